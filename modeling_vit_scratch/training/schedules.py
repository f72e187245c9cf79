"""Learning rates as pure functions of the optimizer step: never of the number of processes or of what came before."""

import math
from collections.abc import Callable
from itertools import pairwise

from ..errors import UserError
from .recipe import CONSTANT, Recipe

EVALUATIONS_PER_RUN = 10  # at most one an epoch, where no flag says more


def evaluation_interval(recipe: Recipe, epoch_steps: int, is_each_epoch: bool, total_steps: int) -> int:
    """The steps between two evaluations; is_each_epoch: where no flag says them, one an epoch, however many."""
    if recipe.eval_strategy == "epoch" or (recipe.eval_steps is None and is_each_epoch):
        return epoch_steps
    if recipe.eval_steps is not None:
        return in_steps(recipe.eval_steps, total_steps)
    return max(math.ceil(total_steps / EVALUATIONS_PER_RUN), epoch_steps)


def in_steps(steps: float, total_steps: int) -> int:
    """A number of steps, at least one; under 1 it is a share of all steps."""
    return max(1, round(steps if steps >= 1 else steps * total_steps))


def steps_text(steps: int) -> str:
    """1 step, 2,000 steps."""
    return f"{steps:,} step{'' if steps == 1 else 's'}"


def num_warmup_steps(warmup_steps: float, total_steps: int) -> int:
    """Warmup in steps; a number under 1 is a share of all steps, as in transformers 5."""
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * total_steps)


def cosine(step: int, total_steps: int, recipe: Recipe) -> float:
    """Half a cosine from the end of warmup to the end of the run (SGDR, 1608.03983, without restarts)."""
    return _above_floor(0.5 * (1 + math.cos(math.pi * _progress(step, total_steps, recipe))), recipe)


def cosine_with_restarts(step: int, total_steps: int, recipe: Recipe) -> float:
    """Half a cosine for each of lr_num_cycles equal parts, each from the highest rate (SGDR, 1608.03983)."""
    done = _progress(step, total_steps, recipe) * recipe.lr_num_cycles
    share = 0.5 * (1 + math.cos(math.pi * (done % 1.0))) if done < recipe.lr_num_cycles else 0.0
    return _above_floor(share, recipe)


def linear(step: int, total_steps: int, recipe: Recipe) -> float:
    """A line from the end of warmup to the end of the run."""
    return _above_floor(1 - _progress(step, total_steps, recipe), recipe)


def polynomial(step: int, total_steps: int, recipe: Recipe) -> float:
    """The line raised to lr_power; with 1 it is `linear`."""
    return _above_floor((1 - _progress(step, total_steps, recipe)) ** recipe.lr_power, recipe)


def constant(step: int, total_steps: int, recipe: Recipe) -> float:
    """The highest rate, to the end."""
    return 1.0


def multi_step(step: int, total_steps: int, recipe: Recipe) -> float:
    """Times lr_gamma at each milestone, down to the floor; milestones count from the run's first step."""
    passed = sum(step >= in_steps(milestone, total_steps) for milestone in recipe.lr_milestones)
    return max(recipe.min_lr_rate, recipe.lr_gamma**passed)


def warmup_stable_decay(step: int, total_steps: int, recipe: Recipe) -> float:
    """The highest rate, then a line to the floor over the last lr_decay_steps (2405.18392; its 1-sqrt falls faster)."""
    after_warmup = total_steps - num_warmup_steps(recipe.warmup_steps, total_steps)
    num_decay_steps = min(in_steps(recipe.lr_decay_steps, total_steps), after_warmup)  # two shares may round to more
    return _above_floor(min(1.0, (total_steps - step) / num_decay_steps), recipe)


# Each gives the share of the highest rate at an optimizer step after warmup.
SCHEDULES: dict[str, Callable[[int, int, Recipe], float]] = {
    "cosine": cosine,
    "cosine_with_restarts": cosine_with_restarts,
    "linear": linear,
    "polynomial": polynomial,
    **dict.fromkeys(CONSTANT, constant),
    "multi_step": multi_step,
    "warmup_stable_decay": warmup_stable_decay,
}


def learning_rate_at(step: int, total_steps: int, recipe: Recipe) -> float:
    """The rate of optimizer step `step` (the first is 0): rising in a line, then as the recipe's schedule says.

    Warmup's first step has the rate 1 / warmup of the highest, its last one the highest. A warmup longer than the run
    is a run that only rises: recipes are shortened with --max_steps to try them.
    """
    warmup = num_warmup_steps(recipe.warmup_steps, total_steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * SCHEDULES[recipe.lr_scheduler_type](step, total_steps, recipe)


def check_patience(patience: int | None, eval_every: int, total_steps: int, full_size_begins: int = 0):
    """Raises UserError where a run has too few evaluations to stop before its end: patience begins with the first one,
    or with the last one before the full size."""
    count = math.ceil(total_steps / eval_every) - max(full_size_begins // eval_every - 1, 0)
    if patience is not None and patience >= count - 1:
        raise UserError(
            f"--early_stopping_patience {patience} cannot stop this run: {steps_text(total_steps)}, of which each "
            f"{eval_every:,} are followed by an evaluation, {count} that count. Evaluate more often with --eval_steps, "
            "train longer, or have less patience."
        )


def check_schedule(recipe: Recipe, total_steps: int):
    """Raises UserError for milestones that are missing, out of order or never reached, or a decay that does not fit."""

    def unrounded(steps: float) -> float:  # shares of a short run may round to the same step, or to its end
        return steps if steps >= 1 else steps * total_steps

    if recipe.lr_scheduler_type == "multi_step":
        milestones = recipe.lr_milestones
        steps = [unrounded(milestone) for milestone in milestones]
        written = ",".join(f"{milestone:g}" for milestone in milestones)
        if not steps:
            raise UserError("--lr_scheduler_type multi_step needs --lr_milestones, such as 0.5,0.75.")
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise UserError(
                f"--lr_milestones {written} must ascend: in a run of {total_steps:,} steps they are "
                f"{', '.join(f'{step:,g}' for step in steps)}."
            )
        if steps[-1] >= total_steps:
            raise UserError(
                f"--lr_milestones {written}: a run of {total_steps:,} steps ends before step {milestones[-1]:,g}. "
                "Lower it, train longer, or give shares of all steps such as 0.5,0.75."
            )
    if recipe.lr_scheduler_type == "warmup_stable_decay":
        decay = unrounded(recipe.lr_decay_steps)
        if decay > total_steps:
            raise UserError(
                f"--lr_decay_steps {recipe.lr_decay_steps:g} does not fit a run of {total_steps:,} steps. "
                "Lower it, train longer, or give a share of all steps such as 0.2."
            )
        warmup = unrounded(recipe.warmup_steps)
        if warmup < total_steps < warmup + decay:
            raise UserError(
                f"--warmup_steps {recipe.warmup_steps:g} and --lr_decay_steps {recipe.lr_decay_steps:g} do not fit "
                f"together: {warmup:,g} + {decay:,g} of {total_steps:,} steps. Lower one of them or train longer."
            )


def _progress(step: int, total_steps: int, recipe: Recipe) -> float:
    """From 0 after warmup to 1 at the end."""
    warmup = num_warmup_steps(recipe.warmup_steps, total_steps)
    return (step - warmup) / max(total_steps - warmup, 1)


def _above_floor(share: float, recipe: Recipe) -> float:
    return recipe.min_lr_rate + (1 - recipe.min_lr_rate) * share
