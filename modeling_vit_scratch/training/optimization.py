"""Parameter groups, optimizers, and learning rates as functions of the optimizer step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling_vit_scratch import ViTScratchPreTrainedModel


@dataclass(frozen=True)
class ParameterGroup:
    """Names and parameters that share a weight decay."""

    names: list[str]
    parameters: list[torch.nn.Parameter]
    weight_decay: float


def parameter_groups(model: ViTScratchPreTrainedModel, weight_decay: float) -> list[ParameterGroup]:
    """Two groups: matrices, which decay, and norms, biases, LayerScale, tokens and positions, which do not.

    Every trainable parameter stands in exactly one of them (article 1 leaves its tokens and positions out of both).
    """
    without = model.no_weight_decay()
    decayed: list[tuple[str, torch.nn.Parameter]] = []
    kept: list[tuple[str, torch.nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or name in without else decayed).append((name, parameter))
    groups = ((decayed, weight_decay), (kept, 0.0))
    return [ParameterGroup([n for n, _ in rows], [p for _, p in rows], rate) for rows, rate in groups if rows]


def build_adamw(groups: Iterable[ParameterGroup], recipe: Any) -> torch.optim.Optimizer:
    settings = [{"params": group.parameters, "weight_decay": group.weight_decay} for group in groups]
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return torch.optim.AdamW(settings, lr=recipe.learning_rate, betas=betas, eps=recipe.adam_epsilon, fused=True)


OPTIMIZERS: dict[str, Callable[[Iterable[ParameterGroup], Any], torch.optim.Optimizer]] = {"adamw": build_adamw}


# Each gives the share of the highest rate at `progress`, which runs from 0 after warmup to 1 at the end.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def num_warmup_steps(warmup_steps: float, total_steps: int) -> int:
    """Warmup in steps; a number under 1 is a share of all steps, as in transformers 5."""
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * total_steps)


def learning_rate_at(step: int, total_steps: int, highest: float, warmup_steps: float, schedule: str) -> float:
    """The rate of optimizer step `step` (the first is 0): rising in a line, then as the schedule says.

    It depends on the step alone, never on the number of processes.
    """
    warmup = num_warmup_steps(warmup_steps, total_steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * SCHEDULES[schedule]((step - warmup) / max(total_steps - warmup, 1))
