"""The model card beside the weights: what it shows of the run, and what the Hub reads out of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_images
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from modeling_vit_scratch.results.model_card import write_model_card

SCORES = {"test_accuracy": 0.1 + 0.2, "test_loss": 1 / 3, "validation_accuracy": 0.875, "validation_f1_macro": 2 / 3}
ON_THE_HUB = {"name": "cifar10", "repository": "uoft-cs/cifar10", "splits": {"test": 10_000}}


def a_run(
    folder: Path,
    dataset: dict[str, Any],
    plots: tuple[str, ...] = (),
    start: str | None = None,
    revision: str | None = None,
    **scores: float,
) -> Path:
    (folder / "plots").mkdir(parents=True)
    results = {"class_names": ["cat", "dog"], "dataset": dataset, **scores}
    recipe = {"recipe": "cifar10", "model_name_or_path": start, "model_revision": revision}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.jsonl").write_text("")
    for index, name in enumerate(plots):
        make_images(1, seed=index)[0].save(folder / "plots" / name)
    return folder


def test_the_card_parses_and_its_results_are_those_of_results_json(tmp_path):
    card = ModelCard.load(write_model_card(a_run(tmp_path / "run", ON_THE_HUB, **SCORES)))
    data = card.data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-classification"
    assert data.license == "apache-2.0" and data.base_model is None
    assert data.datasets == ["uoft-cs/cifar10"]
    assert "vit_scratch" in data.tags
    keys = {"Accuracy": "accuracy", "Macro F1": "f1_macro", "Loss": "loss"}
    found = {f"{entry.dataset_split}_{keys[entry.metric_name]}": entry.metric_value for entry in data.eval_results}
    assert found == SCORES
    assert {entry.dataset_type for entry in data.eval_results} == {"uoft-cs/cifar10"}
    name, entries = model_index_to_eval_results(yaml.safe_load(data.to_yaml())["model-index"])
    assert name == "run" and len(entries) == len(SCORES)


def test_a_model_from_a_strangers_checkpoint_names_it_and_claims_no_license_of_its_own(tmp_path):
    folder = a_run(tmp_path / "run", ON_THE_HUB, start="google/vit-base", revision="refs/pr/3", **SCORES)
    card = ModelCard.load(write_model_card(folder))
    assert "fine-tuned from google/vit-base at refs/pr/3, that sorts" in card.text
    assert card.data.base_model == "google/vit-base" and card.data.license is None
    assert "The license of the checkpoint it was fine-tuned from holds for it too." in card.text


@pytest.mark.parametrize(
    ("scores", "value", "notes"),
    [
        (SCORES, 0.1 + 0.2, "Accuracy on the test split"),
        ({"validation_accuracy": 0.875}, 0.875, "Accuracy on the validation split"),
        (
            {"test_accuracy": 0.5, "test_mean_average_precision": 0.7},
            0.7,
            "Mean average precision on the test split",
        ),
    ],
)
def test_the_score_for_the_data_on_the_hub_is_in_the_hubs_newer_format_too(scores, value, notes, tmp_path):
    write_model_card(a_run(tmp_path / "run", ON_THE_HUB, **scores))
    (path,) = (tmp_path / "run" / "model" / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert path.name == "uoft-cs_cifar10.yaml" and entry.dataset_id == "uoft-cs/cifar10"
    assert entry.value == value and entry.notes == notes


@pytest.mark.parametrize(
    ("dataset", "scores"), [({"name": "/home/anna/newts", "repository": None}, SCORES), (ON_THE_HUB, {})]
)
def test_without_data_on_the_hub_or_scores_there_is_no_such_file(dataset, scores, tmp_path):
    write_model_card(a_run(tmp_path / "run", dataset, **scores))
    assert not (tmp_path / "run" / "model" / ".eval_results").exists()


@pytest.mark.parametrize("plots", [(), ("curves.png",), ("curves.png", "confusion.png", "other.png")])
def test_the_card_shows_the_pictures_that_lie_beside_it(plots, tmp_path):
    run_dir = a_run(tmp_path / "run", ON_THE_HUB, plots, **SCORES)
    text = write_model_card(run_dir).read_text(encoding="utf-8")
    shown = {name for name in plots if f"](plots/{name})" in text}
    assert shown == set(plots) - {"other.png"} and text.count("](plots/") == len(shown)
    for name in shown:
        assert (run_dir / "model" / "plots" / name).read_bytes() == (run_dir / "plots" / name).read_bytes()
    beside = run_dir / "model" / "plots"
    assert {path.name for path in beside.iterdir()} == shown if shown else not beside.exists()
