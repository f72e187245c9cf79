"""An exponential moving average of the weights: what is evaluated and published where --ema_decay is given."""

import copy
import math
from collections.abc import Mapping

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import UserError
from .sharding import local_tensors, shared_out


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

    The first update copies the weights, so that the random start has no part in it. Where both are in shards, each
    process averages its own.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.has_begun = False
        self._lerp = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: torch.nn.Module):
        averages, weights = local_tensors(self.model.parameters()), local_tensors(model.parameters())
        if self.has_begun:
            self._lerp(averages, weights, None)
        else:
            torch._foreach_copy_(averages, weights)
            self.has_begun = True

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], has_begun: bool):
        self.model.load_state_dict(shared_out(tensors, self.model.state_dict()))
        self.has_begun = has_begun
