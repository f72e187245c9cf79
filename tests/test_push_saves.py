"""`--hub_strategy every_save`: each checkpoint's weights on the Hub, while training goes on."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, load_file
from small_vit import build
from test_push import CODE, words

from modeling_vit_scratch import ViTScratchImageProcessor
from modeling_vit_scratch.results import model_folder
from modeling_vit_scratch.results.model_folder import checkpoint_as_model, save_model_folder
from modeling_vit_scratch.training import loop
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.pushing import PushedSaves


@pytest.mark.parametrize("averaging", [[], ["--ema_decay", "0.5"]])
def test_every_save_pushes_the_weights_that_a_checkpoint_would_publish(averaging, hub, tmp_path, monkeypatch):
    seen, real = [], PushedSaves.push

    def push_and_wait(saves, checkpoint, step, total_steps):  # each: a tiny run is faster than its uploads
        real(saves, checkpoint, step, total_steps)
        saves.thread.join()
        repository = hub.repositories["models", "me/digits"]
        seen.append((step, load(repository.files["model.safetensors"]), set(repository.files)))

    monkeypatch.setattr(PushedSaves, "push", push_and_wait)
    flags = ("--push_to_hub", "--hub_strategy", "every_save", "--save_steps", "2", "--max_steps", "6", *averaging)
    run_dir = tmp_path / "digits"
    loop.train(*parse_arguments(words(run_dir, "--save_total_limit", "9", *flags)))
    repository = hub.repositories["models", "me/digits"]
    assert [message.partition(":")[0] for message in repository.messages] == ["step 2 of 6", "step 4 of 6", "digits"]
    for step, tensors, files in seen:
        kind = "averaged" if averaging else "model"
        expected = load_file(run_dir / "checkpoints" / f"step-{step:06d}" / f"{kind}.safetensors")
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[k], expected[k]) for k in expected)
        assert files >= CODE | {"config.json", "preprocessor_config.json"}
    last = load_file(run_dir / "model" / "model.safetensors")
    final = load(repository.files["model.safetensors"])
    assert all(torch.equal(final[name], last[name]) for name in last)
    assert not (run_dir / ".pushing").exists()


def test_a_save_that_cannot_be_pushed_is_said_and_stops_nothing(hub, tmp_path, capsys, monkeypatch):
    fault = hub.fail("/commit/", times=10**6, status=500, method="POST")
    saves = PushedSaves(tmp_path, "me/digits")
    model = build()
    checkpoint = tmp_path / "step-000002"
    save_model_folder(checkpoint, model, model.state_dict(), ViTScratchImageProcessor(size=32))
    saves.push(checkpoint, 2, 6)
    saves.finish()
    assert "note: step 2 of 6 was not pushed: " in capsys.readouterr().out
    fault.times = 0
    assert not (tmp_path / ".pushing").exists()

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_folder.shutil, "copyfile", fill)
    saves.push(checkpoint, 4, 6)
    assert "note: step 4 of 6 was not pushed: " in capsys.readouterr().out
    assert not list(tmp_path.glob(".*pushing"))  # what was written of it would take the last room
    PushedSaves(tmp_path, None).push(checkpoint, 2, 6)  # nothing is asked for
    assert not (tmp_path / ".pushing").exists()


def test_a_pushed_checkpoint_is_a_model_for_who_lacks_the_package(tmp_path):
    model = build()
    save_model_folder(tmp_path / "step-000002", model, model.state_dict(), ViTScratchImageProcessor(size=32))
    checkpoint_as_model(tmp_path / "step-000002", tmp_path / "model")
    (tmp_path / "other").mkdir()
    code = (
        "import sys\nfrom transformers import AutoModelForImageClassification as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        "assert 'modeling_vit_scratch' not in sys.modules\n"
        "print(sum(p.double().sum().item() for p in model.parameters()))"
    )
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path / "other", env=environment
    )
    assert done.returncode == 0, done.stderr
    expected = sum(parameter.double().sum().item() for parameter in model.parameters())
    assert float(done.stdout) == pytest.approx(expected, rel=1e-9)
