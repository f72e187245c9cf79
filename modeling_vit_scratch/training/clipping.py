"""Gradients that are too large, made smaller before a step."""

import math

import torch
from accelerate import Accelerator
from torch.linalg import vector_norm

from .recipe import Recipe
from .sharding import full_tensor

LEAST_NORM = 1e-3  # of a unit's weights: one that begins with zeros would never move (2102.06171, section 4)


def clip_gradients(
    accelerator: Accelerator, model: torch.nn.Module, network: torch.nn.Module, recipe: Recipe
) -> torch.Tensor:
    """Clips the gradients that lie in the parameters as the recipe says; returns the norm that they had, a scalar.

    network: the model as accelerate prepared it, the classifier's parameters named "classifier." in `model`.
    "norm": all are scaled by one number where their norm is over the limit. "value": each number is clamped. "agc":
    `clip_by_weights`, everywhere but in the classifier. A limit of 0 clips nothing.
    """
    limit = recipe.max_grad_norm or math.inf
    is_by_norm = recipe.clip_mode == "norm"
    norm = accelerator.clip_grad_norm_(network.parameters(), limit if is_by_norm else math.inf)
    if not is_by_norm and limit < math.inf:
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            if recipe.clip_mode == "value":
                parameter.grad.clamp_(-limit, limit)
            elif not name.startswith("classifier."):
                clip_by_weights(parameter, limit)
    return full_tensor(norm)


@torch.no_grad()
def clip_by_weights(parameter: torch.nn.Parameter, limit: float):
    """Adaptive gradient clipping (Brock et al., 2102.06171, equation 3): the gradient of a unit, which is a row of a
    matrix, a filter, or a vector as a whole, is scaled down to `limit` times the norm of the unit's weights."""
    dims = tuple(range(1, parameter.ndim)) or None
    weights, gradients = (vector_norm(x, dim=dims, keepdim=parameter.ndim > 1) for x in (parameter, parameter.grad))
    allowed = limit * weights.clamp(min=LEAST_NORM)
    parameter.grad.mul_((allowed / gradients.clamp(min=1e-6)).clamp(max=1))
