"""docs/lora.md says what is true: its code runs, its commands parse, its table is the recorded one."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from small_vit import build
from test_project_shape import launched_commands

from modeling_vit_scratch.training.finetuning import prepare_finetuning, save_adapter
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.recipe import FIELDS
from modeling_vit_scratch.training.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import finetuning_sizes  # noqa: E402

TEXT = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
MARKERS = ("<!-- sizes: benchmarks/finetuning_sizes.py -->\n", "\n<!-- end of sizes -->")


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def finetuned(tmp_path, monkeypatch):
    """A network with LoRA, whose base and adapter lie where the text says that they lie."""
    monkeypatch.chdir(tmp_path)
    base = build(num_labels=10)
    base.save_pretrained("outputs/cifar10/model")
    model = build(num_labels=5, seed=1)
    model.vit.load_state_dict(base.vit.state_dict())
    prepare_finetuning(model, RECIPES["finetune"].replace(finetune="lora"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(model, Path("outputs/photos/adapter"), "outputs/cifar10/model")
    return model


def test_the_code_of_the_text_runs_and_what_it_loads_has_the_finetuned_logits(finetuned):
    namespace = {}
    for block in python_blocks(TEXT):  # the text asserts that its LoRA equals peft's
        exec(compile(block, "docs/lora.md", "exec"), namespace)
    images = torch.randn(2, 3, 32, 32)
    expected = finetuned(images).logits
    torch.testing.assert_close(namespace["plain"].eval()(images).logits, expected, rtol=1e-4, atol=1e-4)


def test_code_that_no_longer_equals_pefts_would_be_seen(finetuned):
    wrong = "\n".join(python_blocks(TEXT)).replace("alpha / r\n", "alpha\n")
    assert wrong != "\n".join(python_blocks(TEXT))
    with pytest.raises(AssertionError, match="not close"):
        exec(compile(wrong, "docs/lora.md", "exec"), {})


def test_the_commands_of_the_text_parse_and_its_flags_have_these_defaults():
    (command,) = launched_commands(TEXT)
    recipe, _ = parse_arguments(command[1:] if command[0].endswith(".py") else command)
    assert recipe.finetune == "lora"
    for name, value in re.findall(r"^\| `--(\w+) (\S+)` \|", TEXT, flags=re.MULTILINE):
        assert str(FIELDS[name].default).removesuffix(".0") == value, name


def test_the_table_is_the_recorded_one():
    start, end = (TEXT.index(marker) for marker in MARKERS)
    recorded = json.loads((ROOT / "benchmarks" / "results" / "finetuning-sizes.json").read_text(encoding="utf-8"))
    assert TEXT[start + len(MARKERS[0]) : end] == finetuning_sizes.markdown(recorded["results"])


def test_the_recorded_sizes_are_what_a_network_gives(tmp_path):
    recorded = json.loads((ROOT / "benchmarks" / "results" / "finetuning-sizes.json").read_text(encoding="utf-8"))
    row = finetuning_sizes.measure("vit_s_16", 10, {"finetune": "lora"}, tmp_path)
    same = next(
        other for other in recorded["results"] if (other["preset"], other["mode"]) == (row["preset"], row["mode"])
    )
    # an adapter's bytes are those of its configuration too, which differs from version to version of peft
    assert row == {**same, "trained_bytes": pytest.approx(same["trained_bytes"], rel=0.01)}
