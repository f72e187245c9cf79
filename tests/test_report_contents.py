"""What report.html shows of a run: its charts hold the run's numbers, its images are those that they are said to be."""

import base64
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity
from small_vit import build
from test_report import A_RECIPE, CLASSES, CONFUSION, a_results, evaluation_rows, training_rows, write_run
from test_run_train import run
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.results.examined import (
    HIGHEST_LOSS,
    LEAST_CONFIDENT,
    examine,
    patch_filters,
    position_similarities,
    telling_images,
)
from modeling_vit_scratch.results.metrics import calibration
from modeling_vit_scratch.results.record import read_run, weights_text
from modeling_vit_scratch.results.report import write_report
from modeling_vit_scratch.results.report_charts import (
    MOST_POINTS,
    confusion_chart,
    panel_chart,
    reliability_chart,
    short,
    thinned,
)
from modeling_vit_scratch.results.report_network import mosaic


def chart(panel: str) -> ElementTree.Element:
    return ElementTree.fromstring(panel)


def line_through(ticks: list[tuple[float, float]], is_log: bool = False) -> np.poly1d:
    """From places in the picture to values, as the ticks say: (place, value) of each."""
    places, values = zip(*ticks, strict=True)
    return np.poly1d(np.polyfit(places, np.log10(values) if is_log else values, 1))


def number_of(tick: str) -> float:
    factors = {"%": 0.01, "k": 1e3, "m": 1e-3, "M": 1e6}
    return float(tick[:-1]) * factors[tick[-1]] if tick[-1] in factors else float(tick)


