"""To the Hub and back: one commit or nothing, checked before training; a stranger without the package loads it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_images
from huggingface_hub import ModelCard, constants
from PIL import Image
from test_run_train import launch

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor, cli
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.results.model_card import write_model_card
from modeling_vit_scratch.results.model_folder import save_model_folder
from modeling_vit_scratch.training import flags, loop
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.sweep_grid import parse_sweep

TINY = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=24"
WRONG_TOKEN = "hf_" + "Wr0ng" * 7
CODE = {f"{name}_vit_scratch.py" for name in ("configuration", "functions", "modeling", "image_processing")}
FILES = CODE | {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """The folder of a finished run that never took place."""
    folder = tmp_path / "newts"
    torch.manual_seed(0)
    config = ViTScratchConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20, image_size=16, patch_size=4,
        id2label=dict(enumerate(["cat", "dog", "newt"])),
    )  # fmt: skip
    model = ViTScratchForImageClassification(config)
    (folder / "plots").mkdir(parents=True)
    save_model_folder(folder / "model", model, model.state_dict(), ViTScratchImageProcessor(size=16))
    results = {"test_accuracy": 0.875, "class_names": ["cat", "dog", "newt"], "dataset": {"name": "newts"}}
    (folder / "recipe.json").write_text(json.dumps({"recipe": "folder", "train_dir": "newts"}))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("")
    make_images(1)[0].save(folder / "plots" / "curves.png")
    write_model_card(folder)
    return folder


def words(output_dir: Path, *more: str) -> list[str]:
    """The command line of a tiny run."""
    fixed = ["--output_dir", str(output_dir), "--report_to", "none", "--cpu_threads", "1", "--max_steps", "2"]
    return [*fixed, "--config_overrides", TINY, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def error_of(capsys: pytest.CaptureFixture) -> str:
    """The one line that a command left on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "hf_" not in line
    return line


# ---------------------------------------------------------------- there and back

STRANGER = """
import json, re, sys
import torch
from huggingface_hub import hf_hub_download
from PIL import Image

if "modeling_vit_scratch" in sys.modules or sys.flags.isolated != 1:
    raise SystemExit("the package may be importable: this would show nothing")
card = open(hf_hub_download("me/digits", "README.md"), encoding="utf-8").read()
examples = re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL)
names = {}
for example in examples:
    exec(example, names)
model, processor = names["model"], names["processor"]
inputs = processor(Image.open("picture.jpg"), return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
model.push_to_hub("me/again")
print(json.dumps({"examples": len(examples), "logits": logits.tolist()}))
"""


def test_a_stranger_without_the_package_gets_the_logits_of_the_run(hub, tmp_path, capfd):
    run_dir = tmp_path / "digits"
    loop.train(*parse_arguments(words(run_dir, "--push_to_hub", "--hub_private_repo")))
    assert hub.repositories["models", "me/digits"].private
    pushed = hub.repositories["models", "me/digits"].files
    local = contents(run_dir / "model")
    assert pushed.keys() == local.keys() >= FILES | {"plots/curves.png", "plots/confusion.png"}
    assert all(pushed[name] == local[name] for name in local if name != "README.md")

    make_images(1, (9, 9))[0].convert("L").save(tmp_path / "picture.jpg")
    environment = hub.environment(tmp_path / "home", token=hub.token("me")) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    model = ViTScratchForImageClassification.from_pretrained(run_dir / "model")
    processor = ViTScratchImageProcessor.from_pretrained(run_dir / "model")
    with torch.no_grad():
        logits = model(**processor(Image.open(tmp_path / "picture.jpg"), return_tensors="pt")).logits
    assert told["examples"] == 2 and torch.equal(torch.tensor(told["logits"]), logits)
    again = hub.repositories["models", "me/again"].files  # a stranger's own push carries the code along
    assert all(again[name] == pushed[name] for name in ("model.safetensors", "modeling_vit_scratch.py"))
    assert json.loads(again["config.json"])["auto_map"] == json.loads(pushed["config.json"])["auto_map"]

    out, err = capfd.readouterr()
    assert f"pushed: {hub.url}/me/digits/commit/" in out
    written = out + err + done.stdout + done.stderr
    assert hub.token("me") not in written
    assert not [name for name, content in contents(run_dir).items() if hub.token("me").encode() in content]


