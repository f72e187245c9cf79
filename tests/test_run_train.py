"""Whole runs: what is learned, resumed, counted and refused."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training import loop
from modeling_vit_scratch.training.flags import main, parse_arguments
from modeling_vit_scratch.training.recording import read_metrics

ROOT = Path(__file__).resolve().parents[1]
TINY = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=24"
TIMING = ("images_per_second", "data_wait")


def run(output_dir, *arguments):
    """The results of a tiny run with these flags."""
    fixed = ["--output_dir", str(output_dir), "--report_to", "none", "--config_overrides", TINY, "--cpu_threads", "1"]
    return loop.train(*parse_arguments([*fixed, *map(str, arguments)]))


def weights(output_dir):
    return load_file(Path(output_dir) / "model" / "model.safetensors")


def metrics(output_dir):
    rows = read_metrics(Path(output_dir) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def launch(num_processes, *arguments, **environment):
    """The finished process of `accelerate launch` on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
    ]
    command += ["--num_processes", str(num_processes), "--main_process_port", str(port), str(ROOT / "run_train.py")]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.run([*command, *map(str, arguments)], env=variables, capture_output=True, text=True, timeout=300)


def test_sixteen_images_are_memorised(image_folder, tmp_path):
    folder = image_folder(size=(8, 8), cat=8, dog=8)
    results = run(
        tmp_path / "run", "--train_dir", folder, "--recipe", "cifar10", "--max_steps", 60, "--train_batch_size", 16,
        "--horizontal_flip_prob", 0, "--crop_padding", 0, "--train_val_split", 0, "--test_dir", folder,
        "--learning_rate", 1e-2, "--label_smoothing_factor", 0,
    )  # fmt: skip
    assert results["test_accuracy"] == 1.0 and results["test_loss"] < 0.1
    assert results["steps"] == 60 and results["dataset"]["splits"] == {"train": 16, "test": 16}


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_resumed_run_ends_as_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, streaming):
    arguments = [
        "--max_steps", 14, "--save_steps", 4, "--logging_steps", 3, "--eval_steps", 7, "--streaming", streaming,
        "--train_batch_size", 100, "--load_best_model_at_end", "true",
    ]  # fmt: skip
    dropouts = f"{TINY},hidden_dropout_prob=0.1,drop_path_rate=0.2"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = run(whole, *arguments, "--config_overrides", dropouts)

    class Killed(Exception):
        pass

    real, steps = loop.learning_rate_at, []

    def die_at_step_9(step, *rest):
        steps.append(step)
        if step == 9:
            raise Killed
        return real(step, *rest)

    monkeypatch.setattr(loop, "learning_rate_at", die_at_step_9)
    with pytest.raises(Killed):
        run(broken, *arguments, "--config_overrides", dropouts)
    monkeypatch.setattr(loop, "learning_rate_at", lambda step, *rest: (steps.append(step), real(step, *rest))[1])
    results = run(broken, *arguments, "--config_overrides", dropouts)
    assert steps == [*range(10), *range(8, 14)]  # from the checkpoint of step 8
    assert equal(weights(whole), weights(broken))
    assert metrics(broken) == metrics(whole)  # what was logged after the checkpoint is cut off and logged again
    assert loop.final_scores(results) == loop.final_scores(expected)


def test_a_finished_run_shows_its_scores_and_trains_no_more(tmp_path, capsys):
    first = run(tmp_path / "run", "--max_steps", 2)
    capsys.readouterr()
    before = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    assert run(tmp_path / "run", "--max_steps", 2) == first
    out = capsys.readouterr().out
    assert "finished" in out and f"{first['test_accuracy']:.4f}" in out
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns == before


def test_the_same_fields_in_other_words_are_the_same_recipe(tmp_path):
    results = run(tmp_path / "run", "--max_steps", 2)
    words = ", ".join(reversed(TINY.split(",")))
    assert run(tmp_path / "run", "--max_steps", 2, "--config_overrides", words) == results


def test_another_recipe_is_refused_until_told_to_start_afresh(tmp_path):
    run(tmp_path / "run", "--max_steps", 2, "--learning_rate", 0.002)
    with pytest.raises(UserError, match=r"another recipe \(max_steps: 2 -> 3; learning_rate: 0.002 -> 0.1\)"):
        run(tmp_path / "run", "--max_steps", 3, "--learning_rate", 0.1)
    several = ["--max_steps", 3, "--learning_rate", 0.1, "--seed", 7, "--weight_decay", 0.2, "--optim", "sgd",
               "--momentum", 0.5, "--max_grad_norm", 2]  # fmt: skip
    with pytest.raises(UserError, match=r"-> \S+; and 2 more\). Go on with the old values"):
        run(tmp_path / "run", *several)
    run(tmp_path / "run", "--max_steps", 2, "--learning_rate", 0.002, "--logging_steps", 1)  # may change
    results = run(tmp_path / "run", "--max_steps", 3, "--overwrite_output_dir", "true")
    assert results["steps"] == 3


