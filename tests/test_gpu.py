"""On a GPU: `pytest -m gpu`. Runs in processes of their own; the rest of the suite stays on the CPU."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from test_run_train import ROOT, launch, metrics, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = "cuda"
DIGITS = ["--recipe", "digits", "--max_steps", 400, "--report_to", "none"]


def train(folder, *arguments, precision="no"):
    """results.json of `python run_train.py` on the GPU."""
    variables = {**os.environ, "ACCELERATE_USE_CPU": "false", "ACCELERATE_MIXED_PRECISION": precision}
    command = [sys.executable, str(ROOT / "run_train.py"), "--output_dir", str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((folder / "results.json").read_text())
    assert results["hardware"]["device"] == DEVICE and results["mixed_precision"] == precision
    return results


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_digits_are_learned_in_every_precision(tmp_path, precision, optim):
    results = train(tmp_path / "run", *DIGITS, "--optim", optim, precision=precision)
    assert results["test_accuracy"] > 0.93
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_resumed_run_agrees_with_the_uninterrupted_one(tmp_path):
    arguments = [*DIGITS[:2], "--max_steps", 60, "--report_to", "none", "--save_steps", 20, "--logging_steps", 10]
    train(tmp_path / "whole", *arguments)
    train(tmp_path / "broken", *arguments)
    (tmp_path / "broken" / "results.json").unlink()
    checkpoints = tmp_path / "broken" / "checkpoints"
    shutil.rmtree(checkpoints / "step-000060")
    begun = (checkpoints / "step-000040" / "state.json").stat().st_mtime_ns
    train(tmp_path / "broken", *arguments)
    assert (checkpoints / "step-000040" / "state.json").stat().st_mtime_ns == begun  # it was not written anew
    pairs = zip(metrics(tmp_path / "whole"), metrics(tmp_path / "broken"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], abs=2e-3) for a, b in pairs if "loss" in a)


def test_a_resumed_run_is_the_same_bit_for_bit_with_deterministic_algorithms(tmp_path):
    arguments = [
        *DIGITS[:2],
        "--max_steps",
        60,
        "--report_to",
        "none",
        "--save_steps",
        20,
        "--full_determinism",
        "true",
    ]
    for name in ("whole", "broken"):
        train(tmp_path / name, *arguments)
    (tmp_path / "broken" / "results.json").unlink()
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000060")
    train(tmp_path / "broken", *arguments)
    whole, broken = (weights(tmp_path / name) for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_every_augmentation_and_both_image_sizes_run_compiled(parquet_repo, tmp_path):
    data = parquet_repo(num_classes=10, size=(32, 32), row_group=50, train=[200], test=[40])
    results = train(
        tmp_path / "run", "--recipe", "cifar10_5min", "--dataset_name", data, "--preset", "nano", "--max_steps", 10,
        "--train_batch_size", 64, "--ema_decay", 0.5, "--report_to", "none", "--logging_steps", 1, precision="bf16",
    )  # fmt: skip
    assert results["steps"] == 10 and (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_stream_with_workers_trains(parquet_repo, tmp_path):
    data = parquet_repo(size=(32, 32), train=[60, 40], test=[20])
    results = train(
        tmp_path / "run", "--recipe", "cifar10", "--dataset_name", data, "--streaming", "true", "--max_steps", 12,
        "--dataloader_num_workers", 2, "--train_batch_size", 32, "--mixup_alpha", 0.8, "--random_erasing_prob", 0.5,
        "--auto_augment", "trivialaugment", "--report_to", "none",
    )  # fmt: skip
    assert results["steps"] == 12


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
@pytest.mark.parametrize("flags", [[], ["--mixup_alpha", 0.8, "--optim", "muon"]], ids=["adamw", "muon and mixup"])
def test_two_gpus_take_the_steps_of_one(tmp_path, flags):
    arguments = [*DIGITS[:2], "--max_steps", 40, "--report_to", "none", "--logging_steps", 5, *flags]
    train(tmp_path / "one", *arguments)
    done = launch(2, *arguments, "--output_dir", tmp_path / "two", ACCELERATE_USE_CPU="false")
    assert done.returncode == 0, done.stdout + done.stderr
    pairs = zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], abs=5e-3) for a, b in pairs if "loss" in a)
