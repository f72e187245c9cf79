"""The folder of one run: new, to be continued, finished, or another run's."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configuration_vit_scratch import COUNTED_POSITIONS, ViTScratchConfig
from ..data.listing import some
from ..data.splits import Source
from ..errors import UserError
from .checkpointing import PARTIAL, checkpoints, damage, newest_whole, remove, step_of
from .overrides import may_see_less, parse_overrides
from .recipe import CONSTANT, COUNTED_LENGTHS, MAY_CHANGE_ON_RESUME, Recipe, full_size_step_of, with_defaults

PUSHED = ".pushing"  # the copy of a checkpoint that is under way to the Hub
OURS = (
    "recipe.json", "bad_images.json", "metrics.jsonl", "results.json", "report.html", "plots", "tensorboard",
    "checkpoints", "model", "adapter", PUSHED,
)  # fmt: skip

MOST_DIFFERENCES = 5  # between two recipes that are named
AFRESH = "choose another --output_dir, or start afresh with --overwrite_output_dir"


@dataclass
class RunState:
    """What was found: the results of a finished run, or the checkpoint to go on from, or neither."""

    results: dict[str, Any] | None = None
    checkpoint: Path | None = None
    note: str | None = None  # what a person should know of it


def data_facts(source: Source) -> dict[str, Any]:
    """What tells the images of a run from others: the classes in their order, and how many each split has."""
    return {
        "class_names": list(source.class_names),
        "num_images": {name: len(split) for name, split in source.splits.items()},
        "held_out": source.held_out,
    }


def open_run(folder: Path, recipe: Recipe, facts: dict[str, Any], data: dict[str, Any] | None = None) -> RunState:
    """Prepares the folder and says what it holds; called by the main process.

    facts: what must be the same on resume but is no field of the recipe (precision), and what is recorded beside it.
    data: see data_facts. Raises UserError for a folder that holds something else, or a run of another recipe or of
    other classes, naming what differs.
    """
    try:
        return _open_run(folder, recipe, facts, data or {})
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be used: {error}.") from error


def _open_run(folder: Path, recipe: Recipe, facts: dict[str, Any], data: dict[str, Any]) -> RunState:
    note, named = None, None
    record = folder / "recipe.json"
    if names_checkpoint(recipe):  # before anything is removed
        named = _named_checkpoint(recipe.resume_from_checkpoint)
        note = _compare_named(named, folder, recipe, facts, data)
    if recipe.overwrite_output_dir and record.exists():
        for name in OURS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    results = folder / "results.json"
    if record.exists() and has_begun(folder):
        old = _read(record)
        _refuse_another_recipe(f"{folder} holds a run", AFRESH, old, recipe, facts)
        goes_on = any(old.get(name) != getattr(recipe, name) for name in COUNTED_LENGTHS) or names_checkpoint(recipe)
        goes_on |= not results.exists()
        note = _compare_data(folder, old, data, goes_on) or note
        if not goes_on:
            return RunState(results=_read(results), note=note)
    elif not record.exists() and folder.exists() and any(not is_partial(path) for path in folder.iterdir()):
        raise UserError(f"--output_dir {folder} holds files but no run; choose a new folder.")
    checkpoint = named or _newest_checkpoint(folder / "checkpoints", recipe)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, {**recipe.to_dict(), **facts, **data})
    return RunState(checkpoint=checkpoint, note=note)


def _compare_named(
    checkpoint: Path, folder: Path, recipe: Recipe, facts: dict[str, Any], data: dict[str, Any]
) -> str | None:
    """A note where the run that a named checkpoint is of saw other images. Raises UserError for one that is to be
    removed, and for a run of another recipe or of other classes."""
    source = checkpoint.resolve().parent.parent
    if source == folder.resolve():
        if recipe.overwrite_output_dir:
            raise UserError(f"--overwrite_output_dir would remove {checkpoint}, which --resume_from_checkpoint names.")
        return None
    if not (source / "recipe.json").is_file():
        return None
    begin = f"begin from its weights with --model_name_or_path {checkpoint}"
    old = _read(source / "recipe.json", begin)
    _refuse_another_recipe(f"{checkpoint} is of a run", f"or {begin}", old, recipe, facts)
    return _compare_data(source, old, data, True)


def _read(path: Path, remedy: str = "start afresh with --overwrite_output_dir") -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text at all
        raise UserError(f"{path} is damaged ({error}); {remedy}.") from error


def keep_positions(config: ViTScratchConfig, checkpoint: Path | None):
    """Lets positions span what they spanned in the steps before: runs of older versions spanned the new size."""
    saved = None if checkpoint is None else checkpoint / "config.json"
    if saved is not None and saved.is_file() and config.position_embedding_type in COUNTED_POSITIONS:
        config.position_image_size = _read(saved).get("position_image_size")


def has_begun(folder: Path) -> bool:
    """Whether a run has left something to go on with; one that stopped before its first step is nobody's yet."""
    return (folder / "metrics.jsonl").exists() or bool(checkpoints(folder / "checkpoints"))


def is_partial(path: Path) -> bool:
    """Whether a file is what a full disk left of one that was being written."""
    return path.name.startswith(PARTIAL)