def test_a_run_from_before_there_was_a_flag_goes_on_without_it(tmp_path):
    results = run(tmp_path / "run", "--max_steps", 2)
    record = tmp_path / "run" / "recipe.json"
    written = json.loads(record.read_text())
    record.write_text(json.dumps({name: value for name, value in written.items() if name != "color_jitter"}))
    assert run(tmp_path / "run", "--max_steps", 2) == results
    with pytest.raises(UserError, match=r"another recipe \(color_jitter: 0.0 -> 0.3\)"):
        run(tmp_path / "run", "--max_steps", 2, "--color_jitter", 0.3)


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "model").mkdir()
    for arguments in ([], ["--overwrite_output_dir", "true"]):
        with pytest.raises(UserError, match="holds files but no run"):
            run(tmp_path, "--max_steps", 1, *arguments)
    assert (tmp_path / "thesis.txt").exists() and (tmp_path / "model").is_dir()
    with pytest.raises(UserError, match="thesis.txt cannot be used"):
        run(tmp_path / "thesis.txt", "--max_steps", 1)


def test_accumulated_parts_take_the_steps_of_one_batch(tmp_path):
    for parts in (1, 4):
        run(tmp_path / str(parts), "--max_steps", 20, "--train_batch_size", 50, "--gradient_accumulation_steps", parts)
    pairs = zip(metrics(tmp_path / "1"), metrics(tmp_path / "4"), strict=True)
    # the same sums in another order of float32
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-4) for a, b in pairs if "loss" in a)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's death on Linux")
def test_a_bare_launcher_that_is_stopped_leaves_a_saved_run_and_no_orphan(tmp_path):
    command = ["accelerate", "launch", str(ROOT / "run_train.py"), "--max_steps", "4000", "--logging_steps", "5"]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    launched = subprocess.Popen(
        [*command, "--report_to", "none", "--output_dir", str(tmp_path / "run")], env=variables, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    lines = iter(launched.stdout.readline, "")
    assert any(line.startswith("step 10/") for line in lines)
    launched.terminate()
    said = "".join(lines)  # until the trainer, which has the pipe too, has ended
    assert "stopped by a signal; saved" in said, said
    assert launched.wait(30) != 0 and list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_two_processes_take_the_steps_and_count_the_scores_of_one(parquet_repo, tmp_path):
    root = parquet_repo(train=[50, 31], test=[20, 17])  # 37 test images: 2 does not divide them
    # epochs end inside batches: there partners of mixed images lie on the other rank, elsewhere on the same
    arguments = ["--dataset_name", root, "--recipe", "cifar10", "--max_steps", 20, "--train_batch_size", 32,
                 "--logging_steps", 5, "--streaming", "true", "--stream_lanes", 6, "--stream_window", 8,
                 "--auto_augment", "randaugment", "--random_erasing_prob", 0.3, "--mixup_alpha", 0.8,
                 "--cutmix_alpha", 1.0, "--ema_decay", 0.8]  # fmt: skip
    one = run(tmp_path / "one", *arguments)
    done = launch(2, *arguments, "--output_dir", tmp_path / "two", "--report_to", "none", "--config_overrides", TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["num_processes"] == 2 and f"{one['num_parameters']:,} parameters" in done.stdout
    pairs = list(zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True))
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-4) for a, b in pairs if "loss" in a)
    assert all(a["learning_rate"] == b["learning_rate"] for a, b in pairs if "loss" in a)
    assert one["confusion"] == two["confusion"] and sum(map(sum, two["confusion"]["test"])) == 37
    assert one["test_accuracy"] == two["test_accuracy"]


def test_a_launch_that_started_fewer_processes_than_asked_is_an_error(tmp_path):
    done = launch(2, "--max_steps", 1, "--output_dir", tmp_path / "run", ACCELERATE_USE_CPU="false")
    if torch.cuda.is_available():
        pytest.skip("two processes on GPUs are a good launch")
    if "2 process(es) on cpu" in done.stdout:
        pytest.skip("this launcher starts two processes on the CPU though it was told not to: a good launch (1.12)")
    assert done.returncode != 0
    assert "2 processes were launched, but each of them is on its own (1)." in done.stderr
    assert done.stderr.count("error: 2 processes") == 1
    assert not (tmp_path / "run").exists()


