"""`vit-scratch doctor` examines what a file, a preset or a checkpoint holds, and its exit code says how it went."""

import json

import pytest
import torch
from small_vit import build

from modeling_vit_scratch import cli
from modeling_vit_scratch.doctor import CHECKS

OWN = """
import torch
from beside import sizes
from modeling_vit_scratch.specimens import SPECIMENS, HealthyViT

def healthy():
    torch.manual_seed(0)
    return HealthyViT(**sizes)

def article_4():
    return SPECIMENS["merged_without_transpose"].build()

def all_of_it(network):
    return torch.optim.AdamW(network.parameters())

def only_the_head(network):
    return torch.optim.AdamW(network.head.parameters())

def number():
    return 3

def broken():
    raise RuntimeError("no\\nway")
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own_networks.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("sizes = {'num_labels': 7}")
    return str(tmp_path / "own_networks.py")


def run(*arguments):
    return cli.main(["doctor", *map(str, arguments)])


def test_a_healthy_network_of_a_file_exits_with_0(own, capsys):
    flags = ("--image_size", 16, "--num_labels", 7, "--optimizer", f"{own}:all_of_it")
    assert run(f"{own}:healthy", *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "result", "measured", "expected"]
    assert [line.split()[:2] for line in lines[1 : len(CHECKS) + 1]] == [[name, "ok"] for name in CHECKS]
    assert lines[-1] == f"{len(CHECKS)} checks passed, 0 failed, 0 not applicable"


def test_a_bug_exits_with_1_and_says_how_to_mend_it(own, capsys):
    assert run(f"{own}:article_4", "--image_size", 16, "--skip", "memorises_one_batch") == 1
    out = capsys.readouterr().out
    assert "layer_equivariance: heads are split or merged by a view or reshape without a transpose" in out
    assert "  mend it: x.view(B, N, A, F).transpose(1, 2)" in out


def test_a_file_is_run_once_so_that_its_classes_are_the_networks_own(tmp_path, capsys):
    (tmp_path / "counted.py").write_text(
        "import torch\nfrom modeling_vit_scratch.specimens import HealthyViT\n\nprint('run')\n\n"
        "class Own(HealthyViT):\n    pass\n\n"
        "def optimizer(network):\n    assert isinstance(network, Own)\n"
        "    return torch.optim.SGD(network.parameters(), 0.1)\n"
    )
    file = tmp_path / "counted.py"
    skip = ",".join(set(CHECKS) - {"output_shape", "one_optimizer_group_each"})
    assert run(f"{file}:Own", "--image_size", 16, "--optimizer", f"{file}:optimizer", "--skip", skip) == 0
    assert capsys.readouterr().out.count("run\n") == 1


def test_images_that_are_not_square_are_given_as_height_and_width(tmp_path):
    (tmp_path / "wide.py").write_text(
        "from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification\n\ndef build():\n"
        "    config = ViTScratchConfig.from_preset('nano', image_size=(16, 32), num_labels=10)\n"
        "    return ViTScratchForImageClassification(config)\n"
    )
    skip = ",".join(set(CHECKS) - {"output_shape", "every_patch_counts"})
    assert run(f"{tmp_path}/wide.py:build", "--image_size", "16,32", "--skip", skip) == 0
    assert run(f"{tmp_path}/wide.py:build", "--image_size", "32,16", "--skip", skip) == 1


def test_the_report_as_json_holds_every_finding(own, capsys):
    skip = ",".join(set(CHECKS) - {"one_optimizer_group_each"})
    flags = ("--image_size", 16, "--optimizer", f"{own}:only_the_head", "--skip", skip, "--format", "json")
    assert run(f"{own}:article_4", *flags) == 1
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert list(findings) == list(CHECKS)
    assert findings["one_optimizer_group_each"]["measured"].startswith("in no group: class_token, positions, ")
    assert findings["pooling"]["passed"] is None


def test_a_preset_brings_its_sizes_and_its_optimizer(capsys):
    torch.manual_seed(0)
    assert run("digits") == 0
    out = capsys.readouterr().out
    assert "one_optimizer_group_each        ok " in out
    assert "2 x 2 pixels each" in out


def test_a_checkpoint_is_examined_past_its_first_loss(tmp_path, capsys):
    build().save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", "--format", "json") == 0
    findings = {finding["check"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["first_loss"]["passed"] is None
    assert findings["memorises_one_batch"]["passed"] is True


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("{own}:healthy",), "--image_size is needed with file.py:factory"),
        (("{own}:helthy", "--image_size", 16), "'helthy'. Did you mean 'healthy'?"),
        (("{own}:number", "--image_size", 16), "must give the network, a Module; it gave int."),
        (("{own}:broken", "--image_size", 16), "called with no arguments, raised RuntimeError: no way."),
        (("{own}",), ": name the function in it that gives the network too: "),
        (("nowhere.py:healthy", "--image_size", 16), "there is no file 'nowhere.py'."),
        (("nanoo",), "No file.py:factory, folder or preset 'nanoo'. Did you mean 'nano'?"),
        (("nano", "--image_size", 16), "--image_size goes with file.py:factory; nano says its own: leave it out."),
        (("nano", "--skip", "poolin"), "No check 'poolin'. Did you mean 'pooling'?"),
        (("nano", "--format", "xml"), "No --format 'xml'."),
        (
            ("{own}:healthy", "--image_size", "x"),
            "Argument --image_size: pixels are one number or height,width, such as 32 or 32,48; got 'x'.",
        ),
        (("{own}:healthy", "--image_size", 16, "--num_labels", 1), "num_labels must be at least 2, got 1"),
        (("{own}:healthy", "--image_size", 16, "--num_labels", 0), "num_labels must be at least 2, got 0"),
        (("{own}:healthy", "--image_size", 16, "--num_channels", 0), "got image_size (16, 16) and num_channels 0."),
        (("nano", "--optimizer", "{own}:number"), "called with the network, raised TypeError"),
    ],
)
def test_a_wrong_word_is_said_in_one_line(arguments, text, own, capsys):
    assert run(*(str(word).format(own=own) for word in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert text in error
