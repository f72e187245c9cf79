"""Plots, report.html and model card, made from the folder of a run that never took place."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.results import record
from modeling_vit_scratch.results.model_card import markdown, write_model_card
from modeling_vit_scratch.results.plots import LIGHT, curves_figure, plot_label, running_mean, write_plots
from modeling_vit_scratch.results.report import heading, write_report

CLASSES = ["<script>alert(1)</script>", "猫", "$x_1^2", "a | b [c](d) `e`"]
CONFUSION = [[7, 1, 0, 0], [0, 8, 0, 1], [0, 0, 9, 0], [3, 0, 0, 8]]
TOKEN = "hf_" + "Abc123" * 4


def training_rows(num_rows: int = 12) -> list[dict[str, Any]]:
    rates = [1e-3 * (1 - row / num_rows) for row in range(num_rows)]
    return [
        {"step": 10 * (row + 1), "epoch": row / 4, "loss": 2.3 / (row + 1), "learning_rate": rate, "data_wait": 0.02,
         "train_accuracy": 1 - 0.9 / (row + 1), "grad_norm": 1.0 + row % 3, "images_per_second": 800.0 + row}
        for row, rate in enumerate(rates)
    ]  # fmt: skip


def evaluation_rows(losses: list[float], accuracies: list[float]) -> list[dict[str, Any]]:
    pairs = enumerate(zip(losses, accuracies, strict=True))
    return [{"step": 30 * (row + 1), "eval_loss": x, "eval_accuracy": y, "eval_f1_macro": y} for row, (x, y) in pairs]


def a_results(**changes: Any) -> dict[str, Any]:
    counts = np.array(CONFUSION)
    hits, predicted, support = np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)
    per_class = [
        {"class": name, "precision": hits[k] / predicted[k], "recall": hits[k] / support[k],
         "f1": 2 * hits[k] / (predicted[k] + support[k]), "support": int(support[k])}
        for k, name in enumerate(CLASSES)
    ]  # fmt: skip
    results = {
        "test_accuracy": 32 / 37, "test_loss": 0.3141592653589793, "test_f1_macro": 0.8611111111111112,
        "validation_accuracy": 0.9, "validation_loss": 0.27, "validation_f1_macro": 0.875,
        "command": f"accelerate launch run_train.py --recipe folder --train_dir '/home/anna/My Pictures/flowers' "
                   f"--output_dir=/home/anna/outputs/first --learning_rate 1e-3 --note {TOKEN}",
        "versions": {"torch": "2.14.1", "transformers": "5.23.0"}, "commit": "0123abc",
        "hardware": {"device": "cpu", "gpu": None, "processor": "<b>Fast & Sons</b>", "threads_per_process": 2},
        "seed": 7, "train_seconds": 754.2, "images_per_second": 812.0, "steps": 120, "num_parameters": 5_403_210,
        "num_processes": 1, "mixed_precision": "no", "weights": "last",
        "dataset": {"name": "/home/anna/My Pictures/flowers", "splits": {"train": 300, "validation": 30, "test": 37}},
        "class_names": CLASSES, "confusion": {"test": CONFUSION}, "per_class": {"test": per_class},
    }  # fmt: skip
    return {**results, **changes}


A_RECIPE = {
    "recipe": "folder",
    "train_dir": "/home/anna/My Pictures/flowers",
    "learning_rate": 1e-3,
    "image_mean": None,
}
EVALUATIONS = evaluation_rows([1.5, 0.9, 0.6, 0.5], [0.5, 0.7, 0.8, 0.9])


def write_run(folder: Path, results: dict[str, Any], rows: list[dict[str, Any]], recipe: dict[str, Any]) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "first", a_results(), training_rows() + EVALUATIONS, A_RECIPE)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a report, for the tests that look at one."""
    rows = training_rows() + EVALUATIONS
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "first", a_results(), rows, A_RECIPE)
    return write_report(run_dir).read_text(encoding="utf-8")


