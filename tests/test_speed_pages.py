"""The tables of speed in the README and in docs/speed.md are made from recorded runs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import speed


@pytest.mark.parametrize("path", speed.PAGES, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_records(path):
    page, with_its_tables = path.read_text(encoding="utf-8"), speed.PAGES[path]
    assert with_its_tables(page) == page
    assert with_its_tables(page.replace("transformers", "others")) != page.replace("transformers", "others")


def test_a_step_is_compared_with_the_steps_of_its_own_shape_and_precision():
    rows = speed.read("train-step")["rows"]
    rates = {(row["shape"], row["precision"], row["network"]): row["images_per_second"] for row in rows}
    for row in rows:
        ours = rates[row["shape"], row["precision"], "ours"]
        assert row["ours_over_this"] == pytest.approx(ours / row["images_per_second"])
