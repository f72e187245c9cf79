"""From a recipe to its images, and to the network, image processor and augmentation that fit them."""

from typing import Any

import numpy as np
from transformers.image_utils import PILImageResampling
from transformers.utils import is_torchvision_available

from ..configuration_vit_scratch import PRESETS, ViTScratchConfig, pair
from ..data.augmentation import Augmentation
from ..data.decoding import Decoder, Processor, probe
from ..data.sources import open_source
from ..data.splits import Source, hold_out, limit_samples
from ..errors import UserError, unknown
from ..image_processing_vit_scratch import ViTScratchImageProcessor, ViTScratchImageProcessorPil
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..weights import LoadingReport, load_pixel_facts, load_pretrained
from ..weights.pixels import SMALL, cropped, squashed
from .objectives import objective_kind
from .overrides import checkpoint_overrides, parse_overrides
from .recipe import Recipe
from .specimen import make_specimen

NUM_PROBED, NUM_PROBED_OF_STREAM = 64, 16  # images looked at to tell size and channels


def source_of(recipe: Recipe) -> Source:
    """The images that the recipe trains on and is scored with."""
    return open_source(
        recipe.dataset_name, recipe.dataset_config_name, recipe.train_dir, recipe.validation_dir, recipe.test_dir,
        recipe.image_column_name, recipe.label_column_name, recipe.streaming, recipe.train_val_split, recipe.seed,
        recipe.max_train_samples, recipe.max_eval_samples, **recipe.split_names,
    )  # fmt: skip


def whole_source_of(recipe: Recipe) -> Source:
    """The same with nothing held out or limited yet: what cannot be read is left out first."""
    return source_of(recipe.replace(train_val_split=0.0, max_train_samples=None, max_eval_samples=None))


def split_as_asked(recipe: Recipe, source: Source):
    """Holds out and limits what whole_source_of did not."""
    hold_out(source, recipe.train_val_split, recipe.seed)
    limit_samples(source, recipe.max_train_samples, recipe.max_eval_samples, recipe.seed)


