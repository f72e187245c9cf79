"""docs/articles.md says what is true: equations quote the network, commands parse, findings are the doctor's."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from test_project_shape import launched_commands

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.specimens import SPECIMENS
from modeling_vit_scratch.training.article_recipes import PRINTED
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import articles  # noqa: E402

TEXT = (ROOT / "docs" / "articles.md").read_text(encoding="utf-8")
NETWORK = (ROOT / "modeling_vit_scratch" / "modeling_vit_scratch.py").read_text(encoding="utf-8").splitlines()


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def section(title):
    """The text under a heading, to the next one of its level."""
    return re.split(r"^## ", TEXT.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def strangers(equations, source):
    """The quoted lines that are not lines of the source, in the order of the source, block by block."""
    missing = []
    for block in python_blocks(equations):
        rest = iter(source)
        missing += [line for line in block.splitlines() if line not in rest]
    return missing


def test_the_lines_below_the_equations_are_the_networks_own():
    equations = section("Equation by equation")
    assert [int(number) for number in re.findall(r"^Equation (\d)", equations, flags=re.MULTILINE)] == [*range(1, 9)]
    assert len(python_blocks(equations)) == 8
    assert strangers(equations, NETWORK) == []


def test_a_line_that_the_network_no_longer_has_is_found():
    equations = section("Equation by equation")
    changed = [line.replace("value).transpose(1, 2).contiguous()", "value)") for line in NETWORK]
    assert [line.strip()[:20] for line in strangers(equations, changed)] == ["return torch.matmul("]


def test_the_doctors_findings_stand_in_each_articles_section():
    for name, fields in PRINTED.items():
        text = section(f"Article {name[-1]}")
        for bug in (fields.get("specimen") or "").split(","):
            if bug:
                (row,) = [line for line in text.splitlines() if line.startswith(f"| `{bug}`")]
                assert f"`{SPECIMENS[bug].check}`" in row


@pytest.mark.parametrize("name", [name for name in PRINTED if name != "article_3"])
def test_the_parameters_of_the_table_are_the_networks(name):
    (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| [`{name}`]")]
    with torch.device("meta"):
        labels = {"num_labels": 3 if name == "article_2" else 10}
        config = ViTScratchConfig.from_preset(RECIPES[name].preset, **labels)
        model = ViTScratchForImageClassification(config)
    assert row.split("|")[4].strip() == f"{model.num_parameters():,}"


def test_the_commands_of_the_text_parse():
    commands = launched_commands(TEXT)
    assert [parse_arguments(words)[0].recipe for words in commands] == ["article_4", "article_4_mended", "article_2"]
    for flags in re.findall(r"`(--preset [^`]*)`", TEXT):
        recipe, _ = parse_arguments(["--recipe", "article_1", *flags.split()])
        assert recipe.preset in ("article_0_small", "article_1_cpu")


def test_the_code_of_the_text_shows_the_bug(capsys):
    torch.manual_seed(0)
    (code,) = python_blocks(TEXT.partition("\n## Article 0")[0])
    code = code.replace('from_preset("article_4")', 'from_preset("article_4", num_hidden_layers=1)')  # a second less
    exec(compile(code, "docs/articles.md", "exec"), {})
    assert re.search(r"layer_equivariance\s+FAILED", capsys.readouterr().out)


# ---------------------------------------------------------------- the recorded runs


def test_the_table_of_our_runs_is_the_recorded_one():
    assert articles.with_recorded(TEXT) == TEXT
    if articles.RECORD.exists():
        assert f"{articles.recorded_rows()[0]['parameters']:,}" in section("Our runs")


ROW = {"network": "article_4", "command": "run_train.py", "test_accuracy": 0.5, "test_loss": 1.0, "steps": 2000,
       "train_seconds": 61.2, "parameters": 3_189_002, "megabytes": 12.76, "milliseconds": 3.04}  # fmt: skip


def test_recorded_rows_take_the_place_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(articles, "RECORD", tmp_path / "record.json")
    articles.RECORD.write_text(json.dumps({"parts": [{"rows": [ROW]}]}), encoding="utf-8")
    text = articles.with_recorded(TEXT)
    assert "| `article_4` | 50.00 | 2,000 | 61 | 3,189,002 | 12.8 | 3.0 |\n<!-- end of articles -->" in text
    assert articles.with_recorded(text) == text and "Not yet recorded" not in text


def test_the_cnn_learns_and_its_cost_is_what_it_has(parquet_repo):
    repository = parquet_repo(num_classes=2, size=(32, 32), train=[24], test=[6])
    flags = ["--dataset_name", str(repository), "--train_batch_size", "8"]
    row = articles.train_cnn("article_4_mended", flags, seconds=0.3)
    assert row["steps"] > 0 and row["train_seconds"] >= 0.3 and 0 <= row["test_accuracy"] <= 1
    kernels = 9 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256)
    assert row["parameters"] == kernels + 2 * (32 + 64 + 128 + 256) + 2 * 256 + 2
    buffers = 4 * 2 * (32 + 64 + 128 + 256) + 4 * 8  # running means and variances, and counters
    assert row["megabytes"] == round((4 * row["parameters"] + buffers) / 1e6, 2)
