"""Where a run goes on: from the newest checkpoint, from a named one, past its first end, after a signal."""

import json
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_run_train import equal, metrics, run, weights

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training import evaluation, interruptions, loop
from modeling_vit_scratch.training.checkpointing import checkpoints
from modeling_vit_scratch.training.interruptions import Interruptions
from modeling_vit_scratch.training.recording import read_metrics

LENGTH = ["--max_steps", 10, "--train_batch_size", 50, "--logging_steps", 3]


def steps_kept(output_dir):
    return sorted(int(path.name[5:]) for path in checkpoints(output_dir / "checkpoints"))


@pytest.mark.parametrize("name, during", [("SIGTERM", 4), ("SIGINT", 4), ("SIGUSR1", 4), ("SIGTERM", 9)])
def test_a_signal_saves_and_the_same_command_ends_as_if_there_had_been_none(name, during, tmp_path, monkeypatch):
    expected = run(tmp_path / "whole", *LENGTH)
    real = loop.learning_rate_at

    def signalled(step, *rest):
        if step == during:  # of 10 steps: the scores of the end are left to the next start, too
            os.kill(os.getpid(), getattr(signal, name))
        return real(step, *rest)

    monkeypatch.setattr(loop, "learning_rate_at", signalled)
    handler = signal.getsignal(getattr(signal, name))
    with pytest.raises(loop.Interrupted, match=f"saved .*step-0000{during + 1:02}"):
        run(tmp_path / "run", *LENGTH)
    assert signal.getsignal(getattr(signal, name)) is handler
    monkeypatch.setattr(loop, "learning_rate_at", real)
    assert run(tmp_path / "run", *LENGTH)["test_loss"] == expected["test_loss"]
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))


@pytest.mark.parametrize(
    "during, flags",
    [
        (4, ["--load_best_model_at_end", "true"]),
        (4, ["--early_stopping_patience", 1, "--learning_rate", 0.5, "--warmup_steps", 0]),
        (10, []),  # the last step's: the scores of the end are the same ones
    ],
)
def test_a_signal_during_an_evaluation_gives_it_up_and_the_same_command_owes_it(during, flags, tmp_path, monkeypatch):
    often = [*LENGTH, "--eval_steps", 2, "--eval_batch_size", 7, *flags]
    expected = run(tmp_path / "whole", *often)
    real_scores, real_pixels, scored_steps, batches = loop.evaluate, evaluation.normalise, [], []

    def noted(*arguments):
        batches.clear()
        found = real_scores(*arguments)
        scored_steps.append(len(batches))
        return found

    def signalled(*arguments):
        batches.append(1)
        if len(batches) == 3 and len(scored_steps) == during // 2 - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_pixels(*arguments)

    monkeypatch.setattr(loop, "evaluate", noted)
    monkeypatch.setattr(evaluation, "normalise", signalled)
    for _ in range(2):  # a second signal while it is made up for
        with pytest.raises(loop.Interrupted, match=f"saved .*step-0000{during:02}"):
            run(tmp_path / "run", *often)
        assert len(batches) == 3  # and no further
        assert [row["step"] for row in metrics(tmp_path / "run") if "eval_loss" in row] == list(range(2, during, 2))
    monkeypatch.setattr(evaluation, "normalise", real_pixels)
    results = run(tmp_path / "run", *often)
    same = ("test_loss", "validation_loss", "weights", "steps")
    assert {name: results[name] for name in same} == {name: expected[name] for name in same}
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


