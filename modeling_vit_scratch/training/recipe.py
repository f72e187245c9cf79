"""Recipe: one dataclass is one run, its fields are the flags.

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
CONSTANT = ("constant", "constant_with_warmup")  # transformers has two names; warmup is --warmup_steps here
MULTI_LABEL_METRICS = ("f1_micro", "mean_average_precision")
GROUPS = (DATA, NETWORK, LENGTH, OPTIMIZATION, AUGMENTATION, OUTPUT, MACHINE)


@dataclass(frozen=True)
class Recipe:
    """One run. Steps are optimizer steps, batches are global; a field that is None is decided from the data."""

    recipe: str = flag("digits", DATA, "the named run that the other flags change")

    # --- data
    dataset_name: str | None = flag(None, DATA, "a known dataset, a folder in a Hub repository's layout, or owner/name")
    dataset_config_name: str | None = flag(None, DATA, "the dataset's configuration, where it has several")
    train_dir: str | None = flag(None, DATA, "folder of training images: one folder a class, or a metadata file")
    validation_dir: str | None = flag(None, DATA, "folder of validation images, laid out alike")
    test_dir: str | None = flag(None, DATA, "folder of test images, laid out alike")
    train_split_name: str | None = flag(None, DATA, "the dataset's split to train on, where its name does not tell")
    validation_split_name: str | None = flag(None, DATA, "the one to validate on, likewise")
    test_split_name: str | None = flag(None, DATA, "the one to test on, likewise")
    image_column_name: str | None = flag(None, DATA, "the column of images, where it cannot be told")
    label_column_name: str | None = flag(
        None, DATA, "the column of labels, in a table or metadata file, where it cannot be told"
    )
    streaming: bool = flag(False, DATA, "read shards as they come instead of loading the whole set first")
    train_val_split: float = flag(
        0.1, DATA, "share of the training split held out for validation, where there is no validation split; 0: none",
        at_least=0, below=1,
    )  # fmt: skip
    max_train_samples: int | None = flag(
        None, DATA, "train on this many images alone, of each class its share, one at least (in a stream, and with "
        "several labels an image: any); a larger number keeps those of a smaller one",
        at_least=1,
    )  # fmt: skip
    max_eval_samples: int | None = flag(
        None, DATA, "validate on this many images alone, of each class its share; the test split stays whole",
        at_least=1,
    )  # fmt: skip
    bad_images: str = flag(
        "error", DATA, "images that cannot be read: stop at the first, or look at every image before training and "
        "leave them out",
        choices=("error", "skip"),
    )  # fmt: skip
    max_bad_images: float = flag(
        0.2, DATA, "with bad_images skip, the largest share of a split that may be left out; above it the run stops",
        above=0, at_most=1,
    )  # fmt: skip
    image_size: int | tuple[int, int] | None = flag(
        None, DATA, "side of the images the network sees, in pixels, or height,width", at_least=1
    )
    crop_pct: float = flag(
        0.875, DATA, "share of a photograph's shorter side that evaluation's central crop keeps", above=0, at_most=1
    )
    interpolation: str = flag(
        "bilinear", DATA, "how photographs are resized, in training and evaluation", choices=("bilinear", "bicubic")
    )
    image_mean: tuple[float, ...] | None = flag(None, DATA, "mean of each channel of pixels in [0, 1]; else 0.5")
    image_std: tuple[float, ...] | None = flag(None, DATA, "standard deviation of each channel; else 0.5")
    balanced_sampler: bool = flag(False, DATA, "each class is drawn as often as any other, however many images it has")
    stream_lanes: int = flag(
        24, DATA, "parts in which a stream is read at once; processes should divide it", at_least=1
    )
    stream_window: int = flag(256, DATA, "samples that each lane shuffles together", at_least=1)

    # --- network
    preset: str = flag("micro", NETWORK, "the network's name (vit_b_16, micro, article_4, ...)")
    config_overrides: str | None = flag(
        None,
        NETWORK,
        'fields over preset and recipe: "pooling=mean,hidden_size=192"; none leaves out the recipe\'s too; of a '
        "checkpoint, pooling and the rates of dropout alone",
    )
    specimen: str | None = flag(
        None, NETWORK, "bugs put into the network on purpose, names with commas (merged_without_transpose, ...); it is "
        "trained and scored, not published",
    )  # fmt: skip
    model_name_or_path: str | None = flag(
        None, NETWORK, "a pretrained checkpoint to start from: a Hub name, a folder or a file of weights"
    )
    model_revision: str | None = flag(None, NETWORK, "the branch, tag or commit of a checkpoint on the Hub; else main")
    finetune: str = flag(
        "full", NETWORK, "what is trained of the checkpoint: full, head, last:K (layers), attention or lora"
    )
    lora_r: int = flag(8, NETWORK, "rank of LoRA's matrices", at_least=1)
    lora_alpha: float = flag(16, NETWORK, "LoRA's update is scaled by lora_alpha / lora_r", above=0)
    lora_dropout: float = flag(0.0, NETWORK, "dropout on the input of LoRA's matrices", at_least=0, below=1)
    lora_target_modules: str = flag(
        "q_proj,v_proj", NETWORK, "matrices with LoRA: names with commas, attention (its four) or all-linear"
    )
    teacher_name_or_path: str | None = flag(
        None, NETWORK, "a trained classifier whose answers are learned too (distillation): a Hub name or a folder, of "
        "any architecture that transformers (or timm, if installed) has, with these classes' names among its own",
    )  # fmt: skip
    teacher_revision: str | None = flag(None, NETWORK, "the branch, tag or commit of a teacher on the Hub; else main")
    distillation_type: str = flag(
        "soft", NETWORK, "what is learned of the teacher: its probabilities; or its answer alone, as a label",
        choices=("soft", "hard"),
    )  # fmt: skip
    distillation_alpha: float = flag(
        0.5, NETWORK, "the teacher's share of the loss; labels have the rest", above=0, at_most=1
    )
    distillation_temperature: float = flag(
        2.0, NETWORK, "with soft, by which both networks' logits are divided; its square scales that loss", above=0
    )
    dtype: str = flag(
        "float32", NETWORK, "of the weights; float64 is for comparisons on a CPU", choices=("float32", "float64")
    )

    # --- length and batch
    max_steps: int | None = flag(None, LENGTH, "optimizer steps", at_least=1)
    num_train_epochs: float | None = flag(None, LENGTH, "passes over the training split", above=0)
    time_budget: str | None = flag(
        None, LENGTH, "time for the whole run (20m, 90s, 1h30m): as many steps as fit, fixed after the first ones"
    )
    early_stopping_patience: int | None = flag(
        None, LENGTH, "stop after this many evaluations without a better metric_for_best_model", at_least=1
    )
    train_batch_size: int = flag(128, LENGTH, "images an optimizer step, over all processes", at_least=1)
    eval_batch_size: int = flag(256, LENGTH, "images an evaluation batch, over all processes", at_least=1)
    gradient_accumulation_steps: int = flag(
        1, LENGTH, "parts in which a batch is computed, over all processes", at_least=1
    )

    # --- optimization
    optim: str = flag(
        "adamw", OPTIMIZATION, "the optimizer; lamb: for large batches; muon: Muon on hidden matrices, AdamW besides",
        choices=("adamw", "adam", "nadamw", "lamb", "lion", "sgd", "muon"),
    )  # fmt: skip
    learning_rate: float = flag(1e-3, OPTIMIZATION, "the highest rate", above=0)
    weight_decay: float = flag(
        0.05, OPTIMIZATION, "on matrices; norms, biases, positions and tokens have none", at_least=0
    )
    layer_decay: float = flag(
        1.0, OPTIMIZATION, "each layer's rate is this share of the one above it, the classifier's is the highest",
        above=0, at_most=1,
    )  # fmt: skip
    head_learning_rate_scale: float | None = flag(
        None, OPTIMIZATION, "the classifier's rate as a multiple of the others'; else 10 for a checkpoint's new head",
        above=0,
    )  # fmt: skip
    adam_beta1: float = flag(0.9, OPTIMIZATION, "beta1 of all optimizers but SGD", at_least=0, below=1)
    adam_beta2: float = flag(0.999, OPTIMIZATION, "their beta2", at_least=0, below=1)
    adam_epsilon: float = flag(1e-8, OPTIMIZATION, "their epsilon; Lion has none", above=0)
    momentum: float | None = flag(
        None, OPTIMIZATION, "SGD's or Muon's momentum; else 0.9 for SGD, 0.95 for Muon", at_least=0, below=1
    )
    nesterov: bool = flag(False, OPTIMIZATION, "SGD's momentum is Nesterov's")
    lr_scheduler_type: str = flag(
        "cosine", OPTIMIZATION, "the rate after warmup",
        choices=(
            "cosine", "cosine_with_restarts", "linear", "polynomial", *CONSTANT, "multi_step", "warmup_stable_decay"
        ),
    )  # fmt: skip
    lr_num_cycles: int = flag(1, OPTIMIZATION, "falls of the rate in cosine_with_restarts", at_least=1)
    lr_power: float = flag(1.0, OPTIMIZATION, "of polynomial: with 1 it is linear, with 2 it falls early", above=0)
    min_lr_rate: float = flag(
        0.0, OPTIMIZATION, "the floor, a share of the highest rate, at which the schedule ends", at_least=0, below=1
    )
    lr_milestones: tuple[float, ...] = flag(
        (0.5, 0.75), OPTIMIZATION, "steps at which multi_step lowers the rate; under 1: shares of all steps", above=0
    )
    lr_gamma: float = flag(0.1, OPTIMIZATION, "by what multi_step lowers the rate", above=0, below=1)
    lr_decay_steps: float = flag(
        0.2, OPTIMIZATION, "steps of falling rate at the end of warmup_stable_decay; under 1: a share", above=0
    )
    warmup_steps: float = flag(0.05, OPTIMIZATION, "steps of rising rate; under 1: a share of all steps", at_least=0)
    max_grad_norm: float = flag(1.0, OPTIMIZATION, "gradients are scaled down to this norm; 0: never", at_least=0)
    clip_mode: str = flag(
        "norm", OPTIMIZATION, "what --max_grad_norm limits: the norm of all gradients, each of their values, or with "
        "agc each row's norm as a multiple of its weights' norm: 0.01 in the paper",
        choices=("norm", "value", "agc"),
    )  # fmt: skip
    label_smoothing_factor: float = flag(0.0, OPTIMIZATION, "mass spread over all classes", at_least=0, below=1)
    bce_loss: bool = flag(
        False, OPTIMIZATION, "train by binary cross-entropy, a mean over the classes; scores report softmax's all the "
        "same",
    )  # fmt: skip
    bce_target_thresh: float | None = flag(
        None, OPTIMIZATION, "with bce_loss, classes of a mixed image whose share is above this count as wholly there "
        "(0 in DeiT III), before labels are smoothed",
        at_least=0, below=1,
    )  # fmt: skip
    class_weights: str | None = flag(
        None, OPTIMIZATION, "balanced: rare classes weigh more in the loss, all classes the same in sum; of several "
        "labels an image, those with a class as much as those without it",
        choices=("balanced",),
    )  # fmt: skip
    ema_decay: float | None = flag(
        None, OPTIMIZATION, "publish an exponential moving average of the weights with this decay a step",
        above=0, below=1,
    )  # fmt: skip

    # --- augmentation
    horizontal_flip_prob: float = flag(0.0, AUGMENTATION, "share of images mirrored", at_least=0, at_most=1)
    vertical_flip_prob: float = flag(0.0, AUGMENTATION, "share of images mirrored top to bottom", at_least=0, at_most=1)
    crop_padding: int = flag(0, AUGMENTATION, "pixels of black around an image before a random crop", at_least=0)
    random_resized_crop_scale: float | None = flag(
        None,
        AUGMENTATION,
        "least share of the area that a random resized crop keeps; none: no such crop",
        above=0,
        at_most=1,
    )
    random_resized_crop_ratio: tuple[float, ...] = flag(
        (3 / 4, 4 / 3), AUGMENTATION, "least and greatest width / height of a random resized crop", above=0
    )
    rotation_degrees: float = flag(0.0, AUGMENTATION, "largest random rotation", at_least=0, at_most=180)
    translate_pixels: float = flag(0.0, AUGMENTATION, "largest random shift", at_least=0)
    scale_range: float = flag(0.0, AUGMENTATION, "largest relative change of scale", at_least=0, below=1)
    auto_augment: str | None = flag(
        None, AUGMENTATION, "a policy of colour and geometry, drawn for each image",
        choices=("randaugment", "autoaugment_cifar10", "autoaugment_imagenet", "trivialaugment", "three_augment"),
    )  # fmt: skip
    randaugment_num_ops: int = flag(2, AUGMENTATION, "operations that RandAugment applies in a row", at_least=1)
    randaugment_magnitude: int = flag(9, AUGMENTATION, "RandAugment's magnitude, of 30", at_least=0, at_most=30)
    randaugment_magnitude_std: float = flag(
        0.0, AUGMENTATION, "standard deviation of RandAugment's magnitude, drawn for each operation", at_least=0
    )
    color_jitter: float = flag(
        0.0, AUGMENTATION, "largest relative change of brightness, contrast and saturation", at_least=0, at_most=1
    )
    random_erasing_prob: float = flag(
        0.0, AUGMENTATION, "share of images of which a rectangle becomes noise", at_least=0, at_most=1
    )
    mixup_alpha: float = flag(0.0, AUGMENTATION, "of mixup's Beta distribution; 0: no mixup", at_least=0)
    cutmix_alpha: float = flag(0.0, AUGMENTATION, "of CutMix's Beta distribution; 0: no CutMix", at_least=0)
    mixup_prob: float = flag(1.0, AUGMENTATION, "share of images that are mixed", at_least=0, at_most=1)
    mixup_switch_prob: float = flag(
        0.5, AUGMENTATION, "share of mixed images that are CutMix, where mixup and CutMix are both on",
        at_least=0, at_most=1,
    )  # fmt: skip
    mixup_off_step: float | None = flag(
        None, AUGMENTATION, "from this step on nothing is mixed; under 1: a share of all steps", above=0
    )
    aug_repeats: int = flag(
        1, AUGMENTATION, "how often an image stands in a row, augmented anew each time; an epoch shows fewer images",
        at_least=1,
    )  # fmt: skip
    initial_image_size: int | None = flag(
        None, AUGMENTATION, "side in pixels of the images of the first steps; a multiple of the patch", at_least=1
    )
    full_size_step: float | None = flag(
        None, AUGMENTATION, "from this step on images have their full size, and the network sees all of their patches "
        "(patch_drop_rate); under 1: a share of all steps; else the recipe's, and without one 0.6 with "
        "initial_image_size and never without",
        above=0,
    )  # fmt: skip

    # --- evaluation, logging and saving
    output_dir: str | None = flag(None, OUTPUT, "folder of this run; else outputs/<recipe>")
    overwrite_output_dir: bool = flag(False, OUTPUT, "start afresh where the folder holds a run already")
    resume_from_checkpoint: str | None = flag(
        None, OUTPUT, "go on from this checkpoint's folder; true: from the newest, which must be there; else from the "
        "newest there is",
    )  # fmt: skip
    logging_steps: int = flag(50, OUTPUT, "steps between two rows of metrics.jsonl", at_least=1)
    eval_strategy: str = flag(
        "steps", OUTPUT, "steps: as --eval_steps says; epoch: after as many steps as an epoch has, rounded up",
        choices=("steps", "epoch"),
    )  # fmt: skip
    eval_steps: float | None = flag(
        None, OUTPUT, "steps between two evaluations; under 1: a share of all steps; else once an epoch, at most ten a "
        "run unless it may stop early",
        above=0,
    )  # fmt: skip
    save_strategy: str = flag(
        "steps", OUTPUT, "steps: as --save_steps says; epoch: after as many steps as an epoch has, rounded up",
        choices=("steps", "epoch"),
    )  # fmt: skip
    save_steps: float = flag(500, OUTPUT, "steps between two checkpoints; under 1: a share of all steps", above=0)
    save_minutes: float | None = flag(None, OUTPUT, "minutes between two checkpoints, besides those by steps", above=0)
    save_total_limit: int = flag(2, OUTPUT, "checkpoints kept, besides the best", at_least=1)
    load_best_model_at_end: bool = flag(False, OUTPUT, "model/ takes the weights that validated best, not the last")
    metric_for_best_model: str = flag(
        "accuracy", OUTPUT, "the score that decides which is best; the last two where images have several classes each",
        choices=("accuracy", "loss", "f1_macro", *MULTI_LABEL_METRICS),
    )  # fmt: skip
    report_to: str = flag("auto", OUTPUT, "trackers: auto (TensorBoard if installed), none, all, or names with commas")
    seed: int = flag(42, OUTPUT, "of initialisation, order, augmentation and dropout", at_least=0)
    push_to_hub: bool = flag(False, OUTPUT, "model/ goes to the Hub at the end; the right to write is checked at once")
    hub_model_id: str | None = flag(
        None, OUTPUT, "the repository to push to, owner/name; else your own, of the folder's name"
    )
    hub_private_repo: bool | None = flag(
        None, OUTPUT, "the repository is seen by its owner alone; else as the owner's settings say"
    )

    hub_strategy: str = flag(
        "end", OUTPUT, "when push_to_hub pushes: at the end, or the weights of each checkpoint too, in the background",
        choices=("end", "every_save"),
    )  # fmt: skip

    # --- this machine
    dataloader_num_workers: int | None = flag(
        None, MACHINE, "processes that decode images; else by the images", at_least=0
    )
    cpu_threads: int | None = flag(None, MACHINE, "threads of each process; else cores / processes", at_least=1)
    cpu_parts: int | None = flag(
        None, MACHINE, "parts of a batch that a CPU computes at once, with a share of the threads each; else 2 where "
        "there are 2 threads and a step is long enough", at_least=1
    )  # fmt: skip
    torch_compile: bool = flag(False, MACHINE, "compile the network")
    full_determinism: bool = flag(
        False, MACHINE, "on a GPU, algorithms that give the same bits each time where torch has them, which are slower"
    )
    tf32: bool = flag(False, MACHINE, "matrix products of float32 in TF32, on GPUs that have it")
    gradient_checkpointing: bool = flag(False, MACHINE, "recompute activations backward: less memory, more time")

    def __post_init__(self):
        for name, item in FIELDS.items():
            check_range(name, getattr(self, name), item.metadata)

    def replace(self, **changes: Any) -> "Recipe":
        return dataclasses.replace(self, **changes)

    @property
    def split_names(self) -> dict[str, str | None]:
        """The flags that name splits of a dataset, as `open_source` takes them."""
        return {name: getattr(self, name) for name in SPLIT_FLAGS}

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


FIELDS: dict[str, dataclasses.Field] = {item.name: item for item in dataclasses.fields(Recipe)}


def with_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded fields, and where the record is older than a field, the default, which is as if there were none."""
    return {**Recipe().to_dict(), **recorded}


