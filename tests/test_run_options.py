"""Whole runs with what a recipe can switch on: each does what it says, and a resumed run does it too."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_run_train import TINY, equal, metrics, run, weights

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training import loop
from modeling_vit_scratch.training.checkpointing import save_checkpoint
from modeling_vit_scratch.training.guard import FiniteGuard
from modeling_vit_scratch.training.objectives import class_weights
from modeling_vit_scratch.training.recipes import RECIPES
from modeling_vit_scratch.training.recording import read_metrics, record_evaluation, start_trackers
from modeling_vit_scratch.training.schedules import learning_rate_at
from modeling_vit_scratch.training.state import Position
from modeling_vit_scratch.training.time_budget import Rehearsal

EVERYTHING = [
    "--horizontal_flip_prob", 0.5, "--auto_augment", "randaugment", "--random_erasing_prob", 0.25, "--mixup_alpha", 0.8,
    "--cutmix_alpha", 1.0, "--mixup_off_step", 0.8, "--random_resized_crop_scale", 0.5, "--ema_decay", 0.5,
    "--vertical_flip_prob", 0.5, "--color_jitter", 0.3, "--bce_loss", "true", "--bce_target_thresh", 0,
    "--max_train_samples", 500, "--max_eval_samples", 50,
]  # fmt: skip


AFFINE = ("rotation_degrees", "translate_pixels", "scale_range")  # of the recipe digits


class Killed(Exception):
    pass


def die_at(monkeypatch, fatal_step):
    """Breaks the run off at a step, once; the list of steps that were begun."""
    real, begun = loop.learning_rate_at, []

    def rate(step, *rest):
        if step == fatal_step and step not in begun:
            begun.append(step)
            raise Killed
        begun.append(step)
        return real(step, *rest)

    monkeypatch.setattr(loop, "learning_rate_at", rate)
    return begun


def assert_killed_runs_end_alike(tmp_path, monkeypatch, arguments, *fatal_steps):
    """A run that is killed before each of these steps ends as the uninterrupted one, bit for bit."""
    whole = run(tmp_path / "whole", *arguments)
    for fatal_step in fatal_steps:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, fatal_step)
            run(tmp_path / "broken", *arguments)
    broken = run(tmp_path / "broken", *arguments)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert loop.final_scores(whole) == loop.final_scores(broken)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_with_everything_on_a_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch, streaming):
    arguments = [*EVERYTHING, "--max_steps", 12, "--save_steps", 4, "--logging_steps", 3, "--train_batch_size", 48,
                 "--streaming", streaming, "--optim", "muon", "--layer_decay", 0.8]  # fmt: skip
    arguments += [] if streaming == "true" else ["--aug_repeats", 3]
    assert_killed_runs_end_alike(tmp_path, monkeypatch, arguments, 9)


def test_averaged_weights_are_what_is_scored_and_saved(tmp_path):
    results = run(tmp_path / "averaged", "--max_steps", 6, "--ema_decay", 0.8)
    last = tmp_path / "averaged" / "checkpoints" / "step-000006"
    assert results["weights"] == "last, averaged"
    saved, averaged = weights(tmp_path / "averaged"), load_file(last / "averaged.safetensors")
    assert equal(saved, averaged) and not equal(saved, load_file(last / "model.safetensors"))
    plain = run(tmp_path / "plain", "--max_steps", 6)
    assert equal(weights(tmp_path / "plain"), load_file(last / "model.safetensors"))  # averaging only looks on
    assert plain["test_loss"] != results["test_loss"]


def test_an_average_slower_than_the_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="--ema_decay 0.999 has a half-life of 693 steps, the run has 5"):
        run(tmp_path / "run", "--max_steps", 5, "--ema_decay", 0.999)
    run(tmp_path / "run", "--max_steps", 5, "--ema_decay", 0.5)  # as the error says, in the folder that nobody owns


def test_the_run_stops_early_when_the_score_no_longer_rises(tmp_path, capsys):
    results = run(tmp_path / "run", "--max_steps", 40, "--eval_steps", 2, "--early_stopping_patience", 3,
                  "--learning_rate", 1e-9, "--metric_for_best_model", "f1_macro")  # fmt: skip
    evaluations = [row for row in metrics(tmp_path / "run") if "eval_f1_macro" in row]
    scores = [row["eval_f1_macro"] for row in evaluations]
    assert results["stopped_early"] and results["steps"] == evaluations[-1]["step"] < 40
    assert len(scores) - 1 - int(np.argmax(scores)) == 3  # the best, and three that are no better
    assert "stopped early at step" in capsys.readouterr().out
    (tmp_path / "run" / "results.json").unlink()  # killed before its scores: it does not go on training
    again = run(tmp_path / "run", "--max_steps", 40, "--eval_steps", 2, "--early_stopping_patience", 3,
                "--learning_rate", 1e-9, "--metric_for_best_model", "f1_macro")  # fmt: skip
    assert again["steps"] == results["steps"] and again["test_loss"] == results["test_loss"]


def test_a_patience_that_cannot_end_the_run_is_refused(tmp_path, monkeypatch):
    flags = ["--max_steps", 40, "--eval_steps", 4, "--early_stopping_patience"]
    with pytest.raises(UserError, match="9 cannot stop this run: 40 steps, .* each 4 are followed .* 10 that count"):
        run(tmp_path / "run", *flags, 9)  # the first is the best, the tenth at the end
    run(tmp_path / "run", *flags, 8)
    dropped = ["--config_overrides", f"{TINY},patch_drop_rate=0.5", "--full_size_step", 20]
    dropped += ["--gradient_accumulation_steps", 1]
    with pytest.raises(UserError, match="5 cannot stop this run: .* 6 that count"):  # those of steps 20 to 40
        run(tmp_path / "dropped", *flags, 5, *dropped)
    budget = ["--time_budget", "60s", "--eval_steps", 0.25, "--early_stopping_patience"]
    monkeypatch.setattr(Rehearsal, "steps_within", lambda *_: 9)
    with pytest.raises(UserError, match="4 cannot stop this run"):  # of five evaluations
        run(tmp_path / "budget", *budget, 4)
    run(tmp_path / "budget", *budget, 3)  # as the error says, in the folder that nobody owns


def test_a_run_of_before_goes_on_with_its_evaluations(tmp_path, monkeypatch):
    flags = ["--max_steps", 60, "--train_batch_size", 600, "--early_stopping_patience", 30, "--save_steps", 12]
    flags += ["--save_total_limit", 9]
    monkeypatch.setattr(loop, "check_patience", lambda *_: None)
    run(tmp_path / "run", *flags)
    assert len([row for row in metrics(tmp_path / "run") if "eval_loss" in row]) == 20
    folder = tmp_path / "run" / "checkpoints" / "step-000012"
    state = json.loads((folder / "state.json").read_text())
    del state["position"]["evaluates_each_epoch"]
    tensors = [load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer")]
    save_checkpoint(tmp_path / "old" / "checkpoints", state.pop("step"), *tensors, state)
    shutil.copy(tmp_path / "run" / "recipe.json", tmp_path / "old")
    run(tmp_path / "old", *flags)
    assert [row["step"] for row in metrics(tmp_path / "old") if "eval_loss" in row] == list(range(18, 61, 6))


def test_each_epoch_may_be_evaluated_and_saved(tmp_path, capsys):
    flags = ["--num_train_epochs", 12, "--train_batch_size", 600, "--save_total_limit", 99, "--warmup_steps", 0]
    run(tmp_path / "run", *flags, "--eval_strategy", "epoch", "--save_strategy", "epoch")
    evaluated = [row["step"] for row in metrics(tmp_path / "run") if "eval_loss" in row]
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert evaluated == saved == [3, 6, 9, 12, 15, 18, 21, 24, 26]  # 1,295 images: 2.2 steps an epoch
    run(tmp_path / "patient", *flags, "--early_stopping_patience", 7)  # no matter how many, then
    assert "validation every 3 steps" in capsys.readouterr().out
    for name in ("eval", "save"):
        with pytest.raises(UserError, match=f"--{name}_steps has no effect here: --{name}_strategy epoch"):
            run(tmp_path / "other", *flags, f"--{name}_strategy", "epoch", f"--{name}_steps", 5)


def test_images_that_are_no_squares_are_trained_on_and_gone_on_with(tmp_path, capsys):
    flags = ["--max_steps", 2, "--image_size", "8,16"]
    run(tmp_path / "run", *flags)
    results = run(tmp_path / "run", *flags)  # finished: the same recipe, read from its file
    assert results["steps"] == 2 and "finished" in capsys.readouterr().out
    model = ViTScratchForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.image_height_width == (8, 16)
    start = ["--dataset_name", "digits", "--model_name_or_path", tmp_path / "run" / "model", "--max_steps", 1]
    run(tmp_path / "tuned", *start, "--image_size", "16,8", "--config_overrides", "none")
    tuned = ViTScratchForImageClassification.from_pretrained(tmp_path / "tuned" / "model")
    assert tuned.config.image_height_width == (16, 8)


def test_interpolation_of_small_images_that_are_enlarged_is_an_effect(tmp_path):
    run(tmp_path / "run", "--max_steps", 1, "--image_size", 16, "--interpolation", "bicubic")
    processor = json.loads((tmp_path / "run" / "model" / "preprocessor_config.json").read_text())
    assert processor["resample"] == 3


def test_a_score_that_is_not_finite_is_never_the_best():
    position, said = Position(step=1), []
    quiet = SimpleNamespace(append=said.append, log=lambda *_, **__: None, say=said.append)
    recipe = SimpleNamespace(metric_for_best_model="loss")
    for step, loss in ((1, math.nan), (2, 1.0), (3, math.nan), (4, 0.5)):
        position.step = step
        record_evaluation(SimpleNamespace(scores={"loss": loss}), position, recipe, quiet, quiet, quiet)
    assert (position.best_step, position.best_value) == (4, -0.5)


@pytest.mark.parametrize("flags", [[], ["--ema_decay", 0.9], ["--optim", "muon"]])
def test_a_budgeted_run_equals_the_run_of_that_many_steps(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(Rehearsal, "steps_within", lambda *_: 9)
    budgeted = run(tmp_path / "budgeted", "--time_budget", "2s", *flags)
    counted = run(tmp_path / "counted", "--max_steps", 9, *flags)
    assert budgeted["steps"] == 9 and equal(weights(tmp_path / "budgeted"), weights(tmp_path / "counted"))
    assert metrics(tmp_path / "budgeted") == metrics(tmp_path / "counted")
    assert loop.final_scores(budgeted) == loop.final_scores(counted)


def test_a_resumed_budget_keeps_its_number_of_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(Rehearsal, "steps_within", lambda *_: 7)
    die_at(monkeypatch, 3)
    with pytest.raises(Killed):
        run(tmp_path / "run", "--time_budget", "2s")  # no checkpoint but the one of step 0
    monkeypatch.setattr(loop, "rehearse", None)  # a second rehearsal would fail
    assert run(tmp_path / "run", "--time_budget", "2s")["steps"] == 7


def test_a_budget_ends_with_its_schedule_at_the_end(tmp_path):
    results = run(tmp_path / "run", "--time_budget", "5s")
    rates = [row["learning_rate"] for row in metrics(tmp_path / "run") if "learning_rate" in row]
    steps = results["steps"]
    assert rates[-1] == learning_rate_at(steps - 1, steps, RECIPES["digits"])
    assert steps == 1 or learning_rate_at(steps, steps, RECIPES["digits"]) == 0.0  # a busy machine fits one


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_stops_the_run_with_its_weights_whole(tmp_path, monkeypatch, optim):
    real = loop.poisoned
    monkeypatch.setattr(loop, "poisoned", lambda loss: real(loss * (float("inf") if fatal() else 1)))
    counter = iter(range(100))

    def fatal():
        return next(counter) >= 2 * 5  # the digits recipe computes a batch in two parts

    with pytest.raises(UserError, match=r"not finite at step 6, rate .*step was not taken. The last good checkpoint is "
                                        r".*step-000004. Lower --learning_rate"):  # fmt: skip
        run(tmp_path / "run", "--max_steps", 9, "--save_steps", 4, "--optim", optim)
    for file in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    assert all(np.isfinite(row.get("loss", 0)) for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_what_the_guard_found_is_not_lost_in_a_checkpoint(tmp_path, monkeypatch, optim):
    """A GPU is not waited for at each step: what saves between two logging steps must ask."""
    monkeypatch.setattr(loop, "FiniteGuard", lambda optimizer, device, may_wait: FiniteGuard(optimizer, device, False))
    real, counter = loop.poisoned, iter(range(100))
    monkeypatch.setattr(loop, "poisoned", lambda loss: real(loss * (float("inf") if next(counter) >= 2 * 5 else 1)))
    with pytest.raises(UserError, match=r"not finite at step 6, .*The last good checkpoint is .*step-000005"):
        run(tmp_path / "run", "--max_steps", 20, "--save_minutes", 1e-9, "--logging_steps", 20, "--optim", optim)


def test_class_weights_balance_what_the_classes_weigh(image_folder):
    from modeling_vit_scratch.data.sources import open_source

    source = open_source(train_dir=str(image_folder(cat=12, dog=3, emu=1)), train_val_split=0)
    found = class_weights(source)
    from sklearn.utils.class_weight import compute_class_weight

    labels = source.label_ids_of("train")
    assert found.numpy() == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels))
    assert found[torch.from_numpy(labels)].mean() == pytest.approx(1.0)


@pytest.mark.parametrize("flags", [["--class_weights", "balanced"], ["--balanced_sampler", "true"]])
def test_a_rare_class_is_not_forgotten(image_folder, tmp_path, flags):
    """Nine of ten training images are cats; noise all of them, so that only the prior can be learned."""
    train = image_folder("train", size=(8, 8), cat=54, dog=6)
    test = image_folder("test", size=(8, 8), seed=900, cat=30, dog=30)
    common = ["--train_dir", train, "--test_dir", test, "--recipe", "cifar10", "--max_steps", 30,
              "--train_val_split", 0, "--learning_rate", 3e-4, "--train_batch_size", 30, "--config_overrides",
              f"{TINY},zero_init_residual=false,position_init=trunc_normal"]  # fmt: skip
    plain = run(tmp_path / "plain", *common)
    balanced = run(tmp_path / "balanced", *common, *flags)

    def share_called_dog(results):
        counts = np.array(results["confusion"]["test"])
        return counts[:, 1].sum() / counts.sum()

    assert share_called_dog(plain) + 0.1 < share_called_dog(balanced)


def test_float64_is_computed_and_saved_in_float64(tmp_path):
    run(tmp_path / "run", "--max_steps", 2, "--dtype", "float64", "--mixup_alpha", 0.5)
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float64}
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dtype"] == "float64"


def test_tensorboard_holds_every_row_of_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "run", "--max_steps", 4, "--logging_steps", 2, "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step":
                assert (row["step"], pytest.approx(value)) in [(e.step, e.value) for e in events.Scalars(name)]
    assert {"loss", "learning_rate", "grad_norm", "images_per_second", "data_wait", "eval_accuracy"} <= {
        *events.Tags()["scalars"]
    }


def test_tensorboard_forgets_the_steps_that_are_taken_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--max_steps", 6, "--logging_steps", 1, "--save_steps", 2, "--save_total_limit", 9]
    run(tmp_path / "run", *flags, "--report_to", "tensorboard")
    named = tmp_path / "run" / "checkpoints" / "step-000002"
    run(tmp_path / "run", *flags, "--report_to", "tensorboard", "--resume_from_checkpoint", named)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name, variable", [("wandb", "WANDB_PROJECT"), ("mlflow", "MLFLOW_EXPERIMENT_NAME")])
def test_a_tracker_gets_the_project_of_its_variable_and_the_name_of_the_run(name, variable, monkeypatch):
    calls = []
    accelerator = SimpleNamespace(init_trackers=lambda *words, **named: calls.append((words, named)), trackers=[])
    start_trackers(accelerator, [name], {}, "first", 0)
    monkeypatch.setenv(variable, "mine")
    start_trackers(accelerator, [name], {}, "first", 0)
    assert [words for words, _ in calls] == [("vit_scratch",), ("mine",)]
    assert calls[1][1]["init_kwargs"]["wandb"] == {"name": "first"}


@pytest.mark.parametrize("engine", ["DEEPSPEED", "MEGATRON_LM"])
def test_engines_that_are_not_supported_are_refused_in_one_line(engine, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=f"--use_{engine.lower()} is not supported"):
        run(tmp_path / "run", "--max_steps", 1)


def test_what_a_tracker_says_against_starting_is_one_line(tmp_path, monkeypatch):
    from accelerate import Accelerator

    def refuse(*_, **__):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(UserError, match="--report_to tensorboard: No API key configured"):
        run(tmp_path / "run", "--max_steps", 1, "--report_to", "tensorboard")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mixup_prob", "0.5"], "--mixup_prob has no effect here: it goes with --mixup_alpha or --cutmix_alpha"),
        (["--mixup_switch_prob", "0.5", "--mixup_alpha", "1"], "--mixup_switch_prob has no effect here"),
        (["--randaugment_magnitude", "5"], "it goes with --auto_augment randaugment"),
        (["--bce_target_thresh", "0", "--bce_loss", "true"], "it goes with --bce_loss and --mixup_alpha or"),
        (["--bce_target_thresh", "0", "--mixup_alpha", "1"], "it goes with --bce_loss and --mixup_alpha or"),
        (["--aug_repeats", "3", "--streaming", "true"], "a stream shows each image once an epoch"),
        (["--aug_repeats", "64", "--train_batch_size", "64"], "leaves a batch of 64 with a single image"),
        (
            ["--aug_repeats", "3", *(word for name in AFFINE for word in (f"--{name}", "0"))],
            "--aug_repeats has no effect here: nothing is drawn for an image",
        ),
        (["--max_eval_samples", "9", "--train_val_split", "0"], "there is no validation split"),
        (["--model_revision", "v2"], "it goes with --model_name_or_path and the name of a repository on the Hub"),
        (["--nesterov", "true"], "it goes with --optim sgd"),
        (["--nesterov", "true", "--optim", "sgd", "--momentum", "0"], "needs a --momentum above 0"),
        (["--momentum", "0.8"], "it goes with --optim sgd or muon"),
        (["--adam_beta1", "0.8", "--optim", "sgd"], "SGD has neither betas nor epsilon"),
        (["--lr_gamma", "0.5"], "it goes with --lr_scheduler_type multi_step"),
        (["--min_lr_rate", "0.1", "--lr_scheduler_type", "constant"], "a constant rate never falls"),
        (["--balanced_sampler", "true", "--streaming", "true"], "--class_weights balanced works there"),
        (["--balanced_sampler", "true", "--class_weights", "balanced"], "would make rare classes count twice"),
        (["--teacher_name_or_path", "t", "--bce_loss", "true"], "--bce_loss does not go with a teacher"),
        (
            ["--teacher_name_or_path", "t", "--distillation_alpha", "1", "--label_smoothing_factor", "0.3"],
            "--label_smoothing_factor has no effect here: with --distillation_alpha 1",
        ),
        (["--tf32", "true"], "--tf32 has no effect here: the device is cpu, not CUDA"),
        (["--early_stopping_patience", "2", "--train_val_split", "0"], "there is no validation split"),
        (["--time_budget", "soon"], "--time_budget takes a time such as"),
        (["--random_resized_crop_scale", "0.5", "--random_resized_crop_ratio", "2,1"], "the least and the greatest"),
    ],
)
def test_a_flag_that_could_not_change_the_run_is_an_error(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", "--max_steps" if "--time_budget" not in flags else "--seed", 1, *flags)