def names_checkpoint(recipe: Recipe) -> bool:
    """Whether --resume_from_checkpoint says which one."""
    return recipe.resume_from_checkpoint is not None and recipe.resume_from_checkpoint.lower() != "true"


def how_to_go_on(recipe: Recipe) -> str:
    """The sentence on going on with a run that was stopped: two flags would start it anew, or from where they say."""
    flags = ["--overwrite_output_dir"] if recipe.overwrite_output_dir else []
    flags += ["--resume_from_checkpoint"] if names_checkpoint(recipe) else []
    without = f", without {' and '.join(flags)}," if flags else ""
    return f"The same command{without} goes on from there."


def _newest_checkpoint(folder: Path, recipe: Recipe) -> Path | None:
    """The newest whole checkpoint, if there is one; UserError where --resume_from_checkpoint true and there is none."""
    newest = newest_whole(folder)
    if recipe.resume_from_checkpoint is not None and newest is None:
        raise UserError(f"--resume_from_checkpoint true: there is no whole checkpoint in {folder}.")
    return newest


def _named_checkpoint(wanted: str) -> Path:
    """The checkpoint that --resume_from_checkpoint names, whose files are read through once; UserError where it is not
    whole."""
    named = Path(wanted)
    if not named.is_dir():
        raise UserError(f"--resume_from_checkpoint takes true or a checkpoint's folder; there is none at {wanted}.")
    if (wrong := damage(named)) is not None:
        raise UserError(f"--resume_from_checkpoint {wanted} cannot be taken: {wrong}.")
    return named


def remove_later(folder: Path, taken: Path):
    """Removes the checkpoints after the one that is gone on from: they are of a way that is not taken."""
    for checkpoint in checkpoints(folder):
        if step_of(checkpoint) > step_of(taken):
            remove(checkpoint)


def may_change_on_resume(recipe: Recipe) -> frozenset[str]:
    """The fields in which a resumed run may differ: its length too, where no step depends on how many there are."""
    shares = [recipe.warmup_steps, recipe.mixup_off_step]  # under 1 they are shares of all steps
    if may_see_less(recipe):
        shares.append(full_size_step_of(recipe.full_size_step, recipe.initial_image_size))
    is_open_ended = recipe.lr_scheduler_type in CONSTANT and not any(0 < (share or 0) < 1 for share in shares)
    return MAY_CHANGE_ON_RESUME | frozenset(COUNTED_LENGTHS if is_open_ended and recipe.time_budget is None else ())


def _fields_of(overrides: str | None) -> dict[str, Any]:
    # a run of a recipe that left out no patches yet goes on with the rate 0
    return {"patch_drop_rate": 0, **parse_overrides(overrides)}


def _refuse_another_recipe(whose: str, remedy: str, old: dict[str, Any], recipe: Recipe, facts: dict[str, Any]):
    new = {**json.loads(json.dumps(recipe.to_dict())), **facts}
    old = with_defaults(old)
    if _fields_of(old["config_overrides"]) == _fields_of(recipe.config_overrides):
        old = {**old, "config_overrides": recipe.config_overrides}  # the same fields, in other words
    if recipe.full_size_step is not None:
        old = {**old, "full_size_step": full_size_step_of(old["full_size_step"], old["initial_image_size"])}
    free = may_change_on_resume(recipe) | {"num_processes"}
    compared = [name for name in new if name not in free]
    differing = [f"{name}: {old.get(name)!r} -> {new[name]!r}" for name in compared if old.get(name) != new[name]]
    if differing:
        named = "; ".join(differing[:MOST_DIFFERENCES])
        if len(differing) > MOST_DIFFERENCES:
            named += f"; and {len(differing) - MOST_DIFFERENCES} more"
        raise UserError(f"{whose} of another recipe ({named}). Go on with the old values, {remedy}.")


def _compare_data(folder: Path, old: dict[str, Any], data: dict[str, Any], goes_on: bool) -> str | None:
    """A note where the images are more or fewer than the run began with; runs of older versions do not say.

    Raises UserError where the classes are others: what the network has learned would bear other names.
    """
    before, now = (facts.get("class_names") for facts in (old, data))
    if before and now and before != now:
        gone, new = (some(map(repr, [n for n in a if n not in b])) for a, b in ((before, now), (now, before)))
        change = " and ".join([*([f"without {gone}"] if gone else []), *([f"with {new}"] if new else [])])
        raise UserError(
            f"{folder} holds a run on other classes: now they are {change or 'in another order'}. Bring the old ones "
            f"back, {AFRESH}."
        )
    before, now = (facts.get("num_images") for facts in (old, data))
    if not before or not now or before == now:
        return None
    counts = (", ".join(f"{count:,} {name}" for name, count in found.items()) for found in (before, now))
    note = f"{folder} holds a run on {next(counts)} images; now there are {next(counts)}."
    if not goes_on:
        return f"{note} Its scores are those of the former; --overwrite_output_dir starts afresh."
    if before.get("train") != now.get("train"):
        leak = ", and what was held out for validation may have been trained on" if data.get("held_out") else ""
        note += f" It goes on with these, in another order{leak}: --overwrite_output_dir starts afresh."
    return note


def write_json(path: Path, value: dict[str, Any]):
    """Writes a JSON file that is whole or not there."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
