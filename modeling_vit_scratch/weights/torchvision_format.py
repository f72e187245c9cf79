"""torchvision's VisionTransformer: vit_b_16 and its kin."""

from typing import Any

from ..configuration_vit_scratch import ViTScratchConfig
from .files import Checkpoint
from .naming import LAYER, Tensors, count_layers, inverted, join_qkv, renamed, split_qkv, with_numbers
from .shapes import Reading, build_reading

SIGNATURE = (r"conv_proj\.weight", r"encoder\.pos_embedding")
THEIRS = "encoder.layers.encoder_layer_{}"
FUSED = "self_attention.in_proj_"
NAMES = {
    "vit.embeddings.cls_token": "class_token",
    "vit.embeddings.position_embeddings": "encoder.pos_embedding",
    "vit.embeddings.patch_embeddings.projection": "conv_proj",
    f"{LAYER}.layernorm_before": f"{THEIRS}.ln_1",
    f"{LAYER}.attention.q_proj": f"{THEIRS}.self_attention.in_proj_q",
    f"{LAYER}.attention.k_proj": f"{THEIRS}.self_attention.in_proj_k",
    f"{LAYER}.attention.v_proj": f"{THEIRS}.self_attention.in_proj_v",
    f"{LAYER}.attention.o_proj": f"{THEIRS}.self_attention.out_proj",
    f"{LAYER}.layernorm_after": f"{THEIRS}.ln_2",
    f"{LAYER}.mlp.fc1": f"{THEIRS}.mlp.0",
    f"{LAYER}.mlp.fc2": f"{THEIRS}.mlp.3",
    "vit.layernorm": "encoder.ln",
    "classifier.dense": "heads.pre_logits",
    "classifier": "heads.head",
}
OLD_MLP = {"linear_1": "0", "linear_2": "3"}  # before torchvision 0.13
USUAL = {"layer_norm_eps": 1e-6}  # vit_b_16 and its kin; torchvision has no other

# What torchvision's VisionTransformer can be: field -> the values it may have.
EXPRESSES = {
    "position_embedding_type": ("learned",),
    "hidden_act": ("gelu",),
    "num_channels": (3,),
    "qkv_bias": (True,),
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
    "classifier": ("linear", "tanh"),
    "layer_norm_eps": (1e-6,),
}


def read(checkpoint: Checkpoint, tensors: Tensors, num_attention_heads: int | None) -> Reading:
    """The network of torchvision's tensors, and of the config.json that `write` puts beside them."""
    tensors = {_current_name(name): tensor for name, tensor in tensors.items()}
    rows = inverted(with_numbers(NAMES, count_layers(tensors, THEIRS + ".")))
    ours, others = renamed(split_qkv(tensors, FUSED), rows, checkpoint.name)
    arguments = checkpoint.config.get("model_args") or {}
    names = checkpoint.config.get("label_names") or []
    known = {
        "hidden_act": "gelu",
        "num_attention_heads": num_attention_heads or arguments.get("num_heads"),
        "image_size": arguments.get("image_size"),
        "id2label": {index: str(name) for index, name in enumerate(names)},
    }
    return build_reading(checkpoint.name, "torchvision", ours, known, USUAL, [], others)


def _current_name(name: str) -> str:
    for old, new in OLD_MLP.items():
        name = name.replace(f"mlp.{old}.", f"mlp.{new}.")
    return name


def write(config: ViTScratchConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """config.json (but for the pixels) and tensors: torchvision.models.VisionTransformer(**config["model_args"])."""
    arguments = {
        "image_size": config.image_height_width[0],
        "patch_size": config.patch_height_width[0],
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "hidden_dim": config.hidden_size,
        "mlp_dim": config.intermediate_size,
        "num_classes": config.num_labels,
    }
    if config.classifier == "tanh":
        arguments["representation_size"] = config.pooler_output_size or config.hidden_size
    facts = {
        "architecture": "torchvision.models.VisionTransformer",
        "model_args": arguments,
        "label_names": list(config.id2label.values()),
    }
    rows = with_numbers({**NAMES, "classifier.out": "heads.head"}, config.num_hidden_layers)
    return facts, join_qkv(renamed(tensors, rows, "this network")[0], FUSED)
