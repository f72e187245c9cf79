"""The training state on disk: whole or not there, verified before it is trusted, resumed exactly.

checkpoints/step-000500/ holds model.safetensors, optimizer.safetensors, averaged.safetensors where weights are
averaged, state.json (the step and what else the loop keeps) and MANIFEST.json with the size and SHA-256 of each.
Tensors are safetensors, the rest JSON: nothing is pickled.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MANIFEST = "MANIFEST.json"
PARTIAL = ".partial-"  # no resume looks at a folder of this name


def step_folder(step: int) -> str:
    return f"step-{step:06d}"


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors "parameter/entry"; `names` in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{entry}": value.detach().cpu().contiguous()
        for index, entries in state.items()
        for entry, value in entries.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor]):
    """Puts saved tensors back; rates and decays stay those of the optimizer, which the recipe made."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(names.index(name), {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: Path,
    step: int,
    model_tensors: dict[str, torch.Tensor],
    optimizer_state: dict[str, torch.Tensor],
    state: dict[str, Any],
    averaged_tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """The path of a new checkpoint of this step: written beside, synced, then renamed into place in one act."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / step_folder(step)
    partial = folder / f"{PARTIAL}{step_folder(step)}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file, tensors in {"model": model_tensors, "averaged": averaged_tensors}.items():
        if tensors is not None:
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(on_cpu, partial / f"{file}.safetensors")
    save_file(optimizer_state, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    files = sorted(partial.iterdir())
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for file in (*files, partial / MANIFEST, partial):
        _sync(file)
    replaced = folder / f"{PARTIAL}{step_folder(step)}-old"
    if target.exists():  # of a run that went another way: it stays until the new one is whole
        os.rename(target, replaced)
    os.rename(partial, target)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(folder)
    return target


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(handle)


def _digest(handle: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := handle.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
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
        return f"its manifest cannot be read ({error})"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, newest first, unverified."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith("step-") and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_whole(folder: Path, say: Any = print) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over, aloud."""
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
    """The contents of a verified checkpoint."""
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
            # renamed first: a half-removed checkpoint must not carry a checkpoint's name
            doomed = folder / f"{PARTIAL}{checkpoint.name}-old"
            os.rename(checkpoint, doomed)
            shutil.rmtree(doomed)
    for leftover in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
