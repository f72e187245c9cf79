"""The training state on disk: whole or not there, verified before it is trusted, resumed exactly.

checkpoints/step-000500/ holds model.safetensors, optimizer.safetensors, averaged.safetensors where weights are
averaged, state.json (the step and what else the loop keeps), config.json and preprocessor_config.json, by which it is
read as any model is, and MANIFEST.json with the size and SHA-256 of each. Tensors are safetensors, the rest JSON:
nothing is pickled.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import PassingError, UserError
from .sharding import gathered, own_shard

MANIFEST = "MANIFEST.json"
PARTIAL = ".partial-"  # no resume looks at a folder of this name
REPLACED = ".replaced-"  # a checkpoint that another of its step takes the place of; put back where that one never came


def step_folder(step: int) -> str:
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: list[str], is_kept: bool = True
) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors "parameter/entry", whole and on the CPU; `names` in the order of its
    parameters. All processes take part in it; where it is not kept it is empty."""
    state = optimizer.state_dict()["state"]
    flat = {f"{names[index]}/{entry}": value for index, entries in state.items() for entry, value in entries.items()}
    return gathered(flat, is_kept)


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor]):
    """Puts saved tensors back; rates and decays stay those of the optimizer, which the recipe made."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        index = names.index(name)
        state.setdefault(index, {})[entry] = own_shard(tensor, parameters[index])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for index, entries in state.items():
        if "mu_product" in entries:  # NAdam's, a float32 on the CPU: torch makes the parameter's dtype and device of it
            optimizer.state[parameters[index]]["mu_product"] = entries["mu_product"]


def save_checkpoint(
    folder: Path,
    step: int,
    model_tensors: dict[str, torch.Tensor],
    optimizer_state: dict[str, torch.Tensor],
    state: dict[str, Any],
    averaged_tensors: dict[str, torch.Tensor] | None = None,
    documents: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """The path of a new checkpoint of this step: written beside, synced, then renamed into place in one act.

    documents: further JSON files, which training does not read. Damaged checkpoints of later steps, which the run
    passed over when it went on, are removed: they must not count among the last that are kept. Raises UserError where
    it cannot be written, on a full disk say; those before it stay.
    """
    partial = folder / f"{PARTIAL}{step_folder(step)}"
    files = {"model": model_tensors, "averaged": averaged_tensors, "optimizer": optimizer_state}
    files = {name: tensors for name, tensors in files.items() if tensors is not None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _put_back(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(partial, files, {"state.json": {"step": step, **state}, **(documents or {})})
        target = _put_in_place(partial, folder / step_folder(step))
        for later in checkpoints(folder):
            if step_of(later) > step and damage(later) is not None:
                remove(later)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk its room is needed
        num_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        raise PassingError(_could_not_write(folder, step, num_bytes, error)) from error
    return target


def _write(partial: Path, files: dict[str, dict[str, torch.Tensor]], documents: dict[str, dict[str, Any]]):
    """Every file of a checkpoint and its manifest, on the disk when this returns."""
    for name, tensors in files.items():
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(on_cpu, partial / f"{name}.safetensors", metadata={"format": "pt"})
    for name, document in documents.items():
        (partial / name).write_text(json.dumps(document, indent=1))
    written = sorted(partial.iterdir())
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in written}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for file in (*written, partial / MANIFEST, partial):
        _sync(file)


def _put_in_place(partial: Path, target: Path) -> Path:
    """The target, which the whole partial folder now is; one that was there stays within reach until then."""
    replaced = target.with_name(f"{REPLACED}{target.name}")
    if target.exists():
        os.rename(target, replaced)
    os.rename(partial, target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _put_back(folder: Path):
    """A crash between two renames leaves a checkpoint under its other name: it gets its own again."""
    for replaced in folder.glob(f"{REPLACED}*"):
        own = folder / replaced.name.removeprefix(REPLACED)
        if own.exists():
            remove(replaced)
        else:
            os.rename(replaced, own)


def _could_not_write(folder: Path, step: int, num_bytes: int, error: Exception) -> str:
    text = f"The checkpoint of step {step}, {num_bytes / 1e6:,.1f} MB, could not be written to {folder}: {error}."
    with suppress(OSError):  # the disk itself may be gone
        text += f" {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free there."
        last = newest_whole(folder, say=lambda _: None)
        text += f" The last good checkpoint is {last}." if last else " There is no checkpoint yet."
    return f"{text} Make room, or mend the disk, and start the same command again."


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sync(path: Path):
    is_windows = os.name == "nt"  # which syncs files that are open for writing, and no folders
    if is_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is there, whole and unchanged."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in manifest.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, newest first, unverified."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith("step-") and path.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest_whole(folder: Path, say: Any = print) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over, aloud."""
    _put_back(folder)
    for checkpoint in checkpoints(folder):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        say(f"passing over {checkpoint}: {wrong}")
    return None


@dataclass
class Checkpoint:
    """What a checkpoint holds."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    averaged: dict[str, torch.Tensor] | None
    state: dict[str, Any]


def load_checkpoint(checkpoint: Path) -> Checkpoint:
    """The contents of a checkpoint. Raises UserError for one that is not whole."""
    if (wrong := damage(checkpoint)) is not None:
        raise UserError(
            f"{checkpoint} is damaged: {wrong}. Put it back from a copy, or start afresh with --overwrite_output_dir."
        )
    averaged = checkpoint / "averaged.safetensors"
    return Checkpoint(
        load_file(checkpoint / "model.safetensors"),
        load_file(checkpoint / "optimizer.safetensors"),
        load_file(averaged) if averaged.exists() else None,
        json.loads((checkpoint / "state.json").read_text()),
    )


def prune(folder: Path, keep_last: int, best_step: int | None):
    """Removes all checkpoints but the last `keep_last` and the best, and what a crash left half written."""
    for index, checkpoint in enumerate(checkpoints(folder)):
        if index >= keep_last and checkpoint.name != (step_folder(best_step) if best_step is not None else None):
            remove(checkpoint)
    for leftover in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(checkpoint: Path):
    """Renamed first: a half-removed checkpoint must not carry a checkpoint's name. Raises UserError where it stays."""
    doomed = checkpoint.with_name(f"{PARTIAL}{checkpoint.name.removeprefix(REPLACED)}-old")
    try:
        shutil.rmtree(doomed, ignore_errors=True)  # of a removal that a crash cut short
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise UserError(
            f"The checkpoint {checkpoint} could not be removed: {error}. Set --save_total_limit higher to keep it, or "
            "remove it by hand, and start the same command again."
        ) from error
