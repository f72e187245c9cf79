"""Several labels an image, from a metadata file to a pipeline's answer."""

import ast
import contextlib
import io
import json

import pytest
import torch
from test_run_train import run
from transformers import pipeline

from modeling_vit_scratch import cli
from modeling_vit_scratch.data.augmentation import Draws, Mixing
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.network import source_of
from modeling_vit_scratch.training.objectives import positive_weights
from modeling_vit_scratch.training.showing import augmented_rows


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_every_label_of_an_image_is_learned(colours, tmp_path, streaming):
    flags = ["--train_dir", colours("train", 64), "--test_dir", colours("test", 16), "--recipe", "cifar10",
             "--max_steps", 60, "--train_batch_size", 32, "--learning_rate", 1e-2, "--mixup_alpha", 0.2,
             "--streaming", streaming, "--ema_decay", 0.8]  # fmt: skip
    results = run(tmp_path / "run", *flags)
    assert results["test_accuracy"] == 1.0 and results["test_mean_average_precision"] == 1.0
    assert [(row["class"], row["support"]) for row in results["per_class"]["test"]] == [
        ("blue", 8), ("green", 8), ("red", 8),
    ]  # fmt: skip
    assert results["confusion"] == {}
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["problem_type"] == "multi_label_classification"
    classify = pipeline("image-classification", str(model))
    answers = {row["label"]: row["score"] for row in classify(str(tmp_path / "test" / "5.png"))}  # 5: red and blue
    assert answers["red"] > 0.5 and answers["blue"] > 0.5 and answers["green"] < 0.5  # sigmoids, each for itself
    card = (model / "README.md").read_text()
    assert "Micro F1" in card and "Mean average precision" in card and "Exact match" in card
    assert "tells which of 3 classes an image has" in card and "sorts images" not in card
    code = card.split("```python")[2].split("```")[0].replace("your-name/run", str(model))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code.replace("picture.jpg", str(tmp_path / "test" / "5.png")), {})
    assert set(ast.literal_eval(output.getvalue())) == {"red", "blue"}


def test_balanced_weights_make_a_class_weigh_as_much_as_its_absence(colours, tmp_path):
    root = colours("train", 60)
    source = open_source(train_dir=str(root), train_val_split=0.0)
    sets = source.label_sets_of("train")
    weights = positive_weights(source)
    for index in range(3):
        present = sum(index in ids for ids in sets)
        assert weights[index].item() * present == pytest.approx(60 - present)
    flags = ["--train_dir", root, "--recipe", "cifar10", "--train_val_split", 0, "--max_steps", 2]
    run(tmp_path / "run", *flags, "--class_weights", "balanced")
    with pytest.raises(
        UserError, match="--balanced_sampler has no effect here: .* --class_weights balanced works there"
    ):
        run(tmp_path / "other", *flags, "--balanced_sampler", "true")


def test_augmented_images_of_several_labels_are_drawn_with_their_names(colours, tmp_path, capsys):
    words = ["--train_dir", str(colours("train", 16)), "--recipe", "cifar10", "--picture", str(tmp_path / "seen.png")]
    for mixed in ([], ["--mixup_alpha", "0.8"]):
        assert cli.main(["show-augmentation", *words, *mixed]) == 0
    recipe, chosen = parse_arguments(words[:4])
    rows = augmented_rows(recipe, chosen, source_of(recipe), 8, 1)
    assert [text for _, text in rows[0]] == [text for _, text in rows[1]]
    assert {text for _, text in rows[0]} <= {
        "none", "red", "green", "blue", "green + red", "blue + red", "blue + green", "blue + green + ..."
    }  # fmt: skip


def test_the_best_of_a_run_is_told_by_a_score_of_several_labels(colours, tmp_path):
    flags = ["--train_dir", colours("train", 64), "--recipe", "cifar10", "--max_steps", 6, "--eval_steps", 2,
             "--train_batch_size", 32, "--load_best_model_at_end", "true"]  # fmt: skip
    results = run(tmp_path / "run", *flags, "--metric_for_best_model", "mean_average_precision")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = {row["step"]: row["eval_mean_average_precision"] for row in rows if "eval_loss" in row}
    assert scored[results["best_step"]] == max(scored.values()) == results["validation_mean_average_precision"]
    flags = ["--max_steps", 4, "--load_best_model_at_end", "true", "--metric_for_best_model", "f1_micro"]
    with pytest.raises(UserError, match="f1_micro is for images of several classes each; here f1_macro is"):
        run(tmp_path / "digits", *flags)


def test_a_limited_set_of_several_labels_an_image_has_as_many_as_asked_for(colours, tmp_path):
    root = str(colours("train", 64))
    few, more = (open_source(train_dir=root, max_train_samples=count).splits["train"] for count in (12, 30))
    assert len(few) == len(few.rows(0)) == 12 and set(few.rows(0)) < set(more.rows(0))
    with pytest.raises(UserError, match="--bce_loss has no effect here: images of several classes each are trained"):
        run(tmp_path / "run", "--train_dir", root, "--recipe", "cifar10", "--max_steps", 1, "--bce_loss", "true")


def test_mixed_images_carry_weighted_means_of_their_labels():
    images = torch.arange(16.0)[:, None, None, None].expand(16, 1, 2, 2).contiguous()
    labels = (torch.rand(16, 5, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    mixed, targets = Mixing(mixup_alpha=1.0)(images, labels, Draws(0, 0, 16, torch.arange(16)), 5)
    ids = torch.arange(16)
    _, shares = Mixing(mixup_alpha=1.0)(
        images, ids, Draws(0, 0, 16, torch.arange(16)), 16
    )  # who is in it, and how much
    assert torch.allclose(targets, shares @ labels, atol=1e-6)
    assert torch.allclose(mixed[:, 0, 0, 0], shares @ images[:, 0, 0, 0], atol=1e-5)
