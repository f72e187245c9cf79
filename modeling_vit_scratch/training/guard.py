"""A gradient that is not finite never reaches the weights."""

from collections.abc import Callable

import torch

from ..errors import UserError


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The loss, exactly as it is; but if it is not finite, every gradient that it sends back is NaN.

    Infinite losses can have finite gradients, and on one rank alone: as NaN they reach the gradient norm of all ranks.
    """
    return loss * (1 + 0 * loss.detach())


class FiniteGuard:
    """Watches the gradient norm, which is the same on every rank, and keeps a step of NaN or infinity from being taken.

    Optimizers with fused kernels, and our Muon, skip a step themselves where their `found_inf` is set: then no step
    waits for the device, and `bad_step` says when the run next logs, scores or saves what happened, with the weights as
    they were before it.
    Other optimizers wait for the number at each step. Under fp16 the scaler skips such steps, as it is meant to.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, may_wait: bool):
        self.optimizer = optimizer
        self.waits = may_wait or not getattr(optimizer, "_step_supports_amp_scaling", False)
        self.found = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, grad_norm: torch.Tensor, step: int) -> bool:
        """Called before the optimizer's step `step` (from 0); False: the step must not be taken."""
        if self.waits:
            if torch.isfinite(grad_norm):
                return True
            self.bad_step.fill_(step)
            return False
        is_bad = ~torch.isfinite(grad_norm)
        self.bad_step.copy_(torch.where(is_bad & (self.bad_step < 0), step, self.bad_step))
        self.found.copy_(torch.maximum(self.found, is_bad.to(self.found.dtype)))  # stays: later steps are skipped too
        self.optimizer.grad_scale, self.optimizer.found_inf = None, self.found
        return True

    def check(self, rate: float, where_to_go_on: Callable[[], str]):
        """Raises UserError if a step was skipped; waits for the device."""
        step = int(self.bad_step)
        if step >= 0:
            raise UserError(
                f"The loss or its gradient is not finite at step {step + 1}, rate {rate:.2e}: that step was not taken. "
                f"{where_to_go_on()} Lower --learning_rate, raise --warmup_steps, or set --max_grad_norm, in another "
                "--output_dir."
            )