def probe_source(source: Source) -> tuple[tuple[int, int] | None, int]:
    """((height, width) that all probed training images share, or None; their number of channels)."""
    split = source.splits["train"]
    if not source.streaming:  # one shard, any row of which is at hand; images often lie sorted by class
        rows = split.rows(0)
        return probe(split.examples.read(0, rows[np.linspace(0, len(rows) - 1, min(len(rows), NUM_PROBED), dtype=int)]))
    shard = next(index for index, size in enumerate(split.shard_sizes) if size)
    rows = split.rows(shard)
    step = max(1, min(len(rows), 4096) // NUM_PROBED_OF_STREAM)  # spread out, but within what one row group may hold
    return probe(split.examples.read(shard, rows[:4096:step][:NUM_PROBED_OF_STREAM]))


def build_network(
    recipe: Recipe, chosen: frozenset[str], source: Source
) -> tuple[ViTScratchForImageClassification, Processor, LoadingReport | None]:
    """The network, its image processor, and the loading report where it starts from a checkpoint.

    A checkpoint is fine-tuned at the image size it was trained at, unless a person chose another.
    """
    shared_size, channels = probe_source(source)
    native = shared_size if shared_size is not None and max(shared_size) <= SMALL else None
    if recipe.specimen is not None and recipe.model_name_or_path is not None:
        raise UserError("--specimen has no effect here: the checkpoint decides the network.")
    problem_type = objective_kind(source.is_multi_label).problem_type
    report = None
    try:
        if recipe.model_name_or_path is not None:
            size = recipe.image_size if "image_size" in chosen else None
            wanted = (source.class_names, size, channels)
            given = {"revision": recipe.model_revision, "overrides": checkpoint_overrides(recipe, chosen)}
            model, report = load_pretrained(recipe.model_name_or_path, *wanted, **given)
            model.config.problem_type = problem_type
        else:
            facts = _facts(recipe, chosen, native, channels)
            names = {index: name for index, name in enumerate(source.class_names)}
            facts |= {"id2label": names, "label2id": {name: index for index, name in names.items()}}
            model = ViTScratchForImageClassification(ViTScratchConfig(**facts, problem_type=problem_type))
            if recipe.specimen is not None:
                make_specimen(model, recipe.specimen)
    except UserError:
        raise
    except Exception as error:  # the configuration says what is wrong and what would work
        raise UserError(" ".join(str(error.__cause__ or error).split())) from error
    config = model.config
    photographs = native is None
    processor = build_processor(recipe, chosen, config.image_height_width, config.num_channels, photographs)
    return model, processor, report


def _facts(recipe: Recipe, chosen: frozenset[str], native: tuple[int, int] | None, channels: int) -> dict[str, Any]:
    """The fields of the preset with the overrides, and the size and channels of these images."""
    overrides = parse_overrides(recipe.config_overrides)
    if recipe.preset not in PRESETS:
        raise unknown("preset", recipe.preset, PRESETS)
    preset = {name: value for name, value in PRESETS[recipe.preset].items() if name != "num_labels"}
    image_size: Any = recipe.image_size or overrides.get("image_size") or native or preset.get("image_size")
    if image_size is None:
        image_size = ViTScratchConfig.image_size
    sides = image_size if isinstance(image_size, (list, tuple)) and len(image_size) == 2 else [image_size]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(
            f"--config_overrides image_size takes a number of pixels or [height,width], got {image_size!r}."
        )
    if "image_size" in chosen and "image_size" in overrides:
        raise UserError("--image_size and --config_overrides image_size both say the size: give one of them.")
    height, width = pair(image_size)
    wanted = overrides.get("num_channels", channels)
    if wanted not in {1, 3, channels}:
        raise UserError(f"--config_overrides num_channels={wanted}: the images have {channels}; 1 and 3 work.")
    image_size = height if height == width else (height, width)
    return {**preset, **overrides, "image_size": image_size, "num_channels": wanted}


def build_processor(
    recipe: Recipe, chosen: frozenset[str], size: tuple[int, int], num_channels: int, photographs: bool
) -> Processor:
    """The image processor of evaluation: a resize to `size`, or for photographs, a resize and a central crop.

    Mean, std, resampling, the crop's share and how an image comes to be square are the checkpoint's where the network
    starts from one, unless a person chose others.
    """
    backend = ViTScratchImageProcessor if is_torchvision_available() else ViTScratchImageProcessorPil
    fields: dict[str, Any] = {}
    if recipe.model_name_or_path is not None:
        fields = load_pixel_facts(recipe.model_name_or_path, num_channels, recipe.model_revision)
    crop_pct, crop_mode = fields.pop("crop_pct", recipe.crop_pct), fields.pop("crop_mode", "center")
    if "crop_pct" in chosen:
        crop_pct, crop_mode = recipe.crop_pct, "center"
    if "resample" not in fields or "interpolation" in chosen:
        fields["resample"] = int(PILImageResampling[recipe.interpolation.upper()])
    for name in ("image_mean", "image_std"):
        values = getattr(recipe, name)
        if name in fields and name not in chosen:
            continue
        if values is not None and len(values) != num_channels:
            if name in chosen:
                raise UserError(f"--{name} has {len(values)} values, the images have {num_channels} channel(s).")
            values = None  # the recipe's values are of its own dataset
        if name == "image_std" and values is not None and min(values) <= 0:
            raise UserError(f"--image_std must be above 0, got {values}.")
        fields[name] = list(values or [0.5] * num_channels)
    if not photographs:
        fields["size"] = {"height": size[0], "width": size[1]}
    elif crop_mode == "squash":
        fields |= squashed(size, crop_pct)
    else:
        fields |= cropped(size, {"shortest_edge": round(max(size) / crop_pct)})
    return backend(num_channels=num_channels, **fields)


def build_augmentation(recipe: Recipe, processor: Processor) -> tuple[Decoder, Augmentation]:
    """What is drawn where an image is decoded, and what on the device.

    Photographs are cropped at random while they are decoded, from all their pixels; small images, which are kept whole
    in memory, on the device.
    """
    at_decoding = processor.do_center_crop and recipe.random_resized_crop_scale is not None
    scale, ratio = recipe.random_resized_crop_scale, recipe.random_resized_crop_ratio
    decoder = Decoder(processor, recipe.seed, (scale, 1.0) if at_decoding else None, ratio)
    augmentation = Augmentation(
        horizontal_flip_prob=recipe.horizontal_flip_prob,
        vertical_flip_prob=recipe.vertical_flip_prob,
        crop_padding=recipe.crop_padding,
        rotation_degrees=recipe.rotation_degrees,
        translate_pixels=recipe.translate_pixels,
        scale_range=recipe.scale_range,
        random_resized_crop_scale=None if at_decoding else scale,
        random_resized_crop_ratio=ratio,
        auto_augment=recipe.auto_augment,
        randaugment_num_ops=recipe.randaugment_num_ops,
        randaugment_magnitude=recipe.randaugment_magnitude,
        randaugment_magnitude_std=recipe.randaugment_magnitude_std,
        color_jitter=recipe.color_jitter,
        random_erasing_prob=recipe.random_erasing_prob,
    )
    return decoder, augmentation
