"""Google's .npz files of vit_jax: the networks of 2010.11929 and "How to train your ViT?" (2106.10270)."""

import re

import torch

from .files import Checkpoint
from .naming import LAYER, Tensors, count_layers, inverted, renamed, with_numbers
from .shapes import Reading, build_reading

SIGNATURE = (r"(opt/target/)?embedding/kernel", r"(opt/target/)?Transformer/encoderblock_0/LayerNorm_0/scale")
THEIRS = "Transformer.encoderblock_{}"
NAMES = {
    "vit.embeddings.cls_token": "cls",
    "vit.embeddings.position_embeddings": "Transformer.posembed_input.pos_embedding",
    "vit.embeddings.patch_embeddings.projection": "embedding",
    f"{LAYER}.layernorm_before": f"{THEIRS}.LayerNorm_0",
    f"{LAYER}.attention.q_proj": f"{THEIRS}.MultiHeadDotProductAttention_1.query",
    f"{LAYER}.attention.k_proj": f"{THEIRS}.MultiHeadDotProductAttention_1.key",
    f"{LAYER}.attention.v_proj": f"{THEIRS}.MultiHeadDotProductAttention_1.value",
    f"{LAYER}.attention.o_proj": f"{THEIRS}.MultiHeadDotProductAttention_1.out",
    f"{LAYER}.layernorm_after": f"{THEIRS}.LayerNorm_2",
    f"{LAYER}.mlp.fc1": f"{THEIRS}.MlpBlock_3.Dense_0",
    f"{LAYER}.mlp.fc2": f"{THEIRS}.MlpBlock_3.Dense_1",
    "vit.layernorm": "Transformer.encoder_norm",
    "classifier.dense": "pre_logits",
    "classifier": "head",
}
OPTIMIZER = re.compile(r"opt/state/|.*/step$|step$")  # beside opt/target/, in files saved while training
USUAL = {"layer_norm_eps": 1e-6, "hidden_act": "gelu"}


def read(checkpoint: Checkpoint, arrays: Tensors, num_attention_heads: int | None) -> Reading:
    """The network of Flax's arrays: kernels are turned to (out, in), heads laid side by side."""
    unused = [name for name in arrays if OPTIMIZER.match(name)]
    tensors, heads = {}, None
    for name, array in arrays.items():
        if name in unused:
            continue
        module, _, leaf = name.removeprefix("opt/target/").replace("/", ".").rpartition(".")
        if module.endswith(".query") and leaf == "kernel":
            heads = array.shape[1]
        names = {"kernel": "weight", "scale": "weight"}
        tensors[".".join(filter(None, [module, names.get(leaf, leaf)]))] = _turned(module, leaf, array)
    rows = inverted(with_numbers(NAMES, count_layers(tensors, THEIRS + ".")))
    ours, others = renamed(tensors, rows, checkpoint.name)
    known = {"num_attention_heads": heads if num_attention_heads is None else num_attention_heads}
    return build_reading(checkpoint.name, "Google", ours, known, USUAL, unused, others)


def _turned(module: str, leaf: str, array: torch.Tensor) -> torch.Tensor:
    """A Flax array as PyTorch has it: (H, W, in, out) -> (out, in, H, W), (in, out) -> (out, in)."""
    if leaf == "bias":
        return array.reshape(-1)  # of queries: (heads, width)
    if leaf != "kernel":
        return array
    if array.ndim == 4:
        return array.permute(3, 2, 0, 1).contiguous()
    if array.ndim == 3:  # queries (D, heads, width), output (heads, width, D)
        array = array.flatten(0, 1) if module.endswith(".out") else array.flatten(1)
    return array.T.contiguous()
