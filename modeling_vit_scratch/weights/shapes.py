"""What tensors tell of the network that they fill, and what is taken for the rest."""

import math
from dataclasses import dataclass, field
from typing import Any

from ..configuration_vit_scratch import ViTScratchConfig
from ..errors import UserError
from .naming import LAYER, Tensors, count_layers

PATCHES = "vit.embeddings.patch_embeddings.projection.weight"
POSITIONS = "vit.embeddings.position_embeddings"
FIRST = LAYER.format(0)


@dataclass
class Reading:
    """A checkpoint as this package's network has it: configuration, tensors by our names, and how they were found."""

    source: str
    format: str
    config: ViTScratchConfig
    tensors: Tensors
    unused: list[str] = field(default_factory=list)  # names of theirs that classification has no use for
    inferred: dict[str, Any] = field(default_factory=dict)  # what neither a file nor a shape said
    notes: list[str] = field(default_factory=list)
    no_head: str = "has no classifier"  # why there is no head, if there is none

    @property
    def has_head(self) -> bool:
        return not {"classifier.weight", "classifier.out.weight"}.isdisjoint(self.tensors)


def build_reading(
    source: str,
    format_name: str,
    tensors: Tensors,
    known: dict[str, Any],
    usual: dict[str, Any],
    unused: list[str],
    others: list[str],
) -> Reading:
    """The reading of tensors that have our names.

    known: fields that the checkpoint's files say. usual: values of the format for what neither files nor shapes say.
    others: names without a place here. Raises UserError for them, and where files and shapes do not fit together.
    """
    if others:
        raise UserError(
            f"{source}: {len(others)} tensors have no place in a plain ViT of {format_name}: {', '.join(others[:5])}."
        )
    missing = [name for name in (PATCHES, f"{FIRST}.mlp.fc1.weight") if name not in tensors]
    if missing or tensors[PATCHES].ndim != 4:
        raise UserError(f"{source}: a plain ViT of {format_name} has a patch embedding and layers; this has not.")
    if "classifier.dense.weight" in tensors:
        for leaf in ("weight", "bias"):
            if f"classifier.{leaf}" in tensors:
                tensors[f"classifier.out.{leaf}"] = tensors.pop(f"classifier.{leaf}")
    facts = _facts_of_shapes(tensors)
    inferred = {name: value for name, value in usual.items() if known.get(name) is None}
    fields = {**facts, **inferred, **{name: value for name, value in known.items() if value is not None}}
    if "num_attention_heads" not in fields:
        inferred["num_attention_heads"] = fields["num_attention_heads"] = _usual_heads(source, tensors)
    fields |= _positions(source, tensors, fields, inferred)
    names = fields.pop("id2label", None) or {}
    num_labels = fields.pop("num_labels")
    if num_labels and len(names) != num_labels:
        names = {}
        inferred["class names"] = f"LABEL_0 to LABEL_{num_labels - 1}"
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}} if num_labels and names else {}
    try:
        config = ViTScratchConfig(**fields, **(labels or {"num_labels": num_labels}))
    except Exception as error:  # the configuration says what is wrong
        raise UserError(f"{source}: {' '.join(str(error.__cause__ or error).split())}") from error
    return Reading(source, format_name, config, tensors, unused, inferred)


def _facts_of_shapes(tensors: Tensors) -> dict[str, Any]:
    """The fields of the configuration that the presence and the shapes of tensors decide."""
    hidden_size, num_channels, *patch = tensors[PATCHES].shape
    registers = tensors.get("vit.embeddings.register_tokens")
    facts: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": num_channels,
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "patch_bias": PATCHES.replace("weight", "bias") in tensors,
        "use_cls_token": "vit.embeddings.cls_token" in tensors,
        "num_register_tokens": 0 if registers is None else registers.shape[1],
        "embedding_norm": "vit.embeddings.layernorm.weight" in tensors,
        "num_hidden_layers": count_layers(tensors, LAYER + "."),
        "intermediate_size": tensors[f"{FIRST}.mlp.fc1.weight"].shape[0],
        "qkv_bias": f"{FIRST}.attention.q_proj.bias" in tensors,
        "proj_bias": f"{FIRST}.attention.o_proj.bias" in tensors,
        "mlp_bias": f"{FIRST}.mlp.fc1.bias" in tensors,
        "qk_norm": f"{FIRST}.attention.q_norm.weight" in tensors,
        "num_labels": 0,
    }
    if facts["qk_norm"]:
        facts["num_attention_heads"] = hidden_size // tensors[f"{FIRST}.attention.q_norm.weight"].shape[0]
    if f"{FIRST}.layer_scale1.lambda1" in tensors:
        facts["layer_scale_init"] = 1e-5  # of new layers; those here are loaded
    if "classifier.dense.weight" in tensors:
        facts |= {"classifier": "tanh", "pooler_output_size": tensors["classifier.dense.weight"].shape[0]}
    for name in ("classifier.weight", "classifier.out.weight"):
        if name in tensors:
            facts["num_labels"] = tensors[name].shape[0]
    if "vit.layernorm.weight" not in tensors:
        facts["final_norm"] = "none"
    return facts


def _usual_heads(source: str, tensors: Tensors) -> int:
    """Heads of the published sizes: 64 channels a head up to ViT-L, sixteen heads above (2010.11929, table 1)."""
    hidden_size = tensors[PATCHES].shape[0]
    if hidden_size > 1024:
        return 16
    if hidden_size % 64:
        raise UserError(
            f"{source} does not say its number of attention heads, and hidden size {hidden_size} is no multiple of "
            "64; name the folder with its config.json, or use `vit-scratch convert --num_attention_heads N` first."
        )
    return hidden_size // 64


def _positions(source: str, tensors: Tensors, fields: dict[str, Any], inferred: dict[str, Any]) -> dict[str, Any]:
    """Image size and kind of positions; the image is taken for square where only their number is known."""
    if POSITIONS not in tensors:
        if fields.get("position_embedding_type") == "none":
            return {}
        raise UserError(
            f"{source} has no learned positions; a plain ViT of {fields['hidden_size']} channels has them. One with "
            "others is read with its config.json: name their folder."
        )
    count = tensors[POSITIONS].shape[1]
    num_prefix = int(fields["use_cls_token"]) + fields["num_register_tokens"]
    patch = fields["patch_size"]
    if fields.get("image_size") is not None:
        try:
            grid = ViTScratchConfig(image_size=fields["image_size"], patch_size=patch).num_patches
        except Exception as error:
            raise UserError(f"{source}: {' '.join(str(error.__cause__ or error).split())}") from error
        if count not in (grid, grid + num_prefix):
            raise UserError(
                f"{source}: {count} positions do not fit images of {fields['image_size']} pixels, which are {grid} "
                f"patches of {patch}, and {num_prefix} other tokens."
            )
        return {"prefix_positions": count != grid or num_prefix == 0}
    # timm's and DeiT III's networks with registers have positions for patches alone
    for prefix in sorted({0, num_prefix}, reverse=not fields["num_register_tokens"]):
        side = math.isqrt(max(count - prefix, 0))
        if side and side * side == count - prefix:
            pair = (patch, patch) if isinstance(patch, int) else patch
            size = side * pair[0] if pair[0] == pair[1] else (side * pair[0], side * pair[1])
            inferred["image_size"] = size
            return {"image_size": size, "prefix_positions": prefix > 0 or num_prefix == 0}
    raise UserError(
        f"{source}: {count} positions are no square of patches, and no file says the image size; give the folder "
        "with its config.json."
    )
