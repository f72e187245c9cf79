"""--time_budget: what is read, how many steps fit, and a run that equals the one with that many steps."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import Accelerator

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training import time_budget
from modeling_vit_scratch.training.time_budget import NUM_MEASURED_STEPS, Rehearsal, rehearse, seconds_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "text, seconds", [("20m", 1200), ("90s", 90), ("1h30m", 5400), ("45", 45), ("1.5h", 5400), ("2M 5S", 125)]
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "3d", "-5m", "0", "m", "inf", "nan", "5m3h"])
def test_other_words_are_refused_with_examples(text):
    with pytest.raises(UserError, match="--time_budget takes a time such as 20m, 90s or 1h30m"):
        seconds_of(text)


@pytest.mark.parametrize("seconds", [30, 61, 600])
def test_as_many_steps_as_fit_and_not_one_more(seconds):
    rehearsal = Rehearsal(0.05, {"validation": 2.0, "test": 4.0})

    def cost(steps):
        return steps * 0.05 + (steps // 100) * 2.0 + 6.0 + time_budget.SECONDS_FOR_PUBLISHING

    steps = rehearsal.steps_within(seconds, lambda n: n // 100)
    assert cost(steps) <= seconds < cost(steps + 1)


def test_a_time_too_short_for_one_step_gives_one():
    assert Rehearsal(5.0, {}).steps_within(1.0, lambda n: 0) == 1


def test_the_first_steps_are_not_counted_and_long_budgets_measure_longer(monkeypatch):
    now, taken = [0.0], []

    def take_steps(count):
        now[0] += count * 0.01 if taken else 60.0  # the first ones compile
        taken.append(count)

    def evaluate():
        now[0] += 3.0

    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: now[0])
    found = rehearse(Accelerator(cpu=True), take_steps, {"test": evaluate}, seconds=100)
    assert found.step_seconds == pytest.approx(0.01) and found.evaluation_seconds == {"test": pytest.approx(3.0)}
    assert sum(taken[1:]) == pytest.approx(200, abs=1) and taken[1] == NUM_MEASURED_STEPS  # a fiftieth of the budget


LAUNCHED = """
import sys
from modeling_vit_scratch.training.time_budget import command_began
print(command_began() - float(sys.argv[1]))
"""


@pytest.mark.parametrize("name", ["accelerate", "somebody"])
def test_a_budget_counts_from_the_command_and_its_launcher(name, tmp_path):
    # apart from the script: what lies beside a script is what it imports by that name
    script, launcher = tmp_path / "script.py", tmp_path / "bin" / name
    launcher.parent.mkdir()
    script.write_text(LAUNCHED)
    launcher.write_text(
        "import subprocess, sys, time\nstart = sys.argv[1]\ntime.sleep(3)\n"
        f"subprocess.run([sys.executable, {str(script)!r}, start], check=True)\n"
    )
    began = time.time()
    words = [sys.executable, launcher, str(began)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60, env=environment)
    # the launcher waits three seconds before it starts the script
    assert float(done.stdout) == pytest.approx(0.0 if name == "accelerate" else 3.0, abs=1.5)
