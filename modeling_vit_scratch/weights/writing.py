"""A network as other libraries load it themselves: configuration, tensors, image processor, or a refusal by field."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..configuration_vit_scratch import RATES_OF_TRAINING, ViTScratchConfig, pair
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification, sincos2d_positions
from . import timm_format, torchvision_format, transformers_format
from .naming import Tensors
from .pixels import timm_config
from .shapes import PATCHES, POSITIONS


@dataclass(frozen=True)
class Target:
    """What a library's network can be, and how it is written.

    expresses: field -> the values that it may have there, for a configuration. kept: fields of training that its
    configuration has.
    """

    title: str
    expresses: Callable[[ViTScratchConfig], dict[str, tuple]]
    write: Callable[[ViTScratchConfig, Tensors], tuple[dict[str, Any], Tensors]]
    needs_prefix_positions: bool  # its class token has a position
    smallest_epsilon: float  # of its LayerNorm
    needs_squares: bool = False  # images and patches
    kept: tuple[str, ...] = ()


TARGETS = {
    "transformers": Target(
        "transformers' ViT", lambda config: transformers_format.EXPRESSES, transformers_format.write, True, 0.0,
        kept=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    ),
    "timm": Target("timm's VisionTransformer", timm_format.expresses, timm_format.write, False, 1e-6),
    "torchvision": Target(
        "torchvision's VisionTransformer", lambda config: torchvision_format.EXPRESSES, torchvision_format.write, True,
        1e-6, needs_squares=True,
    ),
}  # fmt: skip


def write_checkpoint(to: str, folder: Path, model: ViTScratchForImageClassification, processor: Any) -> list[str]:
    """Writes config.json, model.safetensors and preprocessor_config.json to the folder; what is to be said of it.

    to: a name in TARGETS. Raises UserError, naming the fields, where the other library has no such network.
    """
    target = TARGETS[to]
    config, tensors, notes = common_form(model.config, model.state_dict(), target)
    _check(config, target)
    notes += _left_behind(config, target)
    facts, tensors = target.write(config, tensors)
    pixels = processor.to_dict()
    if to == "timm":
        names = facts["label_names"]
        facts["pretrained_cfg"] = timm_config(processor, config.image_height_width, config.num_labels, names)
    if to == "transformers":
        pixels = {**pixels, "image_processor_type": "ViTImageProcessor"}
        del pixels["num_channels"]
    folder.mkdir(parents=True)
    for name, content in {"config.json": facts, "preprocessor_config.json": pixels}.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return notes


def common_form(
    config: ViTScratchConfig, tensors: Tensors, target: Target
) -> tuple[ViTScratchConfig, Tensors, list[str]]:
    """The same network with parts that all libraries have, where numbers stay what they are; and what was changed.

    A matrix on patches becomes a convolution, fixed sine-cosine positions a learned table, a norm on the class token
    alone a norm on all tokens. Only epsilon may change a logit: what is below 1e-6 becomes 1e-6 where a library's
    own is fixed.
    """
    config, tensors, notes = copy.deepcopy(config), dict(tensors), []
    if config.patch_embedding == "linear":
        config.patch_embedding = "conv"
        shape = (config.hidden_size, config.num_channels, *config.patch_height_width)
        tensors[PATCHES] = tensors[PATCHES].view(shape)
    if config.position_embedding_type == "sincos2d":
        config.position_embedding_type, config.prefix_positions = "learned", False
        tensors[POSITIONS] = sincos2d_positions(config.patch_grid, config.hidden_size, config.position_grid)
        config.position_image_size = None
        notes.append("the sine-cosine positions are written as a learned table")
    if not config.prefix_positions and target.needs_prefix_positions and POSITIONS in tensors:
        config.prefix_positions = True
        tensors[POSITIONS] = torch.nn.functional.pad(tensors[POSITIONS], (0, 0, config.num_prefix_tokens, 0))
        notes.append("the tokens before the patches get positions of zero")
    if config.pooling == "cls" and config.final_norm == "after_pooling":
        config.final_norm = "before_pooling"
    if config.layer_norm_eps < target.smallest_epsilon:
        notes.append(
            f"layer_norm_eps is {target.smallest_epsilon:g} there, not {config.layer_norm_eps:g}: logits may differ in "
            "the sixth digit"
        )
        config.layer_norm_eps = target.smallest_epsilon
    return config, tensors, notes


def _check(config: ViTScratchConfig, target: Target):
    """Raises UserError, naming fields and values, where the target cannot be this network, and which others can."""
    if refused := _refused(config, target):
        others = [f"--to {name}" for name, other in TARGETS.items() if not _refused(config, other)]
        hint = f" {' or '.join(others)} can." if others else ""
        raise UserError(f"{target.title} cannot be this network: {', '.join(refused)}.{hint}")


def _refused(config: ViTScratchConfig, target: Target) -> list[str]:
    """The fields, with their values, that the target does not have."""
    patch = config.patch_height_width
    allowed = {"pre_norm": (True,), **target.expresses(config)}
    refused = [
        f"{field}={getattr(config, field)!r} (it has {' or '.join(map(repr, values))})"
        for field, values in allowed.items()
        if getattr(config, field) not in values
    ]
    if pair(config.patch_stride or patch) != patch:
        refused.append(f"patch_stride={config.patch_stride} (its patches do not overlap)")
    if config.attention_head_dim * config.num_attention_heads != config.hidden_size:
        refused.append(f"head_dim={config.head_dim} (it has {config.hidden_size // config.num_attention_heads})")
    if target.needs_squares:
        for field in ("image_size", "patch_size"):
            height, width = pair(getattr(config, field))
            if height != width:
                refused.append(f"{field}={(height, width)} (it has squares)")
    return refused


def _left_behind(config: ViTScratchConfig, target: Target) -> list[str]:
    """What training had and the other library's files do not say; it changes no logit."""
    names = [name for name in RATES_OF_TRAINING if name not in target.kept and getattr(config, name)]
    lost = [f"{name}={getattr(config, name)}" for name in names]
    return [f"left behind, as it acts in training alone: {', '.join(lost)}"] if lost else []
