"""What a run says while it goes: metrics.jsonl, the progress bar, the trackers."""

import importlib.util
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from ..data.splits import Source
from ..errors import UserError, unknown
from .checkpointing import checkpoints
from .evaluation import Evaluation
from .recipe import Recipe
from .schedules import steps_text
from .state import Position, TrainingState, Window

TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")


def resolve_trackers(report_to: str) -> list[str]:
    """The trackers that --report_to means. Raises UserError for an unknown one or one that is not installed."""
    if report_to == "none":
        return []
    installed = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    if report_to == "auto":
        return [name for name in ("tensorboard",) if name in installed]
    if report_to == "all":
        return installed
    names = report_to.split(",")
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker", name, ("auto", "none", "all", *TRACKERS))
        if name not in installed:
            raise UserError(f"--report_to {name}: it is not installed; pip install {name}.")
    return names


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended by the main process; rows after a resumed step are cut off, and
    its scores too where they are still owed."""

    def __init__(self, path: Path, active: bool, resumed_step: int, owes_scores: bool = False):
        self.path, self.active = path, active
        if not active:
            return
        rows = read_metrics(path) if path.exists() else []
        kept = [row for row in rows if row["step"] <= resumed_step] if resumed_step else []
        if owes_scores:  # they were written, but not the checkpoint that has them
            kept = [row for row in kept if row["step"] < resumed_step or "eval_loss" not in row]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, path)

    def append(self, row: dict[str, Any]):
        if self.active:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class DataWait:
    """Tells once when the device has waited for data for long: which share of the time, and what to do.

    num_workers: processes that decode; num_cores: those that this process may use.
    """

    LEAST_SHARE = 0.2
    NUM_ROWS = 3  # logging steps; the first one of a run, in which workers start, does not count

    def __init__(self, num_workers: int, num_cores: int):
        self.num_workers, self.num_cores = num_workers, num_cores
        self.shares: list[float] = []
        self.is_said = False

    def advice(self, row: dict[str, Any]) -> str | None:
        """What to say after this training row, if anything."""
        self.shares.append(row["data_wait"])
        latest = self.shares[1:][-self.NUM_ROWS :]
        share = sum(latest) / self.NUM_ROWS
        if self.is_said or len(latest) < self.NUM_ROWS or share < self.LEAST_SHARE:
            return None
        self.is_said = True
        remedy = f"more --dataloader_num_workers (now {self.num_workers}, of {self.num_cores} cores), or smaller images"
        if self.num_workers >= self.num_cores:
            remedy = f"smaller images, or more cores (all {self.num_cores} decode)"
        return f"the device waits for data {share:.0%} of the time: {remedy}"


class Progress:
    """A bar on a terminal; elsewhere a line at each logging step, with the time left.

    work(n): what the first n steps of the run cost, in any unit. The time left is that of the work left, done as fast
    as in the last NUM_ROWS logging steps, evaluations and checkpoints included.
    """

    NUM_ROWS = 20

    def __init__(
        self,
        total_steps: int,
        step: int,
        active: bool,
        data_wait: DataWait | None = None,
        work: Callable[[int], float] = float,
    ):
        self.total_steps, self.active, self.data_wait, self.work = total_steps, active, data_wait, work
        self.shown = deque([(time.perf_counter(), work(step))], maxlen=self.NUM_ROWS)
        self.on_terminal = active and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=step, disable=not self.on_terminal, unit="step", dynamic_ncols=True)

    def advance(self):
        self.bar.update(1)

    def show(self, row: dict[str, Any]):
        """The training row of a logging step."""
        text = (
            f"loss {row['loss']:.4f}, accuracy {row['train_accuracy']:.3f}, {row['images_per_second']:,.0f} images/s, "
            f"waiting for data {row['data_wait']:.1%}"
        )
        if self.on_terminal:
            self.bar.set_postfix_str(text)
        elif self.active:
            now, done = time.perf_counter(), self.work(row["step"])
            since, before = self.shown[0]
            left = (now - since) / (done - before) * (self.work(self.total_steps) - done)
            self.shown.append((now, done))
            print(f"step {row['step']}/{self.total_steps}: {text}, {_clock(left)} left", flush=True)
        if self.data_wait is not None and (advice := self.data_wait.advice(row)):
            self.say(advice)

    def say(self, text: str):
        if self.active:
            tqdm.write(text) if self.on_terminal else print(text, flush=True)

    def close(self):
        self.bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


PROJECTS = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}  # the variables that Trainer reads


def start_trackers(accelerator: Accelerator, names: list[str], settings: dict[str, Any], run_name: str, step: int):
    """Starts the trackers with the recipe as plain text: TensorBoard refuses lists and None.

    The project is that of WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, else vit_scratch. step: where the run goes on; what
    TensorBoard was told of later ones, which are taken again, it forgets. Raises UserError with what a tracker says
    against it (nobody is logged in, say).
    """
    if names:
        projects = [os.environ.get(PROJECTS[name]) for name in names if name in PROJECTS]
        project = next(filter(None, projects), "vit_scratch")
        try:
            accelerator.init_trackers(project, config=None, init_kwargs={"wandb": {"name": run_name}})
        except Exception as error:
            raise UserError(f"--report_to {','.join(names)}: {error or type(error).__name__}") from error
        for tracker in accelerator.trackers:
            is_events = tracker.name == "tensorboard" and accelerator.is_main_process
            if is_events and len(list(Path(tracker.logging_dir).glob("events*"))) > 1:  # an earlier start's beside ours
                tracker.writer.close()
                tracker.writer = type(tracker.writer)(tracker.logging_dir, purge_step=step + 1)
            tracker.store_init_configuration({name: str(value) for name, value in settings.items()})


def announce(accelerator, source: Source, num_parameters, lines, total_steps, batch_size, data, workers, scored_every):
    """Says what is about to be trained on what: data, `lines` in between, size and length."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in source.splits.items())
    how = "streamed" if source.streaming else "resident" if data.resident is not None else "read at random"
    decoding = "" if data.resident is not None else f", {workers} decoding worker(s)"
    several = ", any number an image" if source.is_multi_label else ""
    accelerator.print(f"{source.name}: {sizes} images of {len(source.class_names)} classes{several}, {how}{decoding}")
    for note in source.notes:
        accelerator.print(f"note: {note}")
    for line in lines:
        accelerator.print(line)
    epochs = total_steps * batch_size / len(source.splits["train"])
    text = f"{num_parameters:,} parameters, {steps_text(total_steps)} of {batch_size} images: {epochs:.4g} epochs"
    if scored_every is not None:
        text += ", validation " + ("at the end" if scored_every >= total_steps else f"every {steps_text(scored_every)}")
    accelerator.print(text, flush=True)


