"""The recipes for one GPU take two steps on the CPU: their flags fit together, and both image sizes are trained."""

import pytest
from test_run_train import metrics

from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.loop import train


@pytest.mark.parametrize("name, millions", [("cifar10_60s", 6.3), ("cifar10_5min", 14.2)])
def test_two_steps_on_the_cpu_train_at_both_sizes(parquet_repo, tmp_path, capsys, name, millions):
    data = parquet_repo(num_classes=10, size=(32, 32), row_group=50, train=[100], test=[20])
    flags = ["--recipe", name, "--dataset_name", data, "--max_steps", 2, "--ema_decay", "none", "--logging_steps", 1]
    flags += ["--torch_compile", "false", "--train_batch_size", 8, "--train_val_split", 0.1, "--report_to", "none"]
    results = train(*parse_arguments([str(flag) for flag in (*flags, "--output_dir", tmp_path / "run")]))
    assert results["num_parameters"] == pytest.approx(millions * 1e6, rel=0.02)
    assert "1 step at 24 pixels, then 1 at full size" in capsys.readouterr().out
    losses = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == 2 and losses[0] == pytest.approx(2.303, abs=0.6)  # ln 10: a head that knows nothing
