"""Flags that could not change a run are errors: nothing a person wrote is passed over in silence."""

from collections.abc import Callable
from pathlib import Path

from ..data.decoding import Decoder
from ..data.loading import is_resident
from ..data.splits import Source
from ..errors import UserError
from .features import can_cache_features, drawn_of_images, is_for_features
from .network import probe_source
from .overrides import checkpoint_overrides, has_own_patch_drop_rate, may_see_less, patch_drop_rate_of
from .recipe import CONSTANT, MULTI_LABEL_METRICS, SPLIT_FLAGS, Recipe
from .time_budget import seconds_of

# flag -> (it has no effect on this recipe, because ...)
IDLE_IN_RECIPE: dict[str, tuple[Callable[[Recipe], bool], str]] = {
    "validation_dir": (lambda r: r.train_dir is None, "it goes with --train_dir"),
    "test_dir": (lambda r: r.train_dir is None, "it goes with --train_dir"),
    "dataset_config_name": (
        lambda r: _has_no_table(r),
        "only datasets in a Hub repository's layout have configurations",
    ),
    **dict.fromkeys(
        SPLIT_FLAGS,
        (lambda r: _has_no_table(r), "only datasets in a Hub repository's layout have splits by name"),
    ),
    "image_column_name": (lambda r: _has_no_table(r), "only datasets in a Hub repository's layout have columns"),
    "label_column_name": (
        lambda r: r.train_dir is None and r.dataset_name == "digits",
        "only tables and the metadata of image folders have columns",
    ),
    "bad_images": (
        lambda r: r.dataset_name == "digits" and r.train_dir is None,
        "digits are numbers, not image files: every one can be read",
    ),
    "max_bad_images": (lambda r: r.bad_images != "skip", "it goes with --bad_images skip"),
    "stream_lanes": (lambda r: not r.streaming, "it goes with --streaming true"),
    "stream_window": (lambda r: not r.streaming, "it goes with --streaming true"),
    "preset": (lambda r: r.model_name_or_path is not None, "the checkpoint decides the network"),
    "push_to_hub": (lambda r: r.push_to_hub and r.specimen is not None, "a specimen is not published"),
    **dict.fromkeys(
        ("hub_model_id", "hub_private_repo", "hub_strategy"),
        (lambda r: not r.push_to_hub, "it goes with --push_to_hub"),
    ),
    "finetune": (lambda r: r.model_name_or_path is None, "it goes with --model_name_or_path"),
    "model_revision": (
        lambda r: r.model_name_or_path is None or Path(r.model_name_or_path).expanduser().exists(),
        "it goes with --model_name_or_path and the name of a repository on the Hub",
    ),
    **dict.fromkeys(
        ("distillation_type", "distillation_alpha"),
        (lambda r: r.teacher_name_or_path is None, "it goes with --teacher_name_or_path"),
    ),
    **dict.fromkeys(
        ("label_smoothing_factor", "class_weights"),
        (
            lambda r: r.teacher_name_or_path is not None and r.distillation_alpha == 1,
            "with --distillation_alpha 1 the teacher is learned alone, no label",
        ),
    ),
    "teacher_revision": (
        lambda r: r.teacher_name_or_path is None or Path(r.teacher_name_or_path).expanduser().exists(),
        "it goes with --teacher_name_or_path and the name of a repository on the Hub",
    ),
    "distillation_temperature": (
        lambda r: r.teacher_name_or_path is None or r.distillation_type == "hard",
        "it goes with --teacher_name_or_path and --distillation_type soft",
    ),
    **dict.fromkeys(
        ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
        (lambda r: r.finetune != "lora", "it goes with --finetune lora"),
    ),
    **dict.fromkeys(
        ("head_learning_rate_scale", "layer_decay"),
        (lambda r: r.finetune == "head", "the classifier alone is trained, at --learning_rate"),
    ),
    **dict.fromkeys(
        ("torch_compile", "gradient_checkpointing"),
        (lambda r: can_cache_features(r, 0, 0), "the frozen backbone sees each image once"),
    ),
    "eval_steps": (lambda r: r.eval_strategy == "epoch", "--eval_strategy epoch evaluates after each epoch"),
    "save_steps": (lambda r: r.save_strategy == "epoch", "--save_strategy epoch saves after each epoch"),
    "metric_for_best_model": (
        lambda r: not r.load_best_model_at_end and r.early_stopping_patience is None,
        "it goes with --load_best_model_at_end or --early_stopping_patience",
    ),
    "balanced_sampler": (
        lambda r: r.balanced_sampler and r.streaming,
        "a stream is read in the order of its shards; --class_weights balanced works there",
    ),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "adam_epsilon"), (lambda r: r.optim == "sgd", "SGD has neither betas nor epsilon")
    ),
    "nesterov": (lambda r: r.optim != "sgd", "it goes with --optim sgd; muon's momentum is Nesterov's"),
    "momentum": (lambda r: r.optim not in ("sgd", "muon"), "it goes with --optim sgd or muon"),
    **dict.fromkeys(
        ("lr_milestones", "lr_gamma"),
        (lambda r: r.lr_scheduler_type != "multi_step", "it goes with --lr_scheduler_type multi_step"),
    ),
    "lr_decay_steps": (
        lambda r: r.lr_scheduler_type != "warmup_stable_decay",
        "it goes with --lr_scheduler_type warmup_stable_decay",
    ),
    "min_lr_rate": (lambda r: r.lr_scheduler_type in CONSTANT, "a constant rate never falls"),
    "lr_num_cycles": (
        lambda r: r.lr_scheduler_type != "cosine_with_restarts",
        "it goes with --lr_scheduler_type cosine_with_restarts",
    ),
    "lr_power": (lambda r: r.lr_scheduler_type != "polynomial", "it goes with --lr_scheduler_type polynomial"),
    "random_resized_crop_ratio": (
        lambda r: r.random_resized_crop_scale is None,
        "it goes with --random_resized_crop_scale",
    ),
    **dict.fromkeys(
        ("randaugment_num_ops", "randaugment_magnitude", "randaugment_magnitude_std"),
        (lambda r: r.auto_augment != "randaugment", "it goes with --auto_augment randaugment"),
    ),
    **dict.fromkeys(
        ("mixup_prob", "mixup_off_step"),
        (lambda r: r.mixup_alpha == 0 == r.cutmix_alpha, "it goes with --mixup_alpha or --cutmix_alpha"),
    ),
    "mixup_switch_prob": (
        lambda r: r.mixup_alpha == 0 or r.cutmix_alpha == 0,
        "it goes with --mixup_alpha and --cutmix_alpha together",
    ),
    "bce_target_thresh": (
        lambda r: not r.bce_loss or r.mixup_alpha == 0 == r.cutmix_alpha,
        "it goes with --bce_loss and --mixup_alpha or --cutmix_alpha",
    ),
    "full_size_step": (
        lambda r: r.full_size_step is not None and not may_see_less(r),
        "it goes with --initial_image_size or --config_overrides patch_drop_rate",
    ),
}