def score_table(scores: dict[str, float]) -> str:
    """Scores as an aligned table for the terminal."""
    width = max(map(len, scores), default=0)
    return "\n".join(f"  {name:<{width}}  {value:.4f}" for name, value in scores.items())


# ---------------------------------------------------------------- rows of a run


def last_checkpoint(state: TrainingState) -> str:
    """Where to go on from, in a sentence."""
    found = checkpoints(state.folder)
    return f"The last good checkpoint is {found[0]}." if found else "There is no checkpoint yet."


def training_row(accelerator: Accelerator, window: Window, step, batch_size, num_samples, rate, grad_norm) -> dict:
    """The metrics row of the steps since the last one: means over their images, over all processes."""
    sums = accelerator.reduce(window.sums, reduction="sum")
    loss, correct = (sums / window.images).tolist()
    seconds = time.perf_counter() - window.started
    row = {
        "step": step,
        "epoch": round(step * batch_size / num_samples, 4),
        "loss": loss,
        "learning_rate": rate,
        "train_accuracy": correct,
        "grad_norm": float(grad_norm),
        "images_per_second": round(window.images / seconds, 1),
        "data_wait": round(window.waited / seconds, 4),
    }
    return row if accelerator.scaler is None else {**row, "skipped_steps": window.skipped_steps}


def check_scaled(accelerator: Accelerator, row: dict[str, Any], where_to_go_on: Callable[[], str]):
    """Under fp16 an infinite gradient is the scaler's to skip, and no JSON; a loss that is not finite is an error."""
    if accelerator.scaler is None:
        return
    if not math.isfinite(row["loss"]):
        raise UserError(
            f"The loss is {row['loss']} at step {row['step']}, rate {row['learning_rate']:.2e}; the scaler took no "
            f"such step. {where_to_go_on()} Lower --learning_rate, or use --mixed_precision bf16."
        )
    if not math.isfinite(row["grad_norm"]):
        row["grad_norm"] = None


def record_evaluation(evaluation: Evaluation, position: Position, recipe: Recipe, metrics, accelerator, progress):
    """Keeps, shows and logs the scores of the position, and whether they are its best yet."""
    row = {f"eval_{name}": value for name, value in evaluation.scores.items()}
    metrics.append({"step": position.step, **row})
    accelerator.log(row, step=position.step)
    progress.say(f"step {position.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
    value = evaluation.scores[recipe.metric_for_best_model]
    if recipe.metric_for_best_model == "loss":
        value = -value
    position.evaluations_since_best += 1
    if math.isfinite(value) and (position.best_value is None or value > position.best_value):
        position.best_value, position.best_step, position.evaluations_since_best = value, position.step, 0
