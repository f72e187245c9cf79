"""How a checkpoint wants its images: mean, standard deviation, resampling, resize and crop, as its files say them."""

import math
from typing import Any

from transformers.image_utils import PILImageResampling
from transformers.utils import is_torchvision_available

from ..errors import UserError
from ..image_processing_vit_scratch import ViTScratchImageProcessor, ViTScratchImageProcessorPil
from .files import Checkpoint
from .formats import is_own
from .timm_format import pretrained_facts

KEPT = (
    "do_resize", "do_center_crop", "do_rescale", "do_normalize", "rescale_factor", "resample", "image_mean",
    "image_std",
)  # fmt: skip
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BILINEAR = int(PILImageResampling.BILINEAR)
TORCHVISION = {**IMAGENET, "resample": BILINEAR, "crop_pct": 224 / 256}  # ViT_B_16_Weights.IMAGENET1K_V1
GOOGLE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": BILINEAR}  # vit_jax: pixels to [-1, 1]


def pixel_facts(checkpoint: Checkpoint, format_name: str) -> dict[str, Any]:
    """image_mean, image_std, resample, crop_pct: those that the checkpoint, or else its format, says."""
    if checkpoint.processor:
        return _facts_of_processor(checkpoint)
    if format_name == "timm" and checkpoint.config:
        return _facts_of_timm(checkpoint)
    return dict({"torchvision": TORCHVISION, "google": GOOGLE}.get(format_name, {}))


def processor_fields(checkpoint: Checkpoint, format_name: str, size: tuple[int, int]) -> dict[str, Any]:
    """The fields of this package's image processor for the checkpoint. size: (height, width) of its images."""
    if checkpoint.processor:
        fields = {name: checkpoint.processor[name] for name in KEPT if checkpoint.processor.get(name) is not None}
        fields["size"] = _sides(checkpoint, "size") or {"height": size[0], "width": size[1]}
        crop = _sides(checkpoint, "crop_size")
        return fields | ({"crop_size": crop} if fields.get("do_center_crop") and crop else {})
    facts = pixel_facts(checkpoint, format_name)
    crop_pct, sides = facts.pop("crop_pct", None), {"height": size[0], "width": size[1]}
    if crop_pct is None:
        return {**facts, "size": sides}
    if format_name == "timm" and pretrained_facts(checkpoint.config).get("crop_mode") == "squash":
        resized = {name: math.floor(side / crop_pct) for name, side in sides.items()}
    else:
        resized = {"shortest_edge": math.floor(min(size) / crop_pct)}
    return {**facts, "size": resized, "do_center_crop": True, "crop_size": sides}


def build_processor(fields: dict[str, Any], num_channels: int):
    """This package's image processor of these fields, by torchvision where it is installed, else by PIL."""
    backend = ViTScratchImageProcessor if is_torchvision_available() else ViTScratchImageProcessorPil
    return backend(num_channels=num_channels, **with_channels(fields, num_channels))


def with_channels(facts: dict[str, Any], num_channels: int | None) -> dict[str, Any]:
    """The facts with mean and standard deviation for this many channels: the mean of those there are, repeated."""
    facts = dict(facts)
    for name in ("image_mean", "image_std"):
        values = facts.get(name)
        if num_channels is not None and values is not None and len(values) != num_channels:
            facts[name] = [sum(values) / len(values)] * num_channels
    return facts


def timm_config(processor: Any, size: tuple[int, int], num_labels: int, names: list[str]) -> dict[str, Any]:
    """pretrained_cfg of a timm config.json for the images of this image processor."""
    fields = processor.to_dict()
    resized, crop = dict(fields["size"]), fields.get("crop_size")
    shortest = resized.get("shortest_edge") or min(resized["height"], resized["width"])
    does_crop = bool(fields.get("do_center_crop")) and crop is not None
    methods = {int(method): method.name.lower() for method in PILImageResampling}
    return {
        "input_size": [processor.num_channels, *size],
        "num_classes": num_labels,
        "mean": list(fields["image_mean"]),
        "std": list(fields["image_std"]),
        "interpolation": methods[int(fields["resample"])],
        "crop_pct": min(size) / shortest if does_crop else 1.0,
        "crop_mode": "center" if does_crop and "shortest_edge" in resized else "squash",
        "fixed_input_size": True,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "label_names": names,
    }


def _facts_of_processor(checkpoint: Checkpoint) -> dict[str, Any]:
    said = checkpoint.processor
    facts = {name: said[name] for name in ("image_mean", "image_std", "resample") if said.get(name) is not None}
    size, crop = _sides(checkpoint, "size"), _sides(checkpoint, "crop_size")
    if said.get("do_center_crop") and size and crop:
        shortest = size.get("shortest_edge") or min(size["height"], size["width"])
        facts["crop_pct"] = min(crop["height"], crop["width"]) / shortest
    return facts


def _facts_of_timm(checkpoint: Checkpoint) -> dict[str, Any]:
    trained = pretrained_facts(checkpoint.config)
    facts = {"image_mean": trained.get("mean"), "image_std": trained.get("std"), "crop_pct": trained.get("crop_pct")}
    method = str(trained.get("interpolation", "")).upper()
    if method in PILImageResampling.__members__:
        facts["resample"] = int(PILImageResampling[method])
    return {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in facts.items() if v is not None}


def _sides(checkpoint: Checkpoint, name: str) -> dict[str, int] | None:
    """A size of preprocessor_config.json as a dictionary: files of old versions hold one number, or two."""
    said = checkpoint.processor.get(name)
    if said is None:
        return None
    if isinstance(said, int):
        return {"height": said, "width": said}
    if isinstance(said, list) and len(said) == 2:
        return {"height": said[0], "width": said[1]}
    known = ({"height", "width"}, {"shortest_edge"})
    sides = {side: value for side, value in said.items() if value is not None} if isinstance(said, dict) else {}
    if set(sides) not in known:
        raise UserError(f"{checkpoint.name}: preprocessor_config.json has {name} {said!r}; expected height and width.")
    return sides


def format_of_files(checkpoint: Checkpoint) -> str | None:
    """The format as the JSON files alone tell it; None where only the tensors can."""
    config = checkpoint.config
    if is_own(checkpoint):
        return "vit_scratch"
    if "model_type" in config:
        return "transformers"
    if str(config.get("architecture", "")).startswith("torchvision."):
        return "torchvision"
    return "timm" if "architecture" in config else None