@pytest.mark.parametrize("is_new", [True, False])
def test_push_to_hub_of_a_model_uploads_its_code_and_leaves_the_model_as_it_was(hub, run_dir, is_new, monkeypatch):
    assert cli.main(["push", str(run_dir), "me/newts"]) == 0
    model = ViTScratchForImageClassification.from_pretrained(run_dir / "model")
    if is_new:
        weights, model = model.state_dict(), ViTScratchForImageClassification(model.config)
        model.load_state_dict(weights)
    before = model.config.to_dict()
    model.push_to_hub("me/other")
    assert model.config.to_dict() == before and ViTScratchForImageClassification._auto_class is None
    monkeypatch.setattr(ViTScratchImageProcessor, "_auto_class", None)  # restored in the end
    ViTScratchImageProcessor.register_for_auto_class()
    ViTScratchImageProcessor.from_pretrained(run_dir / "model").push_to_hub("me/other")
    ours, theirs = (hub.repositories["models", name].files for name in ("me/newts", "me/other"))
    assert theirs.keys() == FILES
    assert all(theirs[name] == ours[name] for name in CODE | {"model.safetensors"})
    written = [json.loads(files["config.json"]) for files in (ours, theirs)]
    assert written[0]["auto_map"] == written[1]["auto_map"] and set(written[0]) == set(written[1])


# ---------------------------------------------------------------- one commit


def test_a_push_is_one_commit_that_names_recipe_and_score(hub, run_dir, capsys):
    before = contents(run_dir)
    assert cli.main(["push", str(run_dir), "newts"]) == 0
    repository = hub.repositories["models", "me/newts"]
    assert repository.messages == ["folder: accuracy 87.50% on the test split"] and not repository.private
    assert repository.files.keys() == FILES | {"plots/curves.png"}
    assert contents(run_dir) == before
    assert capsys.readouterr().out == f"pushed: {hub.url}/me/newts/commit/{repository.commit}\n"


def test_the_card_that_is_pushed_names_its_repository_and_keeps_what_was_edited(hub, run_dir):
    path = run_dir / "model" / "README.md"
    path.write_text(path.read_text() + "\nNewts are not lizards.\n")
    assert cli.main(["push", str(run_dir), "me/pond"]) == 0
    card = ModelCard(hub.repositories["models", "me/pond"].files["README.md"].decode())
    assert card.text.count('"me/pond"') == 3 and "your-name" not in card.text and "not lizards" in card.text
    assert "your-name/newts" in path.read_text()  # may be pushed elsewhere


def test_a_second_push_of_the_same_run_makes_no_commit(hub, run_dir):
    assert [cli.main(["push", str(run_dir), "me/newts"]) for _ in range(2)] == [0, 0]
    assert len(hub.repositories["models", "me/newts"].messages) == 1


def test_what_else_the_repository_holds_stays(hub, run_dir):
    hub.add("models", "me/newts", {"LICENSE": b"mine", "README.md": b"old"})
    assert cli.main(["push", str(run_dir), "me/newts"]) == 0
    files = hub.repositories["models", "me/newts"].files
    assert files["LICENSE"] == b"mine" and files["README.md"] != b"old"


@pytest.mark.parametrize(
    ("method", "part", "status"),
    [("PUT", "/objects/", None), ("POST", "/commit/", None), ("POST", "/commit/", 500), ("POST", "/preupload/", 400)],
)
def test_a_push_that_breaks_leaves_nothing_and_a_second_one_completes(method, part, status, hub, run_dir, capsys):
    hub.add("models", "me/newts", {"README.md": b"old"})
    fault = hub.fail(part, times=10**6, status=status, method=method)
    assert cli.main(["push", str(run_dir), "me/newts"]) == 2
    repository = hub.repositories["models", "me/newts"]
    assert repository.messages == [] and repository.files == {"README.md": b"old"}
    assert "me/newts" in error_of(capsys)
    fault.times = 0
    assert cli.main(["push", str(run_dir), "me/newts"]) == 0
    assert len(repository.messages) == 1 and repository.files.keys() >= FILES


def test_weights_that_arrived_before_the_push_broke_are_not_sent_again(hub, run_dir):
    hub.fail("/commit/", status=None, method="POST")
    assert [cli.main(["push", str(run_dir), "me/newts"]) for _ in range(2)] == [2, 0]
    assert [method for method, path in hub.requests if "/objects/" in path and method == "PUT"] == ["PUT"]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, run_dir):
    hub.fail("/commit/", status=None, method="POST", is_done=True)
    assert [cli.main(["push", str(run_dir), "me/newts"]) for _ in range(2)] == [2, 0]
    repository = hub.repositories["models", "me/newts"]
    assert len(repository.messages) == 1 and repository.files.keys() >= FILES


