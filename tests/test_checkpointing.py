"""A checkpoint is whole or not there, and what is not whole is never taken for it."""

import os

import pytest
import torch

from modeling_vit_scratch.training import checkpointing
from modeling_vit_scratch.training.checkpointing import (
    checkpoints,
    damage,
    load_checkpoint,
    load_optimizer_tensors,
    newest_whole,
    optimizer_tensors,
    prune,
    save_checkpoint,
)

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor(1.5, dtype=torch.bfloat16)}


def save(folder, step):
    return save_checkpoint(
        folder, step, TENSORS, {"weight/step": torch.tensor(float(step))}, {"position": {"step": step}}
    )


def test_what_is_saved_is_loaded(tmp_path):
    saved = load_checkpoint(save(tmp_path, 7))
    assert all(torch.equal(saved.model[name], tensor) for name, tensor in TENSORS.items())
    assert saved.optimizer["weight/step"] == 7 and saved.state == {"step": 7, "position": {"step": 7}}
    assert saved.averaged is None
    averages = {name: tensor + 1 for name, tensor in TENSORS.items()}
    saved = load_checkpoint(save_checkpoint(tmp_path, 8, TENSORS, {}, {}, averages))
    assert all(torch.equal(saved.averaged[name], tensor) for name, tensor in averages.items())


def test_nothing_is_pickled(tmp_path):
    names = {path.name for path in save(tmp_path, 1).iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("harm", ["truncate", "delete", "flip a bit"])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, name, harm):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    file = second / name
    content = file.read_bytes()
    if harm == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "delete":
        file.unlink()
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    said = []
    assert newest_whole(tmp_path, said.append) == first
    assert len(said) == 1 and "step-000002" in said[0]
    assert damage(first) is None


def test_saving_a_step_again_never_leaves_it_missing(tmp_path, monkeypatch):
    first = save(tmp_path, 1)
    monkeypatch.setattr(checkpointing, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    monkeypatch.undo()
    assert newest_whole(tmp_path) == first
    save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("call", ["save_file", "_sync", "rename"])
def test_a_crash_while_writing_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, call):
    first = save(tmp_path, 1)

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os if call == "rename" else checkpointing, call, crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == [first]
    assert newest_whole(tmp_path) == first
    prune(tmp_path, keep_last=1, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in (5, 10, 1_000_000, 20):
        save(tmp_path, step)
    prune(tmp_path, keep_last=2, best_step=5)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1000000", "step-000020", "step-000005"]


def test_optimizer_state_survives_by_parameter_name(tmp_path):
    torch.manual_seed(0)
    names = ["first", "second"]
    parameters = [torch.nn.Parameter(torch.randn(3)) for _ in names]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    sum((parameter**2).sum() for parameter in parameters).backward()
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, names).items()}
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    other = torch.optim.AdamW([copies[1], copies[0]], lr=0.1)  # another order
    load_optimizer_tensors(other, ["second", "first"], saved)
    for pair in (parameters, copies):
        (optimizer if pair is parameters else other).zero_grad()
        sum((parameter**2).sum() for parameter in pair).backward()
    optimizer.step()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))
