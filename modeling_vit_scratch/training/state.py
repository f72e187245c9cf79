"""What a run carries from step to step, and its way into a checkpoint and back."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from ..errors import PassingError, UserError
from .averaging import AveragedWeights
from .checkpointing import (
    PARTIAL,
    damage,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    prune,
    save_checkpoint,
    step_folder,
)
from .machine import agree
from .sharding import gathered, shared_out

Tensors = dict[str, torch.Tensor]
ANOTHER_RUN = "go on with its flags, or begin from its weights with --model_name_or_path"


@dataclass
class Position:
    """Where a run is, besides its tensors."""

    step: int = 0
    total_steps: int | None = None  # fixed when the run begins
    train_seconds: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    evaluations_since_best: int = 0
    has_stopped_early: bool = False
    owes_evaluation: bool = False  # that of its step was given up for a signal
    evaluates_each_epoch: bool = False  # for its patience; runs of older versions have ten evaluations


@dataclass
class Window:
    """Sums of loss and of correct answers since the last training row; on the device, so that no step waits."""

    sums: torch.Tensor
    images: int = 0
    skipped_steps: int = 0  # of the fp16 scaler
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)


class TrainingState:
    """Model, optimizer, averaged weights, position and window of one run, saved together and restored together."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: AcceleratedOptimizer,
        parameter_names: list[str],
        averaged: AveragedWeights | None,
        folder: Path,
        save_total_limit: int,
        describe: Callable[[int], dict[str, dict[str, Any]]],
    ):
        """describe: from a step to the JSON files that its checkpoint has besides the state."""
        self.accelerator, self.model, self.optimizer, self.averaged = accelerator, model, optimizer, averaged
        self.parameter_names = parameter_names  # in the order of the optimizer's parameters
        self.folder, self.save_total_limit, self.describe = folder, save_total_limit, describe
        self.position = Position()
        self.came_from = folder  # where the checkpoint lay that the run goes on from
        self.window = self.new_window()

    def new_window(self) -> Window:
        return Window(torch.zeros(2, dtype=self.model.dtype, device=self.accelerator.device))

    @property
    def published(self) -> torch.nn.Module:
        """The network that is evaluated and saved: the averaged one where there is one."""
        return self.model if self.averaged is None else self.averaged.model

    def save(self, paused: float | None = None) -> Path:
        """The path of a checkpoint of this moment, which the main process writes. Raises UserError in all of them
        where it cannot.

        paused: the moment (time.perf_counter) when the last step was taken, where other things were done since.
        """
        seconds = (time.perf_counter() if paused is None else paused) - self.window.started
        sums = self.accelerator.gather(self.window.sums[None]).tolist()  # through JSON and back without loss
        is_main = self.accelerator.is_main_process
        model = gathered(self.model.state_dict(), is_main)
        moments = optimizer_tensors(self.optimizer.optimizer, self.parameter_names, is_main)
        averages = None if self.averaged is None else gathered(self.averaged.model.state_dict(), is_main)
        agree(self.accelerator, lambda: self._write(sums, seconds, model, moments, averages))
        return self.folder / step_folder(self.position.step)

    def _write(
        self, sums: list[list[float]], seconds: float, model: Tensors, moments: Tensors, averages: Tensors | None
    ):
        scaler = self.accelerator.scaler
        state = {
            "window": {
                "sums": sums,
                "images": self.window.images,
                "skipped_steps": self.window.skipped_steps,
                "waited": self.window.waited,
                "seconds": seconds,
            },
            "position": vars(self.position),
            "num_processes": self.accelerator.num_processes,
            "optimizer": type(self.optimizer.optimizer).__name__,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        step = self.position.step
        save_checkpoint(self.folder, step, model, moments, state, averages, self.describe(step))
        self._bring_best()  # not before there is a checkpoint of this run, which would be gone on from else
        prune(self.folder, self.save_total_limit, self.position.best_step)

    def restore(self, path: Path):
        """Puts back what a verified checkpoint holds, on any number of processes."""
        accelerator, saved = self.accelerator, load_checkpoint(path)
        own = self.model.state_dict()
        others = [name for name in own if name not in saved.model or saved.model[name].shape != own[name].shape]
        if others:
            raise UserError(
                f"{path} is of another network (in {others[0]}): the images had another size, or another number of "
                "channels or classes. Bring the old ones back, choose another --output_dir, or start afresh with "
                "--overwrite_output_dir."
            )
        kind, optimizer = saved.state.get("optimizer"), type(self.optimizer.optimizer).__name__
        if kind is not None and kind != optimizer:
            raise UserError(f"{path} is of a run with {kind}, this one has {optimizer}: {ANOTHER_RUN}.")
        if self.averaged is not None and saved.averaged is None:
            raise UserError(f"{path} has no averaged weights, which --ema_decay goes on from: {ANOTHER_RUN}.")
        self.model.load_state_dict(shared_out(saved.model, own))
        load_optimizer_tensors(self.optimizer.optimizer, self.parameter_names, saved.optimizer)
        state = saved.state
        self.position = Position(**state["position"])
        if self.averaged is not None:
            self.averaged.load_tensors(saved.averaged, has_begun=self.position.step > 0)
        if accelerator.scaler is not None and state.get("scaler"):
            accelerator.scaler.load_state_dict(state["scaler"])
        accelerator.print(f"going on from {path}")
        self.came_from = path.parent
        if state["num_processes"] != accelerator.num_processes:
            accelerator.print(
                f"with {accelerator.num_processes} process(es); it was written by {state['num_processes']}"
            )
        self.window = self._restored_window(state["window"])

    def _bring_best(self):
        """Copies the checkpoint that validated best beside those of this run, which goes on from another's folder."""
        if self.position.best_step is None:
            return
        name = step_folder(self.position.best_step)
        theirs, ours, partial = self.came_from / name, self.folder / name, self.folder / f"{PARTIAL}{name}"
        if ours.exists() or not theirs.exists() or damage(theirs) is not None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(theirs, partial)
            os.rename(partial, ours)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise PassingError(
                f"{theirs} could not be copied to {self.folder}: {error}. Make room, then go on."
            ) from error

    def _restored_window(self, saved: dict[str, Any]) -> Window:
        """The window as this rank left it; with another number of processes, the first one takes all of it."""
        window, rank = self.new_window(), self.accelerator.process_index
        sums = torch.tensor(saved["sums"], dtype=window.sums.dtype, device=window.sums.device)
        whole = sums.sum(dim=0) * (rank == 0)
        window.sums = sums[rank] if len(sums) == self.accelerator.num_processes else whole
        window.images, window.skipped_steps = saved["images"], saved["skipped_steps"]
        window.waited = saved.get("waited", 0.0)  # checkpoints of older versions do not say
        window.started -= saved.get("seconds", 0.0)
        return window

    def has_best(self) -> bool:
        """Whether the checkpoint that validated best is here; of a run that went on from another's it may not be."""
        best = self.folder / step_folder(self.position.best_step)

        def is_here() -> bool:
            self._bring_best()  # nothing was saved where no step was left to take
            return best.exists()

        if agree(self.accelerator, is_here):
            return True
        self.accelerator.print(f"note: {best}, which validated best, is not there: the last weights are published.")
        return False

    def use_best(self) -> int:
        """Puts the weights that validated best into the published network; the step they are of."""
        saved = load_checkpoint(self.folder / step_folder(self.position.best_step))
        best = saved.model if saved.averaged is None else saved.averaged
        self.published.load_state_dict(shared_out(best, self.published.state_dict()))
        return self.position.best_step