def test_a_branch_is_made_and_main_stays_as_it_was(hub, run_dir):
    main = hub.add("models", "me/newts", {"README.md": b"old"})
    assert cli.main(["push", str(run_dir), "me/newts", "--revision", "seed-7"]) == 0
    assert main.files == {"README.md": b"old"} and main.messages == []
    assert main.branches["seed-7"].files.keys() >= FILES
    assert cli.main(["push", str(run_dir), "me/newts", "--revision", "seed-7"]) == 0  # it exists by now


# ---------------------------------------------------------------- before training


def _log_out(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")


def _mistype(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRONG_TOKEN)


def _may_only_read(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token("me", writes=False))


def _unplug(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def _go_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def _others_repository(hub, monkeypatch):
    hub.add("models", "you/digits", {})


def _public_repository(hub, monkeypatch):
    hub.add("models", "me/digits", {})


OBSTACLES = [
    (_log_out, "me/digits", "needs a token with the right to write: log in with `hf auth login`, or set HF_TOKEN"),
    (_mistype, "me/digits", "refuses this token for me/digits: it is mistyped, expired or revoked"),
    (_may_only_read, "me/digits", "may not write to me/digits: .* give the token the right to write at http"),
    (_unplug, "me/digits", "exchange with the Hub at http://127.0.0.1:9 about me/digits failed"),
    (_go_offline, "me/digits", "Nothing can be pushed to me/digits while HF_HUB_OFFLINE is set: unset it"),
    (_others_repository, "you/digits", "may not write to you/digits: name a repository of your own"),
    (_others_repository, "you/pond", "may not write to you/pond: name a repository of your own"),
    (_others_repository, "a/b/c", "'a/b/c' names no repository: expected owner/name"),
    (_others_repository, "me/no:colon", "'me/no:colon' names no repository: expected owner/name"),
    (_public_repository, "me/digits", "me/digits exists and is public, not private as asked: change it at http"),
]


@pytest.mark.parametrize(("obstacle", "name", "text"), OBSTACLES)
def test_nothing_is_trained_where_the_push_could_not_work(obstacle, name, text, hub, tmp_path, monkeypatch, capsys):
    obstacle(hub, monkeypatch)
    flags_of_push = ("--push_to_hub", "--hub_model_id", name, "--hub_private_repo")
    assert flags.main(words(tmp_path / "run", *flags_of_push)) == 2
    assert re.search(text, error_of(capsys)) and not (tmp_path / "run").exists()
    assert not [path for method, path in hub.requests if "/commit/" in path or "/preupload/" in path]


def test_no_repository_is_made_for_data_that_is_not_there(hub, tmp_path, capsys):
    missing = ("--train_dir", str(tmp_path / "photos"), "--recipe", "folder")
    assert flags.main([*missing, "--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", "me/x"]) == 2
    assert "photos" in error_of(capsys) and hub.repositories == {} and hub.requests == []


@pytest.mark.parametrize("word", ["--hub_token=" + WRONG_TOKEN, "--hub_token"])
def test_a_token_is_no_flag_for_a_command_line_is_seen_by_others(word, capsys):
    assert flags.main(["--push_to_hub", word]) == 2
    assert "--hub_token: a command line is seen by all users of the machine: set HF_TOKEN" in error_of(capsys)


def test_a_token_that_was_typed_where_it_does_not_belong_is_not_said(run_dir, capsys):
    assert cli.main(["push", str(run_dir), "me/newts", "--token", WRONG_TOKEN]) == 2
    assert "--token hf_***" in capsys.readouterr().err
    assert flags.main(["--seed", WRONG_TOKEN]) == 2
    assert "got 'hf_***'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--hub_model_id", "me/x"], ["--hub_private_repo"], ["--hub_strategy", "every_save"]])
def test_flags_of_the_hub_without_a_push_are_errors(flag, tmp_path, capsys):
    assert flags.main(words(tmp_path / "run", *flag)) == 2
    assert f"{flag[0]} has no effect here: it goes with --push_to_hub." in error_of(capsys)