# the same, for what only the data tells
IDLE_ON_SOURCE: dict[str, tuple[Callable[[Source, Decoder], bool], str]] = {
    "train_val_split": (
        lambda s, d: not s.held_out,
        "the dataset has a validation split of its own, or too few images of each class to hold one out",
    ),
    "balanced_sampler": (
        lambda s, d: s.is_multi_label,
        "its images have several classes each, none can be drawn for one alone; --class_weights balanced works there",
    ),
    "bce_loss": (lambda s, d: s.is_multi_label, "images of several classes each are trained by it anyway"),
    "max_eval_samples": (lambda s, d: "validation" not in s.splits, "there is no validation split"),
    "early_stopping_patience": (lambda s, d: "validation" not in s.splits, "there is no validation split"),
    "eval_steps": (lambda s, d: "validation" not in s.splits, "there is no validation split"),
    "eval_strategy": (lambda s, d: "validation" not in s.splits, "there is no validation split"),
    "load_best_model_at_end": (lambda s, d: "validation" not in s.splits, "there is no validation split"),
    "eval_batch_size": (lambda s, d: len(s.splits) == 1, "there is no validation or test split"),
    "dataloader_num_workers": (
        lambda s, d: all(is_resident(s, split, Decoder(d.processor, 0, d.crop_scale if n == "train" else None))
                         for n, split in s.splits.items()),
        "the images are decoded once and kept in memory",
    ),
    "crop_pct": (lambda s, d: not d.processor.do_center_crop, "the images are small and of one size: seen whole"),
    "interpolation": (
        lambda s, d: not d.processor.do_center_crop and probe_source(s)[0] == d.size,
        "the images have the size that the network sees",
    ),
}  # fmt: skip


