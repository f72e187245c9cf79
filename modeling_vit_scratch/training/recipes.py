"""Recipe: one dataclass is one run, its fields are the flags. RECIPES: named runs, each with its command and score.

A recipe says what is learned from what and how; the machine (processes, devices, precision) belongs to accelerate.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, unknown


def flag(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A field with what `--help` and the range check need. limits: at_least, above, at_most, below, choices."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **limits})


DATA, NETWORK, LENGTH = "data", "network", "length and batch"
OPTIMIZATION, AUGMENTATION = "optimization", "augmentation"
OUTPUT, MACHINE = "evaluation, logging and saving", "this machine"
GROUPS = (DATA, NETWORK, LENGTH, OPTIMIZATION, AUGMENTATION, OUTPUT, MACHINE)


@dataclass(frozen=True)
class Recipe:
    """One run. Steps are optimizer steps, batches are global; a field that is None is decided from the data."""

    recipe: str = flag("digits", DATA, "the named run that the other flags change")

    # --- data
    dataset_name: str | None = flag(None, DATA, "a known dataset, a folder in a Hub repository's layout, or owner/name")
    dataset_config_name: str | None = flag(None, DATA, "the dataset's configuration, where it has several")
    train_dir: str | None = flag(None, DATA, "folder of training images, one folder a class")
    validation_dir: str | None = flag(None, DATA, "folder of validation images, laid out alike")
    test_dir: str | None = flag(None, DATA, "folder of test images, laid out alike")
    image_column_name: str | None = flag(None, DATA, "the column of images, where it cannot be told")
    label_column_name: str | None = flag(None, DATA, "the column of labels, where it cannot be told")
    streaming: bool = flag(False, DATA, "read shards as they come instead of loading the whole set first")
    train_val_split: float = flag(
        0.1, DATA, "share of the training split held out for validation, where there is no validation split; 0: none",
        at_least=0, below=1,
    )  # fmt: skip
    image_size: int | None = flag(None, DATA, "side of the images the network sees, in pixels", at_least=1)
    crop_pct: float = flag(
        0.875, DATA, "share of a photograph's shorter side that evaluation's central crop keeps", above=0, at_most=1
    )
    image_mean: tuple[float, ...] | None = flag(None, DATA, "mean of each channel of pixels in [0, 1]; else 0.5")
    image_std: tuple[float, ...] | None = flag(None, DATA, "standard deviation of each channel; else 0.5")
    stream_lanes: int = flag(
        24, DATA, "parts in which a stream is read at once; processes should divide it", at_least=1
    )
    stream_window: int = flag(256, DATA, "samples that each lane shuffles together", at_least=1)

    # --- network
    preset: str = flag("micro", NETWORK, "the network's name (vit_b_16, micro, article_4, ...)")
    config_overrides: str | None = flag(None, NETWORK, 'fields over the preset: "pooling=mean,hidden_size=192"')
    model_name_or_path: str | None = flag(
        None, NETWORK, "a pretrained checkpoint to start from, on the Hub or a folder"
    )

    # --- length and batch
    max_steps: int | None = flag(None, LENGTH, "optimizer steps", at_least=1)
    num_train_epochs: float | None = flag(None, LENGTH, "passes over the training split", above=0)
    train_batch_size: int = flag(128, LENGTH, "images an optimizer step, over all processes", at_least=1)
    eval_batch_size: int = flag(256, LENGTH, "images an evaluation batch, over all processes", at_least=1)
    gradient_accumulation_steps: int = flag(
        1, LENGTH, "parts in which a batch is computed, over all processes", at_least=1
    )

    # --- optimization
    optim: str = flag("adamw", OPTIMIZATION, "the optimizer", choices=("adamw",))
    learning_rate: float = flag(1e-3, OPTIMIZATION, "the highest rate", above=0)
    weight_decay: float = flag(
        0.05, OPTIMIZATION, "on matrices; norms, biases, positions and tokens have none", at_least=0
    )
    adam_beta1: float = flag(0.9, OPTIMIZATION, "AdamW's beta1", at_least=0, below=1)
    adam_beta2: float = flag(0.999, OPTIMIZATION, "AdamW's beta2", at_least=0, below=1)
    adam_epsilon: float = flag(1e-8, OPTIMIZATION, "AdamW's epsilon", above=0)
    lr_scheduler_type: str = flag(
        "cosine", OPTIMIZATION, "the rate after warmup", choices=("cosine", "linear", "constant")
    )
    warmup_steps: float = flag(0.05, OPTIMIZATION, "steps of rising rate; under 1: a share of all steps", at_least=0)
    max_grad_norm: float = flag(1.0, OPTIMIZATION, "gradients are scaled down to this norm; 0: never", at_least=0)
    label_smoothing_factor: float = flag(0.0, OPTIMIZATION, "mass spread over all classes", at_least=0, below=1)

    # --- augmentation
    horizontal_flip_prob: float = flag(0.0, AUGMENTATION, "share of images mirrored", at_least=0, at_most=1)
    crop_padding: int = flag(0, AUGMENTATION, "pixels of black around an image before a random crop", at_least=0)
    random_resized_crop_scale: float | None = flag(
        None,
        AUGMENTATION,
        "least share of the area that a random resized crop keeps; none: no such crop",
        above=0,
        at_most=1,
    )
    rotation_degrees: float = flag(0.0, AUGMENTATION, "largest random rotation", at_least=0, at_most=180)
    translate_pixels: float = flag(0.0, AUGMENTATION, "largest random shift", at_least=0)
    scale_range: float = flag(0.0, AUGMENTATION, "largest relative change of scale", at_least=0, below=1)

    # --- evaluation, logging and saving
    output_dir: str | None = flag(None, OUTPUT, "folder of this run; else outputs/<recipe>")
    overwrite_output_dir: bool = flag(False, OUTPUT, "start afresh where the folder holds a run already")
    logging_steps: int = flag(50, OUTPUT, "steps between two rows of metrics.jsonl", at_least=1)
    eval_steps: float | None = flag(
        None,
        OUTPUT,
        "steps between two evaluations; under 1: a share of all steps; else once an epoch, at most ten a run",
        above=0,
    )
    save_steps: float = flag(500, OUTPUT, "steps between two checkpoints; under 1: a share of all steps", above=0)
    save_total_limit: int = flag(2, OUTPUT, "checkpoints kept, besides the best", at_least=1)
    load_best_model_at_end: bool = flag(False, OUTPUT, "model/ takes the weights that validated best, not the last")
    metric_for_best_model: str = flag(
        "accuracy", OUTPUT, "the score that decides which is best", choices=("accuracy", "loss", "f1_macro")
    )
    report_to: str = flag("auto", OUTPUT, "trackers: auto (TensorBoard if installed), none, all, or names with commas")
    seed: int = flag(42, OUTPUT, "of initialisation, order, augmentation and dropout", at_least=0)

    # --- this machine
    dataloader_num_workers: int | None = flag(
        None, MACHINE, "processes that decode images; else by the images", at_least=0
    )
    cpu_threads: int | None = flag(None, MACHINE, "threads of each process; else cores / processes", at_least=1)
    torch_compile: bool = flag(False, MACHINE, "compile the network")
    gradient_checkpointing: bool = flag(False, MACHINE, "recompute activations backward: less memory, more time")

    def __post_init__(self):
        for name, item in FIELDS.items():
            check_range(name, getattr(self, name), item.metadata)

    def replace(self, **changes: Any) -> "Recipe":
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


FIELDS: dict[str, dataclasses.Field] = {item.name: item for item in dataclasses.fields(Recipe)}

# A resumed run may differ in these: they change what is written or how fast, not what is learned.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "output_dir", "overwrite_output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to",
        "dataloader_num_workers", "cpu_threads", "eval_batch_size",
    }
)  # fmt: skip


def check_range(name: str, value: Any, limits: Any):
    """Raises UserError where the value lies outside the limits that its field names. None is always allowed."""
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        raise unknown(name, value, limits["choices"])
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, float) and not math.isfinite(part):
            raise UserError(f"--{name} must be finite, got {value}.")
    tests = {
        "at_least": lambda limit: value >= limit,
        "above": lambda limit: value > limit,
        "at_most": lambda limit: value <= limit,
        "below": lambda limit: value < limit,
    }
    for word, holds in tests.items():
        if word in limits and not holds(limits[word]):
            bounds = " and ".join(f"{w.replace('_', ' ')} {limits[w]}" for w in tests if w in limits)
            raise UserError(f"--{name} must be {bounds}, got {value}.")


RECIPES: dict[str, Recipe] = {
    # accelerate launch run_train.py
    # One process with two parts and two processes with one each take bit-identical steps, where both compute with one
    # thread; the network is too small for a second one to help.
    "digits": Recipe(
        recipe="digits", dataset_name="digits", preset="digits", num_train_epochs=100, train_batch_size=64,
        gradient_accumulation_steps=2, cpu_threads=1,
        learning_rate=4e-3, warmup_steps=0.1, label_smoothing_factor=0.1, rotation_degrees=10, translate_pixels=1.0,
        scale_range=0.1, train_val_split=0.1,
    ),
    # accelerate launch run_train.py --recipe mnist
    "mnist": Recipe(
        recipe="mnist", dataset_name="mnist", preset="mnist", num_train_epochs=12, learning_rate=3e-3,
        label_smoothing_factor=0.05, rotation_degrees=10, translate_pixels=2.0, scale_range=0.1,
        image_mean=(0.1307,), image_std=(0.3081,), train_val_split=0.05,
    ),
    # accelerate launch run_train.py --recipe cifar10
    "cifar10": Recipe(
        recipe="cifar10", dataset_name="cifar10", preset="micro", num_train_epochs=10, learning_rate=2e-3,
        label_smoothing_factor=0.1, horizontal_flip_prob=0.5, crop_padding=4,
        image_mean=(0.4914, 0.4822, 0.4465), image_std=(0.2470, 0.2435, 0.2616), train_val_split=0.1,
    ),
    # accelerate launch --num_processes 8 --mixed_precision bf16 run_train.py --recipe imagenet-1k
    # S/16 of "Better plain ViT baselines for ImageNet-1k", 2205.01580, but for RandAugment and mixup
    "imagenet-1k": Recipe(
        recipe="imagenet-1k", dataset_name="imagenet-1k", preset="vit_s_16",
        config_overrides="pooling=mean,use_cls_token=false,position_embedding_type=sincos2d", streaming=True,
        num_train_epochs=90, train_batch_size=1024, eval_batch_size=1024, learning_rate=1e-3, weight_decay=0.1,
        warmup_steps=10_000, image_size=224, horizontal_flip_prob=0.5, random_resized_crop_scale=0.05,
        train_val_split=0.01, stream_lanes=96,
    ),
    # accelerate launch run_train.py --train_dir photos/train
    "folder": Recipe(
        recipe="folder", preset="micro", image_size=64, config_overrides="patch_size=8", num_train_epochs=50,
        train_batch_size=64, learning_rate=1e-3, label_smoothing_factor=0.1, horizontal_flip_prob=0.5,
        random_resized_crop_scale=0.25, train_val_split=0.15,
    ),
}  # fmt: skip
