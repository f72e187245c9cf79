"""`from_pretrained` of other libraries' checkpoints: what transformers is to load instead of them."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..configuration_vit_scratch import architecture_fields, pair
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .files import Checkpoint, open_checkpoint
from .formats import is_own, own_config, read_checkpoint
from .loading import fitted, wanted_config

logger = logging.get_logger(__name__)

HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")
LABELS = ("num_labels", "id2label", "label2id", "problem_type")


def _is_of_another_size(checkpoint: Checkpoint, arguments: dict[str, Any]) -> bool:
    """Whether images of another size than the checkpoint's own are asked for: its positions are interpolated."""
    size = arguments.get("image_size")
    return size is not None and pair(size) != own_config(checkpoint).image_height_width


def translated(model_class: type, name_or_path: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(None, arguments with config and state_dict) for another library's checkpoint; else both as they came.

    Fields of the configuration among the arguments are taken over: other labels replace the head, another image_size
    interpolates the positions. Raises UserError where the checkpoint does not fill the network.
    """
    is_plain = {"config", "state_dict", "subfolder", "gguf_file"}.isdisjoint(
        name for name, value in arguments.items() if value
    )
    if name_or_path is None or not is_plain:
        return name_or_path, arguments
    try:
        checkpoint = open_checkpoint(str(name_or_path), {name: arguments[name] for name in HUB if name in arguments})
    except UserError:
        return name_or_path, arguments  # an adapter's folder, or nothing at all: transformers says what
    if is_own(checkpoint) and not Path(name_or_path).is_file() and not _is_of_another_size(checkpoint, arguments):
        return name_or_path, arguments
    fields = (*architecture_fields(), *LABELS)
    wanted = {name: value for name, value in arguments.items() if name in fields and value is not None}
    if "id2label" in wanted:
        wanted["id2label"] = {int(index): name for index, name in wanted["id2label"].items()}
        wanted["label2id"] = {name: index for index, name in wanted["id2label"].items()}
    reading = read_checkpoint(checkpoint)
    has_classifier = issubclass(model_class, ViTScratchForImageClassification)
    if has_classifier and not reading.has_head and not {"id2label", "num_labels"} & set(wanted):
        raise UserError(f"{name_or_path} {reading.no_head}: give num_labels or id2label, and train the new one.")
    config = wanted_config(reading, wanted)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in ViTScratchForImageClassification(config).state_dict().items()}
    tensors, report = fitted(reading, config, shapes)
    if not has_classifier:
        tensors = {name.removeprefix("vit."): t for name, t in tensors.items() if name.startswith("vit.")}
    (logger.warning if has_classifier and report.replaced else logger.info)(f"{name_or_path}: {report}")
    others = {name: value for name, value in arguments.items() if name not in (*fields, *HUB)}
    return None, {**others, "config": config, "state_dict": tensors}