def points_of(picture: ElementTree.Element, css_class: str, is_log: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a curve, read off the axes as a person with a ruler would."""
    texts = [(element.get("class"), element) for element in picture.iter("text")]
    across = line_through([(float(e.get("x")), number_of(e.text)) for kind, e in texts if kind == "x"])
    ups = [(float(e.get("y")) - 4, number_of(e.text)) for kind, e in texts if kind == "y"]
    path = next(e.get("d") for e in picture.iter("path") if e.get("class") == css_class)
    places = np.array([list(map(float, pair)) for pair in re.findall(r"([\d.]+),([\d.]+)", path)])
    values = line_through(ups, is_log)(places[:, 1])
    return across(places[:, 0]), 10**values if is_log else values


def a_run(folder: Path, rows: list[dict[str, Any]], **changes: Any):
    return read_run(write_run(folder, a_results(**changes), rows, A_RECIPE))


# ---------------------------------------------------------------- curves


def test_curves_are_the_numbers_of_the_log(tmp_path: Path):
    rows = training_rows() + evaluation_rows([1.5, 0.9, 0.6, 0.5], [0.5, 0.7, 0.8, 0.9])
    found = a_run(tmp_path / "run", rows)
    pairs = {"loss": "eval_loss", "train_accuracy": "eval_accuracy", "learning_rate": None, "images_per_second": None,
             "grad_norm": None, "data_wait": None}  # fmt: skip
    for key, evaluation in pairs.items():
        picture = chart(panel_chart(found, key))
        for name, css_class, logged in ((key, "first", found.training), (evaluation, "second", found.evaluations)):
            if name is None:
                continue
            steps, values = points_of(picture, css_class)
            expected = np.array([row[name] for row in logged])
            span = max(expected.max(), 1e-9)
            np.testing.assert_allclose(steps, [row["step"] for row in logged], atol=0.1)
            np.testing.assert_allclose(values, expected, atol=1e-3 * span)  # two decimals of a pixel, four of a tick


def test_each_evaluation_says_its_number(tmp_path: Path):
    found = a_run(tmp_path / "run", evaluation_rows([1.23456, 0.9], [0.5, 0.71]))
    titles = [element.text for element in chart(panel_chart(found, "loss")).iter("title")]
    assert titles == ["validation, step 30: 1.235", "validation, step 60: 0.9"]


def test_a_gradient_norm_that_spans_decades_is_drawn_on_a_logarithmic_axis(tmp_path: Path):
    norms = [0.01, 0.3, 7.0, 90.0]
    rows = [{"step": k + 1, "loss": 1.0, "grad_norm": norm} for k, norm in enumerate(norms)]
    _, values = points_of(chart(panel_chart(a_run(tmp_path / "run", rows), "grad_norm")), "first", is_log=True)
    np.testing.assert_allclose(values, norms, rtol=1e-3)


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0"), (0.5, "0.5"), (2.34567, "2.346"), (12_500, "12.5k"), (2.5e-5, "2.5e-5"), (2_000_000, "2M")],
)
def test_ticks_are_short(value: float, written: str):
    assert short(value) == written


def test_a_curve_breaks_where_a_loss_is_not_a_number(tmp_path: Path):
    rows = [{"step": k, "loss": math.nan if k == 3 else 1.0 / k} for k in range(1, 6)]
    picture = chart(panel_chart(a_run(tmp_path / "run", rows), "loss"))
    path = next(element.get("d") for element in picture.iter("path"))
    assert re.sub(r"[\d.,]", "", path) == "MLML"


def test_a_curve_of_many_points_is_faint_with_its_running_mean_on_top(tmp_path: Path):
    losses = np.random.default_rng(0).uniform(1, 2, 300)
    rows = [{"step": k + 1, "loss": loss, "learning_rate": 1e-3 / (k + 1)} for k, loss in enumerate(losses)]
    found = a_run(tmp_path / "run", rows)
    picture = chart(panel_chart(found, "loss"))
    np.testing.assert_allclose(points_of(picture, "faint first")[1], losses, atol=1e-3)
    means = [losses[max(0, k - 6) : k + 7].mean() for k in range(300)]  # a fiftieth of the points on each side
    np.testing.assert_allclose(points_of(picture, "first")[1], means, atol=1e-3)
    assert f"training {losses[0]:.4g} at step 1, {losses[-1]:.4g} at step 300" in picture.find("svg").get("aria-label")
    rates = points_of(chart(panel_chart(found, "learning_rate")), "first")[1]
    np.testing.assert_allclose(rates, [row["learning_rate"] for row in rows], atol=1e-6)


def test_a_long_curve_keeps_its_peaks():
    values = np.random.default_rng(0).normal(size=30_000)
    values[[1234, 23456]] = 99, -99
    steps, kept = thinned(list(range(len(values))), values.tolist())
    assert len(kept) <= MOST_POINTS and {99, -99} <= set(kept) and steps == sorted(steps)
    assert all(values[step] == value for step, value in zip(steps, kept, strict=True))


# ---------------------------------------------------------------- reliability and confusion


def test_bins_of_the_reliability_diagram_equal_numpys():
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.2, 1, 500)
    is_right = rng.uniform(size=500) < confidences**2
    picture = chart(reliability_chart(calibration(confidences, is_right)))
    frame = next(e for e in picture.iter("rect") if e.get("class") == "frame")
    bins = np.digitize(confidences, np.linspace(0, 1, 16)[1:-1])
    assert len(picture.findall(".//g")) == len(np.unique(bins))
    for place, group in zip(np.unique(bins), picture.iter("g"), strict=True):
        inside = bins == place
        said = re.search(r"([\d,]+) images, ([\d.]+)% right at a mean confidence of ([\d.]+)%", group[0].text)
        accuracy, confidence = is_right[inside].mean(), confidences[inside].mean()
        assert int(said[1]) == inside.sum()
        assert float(said[2]) == pytest.approx(100 * accuracy, abs=0.051)
        assert float(said[3]) == pytest.approx(100 * confidence, abs=0.051)
        bar, gap, _ = group.findall("rect")
        side = float(frame.get("height"))
        assert float(bar.get("height")) / side == pytest.approx(accuracy, abs=1e-4)
        assert float(gap.get("height")) / side == pytest.approx(abs(accuracy - confidence), abs=1e-4)


def test_cells_of_the_confusion_chart_are_the_counts():
    picture = chart(confusion_chart(CONFUSION, CLASSES))
    counts = [int(element.text) for element in picture.iter("text") if "count" in element.get("class", "")]
    assert counts == [count for row in CONFUSION for count in row if count]
    names = [element.text for element in picture.iter("text") if element.get("class") == "name"]
    assert [name[:9] for name in names[::2]] == [name[:9] for name in CLASSES]


# ---------------------------------------------------------------- images


def run_without_images(folder: Path, *arguments: Any) -> Path:
    run(folder, "--max_steps", 3, "--train_batch_size", 32, *arguments)
    return folder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on digits that trained for three steps."""
    return run_without_images(tmp_path_factory.mktemp("runs") / "digits")


def shots_of(report: str, key: str) -> list[tuple[np.ndarray, str]]:
    """(pixels, caption) of the figures of a section."""
    section = next(e for e in ElementTree.fromstring(report).iter("section") if e.get("id") == key)
    shots = []
    for figure in section.iter("figure"):
        data = figure.find(".//img").get("src").partition("base64,")[2]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        shots.append((pixels, " ".join(figure.find("figcaption").itertext())))
    return shots


def test_the_worst_images_are_those_of_the_highest_loss(digits_run: Path):
    digits = open_source("digits").splits["test"].examples
    images, labels = digits.images, torch.tensor(digits.labels())
    processor = AutoImageProcessor.from_pretrained(digits_run / "model")
    model = ViTScratchForImageClassification.from_pretrained(digits_run / "model").eval()
    with torch.no_grad():
        logits = model(**processor([Image.fromarray(image) for image in images], return_tensors="pt")).logits
    losses, confidences = cross_entropy(logits, labels, reduction="none"), logits.softmax(dim=1).amax(dim=1)
    examples = json.loads((digits_run / "results.json").read_text())["examples"]["test"]
    for kind, values, largest in ((HIGHEST_LOSS, losses, True), (LEAST_CONFIDENT, confidences, False)):
        best = values.topk(12, largest=largest).values
        name = "loss" if largest else "confidence"
        np.testing.assert_allclose([row[name] for row in examples[kind]], best, rtol=1e-4)
        for row in examples[kind]:
            assert row["label"] == labels[row["sample"]] and row["answer"] == logits[row["sample"]].argmax()
            assert row["loss"] == pytest.approx(losses[row["sample"]].item(), rel=1e-4)

    shots = shots_of((digits_run / "report.html").read_text(encoding="utf-8"), "images")
    rows = examples[HIGHEST_LOSS] + examples[LEAST_CONFIDENT]
    for (pixels, caption), row in zip(shots, rows, strict=True):
        np.testing.assert_array_equal(pixels, images[row["sample"]])
        assert f"is  {row['label']}" in caption and f"loss {row['loss']:.3f}" in caption


def test_doubt_about_several_labels_is_the_mean_over_the_classes():
    logits = np.random.default_rng(0).normal(scale=3, size=(30, 4))
    labels = (np.random.default_rng(1).uniform(size=(30, 4)) < 0.5).astype(np.float32)
    losses = np.random.default_rng(2).uniform(size=30)
    found = telling_images(logits, labels, losses)
    probabilities = 1 / (1 + np.exp(-logits))
    confidences = np.maximum(probabilities, 1 - probabilities).mean(axis=1)
    assert [row["sample"] for row in found[LEAST_CONFIDENT]] == np.argsort(confidences)[:12].tolist()
    assert [row["sample"] for row in found[HIGHEST_LOSS]] == np.argsort(-losses)[:12].tolist()
    row = found[HIGHEST_LOSS][0]
    assert row["answer"] == np.flatnonzero(logits[row["sample"]] > 0).tolist()
    assert row["label"] == np.flatnonzero(labels[row["sample"]]).tolist()
    json.dumps(found)  # plain numbers


def test_a_streamed_split_shows_its_images_too(parquet_repo, tmp_path: Path):
    root = parquet_repo(train=[40, 30], test=[9, 11])
    flags = ["--dataset_name", root, "--recipe", "cifar10", "--crop_padding", 0]
    reports = {}
    for streaming in ("false", "true"):
        folder = run_without_images(tmp_path / streaming, *flags, "--streaming", streaming)
        report = (folder / "report.html").read_text(encoding="utf-8")
        examples = json.loads((folder / "results.json").read_text())["examples"]["test"]
        reports[streaming] = list(zip(shots_of(report, "images"), examples[HIGHEST_LOSS], strict=False))
        assert len(shots_of(report, "images")) == 24 and len(shots_of(report, "attention")) == 6
    source = open_source(str(root), train_val_split=0)
    originals = [source.splits["test"].examples.read(0, [row])[0].image for row in range(20)]
    for (pixels, _), row in reports["true"]:
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(originals[row["sample"]]))))