# A resumed run may differ in these: they change what is written or how fast, not what is learned.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_steps", "save_strategy", "save_steps",
        "save_minutes", "save_total_limit", "report_to", "max_bad_images", "dataloader_num_workers", "cpu_threads",
        "cpu_parts", "eval_batch_size", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy",
    }
)  # fmt: skip
# where a run is kept, which changes nothing of what it computes
PLACES = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_strategy",
    }
)
SPLIT_FLAGS = ("train_split_name", "validation_split_name", "test_split_name")
COUNTED_LENGTHS = ("max_steps", "num_train_epochs")
FULL_SIZE_STEP = 0.6  # where --initial_image_size is given and --full_size_step is not


def full_size_step_of(full_size_step: float | None, initial_image_size: int | None) -> float | None:
    """The step from which on all is seen, of a recipe with these two fields; None: there is no such step."""
    return FULL_SIZE_STEP if full_size_step is None and initial_image_size is not None else full_size_step


def check_range(name: str, value: Any, limits: Any):
    """Raises UserError where the value lies outside the limits that its field names. None is always allowed."""
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        raise unknown(name, value, limits["choices"])
    parts = value if isinstance(value, tuple) else (value,)
    if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
        raise UserError(f"--{name} must be finite, got {value}.")
    tests = {
        "at_least": lambda part, limit: part >= limit,
        "above": lambda part, limit: part > limit,
        "at_most": lambda part, limit: part <= limit,
        "below": lambda part, limit: part < limit,
    }
    for word, holds in tests.items():
        if word in limits and not all(holds(part, limits[word]) for part in parts):
            bounds = " and ".join(f"{w.replace('_', ' ')} {limits[w]}" for w in tests if w in limits)
            raise UserError(f"--{name} must be {bounds}, got {value}.")
