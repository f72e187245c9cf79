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
SMALL = 96  # pixels: images of one size up to this are seen whole, at that size
BILINEAR = int(PILImageResampling.BILINEAR)
TORCHVISION = {**IMAGENET, "resample": BILINEAR, "crop_pct": 224 / 256}  # ViT_B_16_Weights.IMAGENET1K_V1
GOOGLE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": BILINEAR}  # vit_jax: pixels to [-1, 1]


def pixel_facts(checkpoint: Checkpoint, format_name: str) -> dict[str, Any]:
    """image_mean, image_std (of pixels in [0, 1]), resample, crop_pct, crop_mode ("squash", where an image is brought
    to the size whatever its shape): those that the checkpoint, or else its format, says."""
    if checkpoint.processor:
        return _facts_of_processor(checkpoint)
    if format_name == "timm" and checkpoint.config:
        return _facts_of_timm(checkpoint)
    return dict({"torchvision": TORCHVISION, "google": GOOGLE}.get(format_name, {}))


def processor_fields(checkpoint: Checkpoint, format_name: str, size: tuple[int, int]) -> dict[str, Any]:
    """The fields of this package's image processor for the checkpoint. size: (height, width) of its images."""
    if checkpoint.processor:
        said = checkpoint.processor
        fields = {name: _listed(name, said[name]) for name in KEPT if said.get(name) is not None}
        fields["size"] = _sides(checkpoint, "size") or {"height": size[0], "width": size[1]}
        if not fields.get("do_center_crop"):
            if fields.get("do_resize") is False:  # its size is nobody's
                fields["size"] = {"height": size[0], "width": size[1]}
            return fields
        if (crop := _sides(checkpoint, "crop_size")) is None:
            raise UserError(f"{checkpoint.name}: preprocessor_config.json has do_center_crop and no crop_size.")
        return fields | {"crop_size": crop}
    facts = pixel_facts(checkpoint, format_name)
    crop_pct, crop_mode = facts.pop("crop_pct", None), facts.pop("crop_mode", None)
    if crop_pct is None:
        return {**facts, "size": {"height": size[0], "width": size[1]}}
    if crop_mode == "squash":
        return {**facts, **squashed(size, crop_pct)}
    return {**facts, **cropped(size, {"shortest_edge": math.floor(min(size) / crop_pct)})}


def squashed(size: tuple[int, int], crop_pct: float) -> dict[str, Any]:
    """The processor's fields for images brought to (height, width) `size` over crop_pct whatever their shape, of which
    the central crop of `size` is kept."""
    return cropped(size, {"height": math.floor(size[0] / crop_pct), "width": math.floor(size[1] / crop_pct)})


def cropped(size: tuple[int, int], resized: dict[str, int]) -> dict[str, Any]:
    """The processor's fields for a resize, and a central crop of (height, width) `size`."""
    return {"size": resized, "do_center_crop": True, "crop_size": {"height": size[0], "width": size[1]}}


def with_other_pixels(processor: Any, size: tuple[int, int], crop_pct: float | None) -> Any:
    """The image processor for images of (height, width) `size`, whose central crop keeps the share crop_pct of the
    shorter side; None: the share that it keeps now, or the whole image. Mean, standard deviation and resampling stay.

    Another size at the same share and the other way round: Touvron et al., "Fixing the train-test resolution
    discrepancy" (1906.06423), section 3.
    """
    crops, squashes = bool(processor.do_center_crop), "shortest_edge" not in dict(processor.size)
    if crop_pct is None:
        crop_pct = crop_share(processor)
    if crop_pct is None and squashes:
        fields = {"size": {"height": size[0], "width": size[1]}, "do_center_crop": False}
    elif crops and squashes:
        fields = squashed(size, crop_pct)
    else:
        fields = cropped(size, {"shortest_edge": round(max(size) / (crop_pct or 1.0))})
    return type(processor)(**{**processor.to_dict(), "do_resize": True, **fields})


def crop_share(processor: Any) -> float | None:
    """Which share of a resized image's side the processor's central crop keeps; None where it does not resize and
    crop. Of images that are not square: the crop's longer side, as with_other_pixels and training take it."""
    if not (processor.do_resize and processor.do_center_crop):
        return None
    crop, resized = dict(processor.crop_size), dict(processor.size)
    return max(crop.values()) / resized.get("shortest_edge", max(resized.values()))


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
    pixels = with_channels(_statistics(fields), processor.num_channels)
    resized, crop = dict(fields["size"]), fields.get("crop_size")
    shortest = resized.get("shortest_edge") or min(resized["height"], resized["width"])
    does_crop = bool(fields.get("do_center_crop")) and crop is not None
    methods = {int(method): method.name.lower() for method in PILImageResampling}
    return {
        "input_size": [processor.num_channels, *size],
        "num_classes": num_labels,
        "mean": pixels["image_mean"],
        "std": pixels["image_std"],
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
    facts = _statistics(said)
    if said.get("resample") is not None:
        facts["resample"] = said["resample"]
    size, crop = _sides(checkpoint, "size"), _sides(checkpoint, "crop_size")
    if said.get("do_center_crop") and size and crop:
        shortest = size.get("shortest_edge") or min(size["height"], size["width"])
        facts["crop_pct"] = min(crop["height"], crop["width"]) / shortest
        return facts | ({} if "shortest_edge" in size else {"crop_mode": "squash"})
    is_resized = said.get("do_resize") is not False and size is not None and "shortest_edge" not in size
    return facts | (_seen_whole(list(size.values())) if is_resized else {})


def _seen_whole(sides: list[int]) -> dict[str, Any]:
    """The facts of images brought to these sides without a crop; small ones are, which says nothing of photographs."""
    return {"crop_pct": 1.0, "crop_mode": "squash"} if max(sides, default=SMALL + 1) > SMALL else {}


def _statistics(said: dict[str, Any]) -> dict[str, Any]:
    """image_mean and image_std that do to pixels in [0, 1] what a processor of these fields does to its own.

    It may bring pixels to another range than [0, 1] before it normalises, or leave one of the two out.
    """
    factor = (said.get("rescale_factor") or 1 / 255) if said.get("do_rescale") is not False else 1.0
    statistics = {"image_mean": [0.0], "image_std": [1.0]}
    if said.get("do_normalize") is not False:
        usual = {} if factor == 1 / 255 else {"image_mean": [0.5], "image_std": [0.5]}
        given = {name: _listed(name, said[name]) for name in statistics if said.get(name) is not None}
        statistics = {**usual, **given}
    return {name: [value / (255 * factor) for value in values] for name, values in statistics.items()}


def _listed(name: str, value: Any) -> Any:
    """The value; mean and standard deviation as a list, where the file has a single number for all channels."""
    is_single = name in ("image_mean", "image_std") and isinstance(value, (int, float))
    return [float(value)] if is_single else value


def _facts_of_timm(checkpoint: Checkpoint) -> dict[str, Any]:
    trained = pretrained_facts(checkpoint.config)
    facts = {"image_mean": trained.get("mean"), "image_std": trained.get("std"), "crop_pct": trained.get("crop_pct")}
    if trained.get("crop_mode") == "squash" and facts["crop_pct"] in (None, 1):
        facts |= {"crop_pct": None, **_seen_whole((trained.get("input_size") or [])[1:])}
    elif trained.get("crop_mode") == "squash":
        facts["crop_mode"] = "squash"
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
