"""timm's VisionTransformer: ViT, DeiT, DeiT III, registers, CLIP's towers; DeiT's and MAE's files have its names."""

import re
from typing import Any

from ..configuration_vit_scratch import ViTScratchConfig
from ..errors import UserError
from .files import Checkpoint
from .naming import LAYER, Tensors, count_layers, inverted, join_qkv, renamed, split_qkv, with_numbers
from .shapes import Reading, build_reading

SIGNATURE = (r"patch_embed\.proj\.weight", r"blocks\.0\.norm1\.weight")
FUSED = "attn.qkv."
NAMES = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.register_tokens": "reg_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.embeddings.layernorm": "norm_pre",
    f"{LAYER}.layernorm_before": "blocks.{}.norm1",
    f"{LAYER}.attention.q_proj": "blocks.{}.attn.qkv.q",
    f"{LAYER}.attention.k_proj": "blocks.{}.attn.qkv.k",
    f"{LAYER}.attention.v_proj": "blocks.{}.attn.qkv.v",
    f"{LAYER}.attention.q_norm": "blocks.{}.attn.q_norm",
    f"{LAYER}.attention.k_norm": "blocks.{}.attn.k_norm",
    f"{LAYER}.attention.o_proj": "blocks.{}.attn.proj",
    f"{LAYER}.layer_scale1.lambda1": "blocks.{}.ls1.gamma",
    f"{LAYER}.layernorm_after": "blocks.{}.norm2",
    f"{LAYER}.mlp.fc1": "blocks.{}.mlp.fc1",
    f"{LAYER}.mlp.fc2": "blocks.{}.mlp.fc2",
    f"{LAYER}.layer_scale2.lambda1": "blocks.{}.ls2.gamma",
    "vit.layernorm": "norm",
    "classifier": "head",
}
# Other names for the same: DeiT III's own files, distillation tokens, the norm behind mean pooling, old files.
ALIASES = (
    (r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
    (r"^dist_token$", "reg_token"),
    (r"^fc_norm\.", "norm."),
    (r"^pre_logits\.fc\.", "pre_logits."),
)
# Parts that classification has no use for: decoders and mask tokens of pretraining by masked images.
UNUSED = re.compile(r"mask_token$|decoder_")
USUAL = {"layer_norm_eps": 1e-6, "hidden_act": "gelu"}

# What timm's 1.0.31 architectures are where no tensor tells; a test compares all of them with timm itself.
PLAIN = re.compile(r"(vit|deit3?|eva_large|flexivit|test_vit2?)(_|$)")
NOT_PLAIN = re.compile(r"_rope_|_rpn_|_dinov3|_lingbot|_sapiens|_pe_")
OWN_HEADS = {"vit_base_patch16_gap_224": 16, "vit_giant_patch16_radio_v3": 24, "test_vit": 2, "test_vit2": 2}
TANH_GELU = re.compile(
    r"vit_(base_patch32_siglip_gap_256|large_patch16_siglip_gap_512|(so400m|giantopt)_patch16_siglip_gap_\d+)$"
)

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
# Architectures by their LayerNorm's epsilon, which model_args cannot say in JSON.
ARCHITECTURES = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}


def facts_of_architecture(source: str, architecture: str) -> dict[str, Any]:
    """Epsilon, activation and heads that a name of timm's stands for. Raises UserError where it is no plain ViT."""
    architecture = architecture.partition(".")[0]
    if not PLAIN.match(architecture) or NOT_PLAIN.search(architecture):
        raise UserError(f"{source}: timm's {architecture!r} is no plain ViT known here; vit_base_patch16_224 is.")
    act = "quick_gelu" if "quickgelu" in architecture else "gelu"
    return {
        "layer_norm_eps": 1e-5 if "_clip_" in architecture else 1e-6,
        "hidden_act": "gelu_pytorch_tanh" if TANH_GELU.match(architecture) else act,
        "num_attention_heads": OWN_HEADS.get(architecture),
    }


def read(checkpoint: Checkpoint, tensors: Tensors, num_attention_heads: int | None) -> Reading:
    """The network of a timm checkpoint; timm's distillation token is a register token here."""
    source = checkpoint.name
    has_norm_behind = any(name.startswith("fc_norm.") for name in tensors)
    heads = [name for name in tensors if name.startswith("head_dist.")]
    if heads:
        heads += [name for name in tensors if name.startswith("head.")]
    unused = [name for name in tensors if UNUSED.match(name)] + heads
    kept = {_plain_name(name): tensor for name, tensor in tensors.items() if name not in unused}
    rows = inverted(with_numbers(NAMES, count_layers(kept, "blocks.{}.")))
    rows["pre_logits"] = "classifier.dense"
    ours, others = renamed(split_qkv(kept, FUSED), rows, source)
    known: dict[str, Any] = {}
    pooling = "mean" if has_norm_behind or "cls_token" not in kept else "cls"
    if checkpoint.config:
        known = _facts(checkpoint, pooling)
        if "embed_dim" in (checkpoint.config.get("model_args") or {}) and not (
            num_attention_heads or known["num_attention_heads"]
        ):
            raise UserError(
                f"{source}: embed_dim without num_heads; use `vit-scratch convert --num_attention_heads N`."
            )
    known["num_attention_heads"] = num_attention_heads or known.get("num_attention_heads")
    known["final_norm"] = "after_pooling" if has_norm_behind else None
    usual = {**USUAL, "pooling": pooling}
    reading = build_reading(source, "timm", ours, known, usual, unused, others)
    if heads:
        reading.no_head = "has two heads, whose mean no plain ViT computes"
    return reading


