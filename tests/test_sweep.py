"""Sweeps: what runs, what is ranked how, what is refused, what goes on."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from modeling_vit_scratch import cli
from modeling_vit_scratch.errors import PassingError, UserError
from modeling_vit_scratch.training import checkpointing, loop
from modeling_vit_scratch.training.recipe import FIELDS
from modeling_vit_scratch.training.sweep import sweep
from modeling_vit_scratch.training.sweep_grid import NOT_SWEPT, parse_axis, parse_sweep

ROOT = Path(__file__).resolve().parents[1]
TINY = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=24"
SHORT = ["--report_to", "none", "--cpu_threads", "1", "--config_overrides", TINY, "--max_steps", "3"]
REAL = [*SHORT, "--logging_steps", "1", "--warmup_steps", "0", "--max_grad_norm", "0",
        "--grid", "learning_rate=1e-2,1e35", "--grid", "pooling:use_cls_token=cls:true,mean:false"]  # fmt: skip


def plan(output_dir, *arguments):
    return parse_sweep(["--output_dir", str(output_dir), *SHORT, *map(str, arguments)])


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


class Trained:
    """Stands in for `train`: counts its runs, writes what a run writes, and ends as `ends` says by run name."""

    def __init__(self, accuracy=lambda recipe: 0.5, ends=None):
        self.accuracy, self.ends, self.names, self.recipes = accuracy, ends or {}, [], []

    def __call__(self, recipe, chosen):
        folder = Path(recipe.output_dir)
        self.names.append(folder.name)
        self.recipes.append(recipe)
        end = self.ends.get(folder.name)
        if end is not None and "before" in str(end):
            raise end
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text("")
        if end is not None:
            raise end
        results = {"validation_accuracy": self.accuracy(recipe), "validation_loss": 1.0, "test_accuracy": 0.25,
                   "train_seconds": 2.0, "steps": 3, "images_per_second": 96.0, "command": "accelerate launch",
                   "dataset": {"splits": {"validation": 142}}}  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "report.html").write_text("")
        return results


@pytest.fixture
def trained(monkeypatch):
    """A maker of stand-ins that take the place of `train`."""

    def put(**settings):
        stand_in = Trained(**settings)
        monkeypatch.setattr(loop, "train", stand_in)
        return stand_in

    return put


@pytest.fixture(scope="module")
def real_sweep(tmp_path_factory):
    """A sweep of two rates, of which one diverges, and two kinds of pooling, really trained; its folder."""
    folder = tmp_path_factory.mktemp("real") / "sweep"
    assert cli.main(["sweep", "--output_dir", str(folder), *REAL]) == 0
    return folder


# ---------------------------------------------------------------- whole sweeps


def test_every_combination_is_a_run_folder_and_is_compared(real_sweep):
    runs = {f"learning_rate-{rate}_{pooling}" for rate in ("0.01", "1e+35")
            for pooling in ("pooling-cls_use_cls_token-true", "pooling-mean_use_cls_token-false")}  # fmt: skip
    assert names(real_sweep) == {*runs, "sweep.json", "sweep.md", "sweep.png"}
    record = json.loads((real_sweep / "sweep.json").read_text())
    for run in record["runs"][:2]:
        results = json.loads((real_sweep / run["name"] / "results.json").read_text())
        assert run["status"] == "finished" and results["steps"] == run["steps"] == 3
        assert all(run[name] == results[name] for name in ("validation_accuracy", "validation_loss", "test_accuracy"))
        config = json.loads((real_sweep / run["name"] / "model" / "config.json").read_text())
        assert config["hidden_size"] == 16  # the overrides that were given, and the grid's
        assert (config["pooling"], config["use_cls_token"]) == (
            run["values"]["pooling"],
            run["values"]["use_cls_token"],
        )
    text = (real_sweep / "sweep.md").read_text()
    assert "The choice is made by validation; the test score is only shown." in text
    assert (real_sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverges_is_recorded_and_the_sweep_goes_on(real_sweep):
    record = json.loads((real_sweep / "sweep.json").read_text())
    assert [run["status"] for run in record["runs"]] == ["finished", "finished", "failed", "failed"]
    assert all("not finite" in run["note"] for run in record["runs"][2:])
    text = (real_sweep / "sweep.md").read_text()
    assert "2 of 4 runs finished, 2 failed." in text
    assert f"- {record['runs'][2]['name']} failed: The loss" in text
    assert str(real_sweep) not in text  # a table may be shown to strangers


def test_a_sweep_that_is_started_again_runs_only_what_is_missing(real_sweep, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sweep"
    shutil.copytree(real_sweep, folder)
    before = json.loads((folder / "sweep.json").read_text())
    lost = "learning_rate-0.01_pooling-mean_use_cls_token-false"
    shutil.rmtree(folder / lost)
    trained, real = [], loop.train
    monkeypatch.setattr(
        loop, "train", lambda recipe, chosen: (trained.append(recipe.output_dir), real(recipe, chosen))[1]
    )
    assert cli.main(["sweep", "--output_dir", str(folder), *REAL]) == 0
    assert trained == [str(folder / lost)]  # and the failed ones are not tried again
    out = capsys.readouterr().out
    assert "[1/4] learning_rate-0.01_pooling-cls_use_cls_token-true: finished before" in out
    assert "[3/4] learning_rate-1e+35_pooling-cls_use_cls_token-true: failed before" in out
    after = json.loads((folder / "sweep.json").read_text())
    scores = ("name", "status", "validation_accuracy", "validation_loss", "test_accuracy")
    assert [[run.get(s) for s in scores] for run in after["runs"]] == [
        [run.get(s) for s in scores] for run in before["runs"]
    ]


def test_a_failed_run_whose_folder_is_deleted_is_tried_again(trained, tmp_path):
    arguments = ["--grid", "learning_rate=0.1,0.2"]
    trained(ends={"learning_rate-0.2": UserError("it diverged")})
    assert [run["status"] for run in sweep(plan(tmp_path / "s", *arguments))["runs"]] == ["finished", "failed"]
    shutil.rmtree(tmp_path / "s" / "learning_rate-0.2")
    again = trained()
    assert [run["status"] for run in sweep(plan(tmp_path / "s", *arguments))["runs"]] == ["finished", "finished"]
    assert again.names == ["learning_rate-0.2"]


def test_a_broken_off_run_is_trained_on_and_its_sweep_goes_on(trained, tmp_path, capsys):
    arguments = ["sweep", "--output_dir", str(tmp_path / "s"), *SHORT, "--grid", "learning_rate=0.1,0.2,0.3"]
    first = trained(ends={"learning_rate-0.2": loop.Interrupted("stopped by a signal; saved step-000002.")})
    assert cli.main(arguments) == 3
    assert first.names == ["learning_rate-0.1", "learning_rate-0.2"]
    error = capsys.readouterr().err
    assert "[2/3] learning_rate-0.2: stopped by a signal; saved step-000002. Finished runs are not repeated." in error
    second = trained()
    assert cli.main(arguments) == 0
    assert second.names == ["learning_rate-0.2", "learning_rate-0.3"]
    assert not any(recipe.overwrite_output_dir for recipe in second.recipes)  # it goes on from its checkpoint


def test_what_an_overwritten_sweep_does_not_reach_is_not_the_old_ones(trained, tmp_path, capsys):
    arguments = ["sweep", "--output_dir", str(tmp_path / "s"), *SHORT, "--grid", "learning_rate=0.1,0.2,0.3"]
    trained()
    assert cli.main(arguments) == 0
    trained(ends={"learning_rate-0.1": loop.Interrupted("stopped by a signal; saved step-000002.")})
    assert cli.main([*arguments, "--overwrite_output_dir"]) == 3
    assert "Leave out --overwrite_output_dir then." in capsys.readouterr().err
    third = trained()
    assert cli.main(arguments) == 0
    assert third.names == ["learning_rate-0.1", "learning_rate-0.2", "learning_rate-0.3"]


def test_what_passes_ends_the_sweep_and_the_same_command_goes_on(trained, tmp_path):
    arguments = ["sweep", "--output_dir", str(tmp_path / "s"), *SHORT, "--grid", "learning_rate=0.1,0.2"]
    trained(ends={"learning_rate-0.2": PassingError("Make room, and start the same command again.")})
    assert cli.main(arguments) == 2
    second = trained()
    assert cli.main(arguments) == 0 and second.names == ["learning_rate-0.2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_steps_of_a_run_ends_the_sweep_with_code_3(request, monkeypatch, number, tmp_path, capsys):
    # what a shell starts in the background ignores SIGINT, and these tests with it
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "train", lambda recipe, chosen: os.kill(os.getpid(), number))
    assert cli.main(["sweep", "--output_dir", str(tmp_path / "s"), *SHORT, "--grid", "learning_rate=0.1"]) == 3
    assert "The same command goes on from its last checkpoint." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_would_hit_every_run_stops_at_the_first(tmp_path, capsys):
    arguments = ["sweep", "--output_dir", str(tmp_path / "s"), *SHORT, "--grid", "learning_rate=0.1,0.2"]
    assert cli.main([*arguments, "--dataset_name", "digit"]) == 2
    captured = capsys.readouterr()
    assert "error: No dataset 'digit'. Did you mean 'digits'?" in captured.err and "[2/2]" not in captured.out
    assert parse_sweep(arguments[1:]) is not None
    assert names(tmp_path / "s") == {"sweep.json"}


def test_a_sweep_without_a_begun_run_gives_way_to_another(trained, tmp_path):
    trained(ends={"learning_rate-0.1": UserError("before its first step")})
    with pytest.raises(UserError, match="before its first step"):
        sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1"))
    trained()
    assert sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.3"))["runs"][0]["status"] == "finished"


def test_a_later_run_that_cannot_start_is_a_failure_of_its_own(trained, tmp_path):
    trained(ends={"learning_rate-0.2": UserError("before its first step")})
    record = sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1,0.2,0.3"))
    assert [run["status"] for run in record["runs"]] == ["finished", "failed", "finished"]


@pytest.mark.parametrize(
    "error, what",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), "CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
         "you tried to allocate 9 bytes"),
    ],
)  # fmt: skip
def test_a_network_too_large_for_the_memory_is_a_failure_of_its_own(error, what, trained, tmp_path):
    trained(ends={"hidden_size-32": error})
    arguments = ["--grid", "hidden_size=16,32", "--config_overrides", "num_hidden_layers=1"]
    record = sweep(plan(tmp_path / "s", *arguments))
    assert record["runs"][1]["note"].startswith(f"Out of memory ({what}). Fewer images at once")


def test_a_sweep_whose_every_run_failed_is_an_error(trained, tmp_path, capsys):
    trained(ends={f"learning_rate-{rate}": UserError(f"it diverged at {rate}") for rate in ("0.1", "0.2")})
    arguments = ["sweep", "--output_dir", str(tmp_path / "s"), *SHORT, "--grid", "learning_rate=0.1,0.2"]
    assert cli.main(arguments) == 2
    assert "error: All 2 runs failed. learning_rate-0.1: it diverged at 0.1" in capsys.readouterr().err


def test_without_a_validation_split_nothing_can_be_chosen(trained, tmp_path):
    trained(accuracy=lambda recipe: None)
    with pytest.raises(UserError, match="no validation split: give --train_val_split 0.1"):
        sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1,0.2"))


def test_another_sweep_in_the_folder_is_refused_until_told_to_start_afresh(trained, tmp_path):
    trained()
    sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1,0.2"))
    with pytest.raises(UserError) as caught:
        sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1,0.3", "--max_steps", 4, "--seeds", "1,2"))
    message = str(caught.value)
    assert (
        "holds another sweep (max_steps: 3 -> 4; grid: ['learning_rate=0.1,0.2'] -> ['learning_rate=0.1,0.3']"
        in message
    )
    assert "seeds: None -> [1, 2])" in message and "--overwrite_output_dir" in message
    again = trained()
    sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1,0.2", "--save_steps", 7))  # may change
    assert again.names == []
    sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1,0.2", "--overwrite_output_dir"))
    assert again.names == ["learning_rate-0.1", "learning_rate-0.2"]


def test_a_sweep_from_before_there_was_a_flag_goes_on_without_it(trained, tmp_path):
    trained()
    sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1,0.2"))
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    del record["flags"]["color_jitter"]
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(record))
    again = trained()
    sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1,0.2"))
    assert again.names == []
    with pytest.raises(UserError, match=r"another sweep \(color_jitter: 0.0 -> 0.3\)"):
        sweep(plan(tmp_path / "s", "--grid", "learning_rate=0.1,0.2", "--color_jitter", "0.3"))


def test_all_images_are_a_value_of_a_sweep_over_their_number(tmp_path):
    made = plan(tmp_path / "s", "--grid", "max_train_samples=250,none")
    assert [run.recipe.max_train_samples for run in made.runs] == [250, None]
    assert [run.name for run in made.runs] == ["max_train_samples-250", "max_train_samples-none"]


def test_a_folder_of_other_files_is_left_alone(trained, tmp_path):
    trained()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files but no sweep; choose a new folder"):
        sweep(plan(tmp_path, "--grid", "learning_rate=0.1"))
    with pytest.raises(UserError, match="thesis.txt.* cannot be used"):
        sweep(plan(tmp_path / "thesis.txt", "--grid", "learning_rate=0.1"))
    assert names(tmp_path) == {"thesis.txt"}


@pytest.mark.slow
def test_two_processes_train_several_runs_and_write_one_table(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_config.yaml"),
              "--num_processes", "2", "--main_process_port", port, "-m", "modeling_vit_scratch.cli", "sweep",
              "--output_dir", str(tmp_path / "s")]  # fmt: skip
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *REAL], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 of 4 runs finished, 2 failed.") == 1
    assert (tmp_path / "s" / "sweep.png").exists()


# ---------------------------------------------------------------- the grid


def test_seeds_multiply_the_grid_and_names_tell_the_values(tmp_path):
    found = plan(tmp_path, "--grid", "learning_rate=1e-3,1e-5", "--grid", "patch_size=2,[2,4]", "--seeds", "1,2")
    assert [run.name for run in found.runs][:4] == [
        "learning_rate-0.001_patch_size-2_seed-1", "learning_rate-0.001_patch_size-2_seed-2",
        "learning_rate-0.001_patch_size-2-4_seed-1", "learning_rate-0.001_patch_size-2-4_seed-2",
    ]  # fmt: skip
    last = found.runs[-1]
    assert last.recipe.seed == 2 and last.recipe.learning_rate == 1e-5
    assert last.recipe.config_overrides == f"{TINY},patch_size=[2,4]"
    assert last.recipe.output_dir == str(tmp_path / "learning_rate-1e-05_patch_size-2-4_seed-2")
    assert {"learning_rate", "seed", "config_overrides", "max_steps"} <= last.chosen


def test_the_default_folder_bears_the_name_of_the_recipe():
    assert parse_sweep(["--recipe", "mnist", "--grid", "learning_rate=0.1"]).folder == Path("outputs/sweep-mnist")


def test_a_grid_replaces_a_field_that_the_recipe_overrides():
    found = parse_sweep(["--recipe", "folder", "--train_dir", "photos", "--grid", "patch_size=4,16"])
    assert [run.recipe.config_overrides for run in found.runs] == ["patch_size=4", "patch_size=16"]


def test_the_metric_that_ranks_the_sweep_is_not_idle(tmp_path):
    found = plan(tmp_path, "--grid", "learning_rate=0.1", "--metric_for_best_model", "loss")
    assert found.new_record()["metric"] == "loss"
    assert found.runs[0].recipe.metric_for_best_model == "loss" and "metric_for_best_model" not in found.runs[0].chosen


def test_lists_and_tuples_stand_in_brackets():
    axis = parse_axis("image_mean:image_std=[0.1]:[0.2],[0.1,0.2,0.3]:[1,1,1]")
    assert axis.values == [((0.1,), (0.2,)), ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))]
    assert str(parse_axis("patch_size=2,[2,4]")) == "patch_size=2,[2,4]"


def test_long_names_are_cut_and_stay_apart():
    found = parse_sweep(["--recipe", "digits", "--grid", f"model_name_or_path={'a' * 200},{'a' * 199}b"])
    lengths = {len(run.name) for run in found.runs}
    assert lengths == {120} and len({run.name for run in found.runs}) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "A sweep needs a grid: --grid"),
        (["--grid", "learning_rate"], "--grid takes \"name=value,value\", got 'learning_rate'"),
        (["--grid", "=1"], "--grid takes \"name=value,value\", got '=1'"),
        (["--grid", "learning_rate="], "--grid learning_rate has an empty value in ''"),
        (["--grid", "learning_rate=0.1,,0.2"], "--grid learning_rate has an empty value in '0.1,,0.2'"),
        (["--grid", "learning_rate=1e-1,0.1"], "--grid learning_rate has the value 0.1 twice"),
        (["--grid", "learnin_rate=1"], "No flag or config field 'learnin_rate'. Did you mean 'learning_rate'?"),
        (["--grid", "poling=cls"], "No flag or config field 'poling'. Did you mean 'pooling'?"),
        (["--grid", "learning_rate=fast"], "--learning_rate takes a number, got 'fast'"),
        (["--grid", "learning_rate=0.1,-1"], "learning_rate -1: --learning_rate must be above 0, got -1.0"),
        (["--grid", "pooling:use_cls_token=cls,mean"], "takes 2 values joined by \":\", got 'cls'"),
        (["--grid", "seed=1,2"], "--grid seed: use --seeds 1,2,3"),
        (["--grid", "recipe=digits,mnist"], "--grid recipe: a sweep varies one recipe"),
        (["--grid", "output_dir=a,b"], "--grid output_dir: each run gets a folder of its own"),
        (["--grid", "overwrite_output_dir=true"], "--grid overwrite_output_dir: give it as a flag"),
        (["--grid", "train_val_split=0.1,0.2"], "would be validated on different images"),
        (["--grid", "config_overrides=a"], "--grid config_overrides: sweep the fields themselves"),
        (["--grid", "optim=adamw", "--grid", "optim=sgd"], "--grid names optim twice"),
        (["--grid", "learning_rate=0.1", "--learning_rate", "1"], "--learning_rate is given as a flag and on the grid"),
        (["--grid", "learning_rate=0.1", "--learning_rate=1"], "--learning_rate is given as a flag and on the grid"),
        (
            ["--grid", "pooling=mean", "--config_overrides", "pooling=mean"],
            "pooling is given in --config_overrides and on the grid",
        ),
        (["--grid", "learning_rate=0.1", "--seeds", "1,,2"], "--seeds has an empty value in '1,,2'"),
        (["--grid", "learning_rate=0.1", "--seeds", "1,1"], "--seeds 1,1 has a seed twice"),
        (["--grid", "learning_rate=0.1", "--seeds", "1,2", "--seed", "3"], "--seed and --seeds both say the seed"),
        (["--grid", "learning_rate=0.1", "--learning_rat", "1"], "No flag '--learning_rat'"),
        (
            ["--grid", "num_train_epochs=1,2", "--max_steps", "5"],
            "num_train_epochs 1: --max_steps and --num_train_epochs (the command line) each say how long to train",
        ),
        (
            ["--grid", "num_train_epochs=1,2", "--grid", "max_steps=5"],
            "num_train_epochs 1, max_steps 5: --max_steps and --num_train_epochs",
        ),
        (["--grid", "stream_lanes=4,8"], "stream_lanes 4: --stream_lanes has no effect here: it goes with --streaming"),
        (["--grid", "preset=micro,mikro"], "preset mikro: No preset 'mikro'. Did you mean 'micro'?"),
        (["--grid", "num_attention_heads=4,5"], "num_attention_heads 5: hidden_size 64 is not a multiple of"),
        (
            ["--grid", "pooling=mean,cls"],
            "pooling cls: pooling='cls' needs use_cls_token=True; without a class token use pooling='mean'. "
            'Fields that must change together share an axis: --grid "pooling:use_cls_token=cls:true,mean:false".',
        ),
        (
            ["--recipe", "digits", "--grid", "model_name_or_path=a/b,a-b"],
            "Two combinations of the grid would share the folder model_name_or_path-a-b",
        ),
    ],
)
def test_a_grid_that_makes_no_sense_is_one_line_before_anything_runs(arguments, message, tmp_path, capsys):
    assert cli.main(["sweep", *arguments, "--output_dir", str(tmp_path / "s")]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert captured.out == "" and not (tmp_path / "s").exists()


def test_a_class_token_can_be_compared_with_and_without_mean_pooling():
    for grid in ("pooling:use_cls_token=cls:true,mean:false", "pooling:use_cls_token=cls:true,mean:true,mean:false"):
        assert len(parse_sweep(["--recipe", "mnist", "--grid", grid]).runs) == grid.count(",") + 1
    same_tokens = ["--config_overrides", "use_cls_token=true", "--grid", "pooling=cls,mean"]
    assert len(parse_sweep(["--recipe", "mnist", *same_tokens]).runs) == 2


def test_what_must_not_be_swept_are_flags():
    assert set(NOT_SWEPT) - {"config"} <= set(FIELDS)


def test_help_explains_with_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    example = re.sub(r"\\\n\s*", "", text).split("  vit-scratch sweep ")[1].splitlines()[0]
    assert len(parse_sweep(shlex.split(example)).runs) == 18


def test_a_full_disk_ends_a_real_sweep_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ["sweep", "--output_dir", str(tmp_path / "s"), *SHORT, "--grid", "learning_rate=1e-2,2e-2"]
    real = checkpointing.save_file

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpointing, "save_file", full)
    assert cli.main(arguments) == 2
    assert "Make room, or mend the disk, and start the same command again." in capsys.readouterr().err
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert {run["status"] for run in record["runs"]} == {"waiting"}
    monkeypatch.setattr(checkpointing, "save_file", real)
    assert cli.main(arguments) == 0
