"""An exponential moving average of the weights: what is evaluated and published where --ema_decay is given."""

import copy
import math
from collections.abc import Mapping

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import UserError


def half_life(decay: float) -> float:
    """Steps after which a weight's old value counts half in the average."""
    return math.log(2) / -math.log(decay)


def check_decay(decay: float | None, total_steps: int):
    """Raises UserError for an average that would still hold mostly the weights of the start when the run ends."""
    if decay is not None and half_life(decay) > total_steps:
        fitting = 0.5 ** (1 / max(total_steps / 20, 1))  # a half-life of a twentieth of the run
        raise UserError(
            f"--ema_decay {decay} has a half-life of {half_life(decay):,.0f} steps, the run has {total_steps:,}: the "
            f"average would be mostly the weights of the start. Try {fitting:.4g}."
        )


class AveragedWeights:
    """A copy of a model whose weights follow the model's: average <- decay * average + (1 - decay) * weights.

    The first update copies the weights, so that the random start has no part in it.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.has_begun = False
        self._tensors = [parameter.data for parameter in self.model.parameters()]
        self._lerp = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: torch.nn.Module):
        weights = [parameter.data for parameter in model.parameters()]
        if self.has_begun:
            self._lerp(self._tensors, weights, None)
        else:
            torch._foreach_copy_(self._tensors, weights)
            self.has_begun = True

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], has_begun: bool):
        self.model.load_state_dict(tensors)
        self.has_begun = has_begun