def test_a_report_says_why_images_are_missing(digits_run: Path, tmp_path: Path):
    found = read_run(digits_run)
    assert examine(found).missing == ["The images are missing: the report was written without the run's data."]
    broken = open_source("digits")

    def read(shard: int, rows: Any):
        raise UserError("Shard x is no longer there.")

    broken.splits["test"].examples.read = read
    said = "The images of the test split could not be read again: Shard x is no longer there."
    assert examine(found, broken).missing == [said]
    bare = write_run(tmp_path / "bare", a_results(specimen="a bug"), training_rows(), A_RECIPE)
    report = write_report(bare).read_text(encoding="utf-8")
    assert "model/ holds no network" in report and "kept in model/" not in report


def test_drawing_changes_no_random_state(digits_run: Path):
    source = open_source("digits")
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    write_report(digits_run, source)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]


def test_the_same_run_gives_the_same_report(digits_run: Path):
    before = (digits_run / "report.html").read_bytes()
    assert write_report(digits_run, open_source("digits")).read_bytes() == before


def test_a_report_names_what_differs_from_the_recipe_first(digits_run: Path):
    report = (digits_run / "report.html").read_text(encoding="utf-8")
    section = next(e for e in ElementTree.fromstring(report).iter("section") if e.get("id") == "recipe")
    first = [["".join(cell.itertext()) for cell in row] for row in next(section.iter("tbody"))]
    assert ["max_steps", "3", "–"] in first and ["train_batch_size", "32", "64"] in first
    assert not {"output_dir", "learning_rate"} & {row[0] for row in first}


