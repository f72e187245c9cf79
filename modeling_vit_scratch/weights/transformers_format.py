"""transformers' ViT and DeiT: the names of version 5, which are ours, and those of the files written before it."""

import re
from typing import Any

from ..configuration_vit_scratch import ViTScratchConfig
from ..errors import UserError
from .files import Checkpoint
from .naming import LAYER, Tensors, count_layers, renamed, with_numbers
from .shapes import Reading, build_reading

SIGNATURE = (r"(vit\.|deit\.)?embeddings\.patch_embeddings\.projection\.weight",)
MODEL_TYPES = ("vit", "deit", "vit_mae")  # of vit_mae, the encoder

NAMES = {
    name: name
    for name in (
        "vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "vit.embeddings.patch_embeddings.projection",
        f"{LAYER}.layernorm_before", f"{LAYER}.layernorm_after", f"{LAYER}.attention.q_proj",
        f"{LAYER}.attention.k_proj", f"{LAYER}.attention.v_proj", f"{LAYER}.attention.o_proj", f"{LAYER}.mlp.fc1",
        f"{LAYER}.mlp.fc2", "vit.layernorm", "classifier",
    )
}  # fmt: skip
DEIT_NAMES = {"vit.embeddings.register_tokens": "vit.embeddings.distillation_token"}

# Files written before version 5; the order matters: attention's own "output.dense" before the MLP's.
OLD_NAMES = (
    (r"\bencoder\.layer\.", "layers."),
    (r"attention\.attention\.(query|key|value)\.", lambda found: f"attention.{found[1][0]}_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
# Parts that classification from the class token has no use for: ViTModel's pooler, decoders of masked images.
UNUSED = re.compile(r"vit\.pooler\.|vit\.embeddings\.mask_token$|decoder\.")
TEACHER_HEADS = re.compile(r"(cls|distillation)_classifier\.")

SHARED_FIELDS = (
    "num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "initializer_range", "problem_type",
)  # fmt: skip
USUAL = {"layer_norm_eps": 1e-12, "hidden_act": "gelu"}


def read(checkpoint: Checkpoint, tensors: Tensors, num_attention_heads: int | None) -> Reading:
    """The network of a ViT or DeiT checkpoint. The distillation token of a DeiT is a register token here."""
    facts = checkpoint.config
    model_type = facts.get("model_type", "vit")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{checkpoint.name} has model_type {model_type!r}, no plain ViT; known: {', '.join(MODEL_TYPES)}."
        )
    tensors = {_current_name(name): tensor for name, tensor in tensors.items()}
    teacher = [name for name in tensors if TEACHER_HEADS.match(name)]
    unused = [name for name in tensors if UNUSED.match(name)] + teacher
    kept = {name: tensor for name, tensor in tensors.items() if name not in unused}
    rows = with_numbers({**NAMES, **DEIT_NAMES}, count_layers(tensors, LAYER + "."))
    ours, others = renamed(kept, {theirs: name for name, theirs in rows.items()}, checkpoint.name)
    known = {name: facts.get(name) for name in SHARED_FIELDS} if facts else {}
    if facts:
        known |= {name: facts.get(name, USUAL[name]) for name in USUAL}
        known["num_attention_heads"] = facts.get("num_attention_heads", 12)
        known["image_size"] = facts.get("image_size", 224)
        known["id2label"] = _names(checkpoint)
    known["num_attention_heads"] = num_attention_heads or known.get("num_attention_heads")
    pooling = "cls" if "vit.embeddings.cls_token" in ours else "mean"
    usual = USUAL if facts else {**USUAL, "pooling": pooling}  # a bare file may be this package's own
    reading = build_reading(checkpoint.name, "transformers", ours, known, usual, unused, others)
    if teacher:
        reading.no_head = "has two heads, whose mean no plain ViT computes"
    return reading


def _names(checkpoint: Checkpoint) -> dict[int, str]:
    said = checkpoint.config.get("id2label") or {}
    try:
        return {int(index): str(name) for index, name in said.items()}
    except (AttributeError, ValueError) as error:
        text = f"{checkpoint.name}: config.json has id2label {said!r:.60}; expected numbers and names."
        raise UserError(text) from error


def _current_name(name: str) -> str:
    """The name of version 5 with the encoder under "vit."."""
    name = re.sub(r"^deit\.", "vit.", name)
    if re.match(r"(embeddings|encoder|layers|layernorm|pooler)\.", name):
        name = f"vit.{name}"  # a ViTModel saved alone
    for pattern, new in OLD_NAMES:
        name = re.sub(pattern, new, name)
    return name


def write(config: ViTScratchConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """config.json and tensors of a ViTForImageClassification."""
    fields = {
        name: getattr(config, name)
        for name in (*SHARED_FIELDS, "hidden_size", "num_hidden_layers", "intermediate_size", "patch_size",
                     "num_channels", "qkv_bias")
    }  # fmt: skip
    labels = {str(index): name for index, name in config.id2label.items()}
    facts = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        **{name: value for name, value in fields.items() if value is not None},
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
        "dtype": "float32",
    }
    return facts, dict(tensors)


# What ViTForImageClassification can be: field -> the values it may have.
EXPRESSES = {
    "position_embedding_type": ("learned",),
    "patch_bias": (True,),
    "use_cls_token": (True,),
    "num_register_tokens": (0,),
    "embedding_norm": (False,),
    "qk_norm": (False,),
    "proj_bias": (True,),
    "mlp_bias": (True,),
    "layer_scale_init": (None,),
    "final_norm": ("before_pooling",),
    "pooling": ("cls",),
    "classifier": ("linear",),
}
