"""--time_budget: as many steps as fit into a time, fixed once, so that the schedule ends as the time does."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from accelerate import Accelerator

from ..errors import UserError
from .machine import agree, launcher

UNITS = {"h": 3600, "m": 60, "s": 1}
NUM_WARM_STEPS = 3  # the first steps choose kernels and fill caches; with --torch_compile they compile
NUM_MEASURED_STEPS = 20
SECONDS_FOR_PUBLISHING = 4.0  # checkpoints, plots, report and model folder, mostly at the end of a run


def seconds_of(text: str) -> float:
    """The seconds of "20m", "90s", "1h30m", or of a plain number. Raises UserError for anything else or for zero."""
    compact = text.replace(" ", "").lower()
    try:
        seconds = float(compact)
    except ValueError:
        if not re.fullmatch(r"(\d+(\.\d+)?h)?(\d+(\.\d+)?m)?(\d+(\.\d+)?s)?", compact):
            seconds = math.nan
        else:
            seconds = sum(float(n) * UNITS[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)([hms])", compact))
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"--time_budget takes a time such as 20m, 90s or 1h30m, got {text!r}.")
    return seconds


def command_began() -> float:
    """The time, as time.time() counts it, at which this command began: its launcher, where one started this process."""
    return (launcher() or psutil.Process()).create_time()


@dataclass
class Rehearsal:
    """What a run costs, measured before it: seconds a step, and seconds to evaluate each held-out split.

    initial_step_seconds: of one of the first steps, where those see less of their images.
    """

    step_seconds: float
    evaluation_seconds: dict[str, float]
    initial_step_seconds: float | None = None

    @property
    def each_step(self) -> str:
        first = "" if self.initial_step_seconds is None else f"{self.initial_step_seconds:.3f} s and then "
        return f"{first}{self.step_seconds:.3f} s"

    def steps_within(
        self,
        seconds: float,
        evaluations_in: Callable[[int], int],
        initial_steps_in: Callable[[int], int] = lambda num_steps: 0,
    ) -> int:
        """The most steps that end, with their evaluations and the final ones, within `seconds`; at least one.

        evaluations_in, initial_steps_in: how many evaluations of the validation split a run of so many steps makes, and
        how many of the steps are such first ones.
        """
        final = sum(self.evaluation_seconds.values()) + SECONDS_FOR_PUBLISHING
        each = self.evaluation_seconds.get("validation", 0.0)
        initial_seconds = self.step_seconds if self.initial_step_seconds is None else self.initial_step_seconds
        low, high = 1, max(1, int(seconds / min(initial_seconds, self.step_seconds)))
        while low < high:
            middle = (low + high + 1) // 2
            initial = initial_steps_in(middle)
            cost = initial * initial_seconds + (middle - initial) * self.step_seconds
            cost += evaluations_in(middle) * each + final
            low, high = (middle, high) if cost <= seconds else (low, middle - 1)
        return low


def rehearse(
    accelerator: Accelerator,
    take_steps: Callable[[int], None],
    evaluate: dict[str, Callable[[], object]],
    seconds: float,
    take_initial_steps: Callable[[int], None] | None = None,
) -> Rehearsal:
    """Measures steps, at least NUM_MEASURED_STEPS and a fiftieth of the budget, and one evaluation of each split.

    take_steps(n) takes n steps that leave no trace in the weights, and take_initial_steps(n) n of those that a run
    begins with, where they are others: they are measured for as long, and first, as in the run. All processes measure
    together; the main one's clock counts.
    """
    wanted = min(seconds / 50, 10.0)
    initial = None if take_initial_steps is None else _seconds_a_step(accelerator, take_initial_steps, wanted)
    each = _seconds_a_step(accelerator, take_steps, wanted)
    evaluations = {name: _timed(call) for name, call in evaluate.items()}
    return agree(accelerator, lambda: Rehearsal(each, evaluations, initial))


def _seconds_a_step(accelerator: Accelerator, take_steps: Callable[[int], None], wanted: float) -> float:
    """Seconds of a step, a mean over at least NUM_MEASURED_STEPS and `wanted` seconds."""
    take_steps(NUM_WARM_STEPS)
    elapsed = _timed(lambda: take_steps(NUM_MEASURED_STEPS))
    more = agree(accelerator, lambda: max(0, math.ceil((wanted - elapsed) / elapsed * NUM_MEASURED_STEPS)))
    if more:
        elapsed += _timed(lambda: take_steps(more))
    return elapsed / (NUM_MEASURED_STEPS + more)


def _timed(call: Callable[[], object]) -> float:
    _finish_queue()
    started = time.perf_counter()
    call()
    _finish_queue()
    return time.perf_counter() - started


def _finish_queue():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