def test_sigterm_saves_and_leaves_with_its_own_code(tmp_path):
    command = [sys.executable, str(ROOT / "run_train.py"), "--output_dir", str(tmp_path / "run"), "--report_to", "none",
               "--logging_steps", "5", "--save_steps", "100000", "--config_overrides", TINY]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not process.stdout.readline().startswith("step"):
            pass
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    saved = re.search(r"saved (\S+step-\d+)", errors).group(1)
    assert Path(saved).is_dir() and "Traceback" not in errors


def test_the_run_folder_holds_everything(tmp_path):
    results = run(tmp_path / "run", "--max_steps", 5, "--save_steps", 1, "--save_total_limit", 2)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"recipe.json", "metrics.jsonl", "results.json", "report.html", "plots", "checkpoints", "model"}
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000004", "step-000005"}
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    row = next(row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row)
    columns = {"step", "loss", "learning_rate", "train_accuracy", "grad_norm", "images_per_second", "data_wait"}
    assert columns <= set(row)
    total = results["dataset"]["splits"]["test"]
    confusion = results["confusion"]["test"]
    assert results["test_accuracy"] == sum(confusion[i][i] for i in range(10)) / total


def test_the_best_weights_are_published_on_request(tmp_path):
    results = run(tmp_path / "run", "--max_steps", 8, "--eval_steps", 2, "--learning_rate", 0.3, "--warmup_steps", 0,
                  "--load_best_model_at_end", "true", "--metric_for_best_model", "loss")  # fmt: skip
    rows = [row for row in metrics(tmp_path / "run") if "eval_loss" in row]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert results["weights"] == f"best at step {best['step']}"
    assert results["validation_loss"] == pytest.approx(best["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "vit_b"], "No preset 'vit_b'."),
        (["--dataset_name", "digit"], "No dataset 'digit'. Did you mean 'digits'?"),
        (["--image_size", "9"], "the nearest sizes that are: 8 and 10"),
        (["--config_overrides", "hidden_size=10,num_attention_heads=4"], "is not a multiple of num_attention_heads 4"),
        (["--recipe", "digits", "--model_name_or_path", "./nowhere"], "./nowhere: there is no such folder or file"),
        (["--recipe", "digits", "--model_name_or_path", "me/nothing"], "and the Hub cannot be reached"),
        (["--recipe", "cifar10"], "the Hub cannot be reached"),
        (["--recipe", "folder"], "needs images: give --train_dir"),
        (["--train_dir", "nowhere"], "there is no such folder"),
        (["--report_to", "tensorbord"], "No tracker 'tensorbord'. Did you mean 'tensorboard'?"),
        (["--image_mean", "0.5,0.5"], "--image_mean has 2 values, the images have 1 channel"),
        (["--validation_dir", "x"], "--validation_dir has no effect here: it goes with --train_dir"),
        (["--dataset_config_name", "x"], "--dataset_config_name has no effect here"),
        (["--image_column_name", "x"], "--image_column_name has no effect here"),
        (["--stream_lanes", "8"], "--stream_lanes has no effect here: it goes with --streaming true"),
        (["--metric_for_best_model", "loss"], "it goes with --load_best_model_at_end"),
        (["--dataloader_num_workers", "2"], "the images are decoded once and kept in memory"),
        (
            ["--train_val_split", "0", "--eval_steps", "5"],
            "--eval_steps has no effect here: there is no validation split",
        ),
        (["--crop_pct", "0.9"], "--crop_pct has no effect here"),
        (
            ["--interpolation", "bicubic"],
            "the images have the size that the network sees",
        ),
        (["--image_std", "0"], "--image_std must be above 0"),
        (["--config_overrides", "image_size=abc"], "image_size takes a number of pixels or [height,width], got 'abc'"),
        (["--config_overrides", "hidden_size={"], "'hidden_size={' has no value that can be read"),
        (["--config_overrides", "image_size=16", "--image_size", "8"], "both say the size"),
        (["--config_overrides", "num_channels=4"], "the images have 1; 1 and 3 work"),
    ],
)
def test_what_a_person_gets_wrong_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "run").exists()


def test_columns_and_labels_that_are_wrong_are_one_line(parquet_repo, tmp_path, capsys):
    root = str(parquet_repo(train=[9], image="pic"))
    common = ["--dataset_name", root, "--recipe", "cifar10", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    assert main([*common, "--image_column_name", "image"]) == 2
    assert "has no such column. It has: pic (image), label (3 classes)" in capsys.readouterr().err
    assert main([*common, "--train_val_split", "0.3", "--dataset_config_name", "other"]) == 2
    assert "BuilderConfig 'other' not found" in capsys.readouterr().err
