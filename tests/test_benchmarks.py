"""The README's numbers are those of the recorded runs."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import finetuning  # noqa: E402
import results_table  # noqa: E402


def test_the_table_of_scores_in_the_readme_is_made_from_the_recorded_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results_table.with_scores(readme) == readme


def test_a_changed_number_in_the_readme_would_be_seen():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    score = results_table.table(results_table.read_runs()).splitlines()[2].split("|")[3].strip()
    assert results_table.with_scores(readme.replace(score, "99.99")) == readme


def test_the_table_of_fine_tuning_is_the_recorded_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert finetuning.with_recorded(readme) == readme
    assert finetuning.with_recorded(readme.replace("| head |", "| neck |")) == readme
