"""LAMB: AdamW's update of each tensor, at the scale of the tensor itself, for large batches."""

from collections.abc import Callable
from typing import Any

import torch


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 1904.00962, algorithm 2), with which DeiT III trains (2204.07118).

    Adam's bias-corrected update and the decay are added up, and where there is a decay scaled to the norm of the
    weights: a tensor without decay (norms, biases) takes Adam's step, as in timm. Gradients are clipped by who clips
    them for all optimizers, not here.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The closure's result, if there is one, after a step."""
        result = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(self._update(parameter, group), alpha=-group["lr"])
        return result

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state, gradient = self.state[parameter], parameter.grad
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        count, (beta1, beta2) = state["step"].item(), group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
        update = (mean / (1 - beta1**count)).div_(size)
        if group["weight_decay"] == 0:
            return update
        update.add_(parameter, alpha=group["weight_decay"])
        weights, change = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(update)
        ratio = torch.where((weights > 0) & (change > 0), weights / change, torch.ones_like(weights))
        return update.mul_(ratio)
