"""What saves a run between its own checkpoints: a signal, which also ends it, and the minutes since the last one."""

import signal
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

AGREEMENT_SECONDS = 1.0  # between two looks at what all processes have received
MOST_STEPS = 100  # and never more steps than this

# SIGTERM comes when a machine is taken away or time is nearly up (Slurm's `--signal=TERM@120`). SIGUSR1 is the other
# that clusters send; torchrun dies of it, so it serves where no launcher stands between
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class Interruptions:
    """Listens for signals while it is entered; a second Ctrl-C is not caught.

    Processes get a signal at different steps and must leave at the same one: they agree about once a second, so that a
    GPU need not wait at every step and slow steps still end within the grace that launchers give (torchrun: 30 s).
    """

    def __init__(self, accelerator: Accelerator, save_minutes: float | None, step: int):
        self.accelerator, self.save_seconds = accelerator, None if save_minutes is None else 60 * save_minutes
        self.received: list[int] = []
        self._steps = _Looks(accelerator, step)
        self.saved_at = time.monotonic()

    def __enter__(self) -> "Interruptions":
        try:
            self._old = {number: signal.signal(number, self._remember) for number in SIGNALS}
        except ValueError:  # not the main thread
            self._old = {}
        return self

    def __exit__(self, *_: Any):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: Any):
        self.received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def saved(self):
        """Starts the minutes anew: a checkpoint was written."""
        self.saved_at = time.monotonic()

    def after(self, step: int) -> tuple[bool, bool]:
        """(whether to stop, whether the minutes are up) after this step; the same in all processes."""
        now = time.monotonic()
        is_due = self.save_seconds is not None and now - self.saved_at >= self.save_seconds
        num_signals, is_due = self._steps.agree(step, len(self.received), is_due and self.accelerator.is_main_process)
        return bool(num_signals), bool(is_due)

    def now(self) -> bool:
        """Whether to stop, asked by all processes at once."""
        return self.among_batches()(1)

    def among_batches(self) -> Callable[[int], bool]:
        """A function for the batches of an evaluation: whether to stop after this one, the same in all processes."""
        looks = _Looks(self.accelerator, 0)
        return lambda turn: bool(looks.agree(turn, len(self.received))[0])


class _Looks:
    """What processes tell each other about once a second, at the same of their steps."""

    def __init__(self, accelerator: Accelerator, step: int):
        self.accelerator = accelerator
        self.next_step, self.last_step, self.looked_at = step + 1, step, time.monotonic()

    def agree(self, step: int, *wishes: int) -> list[int]:
        """The wishes, each summed over the processes; zeros where it is not time yet."""
        if self.accelerator.num_processes == 1:
            return list(wishes)
        if step < self.next_step:
            return [0] * len(wishes)
        rate = max(step - self.last_step, 1) / max(time.monotonic() - self.looked_at, 1e-9)  # steps a second
        wait = min(max(int(rate * AGREEMENT_SECONDS), 1), MOST_STEPS)  # the main process's counts
        own = torch.tensor([*wishes, self.accelerator.is_main_process * wait], device=self.accelerator.device)
        *sums, wait = self.accelerator.reduce(own, reduction="sum").tolist()
        self.next_step, self.last_step, self.looked_at = step + wait, step, time.monotonic()
        return sums