# ---------------------------------------------------------------- the first weights


@pytest.mark.parametrize("patch_embedding", ["conv", "linear"])
def test_patch_filters_are_numpys_singular_vectors(patch_embedding: str):
    model = build(patch_embedding=patch_embedding, patch_size=4)
    filters, share = patch_filters(model, 5)
    weight = model.vit.embeddings.patch_embeddings.projection.weight.detach().double().numpy().reshape(32, -1)
    _, lengths, vectors = np.linalg.svd(weight, full_matrices=False)
    assert filters.shape == (5, 3, 4, 4)
    products = np.abs(np.sum(filters.reshape(5, -1) * vectors[:5], axis=1))
    np.testing.assert_allclose(products, 1, atol=1e-5)  # a singular vector's sign is free
    assert share == pytest.approx((lengths[:5] ** 2).sum() / (lengths**2).sum())


@pytest.mark.parametrize("prefix_positions", [True, False])
def test_position_similarities_equal_scikit_learns(prefix_positions: bool):
    model = build(prefix_positions=prefix_positions, num_register_tokens=2)
    positions = model.vit.embeddings.position_embeddings[0, -16:].detach().double().numpy()
    found = position_similarities(model)
    assert found.shape == (4, 4, 4, 4)
    np.testing.assert_allclose(found.reshape(16, 16), cosine_similarity(positions), atol=1e-12)
    assert position_similarities(build(position_embedding_type="rope2d")) is None


def test_a_mosaic_keeps_its_tiles_apart():
    tiles = np.random.default_rng(0).integers(0, 256, (5, 2, 3, 3), dtype=np.uint8)
    sheet = mosaic(tiles, 2)
    assert sheet.shape == (8, 7, 4)
    np.testing.assert_array_equal(sheet[3:5, 4:7, :3], tiles[3])
    assert (sheet[2, :, 3] == 0).all() and (sheet[6:, 4:, 3] == 0).all()


@pytest.mark.parametrize(
    "recorded, said",
    [(None, "those of the last step"),
     ("last", "those of the last step"),
     ("last, averaged", "those of the last step, an average over steps"),
     ("best at step 40", "those that validated best, of step 40"),
     ("best at step 40, averaged", "those that validated best, of step 40, an average over steps")],
)  # fmt: skip
def test_which_weights_were_kept_is_said_in_words(recorded, said):
    assert weights_text({} if recorded is None else {"weights": recorded}) == said
