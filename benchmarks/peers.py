"""The same Vision Transformer as five libraries build it: class token, learned positions, linear head."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification


@dataclass(frozen=True)
class Shape:
    """A network's sizes; mlp_ratio is the MLP's width over the hidden size."""

    image_size: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_ratio: int
    num_labels: int

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


SHAPES = {
    "nano": Shape(32, 4, 96, 6, 3, 3, 10),
    "micro": Shape(32, 4, 128, 6, 4, 2, 10),
    "d192": Shape(32, 4, 192, 6, 3, 4, 10),
    "vit_s_4": Shape(32, 4, 384, 12, 6, 4, 10),
    "vit_ti_16": Shape(224, 16, 192, 12, 3, 4, 1000),
    "vit_s_16": Shape(224, 16, 384, 12, 6, 4, 1000),
    "vit_b_16": Shape(224, 16, 768, 12, 12, 4, 1000),
}


def ours(shape: Shape, attention: str = "sdpa") -> nn.Module:
    config = ViTScratchConfig(
        image_size=shape.image_size, patch_size=shape.patch_size, hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        intermediate_size=shape.hidden_size * shape.mlp_ratio, num_labels=shape.num_labels, layer_norm_eps=1e-6,
        attn_implementation=attention,
    )  # fmt: skip
    return ViTScratchForImageClassification(config)


def of_transformers(shape: Shape, attention: str = "sdpa") -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=shape.image_size, patch_size=shape.patch_size, hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        intermediate_size=shape.hidden_size * shape.mlp_ratio, num_labels=shape.num_labels, layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation=attention,
    )  # fmt: skip
    return ViTForImageClassification(config)


def of_timm(shape: Shape) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=shape.image_size, patch_size=shape.patch_size, embed_dim=shape.hidden_size, depth=shape.num_layers,
        num_heads=shape.num_heads, mlp_ratio=shape.mlp_ratio, num_classes=shape.num_labels,
    )  # fmt: skip


def of_torchvision(shape: Shape) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=shape.image_size, patch_size=shape.patch_size, num_layers=shape.num_layers,
        num_heads=shape.num_heads, hidden_dim=shape.hidden_size, mlp_dim=shape.hidden_size * shape.mlp_ratio,
        num_classes=shape.num_labels,
    )  # fmt: skip


class Article4Layer(nn.Module):
    """A layer as article 4 prints it: three products without biases, softmax in the precision of its input.

    Heads are merged correctly, which costs what its mistake costs; dropout, its 0.2, is off as in the others.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.hidden_size
        self.num_heads, self.head_dim = shape.num_heads, width // shape.num_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.layer_norm_1, self.layer_norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        hidden = width * shape.mlp_ratio
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = self.layer_norm_1(states)
        heads = (*states.shape[:2], self.num_heads, self.head_dim)
        query, key, value = (w(normed).view(heads).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        weights = (query @ key.transpose(2, 3) * self.head_dim**-0.5).softmax(dim=-1)
        states = states + self.wo((weights @ value).transpose(1, 2).reshape(states.shape))
        return states + self.ffn(self.layer_norm_2(states))


class Article4Network(nn.Module):
    """Article 4's network: patches through a matrix, class token, layers, LayerNorm and matrix on the class token."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.patch_size = shape.patch_size
        self.input_layer = nn.Linear(3 * shape.patch_size**2, shape.hidden_size)
        self.transformer = nn.Sequential(*(Article4Layer(shape) for _ in range(shape.num_layers)))
        self.mlp = nn.Sequential(nn.LayerNorm(shape.hidden_size), nn.Linear(shape.hidden_size, shape.num_labels))
        self.cls_token = nn.Parameter(torch.randn(1, 1, shape.hidden_size))
        self.pos_embedding = nn.Parameter(torch.randn(1, shape.num_tokens, shape.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = nn.functional.unfold(pixel_values, self.patch_size, stride=self.patch_size).transpose(1, 2)
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), self.input_layer(patches)), dim=1)
        return self.mlp(self.transformer(tokens + self.pos_embedding)[:, 0])


OURS = "ours"
PEERS: dict[str, Callable[[Shape], nn.Module]] = {
    OURS: ours,
    "transformers": of_transformers,
    "timm": of_timm,
    "torchvision": of_torchvision,
    "article 4": Article4Network,
}
