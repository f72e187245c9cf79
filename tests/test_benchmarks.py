"""The README's numbers are those of the recorded runs."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import distillation  # noqa: E402
import finetuning  # noqa: E402
import gpu  # noqa: E402
import results_table  # noqa: E402
import same_minutes  # noqa: E402

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification  # noqa: E402
from modeling_vit_scratch.training import effects  # noqa: E402
from modeling_vit_scratch.training.flags import parse_arguments  # noqa: E402
from modeling_vit_scratch.training.overrides import parse_overrides  # noqa: E402
from modeling_vit_scratch.training.resolution import resolution_of  # noqa: E402


def test_the_table_of_scores_in_the_readme_is_made_from_the_recorded_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results_table.with_scores(readme) == readme


def test_the_commands_of_recorded_runs_still_train_what_they_trained():
    for run in (run for runs in results_table.read_runs().values() for run in runs):
        words = results_table.command_of(run).partition("run_train.py ")[2]
        recipe, chosen = parse_arguments(shlex.split(words))
        effects.check_recipe(recipe, chosen)
        assert (recipe.recipe, recipe.seed) == (run["recipe"], run["seed"])
        overrides = parse_overrides(recipe.config_overrides)
        config = ViTScratchConfig.from_preset(recipe.preset, num_labels=len(run["class_names"]), **overrides)
        assert ViTScratchForImageClassification(config).num_parameters() == run["num_parameters"]
        resolution = resolution_of(recipe, chosen, config, run["dataset"]["splits"]["train"])
        pflop = resolution.pflop(config, run["steps"], run["steps"], recipe.train_batch_size)
        assert "train_pflop" not in run or pflop == pytest.approx(run["train_pflop"], rel=1e-6), run["command"]


def test_a_changed_number_in_the_readme_would_be_seen():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    score = results_table.table(results_table.read_runs()).splitlines()[2].split("|")[3].strip()
    assert results_table.with_scores(readme.replace(score, "99.99")) == readme


def test_the_table_of_fine_tuning_is_the_recorded_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert finetuning.with_recorded(readme) == readme
    assert finetuning.with_recorded(readme.replace("| head |", "| neck |")) == readme


def test_the_table_of_distillation_is_the_recorded_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert distillation.with_recorded(readme) == readme
    assert distillation.with_recorded(readme.replace("| labels alone |", "| labels |")) == readme


def test_the_table_of_the_same_minutes_is_the_recorded_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert same_minutes.with_recorded(readme) == readme
    assert same_minutes.with_recorded(readme.replace("transformers' example: ViT", "another ViT")) == readme


@pytest.mark.slow
def test_what_a_gpu_is_asked_runs_on_the_cpu(parquet_repo, tmp_path):
    data = parquet_repo(num_classes=10, size=(32, 32), row_group=50, train=[500], test=[40])
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), str(data), "--quick", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + "".join(log.read_text() for log in tmp_path.glob("*.log"))
    records = {
        name: json.loads((tmp_path / part.output).read_text()) for name, part in gpu.PARTS.items() if part.output
    }
    assert {row["network"] for row in records["compiled"]["rows"]} >= {"ours", "ours (compiled)"}
    assert all(
        records[name]["recipe"] == name and records[name]["steps"] == 2 for name in ("cifar10_60s", "cifar10_5min")
    )
