"""Muon: momentum whose matrices are made orthogonal. One batched iteration for all matrices of a shape."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..functions_vit_scratch import is_for_onednn, linear_product

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic: steep at zero, so that five iterations suffice
NUM_ITERATIONS = 5
SMALLEST_SIDE = 192  # of a matrix, from which oneDNN's products, one after the other, beat a batch of MKL's


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) with Nesterov momentum, decoupled decay and AdamW's scale of updates.

    The step is torch.optim.Muon's with adjust_lr_fn="match_rms_adamw". Its loop over matrices takes a fifth of a small
    network's step on a CPU; batched products take the same iterations of all matrices of one shape at once.

    `compute_dtype` is what the iterations' products are computed in: bfloat16 in torch, float16 where a run trains in
    that, and by default the precision of the matrices themselves. Processors without units for bfloat16 need thirty
    times as long for it as for float32 (benchmarks/NOTES.md).

    Like torch's fused kernels it takes `grad_scale` and `found_inf`, tensors on the device that GradScaler sets: what
    gradients are divided by, and whether the step is left out, state and all. It waits for nothing to know.
    """

    _step_supports_amp_scaling = True  # for GradScaler, which would take a `grad_scale` of the class for a factor
    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        compute_dtype: torch.dtype | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.compute_dtype = compute_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None if closure is None else torch.enable_grad()(closure)()
        by_shape: dict[tuple[int, ...], list[tuple[torch.Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append((parameter, group))
        for shape, members in by_shape.items():
            momenta = torch.stack([self._momentum(*member) for member in members])
            updates = orthogonalised(momenta, self.compute_dtype)
            taken = 1.0
            if self.found_inf is not None:
                taken = (self.found_inf == 0).to(members[0][0].dtype)  # 0 or 1
                updates = updates * taken
            scale = 0.2 * math.sqrt(max(shape))  # 2502.16982, section 2.2
            for (parameter, group), update in zip(members, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"] * taken)
                parameter.add_(update, alpha=-group["lr"] * scale)
        return result

    def _momentum(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state, gradient = self.state[parameter], parameter.grad
        if (grad_scale := getattr(self, "grad_scale", None)) is not None:
            gradient = gradient / grad_scale
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"]
        if self.found_inf is not None:  # where it is set the average stays: its step towards itself is nought
            gradient = torch.where(self.found_inf == 0, gradient, average)
        average.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(average, group["momentum"])


def orthogonalised(matrices: torch.Tensor, compute_dtype: torch.dtype | None = None) -> torch.Tensor:
    """About U V^T of each matrix U S V^T: singular values between 0.7 and 1.2. (K, rows, columns) -> same.

    Newton-Schulz iterations, on the side of fewer rows, in `compute_dtype`, which the result has too; None: in the
    precision of the matrices.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    factors = matrices.transpose(1, 2) if is_tall else matrices
    factors = factors / factors.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    factors = factors.to(compute_dtype or matrices.dtype)
    if factors.shape[1] >= SMALLEST_SIDE and is_for_onednn(factors[0], factors[0]):
        factors = torch.stack([_iterated(factor) for factor in factors])
    else:
        a, b, c = COEFFICIENTS
        for _ in range(NUM_ITERATIONS):
            gram = factors @ factors.transpose(1, 2)
            gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factors = torch.baddbmm(factors, gram, factors, beta=a)
    return factors.transpose(1, 2) if is_tall else factors


def _iterated(factor: torch.Tensor) -> torch.Tensor:
    """The same iterations of one matrix (rows, columns), by the products of functions_vit_scratch.py."""
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = linear_product(factor, factor)
        gram = torch.add(b * gram, linear_product(gram, gram), alpha=c)  # a gram matrix is its transpose
        factor = torch.add(a * factor, linear_product(gram, factor.t()))
    return factor
