"""Whatever a crash, a full disk or a bad disk does to checkpoints, a resume takes a whole one and says what it left."""

import io
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training import checkpointing
from modeling_vit_scratch.training.checkpointing import (
    MANIFEST,
    checkpoints,
    damage,
    load_checkpoint,
    newest_whole,
    prune,
    save_checkpoint,
    step_of,
)

ROOT = Path(__file__).resolve().parents[1]
FILES = ("model.safetensors", "averaged.safetensors", "optimizer.safetensors", "state.json", MANIFEST)


def save(folder, step, mark=0.0):
    """A small checkpoint of every kind of file; its weights carry the step and the mark."""
    weights = {"weight": torch.full((5, 7), float(step)), "mark": torch.tensor(mark)}
    averages = {name: tensor + 1 for name, tensor in weights.items()}
    moments = {"weight/exp_avg": torch.ones(5, 7), "weight/step": torch.tensor(float(step))}
    return save_checkpoint(folder, step, weights, moments, {"position": {"step": step}}, averages)


def mark(checkpoint):
    return float(load_checkpoint(checkpoint).model["mark"])


# ---------------------------------------------------------------- files that are not what was written


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_passed_over_aloud(tmp_path, name):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    content = (second / name).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (second / name).write_bytes(content[:length])
        said = []
        assert newest_whole(tmp_path, said.append) == first
        assert len(said) == 1 and said[0].startswith(f"passing over {second}: ")
        with pytest.raises(UserError, match="step-000002 is damaged: "):
            load_checkpoint(second)
    (second / name).write_bytes(content)
    assert newest_whole(tmp_path) == second


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_passed_over_aloud(tmp_path, name):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    (second / name).unlink()
    said = []
    assert newest_whole(tmp_path, said.append) == first
    assert len(said) == 1 and name in said[0]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_wherever_it_lies(tmp_path, name):
    checkpoint = save(tmp_path, 2)
    content = (checkpoint / name).read_bytes()
    for place in range(0, len(content) * 8, 5):  # each bit of a byte in turn
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (checkpoint / name).write_bytes(flipped)
        assert damage(checkpoint) is not None, f"bit {place}"
    (checkpoint / name).write_bytes(content)
    assert damage(checkpoint) is None


