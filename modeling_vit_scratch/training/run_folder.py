"""The folder of one run: new, to be continued, finished, or another run's."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .checkpointing import checkpoints, newest_whole
from .recipes import MAY_CHANGE_ON_RESUME, Recipe

OURS = (
    "recipe.json", "bad_images.json", "metrics.jsonl", "results.json", "report.html", "plots", "tensorboard",
    "checkpoints", "model",
)  # fmt: skip


@dataclass
class RunState:
    """What was found: the results of a finished run, or the checkpoint to go on from, or neither."""

    results: dict[str, Any] | None = None
    checkpoint: Path | None = None


def open_run(folder: Path, recipe: Recipe, facts: dict[str, Any]) -> RunState:
    """Prepares the folder and says what it holds; called by the main process.

    facts: what must be the same on resume but is no field of the recipe (precision), and what is recorded beside it.
    Raises UserError for a folder that holds something else, or a run of another recipe, naming the fields that differ.
    """
    try:
        return _open_run(folder, recipe, facts)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{folder}/recipe.json is damaged ({error}); start afresh with --overwrite_output_dir."
        ) from error
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be used: {error}.") from error


def _open_run(folder: Path, recipe: Recipe, facts: dict[str, Any]) -> RunState:
    record = folder / "recipe.json"
    if recipe.overwrite_output_dir and record.exists():
        for name in OURS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    begun = (folder / "metrics.jsonl").exists() or checkpoints(folder / "checkpoints")
    if record.exists() and begun:  # a run that stopped before its first step is nobody's yet
        _refuse_another_recipe(folder, json.loads(record.read_text(encoding="utf-8")), recipe, facts)
        if (folder / "results.json").exists():
            return RunState(results=json.loads((folder / "results.json").read_text(encoding="utf-8")))
    elif not record.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} holds files but no run; choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, {**recipe.to_dict(), **facts})
    return RunState(checkpoint=newest_whole(folder / "checkpoints"))


def _refuse_another_recipe(folder: Path, old: dict[str, Any], recipe: Recipe, facts: dict[str, Any]):
    new = {**json.loads(json.dumps(recipe.to_dict())), **facts}
    compared = [name for name in new if name not in MAY_CHANGE_ON_RESUME and name != "num_processes"]
    differing = [f"{name}: {old.get(name)!r} -> {new[name]!r}" for name in compared if old.get(name) != new[name]]
    if differing:
        raise UserError(
            f"{folder} holds a run of another recipe ({'; '.join(differing)}). Go on with the old values, choose "
            "another --output_dir, or start afresh with --overwrite_output_dir."
        )


def write_json(path: Path, value: dict[str, Any]):
    """Writes a JSON file that is whole or not there."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
