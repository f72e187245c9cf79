"""docs/exactness.md shows what was recorded, and what was recorded is what must hold."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import exactness


def test_the_tables_of_the_page_are_made_from_recorded_runs():
    page = exactness.PAGE.read_text(encoding="utf-8")
    assert exactness.with_tables(page) == page
    assert exactness.with_tables(page.replace("| nothing |", "| weights |")) == page


def test_nothing_that_was_recorded_differs():
    kills = {name: exactness.read(name) for name in exactness.SOAKS}
    assert [len(record["kills"]) for record in kills.values()] == [50, 50, 20]
    assert all(record["killed"] == record["uninterrupted"] for record in kills.values())
    assert all(row["is_ok"] for name in ("equality", "faults") for row in exactness.read(name)["rows"])