def _copies_are_alike(recipe: Recipe) -> bool:
    is_mirrored = recipe.horizontal_flip_prob > 0 and not is_for_features(recipe)
    return recipe.aug_repeats > 1 and not is_mirrored and not any(drawn_of_images(recipe))


def _has_no_table(recipe: Recipe) -> bool:
    return recipe.train_dir is not None or recipe.dataset_name == "digits"


def check_recipe(recipe: Recipe, chosen: frozenset[str]):
    """Raises UserError for a chosen flag that this recipe leaves idle, and for a recipe without data or length."""
    for name, (is_idle, reason) in IDLE_IN_RECIPE.items():
        if name in chosen and is_idle(recipe):
            raise UserError(f"--{name} has no effect here: {reason}.")
    if recipe.dataset_name is None and recipe.train_dir is None:
        raise UserError(f"--recipe {recipe.recipe} needs images: give --train_dir FOLDER or --dataset_name.")
    if recipe.max_steps is None and recipe.num_train_epochs is None and recipe.time_budget is None:
        raise UserError("Say how long to train: --max_steps, --num_train_epochs or --time_budget.")
    if recipe.time_budget is not None:
        seconds_of(recipe.time_budget)
    if recipe.model_name_or_path is not None:
        checkpoint_overrides(recipe, chosen)
    if recipe.specimen is not None and patch_drop_rate_of(recipe) and not has_own_patch_drop_rate(recipe):
        raise UserError("patch_drop_rate does not work with --specimen: a specimen sees all patches.")
    if recipe.hub_strategy == "every_save" and recipe.finetune == "lora":
        raise UserError("--hub_strategy every_save has no effect here: LoRA is merged into the network at the end.")
    if recipe.bce_loss and recipe.teacher_name_or_path is not None:
        raise UserError(
            "--bce_loss does not go with a teacher: what is learned of one is a choice among the classes, whose "
            "probabilities add up to 1. Leave it out."
        )
    if recipe.balanced_sampler and recipe.class_weights is not None:
        raise UserError(
            "--balanced_sampler and --class_weights balanced would make rare classes count twice: give one of them."
        )
    if recipe.nesterov and recipe.momentum == 0:
        raise UserError("--nesterov true needs a --momentum above 0.")
    if recipe.aug_repeats > 1 and recipe.streaming:
        raise UserError(
            "--aug_repeats has no effect here: a stream shows each image once an epoch, as its shards come."
        )
    if _copies_are_alike(recipe):
        raise UserError("--aug_repeats has no effect here: nothing is drawn for an image, its copies would be alike.")
    if 2 * recipe.aug_repeats > max(recipe.train_batch_size, 2):
        raise UserError(
            f"--aug_repeats {recipe.aug_repeats} leaves a batch of {recipe.train_batch_size} with a single image: give "
            "half of --train_batch_size at most."
        )
    ratio = recipe.random_resized_crop_ratio
    if len(ratio) != 2 or ratio[0] > ratio[1]:
        raise UserError(
            f"--random_resized_crop_ratio takes the least and the greatest, such as 0.75,1.33, got {ratio}."
        )


def check_source(recipe: Recipe, chosen: frozenset[str], source: Source, decoder: Decoder):
    """Raises UserError for a chosen flag that this data leaves idle."""
    for name, (is_idle, reason) in IDLE_ON_SOURCE.items():
        asked = name in chosen and getattr(recipe, name) not in (None, False)
        if asked and is_idle(source, decoder):
            raise UserError(f"--{name} has no effect here: {reason}.")
    metric = recipe.metric_for_best_model
    if metric in MULTI_LABEL_METRICS and not source.is_multi_label:
        raise UserError(f"--metric_for_best_model {metric} is for images of several classes each; here f1_macro is.")
