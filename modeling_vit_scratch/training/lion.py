"""Lion: steps by the sign of an average of gradients, with one number of state a weight."""

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., 2302.06675, algorithm 2): every weight moves by the rate, up or down, or stays.

    `betas`: of the average whose sign is the step, and of the one that is kept. Its steps are longer than AdamW's at
    the same rate: the paper takes a third to a tenth of AdamW's rate, and as many times its weight decay.
    """

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The closure's result, if there is one, after a step."""
        result = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                mean = state["exp_avg"]
                direction = mean.lerp(parameter.grad, 1 - beta1).sign_()
                parameter.mul_(1 - rate * group["weight_decay"]).add_(direction, alpha=-rate)
                mean.lerp_(parameter.grad, 1 - beta2)
        return result