def test_a_signal_during_the_last_scores_leaves_them_to_the_same_command(tmp_path, monkeypatch):
    flags = [*LENGTH, "--eval_batch_size", 7]
    expected = run(tmp_path / "whole", *flags)
    real = loop.evaluate

    def signalled(*arguments):
        if len(arguments[1].split) == 360:  # the test split
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(loop, "evaluate", signalled)
    with pytest.raises(loop.Interrupted, match=r"all steps are saved\. The same command goes on from there"):
        run(tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.setattr(loop, "evaluate", real)
    assert run(tmp_path / "run", *flags)["test_loss"] == expected["test_loss"]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


@pytest.mark.parametrize("flag", ["--overwrite_output_dir", "--resume_from_checkpoint"])
def test_flags_that_would_lose_the_steps_are_to_be_left_out(flag, tmp_path, monkeypatch):
    expected = run(tmp_path / "run", *LENGTH, "--save_steps", 2, "--save_total_limit", 9)
    named = tmp_path / "run" / "checkpoints" / "step-000002"
    real = loop.learning_rate_at

    def signalled(step, *rest):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(step, *rest)

    monkeypatch.setattr(loop, "learning_rate_at", signalled)
    value = named if flag == "--resume_from_checkpoint" else "true"
    with pytest.raises(loop.Interrupted, match=f"The same command, without {flag}, goes on from there"):
        run(tmp_path / "run", *LENGTH, "--save_steps", 2, "--save_total_limit", 9, flag, value)
    monkeypatch.setattr(loop, "learning_rate_at", real)
    again = run(tmp_path / "run", *LENGTH, "--save_steps", 2, "--save_total_limit", 9)
    assert again["test_loss"] == expected["test_loss"]


def test_the_best_weights_come_along_from_another_run(tmp_path, capsys):
    often = [*LENGTH, "--save_steps", 2, "--eval_steps", 2, "--load_best_model_at_end", "true", "--save_total_limit", 1]
    often += ["--lr_scheduler_type", "linear", "--learning_rate", 0.5, "--warmup_steps", 0]
    expected = run(tmp_path / "run", *often)
    best = int(expected["weights"].rpartition(" ")[2])
    assert best < 10  # so high a rate does not end with its best
    for folder, keeps_best in (("with", True), ("without", False)):
        last = tmp_path / "run" / "checkpoints" / "step-000010"
        if not keeps_best:
            shutil.rmtree(last.with_name(f"step-{best:06d}"))
        results = run(tmp_path / folder, *often, "--resume_from_checkpoint", last)
        assert results["weights"] == (expected["weights"] if keeps_best else "last")
        assert equal(weights(tmp_path / "run"), weights(tmp_path / folder)) == keeps_best
    assert "which validated best, is not there: the last weights are published" in capsys.readouterr().out


def test_the_rate_after_a_resume_counts_the_time_before(tmp_path, monkeypatch):
    real, slow = loop.evaluate, 1.0

    def slowly(*arguments):
        time.sleep(slow)
        return real(*arguments)

    monkeypatch.setattr(loop, "evaluate", slowly)
    often = [*LENGTH, "--save_steps", 2, "--save_total_limit", 9, "--eval_steps", 8]
    run(tmp_path / "run", *often)
    named = tmp_path / "run" / "checkpoints" / "step-000008"
    window = json.loads((named / "state.json").read_text())["window"]
    assert window["images"] == 100 and 0 < window["seconds"] < slow  # the steps' own
    run(tmp_path / "other", *often, "--resume_from_checkpoint", named)
    (row,) = [row for row in read_metrics(tmp_path / "other" / "metrics.jsonl") if row["step"] == 9 and "loss" in row]
    assert row["images_per_second"] <= 1.01 * 150 / window["seconds"]


def test_checkpoints_are_written_by_minutes_too(tmp_path, monkeypatch):
    clock = iter(range(0, 100_000, 30))  # half a minute a look
    monkeypatch.setattr(interruptions, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run(tmp_path / "run", *LENGTH, "--save_minutes", 1, "--save_steps", 1000, "--save_total_limit", 20)
    assert steps_kept(tmp_path / "run") == [2, 4, 6, 8, 10]


class Pair:
    """Two processes' accelerators, as threads that meet where they reduce."""

    def __init__(self):
        self.barrier, self.given = threading.Barrier(2), {}

    def member(self, rank):
        def reduce(tensor, reduction):
            assert reduction == "sum"
            self.given[rank] = tensor
            self.barrier.wait(10)
            total = self.given[0] + self.given[1]
            self.barrier.wait(10)
            return total

        return SimpleNamespace(
            num_processes=2, is_main_process=rank == 0, device=torch.device("cpu"), reduce=reduce
        )  # fmt: skip


def in_both(process):
    """Runs process(rank) as the two processes, to their ends."""
    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


@pytest.mark.parametrize("where", ["steps", "an evaluation's batches"])
def test_two_processes_stop_after_the_same_step_whoever_got_the_signal(where):
    pair, stopped_at = Pair(), {}

    def process(rank):
        listener = Interruptions(pair.member(rank), None, step=0)
        stops = listener.among_batches() if where != "steps" else lambda step: listener.after(step)[0]
        for step in range(1, 500):
            if rank == 1 and step == 150:
                listener.received.append(signal.SIGTERM)
            if stops(step):
                stopped_at[rank] = step
                return

    in_both(process)
    assert stopped_at[0] == stopped_at[1] >= 150


def test_after_the_last_step_two_processes_ask_each_other_at_once():
    pair, answers = Pair(), {}

    def process(rank):
        listener = Interruptions(pair.member(rank), None, step=0)
        for step in range(1, 100):
            if rank == 1 and step == 99:
                listener.received.append(signal.SIGTERM)
            listener.after(step)
        answers[rank] = listener.now()

    in_both(process)
    assert answers == {0: True, 1: True}


def test_a_named_checkpoint_is_gone_on_from_and_later_ones_are_dropped(tmp_path, capsys):
    often = ["--save_steps", 2, "--save_total_limit", 9]
    expected = run(tmp_path / "run", *LENGTH, *often)
    before, rows = weights(tmp_path / "run"), metrics(tmp_path / "run")
    named = tmp_path / "run" / "checkpoints" / "step-000004"
    results = run(tmp_path / "run", *LENGTH, *often, "--resume_from_checkpoint", named)
    assert f"going on from {named}" in capsys.readouterr().out
    assert equal(before, weights(tmp_path / "run")) and metrics(tmp_path / "run") == rows
    assert results["test_loss"] == expected["test_loss"]
    elsewhere = run(tmp_path / "other", *LENGTH, *often, "--resume_from_checkpoint", named)
    assert equal(before, weights(tmp_path / "other")) and elsewhere["test_loss"] == expected["test_loss"]
    assert steps_kept(tmp_path / "other") == [6, 8, 10]


def test_a_checkpoint_that_is_not_there_or_not_whole_is_refused(tmp_path):
    run(tmp_path / "run", *LENGTH)
    named = tmp_path / "run" / "checkpoints" / "step-000010"
    with pytest.raises(UserError, match="takes true or a checkpoint's folder; there is none at nowhere"):
        run(tmp_path / "new", *LENGTH, "--resume_from_checkpoint", "nowhere")
    with pytest.raises(UserError, match="resume_from_checkpoint true: there is no whole checkpoint"):
        run(tmp_path / "new", *LENGTH, "--resume_from_checkpoint", "true")
    (named / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be taken: optimizer.safetensors has 0 bytes instead of"):
        run(tmp_path / "new", *LENGTH, "--resume_from_checkpoint", named)


def test_a_checkpoint_of_another_run_is_compared_and_costs_nothing_where_it_is_refused(tmp_path):
    run(tmp_path / "run", *LENGTH, "--save_steps", 5)
    run(tmp_path / "other", *LENGTH, "--save_steps", 5, "--learning_rate", 1e-2, "--weight_decay", 0.2)
    theirs = tmp_path / "other" / "checkpoints" / "step-000005"
    on = [*LENGTH, "--save_steps", 5, "--resume_from_checkpoint", theirs]
    with pytest.raises(
        UserError, match=r"of a run of another recipe \(.*learning_rate: 0.01 -> .*weight_decay: 0.2 ->"
    ):
        run(tmp_path / "run", *on)
    (tmp_path / "other" / "recipe.json").unlink()  # a checkpoint that was copied says less
    for flags, message in (
        (["--optim", "sgd", "--learning_rate", 1e-2], "is of a run with AdamW, this one has SGD"),
        (["--ema_decay", 0.5], "has no averaged weights, which --ema_decay goes on from"),
        (["--preset", "micro"], "is of another network"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "fresh", *on, *flags)
    own = tmp_path / "run" / "checkpoints" / "step-000005"
    with pytest.raises(UserError, match=f"--overwrite_output_dir would remove {own}"):
        run(tmp_path / "run", *LENGTH, "--save_steps", 5, "--overwrite_output_dir", "--resume_from_checkpoint", own)
    assert steps_kept(tmp_path / "run") == [5, 10]


def test_the_last_checkpoint_of_another_run_is_taken_over_before_it_is_scored(tmp_path, monkeypatch):
    flags = [*LENGTH, "--eval_batch_size", 7]
    expected = run(tmp_path / "whole", *flags)
    last = tmp_path / "whole" / "checkpoints" / "step-000010"
    real = loop.evaluate

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(loop, "evaluate", signalled)
    with pytest.raises(loop.Interrupted, match="without --resume_from_checkpoint, goes on from there"):
        run(tmp_path / "run", *flags, "--resume_from_checkpoint", last)
    assert steps_kept(tmp_path / "run") == [10]
    monkeypatch.setattr(loop, "evaluate", real)
    assert run(tmp_path / "run", *flags)["test_loss"] == expected["test_loss"]


def test_a_constant_rate_may_be_trained_longer_and_ends_as_if_it_had_been_asked_at_once(tmp_path):
    constant = ["--lr_scheduler_type", "constant", "--warmup_steps", 2, "--train_batch_size", 50]
    whole = run(tmp_path / "whole", *constant, "--max_steps", 10)
    run(tmp_path / "run", *constant, "--max_steps", 6)
    longer = run(tmp_path / "run", *constant, "--max_steps", 10)
    assert longer["steps"] == 10 and longer["test_loss"] == whole["test_loss"]
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    with pytest.raises(UserError, match="is at step 10 already: 8 steps are fewer"):
        run(tmp_path / "run", *constant, "--max_steps", 8)


def test_a_rate_that_falls_to_its_end_may_not(tmp_path):
    run(tmp_path / "run", "--max_steps", 3)
    with pytest.raises(UserError, match=r"another recipe \(max_steps: 3 -> 5\)"):
        run(tmp_path / "run", "--max_steps", 5)


LEVEL = ["--recipe", "cifar10", "--train_batch_size", 8, "--config_overrides", "hidden_size=32", "--warmup_steps", 1,
         "--lr_scheduler_type", "constant", "--full_size_step", "none"]  # fmt: skip


@pytest.fixture
def stopped(image_folder, tmp_path):
    """(flags with which the run in run/ goes on for two more steps, its training folder)."""
    folder = image_folder(name="train", size=(8, 8), cat=12, dog=12, newt=12)
    run(tmp_path / "run", "--train_dir", folder, *LEVEL, "--max_steps", 3)
    return ["--train_dir", folder, *LEVEL, "--max_steps", 5], folder


@pytest.mark.parametrize("new_name", ["aardvark", "zebra"])
def test_a_run_does_not_go_on_with_other_classes(stopped, tmp_path, new_name):
    flags, folder = stopped
    (folder / "dog").rename(folder / new_name)
    with pytest.raises(UserError, match=f"other classes: now they are without 'dog' and with '{new_name}'. Bring"):
        run(tmp_path / "run", *flags)


def test_a_run_does_not_go_on_with_images_of_another_size(stopped, tmp_path):
    flags, folder = stopped
    for file in folder.rglob("*.png"):
        with Image.open(file) as image:
            image.resize((12, 12)).save(file)
    with pytest.raises(UserError, match="step-000003 is of another network .*: the images had another size"):
        run(tmp_path / "run", *flags)


def test_a_run_whose_images_have_become_more_says_so_and_goes_on(stopped, tmp_path, capsys):
    flags, folder = stopped
    for index in range(4):
        (folder / "cat" / f"again{index}.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    assert run(tmp_path / "run", *flags)["steps"] == 5
    said = capsys.readouterr().out
    assert "holds a run on 33 train, 3 validation images; now there are 36 train, 4 validation." in said
    run(tmp_path / "run", *flags)
    assert "now there are" not in capsys.readouterr().out  # it has been told
    (folder / "cat" / "again0.png").unlink()
    run(tmp_path / "run", *flags)
    assert "Its scores are those of the former" in capsys.readouterr().out