class Page(HTMLParser):
    """A page's tags, attributes and text; a tag that closes another one than the last that was opened is an error."""

    VOID = ("meta", "img", "source", "br", "link", "input", "hr")
    SHAPES = ("line", "path", "rect", "circle")  # of SVG, which may close themselves within HTML too

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]):
        assert tag in self.VOID + self.SHAPES
        self.handle_starttag(tag, attrs)
        if tag in self.SHAPES:
            self.open.pop()

    def handle_endtag(self, tag: str):
        assert self.open.pop() == tag

    def handle_data(self, data: str):
        self.text += data


# ---------------------------------------------------------------- plots


def test_plots_are_pictures_of_a_sensible_size(run_dir: Path):
    paths = write_plots(run_dir)
    names = ["plots/curves.png", "plots/confusion.png", "plots/confusion.csv"]
    assert [path.relative_to(run_dir).as_posix() for path in paths] == names
    with open(paths[-1], newline="", encoding="utf-8") as file:
        (_, *columns), *rows = csv.reader(file)
    results = json.loads((run_dir / "results.json").read_text())
    assert columns == [row[0] for row in rows] == results["class_names"]
    assert [[int(count) for count in row[1:]] for row in rows] == results["confusion"]["test"]
    for path in paths[:-1]:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and all(400 <= side <= 4000 for side in image.size)
            # not a blank sheet: the mean of a page of text and lines is neither white nor black
            assert 100 < np.asarray(image.convert("L")).mean() < 254


def test_the_same_records_give_the_same_pictures(run_dir: Path):
    first = [path.read_bytes() for path in write_plots(run_dir)]
    assert [path.read_bytes() for path in write_plots(run_dir)] == first


