"""Flags that could not change a run are errors: nothing a person wrote is passed over in silence."""

from collections.abc import Callable

from ..data.decoding import Decoder
from ..data.loading import is_resident
from ..data.sources import Source
from ..errors import UserError
from .recipes import Recipe

# flag -> (it has no effect on this recipe, because ...)
IDLE_IN_RECIPE: dict[str, tuple[Callable[[Recipe], bool], str]] = {
    "validation_dir": (lambda r: r.train_dir is None, "it goes with --train_dir"),
    "test_dir": (lambda r: r.train_dir is None, "it goes with --train_dir"),
    "dataset_config_name": (
        lambda r: _has_no_table(r),
        "only datasets in a Hub repository's layout have configurations",
    ),
    "image_column_name": (lambda r: _has_no_table(r), "only datasets in a Hub repository's layout have columns"),
    "label_column_name": (lambda r: _has_no_table(r), "only datasets in a Hub repository's layout have columns"),
    "stream_lanes": (lambda r: not r.streaming, "it goes with --streaming true"),
    "stream_window": (lambda r: not r.streaming, "it goes with --streaming true"),
    "preset": (lambda r: r.model_name_or_path is not None, "the checkpoint decides the network"),
    "config_overrides": (lambda r: r.model_name_or_path is not None, "the checkpoint decides the network"),
    "metric_for_best_model": (lambda r: not r.load_best_model_at_end, "it goes with --load_best_model_at_end"),
}

# the same, for what only the data tells
IDLE_ON_SOURCE: dict[str, tuple[Callable[[Source, Decoder], bool], str]] = {
    "train_val_split": (
        lambda s, d: not s.held_out,
        "the dataset has a validation split of its own, or too few images of each class to hold one out",
    ),
    "eval_steps": (lambda s, d: "validation" not in s.splits, "there is no validation split"),
    "load_best_model_at_end": (lambda s, d: "validation" not in s.splits, "there is no validation split"),
    "eval_batch_size": (lambda s, d: len(s.splits) == 1, "there is no validation or test split"),
    "dataloader_num_workers": (
        lambda s, d: all(is_resident(s, split, Decoder(d.processor, 0, d.crop_scale if n == "train" else None))
                         for n, split in s.splits.items()),
        "the images are decoded once and kept in memory",
    ),
    "crop_pct": (lambda s, d: not d.processor.do_center_crop, "the images are small and of one size: seen whole"),
}  # fmt: skip


def _has_no_table(recipe: Recipe) -> bool:
    return recipe.train_dir is not None or recipe.dataset_name == "digits"


def check_recipe(recipe: Recipe, chosen: frozenset[str]):
    """Raises UserError for a chosen flag that this recipe leaves idle, and for a recipe without data or length."""
    for name, (is_idle, reason) in IDLE_IN_RECIPE.items():
        if name in chosen and is_idle(recipe):
            raise UserError(f"--{name} has no effect here: {reason}.")
    if recipe.dataset_name is None and recipe.train_dir is None:
        raise UserError(f"--recipe {recipe.recipe} needs images: give --train_dir FOLDER or --dataset_name.")
    if recipe.max_steps is None and recipe.num_train_epochs is None:
        raise UserError("Say how long to train: --max_steps or --num_train_epochs.")


def check_source(recipe: Recipe, chosen: frozenset[str], source: Source, decoder: Decoder):
    """Raises UserError for a chosen flag that this data leaves idle."""
    for name, (is_idle, reason) in IDLE_ON_SOURCE.items():
        asked = name in chosen and getattr(recipe, name) not in (None, False)
        if asked and is_idle(source, decoder):
            raise UserError(f"--{name} has no effect here: {reason}.")
