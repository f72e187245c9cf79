"""Names of parameters between libraries: tables of modules, and matrices that some libraries keep as one."""

import re
from collections.abc import Iterable

import torch

from ..errors import UserError

Tensors = dict[str, torch.Tensor]

# A table maps our module or parameter to theirs; {} stands for the number of the layer.
LAYER = "vit.layers.{}"


def count_layers(names: Iterable[str], pattern: str) -> int:
    """The number of layers whose names begin with `pattern`, a text with {} for the number."""
    number = re.compile(re.escape(pattern).replace(re.escape("{}"), r"(\d+)"))
    return max((int(found[1]) + 1 for found in map(number.match, names) if found), default=0)


def with_numbers(table: dict[str, str], num_layers: int) -> dict[str, str]:
    """The table with a row for each layer."""
    rows: dict[str, str] = {}
    for ours, theirs in table.items():
        for layer in range(num_layers) if "{}" in ours else (0,):
            rows[ours.format(layer)] = theirs.format(layer)
    return rows


def renamed(tensors: Tensors, rows: dict[str, str], source: str) -> tuple[Tensors, list[str]]:
    """The tensors whose name or module has a row, under the row's name, and the names of the others."""
    found: Tensors = {}
    others = []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        new = rows.get(name) or (f"{rows[module]}.{leaf}" if module in rows else None)
        if new is None:
            others.append(name)
        elif new in found:
            raise UserError(f"{source}: two tensors would be {new}, {name} is the second; a plain ViT has one.")
        else:
            found[new] = tensor
    return found, others


def inverted(rows: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in rows.items()}


def split_qkv(tensors: Tensors, fused: str) -> Tensors:
    """Queries, keys and values that stand above each other in one matrix or vector, as q, k and v.

    fused: what stands before "weight" and "bias", "attn.qkv." say: attn.qkv.weight gives attn.qkv.q.weight and so on.
    """
    parts: Tensors = {}
    for name, tensor in tensors.items():
        if fused not in name:
            parts[name] = tensor
            continue
        module, _, leaf = name.partition(fused)
        for letter, part in zip("qkv", tensor.chunk(3)):
            parts[f"{module}{fused}{letter}.{leaf}"] = part.clone()
    return parts


def join_qkv(tensors: Tensors, fused: str) -> Tensors:
    """The inverse of split_qkv."""
    joined: Tensors = {}
    for name, tensor in tensors.items():
        module, found, rest = name.partition(fused)
        if not found:
            joined[name] = tensor
        elif rest.startswith("q."):
            leaf = rest.removeprefix("q.")
            parts = [tensors[f"{module}{fused}{letter}.{leaf}"] for letter in "qkv"]
            joined[f"{module}{fused}{leaf}"] = torch.cat(parts)
    return joined
