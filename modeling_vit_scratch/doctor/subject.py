"""The network under examination: copies of it, images for it, logits out of it."""

import copy
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .anatomy import Anatomy, observe, tensors_in
from .findings import NotApplicable

OBSERVED_BATCH = 7  # a prime, so that the batch's axis is told from the tokens'


class Subject:
    """A module that maps images (B, C, H, W) to logits (B, K), never run itself: each check works on a deep copy.

    image_size: (height, width) in pixels. Copies are on the CPU, in float32.
    """

    def __init__(
        self,
        module: nn.Module,
        image_size: tuple[int, int],
        num_labels: int,
        num_channels: int,
        optimizer: torch.optim.Optimizer | None,
    ):
        self.module, self.optimizer = module, optimizer
        self.image_size, self.num_labels, self.num_channels = image_size, num_labels, num_channels

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    def copy(self) -> nn.Module:
        """The network as it came, in eval mode."""
        left = [tensor for part in self.module.modules() for tensor in tensors_in(vars(part))]
        # torch copies no tensor with a history: maps of attention, say, that the last forward left in an attribute
        known = {id(tensor): tensor.detach().clone() for tensor in left if not tensor.is_leaf}
        return copy.deepcopy(self.module, known).cpu().float().eval()

    def varied(self, seed: int = 1) -> nn.Module:
        """A copy whose parameters are all moved by random amounts.

        A head, a LayerScale or positions that start at zero, which is no mistake, would hide what lies behind them.
        """
        module = self.copy()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                has_fan = parameter.ndim in (2, 4) or (parameter.ndim == 3 and len(parameter) > 1)
                # vectors and tables (1, N, D) have no fan
                deviation = parameter[0].numel() ** -0.5 if has_fan else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=deviation)
        return module

    def images(self, count: int, seed: int = 0) -> torch.Tensor:
        """Random images (count, C, H, W) of mean 0 and deviation near 1: broad patches of colour, and noise."""
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(count, self.num_channels, 4, 4, generator=generator)
        broad = nn.functional.interpolate(coarse, self.image_size, mode="bilinear")
        return broad + 0.5 * torch.randn(count, self.num_channels, *self.image_size, generator=generator)

    def labels(self, count: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(self.num_labels, (count,), generator=torch.Generator().manual_seed(seed))

    def logits(self, module: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) out of a tensor, an output with .logits, a dict or a tuple."""
        return logits_of(module(images))

    def observed(self) -> Anatomy:
        """What one forward of a new varied copy shows: tokens, layers, norms."""
        return observe(self.varied(), self.images(OBSERVED_BATCH), OBSERVED_BATCH)

    @cached_property
    def anatomy(self) -> Anatomy:
        """The same, observed once, for checks that change nothing in it."""
        return self.observed()

    def require_layers(self) -> Anatomy:
        """The anatomy; raises NotApplicable where no layer on tokens was found."""
        if not self.anatomy.layers:
            raise NotApplicable("no layers that map tokens (B, N, D) to tokens were found")
        return self.anatomy


def logits_of(output: Any) -> torch.Tensor:
    """The tensor of logits in a module's output. Raises UserError where there is none."""
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, dict):
        output = output.get("logits", next(iter(output.values()), None))
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor):
        raise UserError(f"Expected logits, a tensor or an output that holds one, got {type(output).__name__}.")
    return output


def relative_change(changed: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference of two tensors, in standard deviations of the second."""
    spread = reference.std().item()
    return (changed - reference).abs().max().item() / max(spread, 1e-12)