def test_plots_leave_pyplots_state_alone(run_dir: Path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    write_plots(run_dir)
    assert dict(matplotlib.rcParams) == before


def test_a_matrix_of_many_classes_is_not_drawn(tmp_path: Path):
    names = [f"class {k}" for k in range(51)]
    results = a_results(class_names=names, confusion={"test": np.eye(51, dtype=int).tolist()}, per_class={})
    run_dir = write_run(tmp_path / "many", results, training_rows(), A_RECIPE)
    assert [path.name for path in write_plots(run_dir)] == ["curves.png", "confusion.csv"]
    assert "up to 50 classes" in Page(write_report(run_dir).read_text()).text


def test_a_class_without_images_and_a_loss_that_is_not_a_number_are_drawn(tmp_path: Path):
    rows = [*training_rows(), {"step": 130, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-4}]
    confusion = {"validation": [[0, 0, 0, 0], *CONFUSION[1:]]}
    run_dir = write_run(tmp_path / "odd", a_results(confusion=confusion), rows, A_RECIPE)
    assert len(write_plots(run_dir)) == 3


def test_running_mean_equals_the_mean_of_each_window():
    values = np.random.default_rng(0).normal(size=23)
    values[5] = np.nan
    expected = [np.nanmean(values[max(0, k - 3) : k + 4]) for k in range(23)]
    np.testing.assert_allclose(running_mean(values.tolist(), 3), expected, atol=1e-12)  # sums in another order


@pytest.mark.parametrize(("name", "label"), [("cat", "cat"), ("猫", "class 3"), ("x" * 30, "x" * 19 + "…")])
def test_a_class_is_labelled_by_its_name_where_the_font_has_its_letters(name: str, label: str):
    assert plot_label(3, name) == label


# ---------------------------------------------------------------- report.html


def test_report_is_well_formed_and_readable_on_a_phone(report: str):
    page = Page(report)
    assert ("meta", "name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in page.text  # the style sheet
    assert page.tags.count("svg") == 7  # six curves and a matrix, each for light and dark
    ElementTree.fromstring(report)  # as XML too


def test_report_fetches_nothing_and_runs_nothing(report: str):
    page = Page(report)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    references = [value for _, name, value in page.attributes if name in ("src", "srcset", "href", "data", "action")]
    assert references and all(re.match(r"#[a-z]+$|data:image/(png|jpeg);base64,", value) for value in references)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "http:" not in report and "https:" not in report and "@import" not in report and "url(" not in report


def test_report_shows_strange_names_as_text(report: str):
    page = Page(report)
    assert "<script" not in report and "<b>Fast" not in report
    for name in [*CLASSES, "<b>Fast & Sons</b>"]:
        assert name in page.text


def test_report_holds_scores_recipe_command_machine_and_versions(report: str):
    text = Page(report).text
    facts = ["86.49%", "0.3142", "90.00%", "± 11.0 points on 37 images", "those of the last step"]
    facts += ["12 min 34 s", "5,403,210", "learning_rate", "0.001", "run_train.py", "threads per process", "2.14.1"]
    for fact in [*facts, "0123abc"]:
        assert fact in text
    assert TOKEN not in report and "hf_***" in report


def test_a_run_without_scores_and_evaluations_has_a_report(tmp_path: Path):
    results = {
        "command": ["accelerate", "launch", "run_train.py"],
        "class_names": ["a", "b"],
        "dataset": {"name": "digits"},
    }
    run_dir = write_run(tmp_path / "bare", results, training_rows(1), {"recipe": "digits"})
    assert "accelerate launch run_train.py" in Page(write_report(run_dir).read_text()).text
    assert metadata_load(write_model_card(run_dir)).get("model-index") is None
    assert "No split was scored" in (run_dir / "model" / "README.md").read_text()


# ---------------------------------------------------------------- the sentence on overfitting


def test_a_loss_that_rises_while_accuracy_does_not_fall_is_said(tmp_path: Path):
    rows = training_rows() + evaluation_rows([1.0, 0.5, 0.6, 0.8], [0.5, 0.7, 0.72, 0.75])
    run = record.read_run(write_run(tmp_path / "run", a_results(), rows, A_RECIPE))
    assert "rose to 0.800 at step 120, while the validation accuracy did not fall (70.00%, then 75.00%)" in heading(run)


def test_a_run_with_several_labels_speaks_of_exact_matches_alone(tmp_path: Path):
    for accuracies in ([0.5, 0.7, 0.7, 0.69], [0.5, 0.7, 0.72, 0.75]):
        rows = training_rows() + evaluation_rows([1.0, 0.5, 0.6, 0.8], accuracies)
        run_dir = write_run(tmp_path / str(accuracies[-1]), a_results(is_multi_label=True), rows, A_RECIPE)
        page = Page(write_report(run_dir).read_text()).text
        assert "while the validation exact match did not" in page
        assert "accuracy" not in page.lower().replace("test_accuracy", "")


def test_a_class_without_images_has_no_recall(tmp_path: Path):
    results = a_results()
    results["per_class"]["test"][0] |= {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    page = write_report(write_run(tmp_path / "run", results, training_rows(), A_RECIPE)).read_text()
    row = page[page.index('<section id="classes"') :].partition("<tbody>")[2].partition("</tr>")[0]
    assert row.count("0.0%") == 2 and row.count("–") == 2  # precision, its bar; recall and F1


def test_the_rate_of_a_run_with_one_logged_step_is_seen(tmp_path: Path):
    rows = [{"step": 1, "loss": 1.0, "learning_rate": 1e-3}]
    run = record.read_run(write_run(tmp_path / "run", a_results(), rows, A_RECIPE))
    axes = {panel.get_title(loc="left"): panel for panel in curves_figure(run, LIGHT).axes}
    assert axes["Learning rate"].lines[0].get_marker() == axes["Loss"].lines[0].get_marker() == "o"


@pytest.mark.parametrize(
    ("losses", "accuracies", "overfits"),
    [
        ([1.0, 0.5, 0.6, 0.8], [0.5, 0.7, 0.7, 0.69], True),
        ([1.0, 0.5, 0.6, 0.8], [0.5, 0.7, 0.7, 0.70], True),  # no higher is not risen
        ([1.0, 0.5, 0.6, 0.8], [0.5, 0.7, 0.72, 0.75], False),  # accuracy still rises
        ([1.0, 0.5, 0.4, 0.3], [0.5, 0.7, 0.7, 0.69], False),  # loss still falls
        ([1.0, 0.5, 0.5, 0.51], [0.5, 0.7, 0.7, 0.69], False),  # within the noise
        ([0.5], [0.7], False),
        ([], [], False),
    ],
)
def test_overfitting_is_said_exactly_when_loss_rises_and_accuracy_does_not(
    losses: list[float], accuracies: list[float], overfits: bool, tmp_path: Path
):
    rows = training_rows() + evaluation_rows(losses, accuracies)
    run_dir = write_run(tmp_path / "run", a_results(), rows, A_RECIPE)
    sentence = "rose to 0.800 at step 120, while the validation accuracy did not rise"
    assert (sentence in heading(record.read_run(run_dir))) == overfits
    assert (sentence in write_model_card(run_dir).read_text(encoding="utf-8")) == overfits
    assert (record.overfitting_note(evaluation_rows(losses, accuracies)) is not None) == overfits


# ---------------------------------------------------------------- model card


def test_card_scores_equal_results_json(run_dir: Path):
    path = write_model_card(run_dir)
    assert path == run_dir / "model" / "README.md"
    results = json.loads((run_dir / "results.json").read_text())
    name, entries = model_index_to_eval_results(metadata_load(path)["model-index"])
    keys = {"Accuracy": "accuracy", "Macro F1": "f1_macro", "Loss": "loss"}
    found = {f"{entry.dataset_split}_{keys[entry.metric_name]}": entry.metric_value for entry in entries}
    assert name == "first"
    assert found == {key: value for key, value in results.items() if key.startswith(("test_", "validation_"))}


def test_card_metadata_makes_a_hub_repository(run_dir: Path):
    data = metadata_load(write_model_card(run_dir))
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert data["license"] == "apache-2.0" and data["metrics"] == ["accuracy", "f1"]
    assert "datasets" not in data and "base_model" not in data
    assert ModelCard.load(run_dir / "model" / "README.md").data.to_dict() == data


@pytest.mark.parametrize(
    ("dataset", "recipe", "hub_id"),
    [
        ({"name": "uoft-cs/cifar10"}, {}, "uoft-cs/cifar10"),
        ({"name": "cifar10", "repository": "uoft-cs/cifar10"}, {}, "uoft-cs/cifar10"),
        ({"name": "cifar10"}, {}, None),
        ({"name": "data/flowers", "repository": None}, {}, None),
        ({"name": "data/flowers"}, {"train_dir": "data/flowers"}, None),
        ({"name": "/home/anna/flowers"}, {}, None),
    ],
)
def test_card_names_the_data_only_where_it_is_on_the_hub(
    dataset: dict[str, Any], recipe: dict[str, Any], hub_id: str | None, tmp_path: Path
):
    run_dir = write_run(tmp_path / "run", a_results(dataset=dataset), [], {"recipe": "cifar10", **recipe})
    assert metadata_load(write_model_card(run_dir)).get("datasets") == ([hub_id] if hub_id else None)


def test_a_binary_training_loss_is_told_from_the_validation_loss(tmp_path: Path):
    rows = [*training_rows(), *evaluation_rows([1.0, 0.5], [0.5, 0.9])]
    for recipe, is_binary in ((A_RECIPE, False), ({**A_RECIPE, "bce_loss": True}, True)):
        run_dir = write_run(tmp_path / str(is_binary), a_results(), rows, recipe)
        found = write_report(run_dir).read_text(encoding="utf-8").count("</i>training (binary)<")
        assert found == (1 if is_binary else 0)  # beside the loss, not beside the accuracy


def test_card_of_a_fine_tuned_model_names_its_base(tmp_path: Path):
    run_dir = write_run(tmp_path / "run", a_results(), [], {**A_RECIPE, "model_name_or_path": "google/vit-base"})
    path = write_model_card(run_dir)
    assert metadata_load(path)["base_model"] == "google/vit-base"
    assert "fine-tuned from google/vit-base" in path.read_text(encoding="utf-8")


def test_card_holds_no_local_path_and_no_token(run_dir: Path):
    text = write_model_card(run_dir).read_text(encoding="utf-8")
    assert "/home" not in text and "anna" not in text and TOKEN not in text
    assert "--train_dir flowers --output_dir=first --learning_rate 1e-3" in text
    assert "- Data: flowers" in text


def test_card_shows_strange_names_as_text(run_dir: Path):
    text = write_model_card(run_dir).read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    assert r"a \| b \[c\](d) \`e\`" in text
    assert markdown("a\nb \x1b[1m") == "a\N{REPLACEMENT CHARACTER}b \N{REPLACEMENT CHARACTER}\\[1m"


def test_card_code_is_python(run_dir: Path):
    text = write_model_card(run_dir).read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        compile(example, "README.md", "exec")
        assert '"your-name/first"' in example and "trust_remote_code=True" in example


def test_card_says_what_the_records_do_not_show(run_dir: Path):
    text = write_model_card(run_dir).read_text(encoding="utf-8")
    assert "The test accuracy was counted on 37 images: ± 11.0 points (95%)." in text
    assert r"Its weakest class is a \| b \[c\](d) \`e\`: 72.7% of its 11 test images were recognised." in text
    assert "not scored on a test split" not in text


# ---------------------------------------------------------------- records


def test_most_confused_equals_a_count_by_hand():
    assert record.most_confused(CONFUSION, ["a", "b", "c", "d"]) == [("d", "a", 3), ("a", "b", 1), ("b", "d", 1)]


def test_accuracy_margin_equals_scipys_wilson_interval():
    from scipy.stats import binomtest

    for hits, num_images in ((32, 37), (0, 10), (9_876, 10_000)):
        interval = binomtest(hits, num_images).proportion_ci(0.95, method="wilson")
        half_width = (interval.high - interval.low) / 2
        assert record.accuracy_margin(hits / num_images, num_images) == pytest.approx(half_width)


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("python run_train.py --recipe digits", "python run_train.py --recipe digits"),
        ("/usr/bin/python run_train.py --train_dir ~/pets", "python run_train.py --train_dir pets"),
        (["python", "run_train.py", "--train_dir", r"C:\Users\anna\pets"], "python run_train.py --train_dir pets"),
        (
            "run_train.py --train_dir=file:///data/pets --test_dir ../x/pets",
            "run_train.py --train_dir=pets --test_dir pets",
        ),
        ("run_train.py --train_dir data/pets 'open quote", "run_train.py --train_dir data/pets ''\"'\"'open' quote"),
    ],
)
def test_public_command_cuts_paths_outside_the_working_folder(command: str | list[str], public: str):
    assert record.public_command(command) == public


@pytest.mark.parametrize(
    "seconds_text", [(4.21, "4.2 s"), (59.4, "59 s"), (754.2, "12 min 34 s"), (7_260, "2 h 1 min")]
)
def test_durations_are_said_in_two_units(seconds_text: tuple[float, str]):
    assert record.duration_text(seconds_text[0]) == seconds_text[1]


@pytest.mark.parametrize("missing", ["recipe.json", "results.json", "metrics.jsonl"])
def test_a_folder_that_is_no_finished_run_is_an_error_a_person_can_mend(missing: str, run_dir: Path):
    (run_dir / missing).unlink()
    with pytest.raises(UserError, match=f"No .*{missing}: expected a finished run's folder"):
        write_report(run_dir)


def test_a_broken_line_is_named(run_dir: Path):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 17 is not JSON"):
        write_plots(run_dir)


def test_scores_come_test_split_first_and_unknown_ones_too():
    results = {
        "validation_loss": 1.0,
        "test_calibration_error": 0.01,
        "test_accuracy": 0.5,
        "test_note": "x",
        "steps": 3,
    }
    assert record.scores(results) == {"test": {"accuracy": 0.5, "calibration_error": 0.01}, "validation": {"loss": 1.0}}
    assert record.metric_label("calibration_error") == "Calibration error"
    assert list(record.scores(results)["test"]) == ["accuracy", "calibration_error"]
