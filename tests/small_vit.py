"""The small network and the small images that the tests of the network share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_labels": 5,
    "initializer_range": 0.2,  # ten times the default: differences stand well above rounding
}


def build(model_class=ViTScratchForImageClassification, seed=0, **fields):
    torch.manual_seed(seed)
    return model_class(ViTScratchConfig(**{**SMALL, **fields})).eval()


def images(*shape, seed=1):
    return torch.randn(*(shape or (3, 3, 32, 32)), generator=torch.Generator().manual_seed(seed))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch computes with so many threads, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