def test_a_specimen_is_not_pushed(hub, run_dir, tmp_path, capsys):
    specimen = ("--preset", "digits", "--specimen", "diagonal_attention", "--push_to_hub")
    assert flags.main(["--output_dir", str(tmp_path / "run"), *specimen]) == 2
    assert "--push_to_hub has no effect here: a specimen is not published." in error_of(capsys)
    results = json.loads((run_dir / "results.json").read_text()) | {"specimen": "diagonal_attention"}
    (run_dir / "results.json").write_text(json.dumps(results))
    assert cli.main(["push", str(run_dir), "me/newts"]) == 2
    assert "holds a specimen" in error_of(capsys) and hub.requests == []


def test_a_sweep_pushes_nothing(tmp_path):
    with pytest.raises(UserError, match="would push every run of a sweep"):
        parse_sweep([*words(tmp_path), "--grid", "learning_rate=1e-3,1e-2", "--push_to_hub"])


# ---------------------------------------------------------------- after training


def test_a_run_whose_push_fails_is_whole_and_says_the_command_that_goes_on(hub, tmp_path, capsys):
    run_dir = tmp_path / "my run"
    fault = hub.fail("/commit/", times=10**6, status=None, method="POST")
    push = ("--push_to_hub", "--hub_model_id", "me/digits")
    assert flags.main(words(run_dir, *push)) == 2
    command = f"vit-scratch push '{run_dir}' me/digits"
    assert f"{run_dir} holds the run, whole, but its push failed" in (line := error_of(capsys)) and command in line
    assert (run_dir / "report.html").exists() and contents(run_dir / "model").keys() >= FILES
    fault.times = 0
    step = (run_dir / "metrics.jsonl").stat().st_mtime_ns
    assert cli.main(["push", str(run_dir), "me/digits"]) == 0
    assert flags.main(words(run_dir, *push)) == 0  # the same command finds the run finished and nothing to push
    assert len(hub.repositories["models", "me/digits"].messages) == 1
    assert (run_dir / "metrics.jsonl").stat().st_mtime_ns == step
    results = json.loads((run_dir / "results.json").read_text())
    assert "hub" not in results["command"]  # whoever repeats the run does not push to this repository


@pytest.mark.slow
@pytest.mark.parametrize("is_broken", [False, True])
def test_of_several_processes_the_first_one_pushes_and_no_other_waits(is_broken, hub, tmp_path):
    if is_broken:
        hub.fail("/commit/", times=10**6, status=None, method="POST")
    environment = hub.environment(tmp_path / "home", token=hub.token("me")) | {"HF_HUB_OFFLINE": "0"}
    done = launch(2, *words(tmp_path / "digits", "--push_to_hub"), **environment)
    assert (done.returncode != 0) == is_broken, done.stderr
    assert len(hub.repositories["models", "me/digits"].messages) == (not is_broken)
    assert sum(path.endswith("/commit/main") for _, path in hub.requests) == 1
    assert hub.requests.count(("GET", "/api/whoami-v2")) == 1
    assert done.stderr.count("but its push failed") == is_broken and hub.token("me") not in done.stdout + done.stderr


def test_a_finished_run_is_pushed_by_its_command_with_push_to_hub_added(hub, tmp_path):
    loop.train(*parse_arguments(words(tmp_path / "digits")))
    assert ("models", "me/digits") not in hub.repositories
    loop.train(*parse_arguments(words(tmp_path / "digits", "--push_to_hub")))
    assert len(hub.repositories["models", "me/digits"].messages) == 1


def test_a_folder_that_is_no_finished_run_makes_no_repository(hub, run_dir, capsys):
    (run_dir / "model" / "model.safetensors").unlink()
    for folder in (run_dir, run_dir / "nowhere"):
        assert cli.main(["push", str(folder), "me/newts"]) == 2
        missing = f"model.safetensors missing: remove {run_dir}/results.json and start the command"
        assert (missing if folder == run_dir else "No ") in error_of(capsys)
    assert cli.main(["push", str(run_dir / "model"), "me/newts"]) == 2
    assert f"Did you mean {str(run_dir)!r}?" in error_of(capsys)
    assert hub.repositories == {} and hub.requests == []


def test_a_model_that_is_gone_is_written_anew_from_the_last_checkpoint(tmp_path):
    loop.train(*parse_arguments(words(tmp_path / "digits")))
    weights = tmp_path / "digits" / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    (tmp_path / "digits" / "results.json").unlink()
    loop.train(*parse_arguments(words(tmp_path / "digits")))
    assert weights.read_bytes() == before