def test_where_every_checkpoint_is_damaged_none_is_taken(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").unlink()
    said = []
    assert newest_whole(tmp_path, said.append) is None
    assert [line.count("model.safetensors is missing") for line in said] == [1, 1]


def test_a_damaged_later_checkpoint_does_not_push_out_those_of_the_run_that_went_on(tmp_path):
    save(tmp_path, 8)
    (save(tmp_path, 10) / "model.safetensors").unlink()
    assert newest_whole(tmp_path, lambda text: None) == tmp_path / "step-000008"
    saved = save(tmp_path, 9)  # a signal came before step 10 was there again
    prune(tmp_path, keep_last=1, best_step=None)
    assert checkpoints(tmp_path) == [saved]


# ---------------------------------------------------------------- a crash between any two calls


class Crash(BaseException):
    """The machine is off: nothing catches it and no call after it does anything."""


@contextmanager
def crash_at(monkeypatch, number, kept=1.0):
    """Every call that changes the disk raises from call `number` on; yields a list that counts the calls.

    kept: the share of a tensor file that is on the disk when the crash strikes while it is written.
    """
    calls = []

    def counted(real, cut_short=None):
        def call(*args, **kwargs):
            calls.append(real.__name__)
            if len(calls) == number and cut_short is not None:
                cut_short(*args)
            if len(calls) >= number:
                raise Crash
            return real(*args, **kwargs)

        return call

    def half_a_tensor_file(tensors, path):
        content = b"\0" * int(kept * sum(tensor.nbytes for tensor in tensors.values()))
        descriptor = real_open(path, os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, content)
        os.close(descriptor)

    real_open = os.open
    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(io, "open", counted(io.open))  # state.json and the manifest
        patch.setattr(checkpointing, "save_file", counted(checkpointing.save_file, half_a_tensor_file))
        yield calls


def num_calls(monkeypatch, act):
    with crash_at(monkeypatch, 10**9) as calls:
        act()
    return len(calls)


def test_a_crash_at_any_call_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    save(tmp_path / "counted", 1)
    total = num_calls(monkeypatch, lambda: save(tmp_path / "counted", 2))
    assert total > 12  # folders, files, manifest, syncs, renames
    taken = []
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        save(folder, 1)
        with pytest.raises(Crash), crash_at(monkeypatch, number, kept=number % 3 / 2):
            save(folder, 2)
        found = newest_whole(folder, lambda text: pytest.fail(text))
        taken.append(step_of(found))
        assert mark(found) == 0.0 and load_checkpoint(found).model["weight"][0, 0] == step_of(found)
        assert newest_whole(folder) == save(folder, 2) or step_of(found) == 1  # and the run can go on
        prune(folder, keep_last=2, best_step=None)
        assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002"]
    assert taken == sorted(taken) and set(taken) == {1, 2}  # the old one, and from one call on the new one


def test_a_crash_at_any_call_while_the_only_checkpoint_is_replaced_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    save(tmp_path / "counted", 1)
    total = num_calls(monkeypatch, lambda: save(tmp_path / "counted", 1))
    taken = []
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        save(folder, 1, mark=1.0)
        with pytest.raises(Crash), crash_at(monkeypatch, number):
            save(folder, 1, mark=2.0)
        found = newest_whole(folder, lambda text: pytest.fail(text))
        assert found == folder / "step-000001"
        taken.append(mark(found))
        assert mark(save(folder, 1, mark=3.0)) == 3.0
        prune(folder, keep_last=1, best_step=None)
        assert [path.name for path in folder.iterdir()] == ["step-000001"]
    assert taken == sorted(taken) and set(taken) == {1.0, 2.0}


def test_a_crash_at_any_call_of_the_first_save_leaves_nothing_or_all(tmp_path, monkeypatch):
    total = num_calls(monkeypatch, lambda: save(tmp_path / "counted", 1))
    for number in range(1, total + 1):
        folder = tmp_path / str(number)
        with pytest.raises(Crash), crash_at(monkeypatch, number):
            save(folder, 1)
        found = newest_whole(folder, lambda text: pytest.fail(text))
        assert found is None or mark(found) == 0.0
        save(folder, 1)


def test_a_crash_at_any_call_while_old_ones_are_removed_keeps_the_last(tmp_path, monkeypatch):
    def filled(folder):
        for step in (1, 2, 3):
            save(folder, step)
        return folder

    counted = filled(tmp_path / "counted")
    for number in range(1, num_calls(monkeypatch, lambda: prune(counted, 1, None)) + 1):
        folder = filled(tmp_path / str(number))
        with pytest.raises(Crash), crash_at(monkeypatch, number):
            prune(folder, keep_last=1, best_step=None)
        assert newest_whole(folder, lambda text: pytest.fail(text)) == folder / "step-000003"
        prune(folder, keep_last=1, best_step=None)
        assert [path.name for path in folder.iterdir()] == ["step-000003"]


# ---------------------------------------------------------------- a disk that takes no more


def only_line(error, folder):
    """The text of the error, after the check that it is one line that names the last good checkpoint and a remedy."""
    text = str(error.value)
    assert "\n" not in text and f"The last good checkpoint is {folder / 'step-000001'}." in text
    assert text.endswith("Make room, or mend the disk, and start the same command again.")
    return text


def test_a_file_that_the_system_cuts_short_is_one_line_and_keeps_the_last_good_one(tmp_path):
    save(tmp_path, 1)
    largest = max(file.stat().st_size for file in (tmp_path / "step-000001").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 100, largest - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # real writes fail in the middle of a file
            with pytest.raises(UserError) as caught:
                save(tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "The checkpoint of step 2, 0.0 MB, could not be written to" in only_line(caught, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]  # the room of the broken one is free again
    assert newest_whole(tmp_path) == tmp_path / "step-000001"
    assert newest_whole(tmp_path) != save(tmp_path, 2)


@pytest.mark.parametrize("name", ["mkdir", "rename", "fsync"])
def test_any_call_that_finds_the_disk_full_is_one_line_and_keeps_the_last_good_one(tmp_path, monkeypatch, name):
    real, calls, failing = getattr(os, name), [], [0]

    def full(*args, **kwargs):
        calls.append(name)
        if len(calls) == failing[0]:
            raise OSError(28, "No space left on device", str(args[0]))
        return real(*args, **kwargs)

    refused = 0
    while failing[0] <= len(calls):
        calls.clear()
        failing[0] += 1
        folder = tmp_path / str(failing[0])
        save(folder, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            try:
                save(folder, 2)
            except UserError as error:
                refused += 1
                assert "No space left on device" in str(error) and "\n" not in str(error)
        assert newest_whole(folder, lambda text: pytest.fail(text)) is not None
        assert not list(folder.glob(".*"))
    assert refused > 0


DRIVER = """
import sys
import torch
from pathlib import Path
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.checkpointing import newest_whole, save_checkpoint

folder = Path(sys.argv[1])
for step, size in ((1, 1_000), (2, 400_000), (3, 1_000)):  # of 4 bytes, on a disk of 1 MiB
    try:
        save_checkpoint(folder, step, {"weight": torch.ones(size)}, {}, {})
    except UserError as error:
        print(error)
    print(newest_whole(folder).name, len(list(folder.iterdir())))
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_keeps_the_last_good_checkpoint_and_is_used_again(tmp_path):
    command = 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"'
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command, "sh", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here without root")
    done = subprocess.run(
        [*isolated, sys.executable, "-c", DRIVER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    first, said, second, third = done.stdout.splitlines()
    assert (first, second, third) == ("step-000001 1", "step-000001 1", "step-000003 2")
    assert said.startswith(f"The checkpoint of step 2, 1.6 MB, could not be written to {tmp_path}: ")
    assert "No space left on device" in said and "The last good checkpoint is " in said


def test_an_old_checkpoint_that_cannot_be_removed_is_one_line(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(args[0]))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="step-000001 could not be removed: .*Permission denied.*by hand"):
        prune(tmp_path, keep_last=1, best_step=None)
