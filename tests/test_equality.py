"""The table of runs that must end alike compares what it says, and would see a difference."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from modeling_vit_scratch.training import loop, publishing
from modeling_vit_scratch.training.flags import main

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import equality  # noqa: E402
from equality import FLOAT64, Outcome, Trainer, rows  # noqa: E402


class Killed(BaseException):
    """Nothing catches it: what a start did not write by now is lost."""


@pytest.fixture
def start(monkeypatch):
    """A start in this process, without pictures."""
    real = loop.learning_rate_at
    for name in ("write_plots", "write_report"):
        monkeypatch.setattr(publishing, name, lambda *_: None)

    def train(flags, log, num_processes, dies_at):
        def rate_or_death(step, *rest):
            if step == dies_at:
                raise Killed
            return real(step, *rest)

        monkeypatch.setattr(loop, "learning_rate_at", rate_or_death)
        log.write_text("")
        try:
            return main(flags)
        except Killed:
            return -9

    return train


def shortened(row, steps=9, kills=(3, 8)):
    """The row with fewer steps."""
    first, other = (replace(run, steps=steps, kills=kills if run.kills else ()) for run in (row.first, row.other))
    return replace(row, first=first, other=other)


def row_of(what, **fields):
    """The first row of this name whose other run is of one process and has these fields."""
    wanted = {"num_processes": 1, **fields}.items()
    return next(r for r in rows() if r.what == what and all(getattr(r.other, name) == value for name, value in wanted))


@pytest.mark.parametrize(
    "row",
    [
        row_of("resumed, kept decoded"),
        row_of("resumed, streamed", workers=(0,)),
        row_of("parts, muon, float64"),
    ],
    ids=lambda row: row.what,
)
def test_rows_of_one_process_end_alike(row, start, tmp_path):
    row = shortened(row)
    outcome = Trainer(tmp_path, start).outcome(row)
    assert outcome.is_ok(row.limit), outcome
    assert equality.cells(row, outcome)[-1] == "yes"
    if row.limit is None:
        assert outcome.differing == [] and outcome.loss_difference == 0
        logs = sorted(tmp_path.glob("run-1-*.log"))
        assert len(logs) == 3  # two kills


def test_a_run_that_draws_otherwise_is_seen(start, tmp_path):
    row = shortened(row_of("parts, adamw, float64"), steps=4)
    other = replace(row.other, flags=(*row.other.flags, ("seed", 7)))
    outcome = Trainer(tmp_path, start).outcome(replace(row, other=other))
    assert not outcome.is_ok(FLOAT64) and not outcome.is_ok(None)
    assert outcome.loss_difference > 1e-4 and {"weights", "metrics"} <= set(outcome.differing)
    assert equality.cells(row, outcome)[-1] == "NO"


def test_a_start_that_hangs_or_fails_is_a_row_that_is_not_ok(tmp_path):
    row = shortened(row_of("resumed, kept decoded"))
    for code, said in ((None, "hangs"), (2, "ended with code 2"), (-9, "ended with code -9")):
        outcome = Trainer(tmp_path, lambda *_, code=code: code).outcome(row)
        assert said in outcome.error and not outcome.is_ok(None) and not outcome.is_ok(1.0)
        assert equality.cells(row, outcome)[-1] == "NO"


def test_each_thing_that_is_compared_counts():
    same = Outcome(0.0, are_rates_equal=True)
    assert same.is_ok(None) and same.is_ok(1e-9)
    assert replace(same, differing=["weights"]).is_ok(1e-9) and not replace(same, differing=["weights"]).is_ok(None)
    for change in ({"loss_difference": 1e-3}, {"are_rates_equal": False}, {"are_counts_equal": False}):
        assert not replace(same, **change).is_ok(1e-4)
    assert not replace(same, loss_difference=math.nan).is_ok(1e-4)


def test_every_row_of_the_matrix_is_there_once():
    found = rows()
    assert len(set(found)) == len(found)
    resumed = [row for row in found if row.what.startswith("resumed")]
    assert {row.other.num_processes for row in resumed} == {1, 2} and all(len(row.other.kills) > 2 for row in resumed)
    assert {workers for row in resumed for workers in row.other.workers} >= {0, 1, 3}
    several = {(row.what, row.other.num_processes) for row in found if row.what.startswith("processes")}
    for optim in ("adamw", "adam", "sgd", "muon"):
        assert {(f"processes, {optim}, float64", number) for number in (2, 3)} <= several
