"""What a stranger made runs no code and leaves its folder nowhere; a token is written nowhere."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import make_images
from small_vit import build
from test_report import Page
from test_run_train import TINY, equal, metrics, run, weights

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training import loop, publishing
from modeling_vit_scratch.training.flags import main, parse_arguments
from modeling_vit_scratch.weights import load_pretrained

# put together here, so that no scanner takes this file for a leak
TOKEN = "hf_" + "Zx9" * 11 + "A"


class Trap:
    """Unpickled, it touches a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def trap(tmp_path):
    """The file that only code of a stranger would make."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


@pytest.fixture
def model_folder(tmp_path):
    """A checkpoint of ours, and the names of its classes."""
    model = build()
    model.save_pretrained(tmp_path / "stranger")
    return tmp_path / "stranger"


def code_that_touches(path):
    return f"from pathlib import Path\nPath({str(path)!r}).touch()\n"


def refusal(arguments, capsys):
    """The one line that a command is refused with."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "alone.pth", "alone.npz"])
def test_weights_that_would_run_code_are_refused_in_one_line(name, trap, model_folder, tmp_path, capsys):
    (model_folder / "model.safetensors").unlink()
    file = tmp_path / name if name.startswith("alone") else model_folder / name
    state = {"classifier.weight": Trap(trap)}
    if name.endswith("npz"):
        np.savez(file, **{key: np.array(value, dtype=object) for key, value in state.items()})
    else:
        torch.save(state, file)
    named = file if name.startswith("alone") else model_folder
    words = ["--dataset_name", "digits", "--model_name_or_path", named, "--output_dir", tmp_path / "run"]
    said = refusal([*words, "--max_steps", 1], capsys)
    reason = "allow_pickle=False" if name.endswith("npz") else "unpickling it could run any code"
    assert reason in said and name in said and not (tmp_path / "run").exists()


def test_the_traps_of_this_file_work(tmp_path):
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "file.pth")
    torch.load(tmp_path / "file.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_pickle_beside_safetensors_is_never_opened(trap, model_folder):
    torch.save({"classifier.weight": Trap(trap)}, model_folder / "pytorch_model.bin")
    assert isinstance(load_pretrained(str(model_folder))[0], ViTScratchForImageClassification)


@pytest.fixture
def without_pictures(monkeypatch):
    """Runs draw nothing: pictures take longer than these runs."""
    for name in ("write_plots", "write_report"):
        monkeypatch.setattr(publishing, name, lambda *_: None)


def test_the_code_that_a_checkpoint_brings_is_not_run(trap, model_folder, tmp_path, without_pictures):
    config = json.loads((model_folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
    (model_folder / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    (model_folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "evil.P"}}))
    (model_folder / "evil.py").write_text(code_that_touches(trap))
    load_pretrained(str(model_folder))
    ViTScratchForImageClassification.from_pretrained(model_folder)
    words = ["--dataset_name", "digits", "--model_name_or_path", model_folder, "--output_dir", tmp_path / "run"]
    words += ["--max_steps", 1, "--train_batch_size", 8, "--report_to", "none"]
    assert main(list(map(str, words))) == 0


# ---------------------------------------------------------------- checkpoints of a run


def test_a_pickle_in_a_checkpoint_that_a_run_goes_on_from_is_not_opened(trap, tmp_path, monkeypatch, without_pictures):
    arguments = ["--max_steps", 4, "--save_steps", 2, "--train_batch_size", 16]
    run(tmp_path / "whole", *arguments)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000004")
    (tmp_path / "broken" / "results.json").unlink()
    left = tmp_path / "broken" / "checkpoints" / "step-000002"
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "model.pth"):
        torch.save(Trap(trap), left / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a checkpoint of a run was unpickled"))
    run(tmp_path / "broken", *arguments)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")


# ---------------------------------------------------------------- data sets


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["dataset.py", "data/repo.py"])
def test_a_script_in_a_dataset_is_not_run(trap, parquet_repo, streaming, name):
    root = parquet_repo(train=[6])
    (root / name).write_text(code_that_touches(trap))
    assert len(open_source(str(root), streaming=streaming, train_val_split=0).splits["train"]) == 6


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_with_a_loading_script_is_refused_in_one_line(trap, parquet_repo, streaming):
    root = parquet_repo(train=[6])
    (root / "repo.py").write_text(code_that_touches(trap))
    with pytest.raises(
        UserError, match="repo has a loading script, repo.py, and scripts are never run: remove it from"
    ):
        open_source(str(root), streaming=streaming, train_val_split=0)


STRANGE = ["../../escaped", "/etc/escaped", "<script>alert(1)</script>", "a\x1b[31m\nb", "con|`x`", "C:\\escaped"]


@pytest.fixture(scope="module")
def strange_run(tmp_path_factory):
    """(the folder of a run on classes and files of strange names, every file of the folder around it)."""
    around = tmp_path_factory.mktemp("around")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=STRANGE)})
    for split, count in (("train", 24), ("test", 12)):
        images = [{"bytes": None, "path": None} for _ in range(count)]
        for index, image in enumerate(make_images(count, seed=count)):
            image.save(around / "held.png")
            path = f"../../escaped/{index}\x1b[31m.png"
            images[index] = {"bytes": (around / "held.png").read_bytes(), "path": path}
        rows = {"image": images, "label": [row % len(STRANGE) for row in range(count)]}
        path = around / "data" / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    (around / "held.png").unlink()
    before = {path for path in around.rglob("*") if path.is_file()}
    folder = around / "runs" / "run"
    run(folder, "--recipe", "cifar10", "--dataset_name", around, "--max_steps", 2, "--train_batch_size", 8)
    return folder, {path for path in around.rglob("*") if path.is_file()} - before


def test_names_of_classes_and_files_lead_nowhere_outside_the_runs_folder(strange_run):
    folder, written = strange_run
    assert len(written) > 12 and all(path.is_relative_to(folder) for path in written)
    assert not [path for path in written if "escaped" in str(path.relative_to(folder))]
    assert not Path("/etc/escaped").exists()


def test_strange_class_names_are_text_in_report_and_card(strange_run):
    folder, _ = strange_run
    report = (folder / "report.html").read_text(encoding="utf-8")
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "script" not in Page(report).tags and STRANGE[2] in Page(report).text
    assert "<script" not in card and "&lt;script&gt;" in card
    for text in (report, card):
        assert "\x1b" not in text
    assert json.loads((folder / "model" / "config.json").read_text())["id2label"]["0"] == STRANGE[0]


# ---------------------------------------------------------------- tokens


def test_tokens_of_the_environment_and_of_the_command_are_written_nowhere(tmp_path, monkeypatch, capfd, caplog):
    written = "hf_" + "Qw8" * 11 + "B"  # on the command line, as a part of a path
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    caplog.set_level("DEBUG")
    folder = tmp_path / written
    words = ["--max_steps", 2, "--report_to", "tensorboard", "--output_dir", folder, "--train_batch_size", 8]
    results = loop.train(*parse_arguments([*map(str, words), "--config_overrides", TINY, "--cpu_threads", "1"]))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    out, err = capfd.readouterr()
    assert TOKEN not in out + err + caplog.text
    for name in ("report.html", "model/README.md", "results.json"):
        assert written not in (folder / name).read_text(encoding="utf-8"), name
    assert written not in results["command"]