def _plain_name(name: str) -> str:
    for pattern, new in ALIASES:
        name = re.sub(pattern, new, name)
    return name


def _facts(checkpoint: Checkpoint, pooling: str) -> dict[str, Any]:
    """What config.json says: the architecture, its arguments, and the images it was trained on."""
    config, source = checkpoint.config, checkpoint.name
    arguments = config.get("model_args") or {}
    trained = pretrained_facts(config)
    size = arguments.get("img_size") or (trained.get("input_size") or [None])[1:] or None
    pools = {"token": "cls", "avg": "mean", None: pooling}
    pool = arguments.get("global_pool", config.get("global_pool"))
    if pool not in pools or arguments.get("pool_include_prefix"):
        raise UserError(f"{source}: timm's global_pool {pool!r} is not known here; token and avg are.")
    known = facts_of_architecture(source, config.get("architecture", "vit"))
    act = arguments.get("act_layer")
    activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    if act is not None and act not in activations:
        raise UserError(f"{source}: timm's act_layer {act!r} is not known here; known: {', '.join(activations)}.")
    if arguments.get("norm_layer") not in (None, "layernorm"):
        raise UserError(f"{source}: timm's norm_layer {arguments['norm_layer']!r} is not known here; layernorm is.")
    if arguments.get("norm_layer"):
        known["layer_norm_eps"] = 1e-6
    known |= {"pooling": pools[pool], "layer_scale_init": arguments.get("init_values")}
    known["hidden_act"] = activations[act] if act is not None else known["hidden_act"]
    known["num_attention_heads"] = arguments.get("num_heads", known["num_attention_heads"])
    known["image_size"] = tuple(size) if isinstance(size, list) and size[0] != size[1] else _first(size)
    known["position_embedding_type"] = "none" if arguments.get("pos_embed") in ("", "none") else None
    names = config.get("label_names") or trained.get("label_names") or []
    known["id2label"] = {index: str(name) for index, name in enumerate(names)}
    return known


def _first(size: Any) -> Any:
    return size[0] if isinstance(size, list) else size


def pretrained_facts(config: dict[str, Any]) -> dict[str, Any]:
    """pretrained_cfg of a config.json; old files have its entries at the top level."""
    return config.get("pretrained_cfg") or config


def write(config: ViTScratchConfig, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """config.json (but for the pixels) and tensors for timm.create_model("local-dir:...")."""
    height, width = config.image_height_width
    has_positions = config.position_embedding_type == "learned"
    arguments = {
        "img_size": height if height == width else [height, width],
        "patch_size": config.patch_size if isinstance(config.patch_size, int) else list(config.patch_size),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,  # timm rounds the product down
        "qkv_bias": config.qkv_bias,
        "proj_bias": config.proj_bias,
        "qk_norm": config.qk_norm,
        "init_values": None if config.layer_scale_init is None else config.layer_scale_init or 1e-5,
        "class_token": config.use_cls_token,
        "reg_tokens": config.num_register_tokens,
        "no_embed_class": not config.prefix_positions,
        "pos_embed": "learn" if has_positions else "none",
        "pre_norm": config.embedding_norm,
        "global_pool": {"cls": "token", "mean": "avg"}[config.pooling],
        "final_norm": config.final_norm != "none",
        "fc_norm": config.final_norm == "after_pooling",
        "act_layer": ACTIVATIONS[config.hidden_act],
    }
    facts = {
        "architecture": ARCHITECTURES[config.layer_norm_eps],
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": arguments["global_pool"],
        "label_names": list(config.id2label.values()),
        "model_args": arguments,
    }
    table = {**NAMES, "vit.layernorm": "fc_norm" if config.final_norm == "after_pooling" else "norm"}
    rows = with_numbers(table, config.num_hidden_layers)
    return facts, join_qkv(renamed(tensors, rows, "this network")[0], FUSED)


def expresses(config: ViTScratchConfig) -> dict[str, tuple]:
    """What timm's VisionTransformer can be: field -> the values it may have beside this network's others."""
    return {
        "position_embedding_type": ("learned", "none"),
        "patch_bias": (not config.embedding_norm,),
        "mlp_bias": (config.proj_bias,),
        "classifier": ("linear",),
        "hidden_act": tuple(ACTIVATIONS),
        "layer_norm_eps": tuple(ARCHITECTURES),
    }
