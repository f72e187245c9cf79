"""`vit-scratch evaluate`: the scores of a run again, and those of any model on any images that have its classes."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from small_vit import build
from test_run_train import ROOT, run

from modeling_vit_scratch import ViTScratchForImageClassification, ViTScratchImageProcessor, cli
from modeling_vit_scratch.data.examples import ArrayExamples
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.data.splits import Source, Split
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.results.model_folder import save_model_folder
from modeling_vit_scratch.results.prediction import open_model, predict
from modeling_vit_scratch.results.score_text import class_means, overall, score_text, with_recall_intervals
from modeling_vit_scratch.training.scoring import match_classes


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on the digits, and its test split as a folder of PNGs."""
    root = tmp_path_factory.mktemp("digits")
    results = run(root / "run", "--max_steps", 40, "--learning_rate", 1e-2)
    split = open_source("digits").splits["test"]
    for row, example in enumerate(split.examples.read(0, split.rows(0))):
        file = root / "photos" / str(example.label) / f"{row:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(example.image).save(file)
    return root / "run", root / "photos", results


@pytest.fixture
def save_model(tmp_path):
    """A maker of a folder with a small model of these classes."""

    def make(classes, **fields):
        names = dict(enumerate(classes))
        model = build(num_labels=len(classes), id2label=names, label2id={v: k for k, v in names.items()}, **fields)
        processor = ViTScratchImageProcessor(size={"height": 32, "width": 32})
        save_model_folder(tmp_path / "model", model, model.state_dict(), processor)
        return tmp_path / "model"

    return make


def evaluated(capsys, *arguments):
    """(exit code, stdout, stderr) of `vit-scratch evaluate`."""
    capsys.readouterr()
    code = cli.main(["evaluate", *map(str, arguments), "--cpu_threads", "1"])
    return code, *capsys.readouterr()


def scores_of(capsys, tmp_path, *arguments):
    code, _, err = evaluated(capsys, *arguments, "--output", tmp_path / "scores.json")
    assert code == 0, err
    return json.loads((tmp_path / "scores.json").read_text())


def test_a_run_scores_what_it_scored(digits, capsys, tmp_path):
    folder, photos, results = digits
    found = scores_of(capsys, tmp_path, folder, "--dataset_name", "digits")
    for name in ("accuracy", "accuracy_top5", "f1_macro", "loss"):
        assert found[name] == results[f"test_{name}"]
    assert found["confusion"] == results["confusion"]["test"] and found["num_images"] == 360
    code, out, _ = evaluated(capsys, folder, "--test_dir", photos)
    assert code == 0 and f"{100 * results['test_accuracy']:.2f}%  95% interval" in out
    assert f"{folder} on {photos.name}: 360 images of 10 classes" in out
    assert "Confusion (row: true class, column: answer):" in out


def test_other_pixels_are_scored_too(digits, capsys, tmp_path):
    folder, photos, results = digits
    same = scores_of(capsys, tmp_path, folder, "--test_dir", photos, "--image_size", 8)
    assert same["loss"] == results["test_loss"] and same["image_size"] == [8, 8]
    larger = scores_of(capsys, tmp_path, folder, "--test_dir", photos, "--image_size", 16)
    assert larger["image_size"] == [16, 16] and larger["crop_pct"] is None
    model, processor, _ = open_model(str(folder), image_size=16)
    trained = ViTScratchForImageClassification.from_pretrained(folder / "model").eval()
    answers = list(predict(model, processor, sorted(map(str, photos.rglob("*.png")))))
    with torch.no_grad():
        pixels = [processor(Image.open(answer.path), return_tensors="pt").pixel_values for answer in answers]
        best = trained(torch.cat(pixels), interpolate_pos_encoding=True).logits.softmax(-1).max(-1).values
    np.testing.assert_allclose([answer.probabilities[0] for answer in answers], best.numpy(), atol=1e-5)
    cropped = scores_of(capsys, tmp_path, folder, "--test_dir", photos, "--crop_pct", 0.5)
    assert cropped["image_size"] == [8, 8] and cropped["crop_pct"] == 0.5 and cropped["loss"] > same["loss"]


def test_calibration_and_intervals_are_those_of_the_predictions(digits, capsys, tmp_path):
    folder, photos, _ = digits
    found = scores_of(capsys, tmp_path, folder, "--test_dir", photos, "--eval_batch_size", 100)
    model, processor, _ = open_model(str(folder))
    answers = list(predict(model, processor, sorted(map(str, photos.rglob("*.png")))))
    sure = np.array([answer.probabilities[0] for answer in answers])
    right = np.array([answer.is_right for answer in answers])
    error = 0
    for low in range(15):
        inside = (sure > low / 15) & (sure <= (low + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert found["calibration"]["expected_calibration_error"] == pytest.approx(error, abs=1e-6)
    assert found["calibration"]["mean_confidence"] == pytest.approx(sure.mean(), abs=1e-6)
    assert found["accuracy"] == right.mean()
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high
    row = found["per_class"][3]
    assert row["recall_interval"][0] <= row["recall"] <= row["recall_interval"][1] <= 1


@pytest.mark.slow  # three processes start
def test_several_processes_score_what_one_does(digits, capsys, tmp_path):
    folder, photos, _ = digits
    one = scores_of(capsys, tmp_path, folder, "--test_dir", photos, "--eval_batch_size", 38)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_config.yaml"]
    launcher += ["--num_processes", 2, "--main_process_port", port, "-m", "modeling_vit_scratch.cli"]
    arguments = [folder, "--test_dir", photos, "--eval_batch_size", 38, "--cpu_threads", 1]
    command = [*launcher, "evaluate", *arguments, "--output", tmp_path / "two.json"]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Accuracy  ") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["num_processes"] == 2
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-6)  # batches of another size round otherwise
    assert two["calibration"]["mean_confidence"] == pytest.approx(one["calibration"]["mean_confidence"], abs=1e-6)
    for name in ("accuracy", "f1_macro", "accuracy_top5", "confusion", "per_class", "num_images"):
        assert two[name] == one[name]


# ---------------------------------------------------------------- classes


def source_of(names, labels=(0, 1), label_ids=None):
    pixels = np.zeros((len(labels), 4, 4), dtype=np.uint8)
    return Source("set", {"test": Split(ArrayExamples(pixels, np.array(labels), "set"))}, names, label_ids, False)


def test_classes_are_matched_by_their_names():
    matched = match_classes(source_of(["newt", "cat"], labels=[0, 1, 1]), ["cat", "dog", "newt"])
    assert matched.label_ids_of("test").tolist() == [2, 0, 0]
    assert matched.notes == ["set lacks 1 of the model's 3 classes: 'dog'."]
    by_text = match_classes(source_of(["cat", "newt"], label_ids={"cat": 0, "newt": 1}), ["newt", "cat"])
    assert [by_text.label_id(name, "row") for name in ("cat", "newt")] == [1, 0] and by_text.notes == []


def test_classes_without_names_are_matched_by_position_when_a_person_says_so():
    names = ["LABEL_0", "LABEL_1"]
    with pytest.raises(UserError, match="no name is in both. .*same order, say so with --match_classes position"):
        match_classes(source_of(["cat", "dog"]), names)
    assert match_classes(source_of(["cat", "dog"]), names, "position").label_ids_of("test").tolist() == [0, 1]
    with pytest.raises(UserError, match="as many classes here as there: set has 2, the model 3"):
        match_classes(source_of(["cat", "dog"]), [*names, "LABEL_2"], "position")
    with pytest.raises(UserError, match="no effect here: the names agree"):
        match_classes(source_of(names), names, "position")


def test_a_class_that_the_model_does_not_know_is_named():
    with pytest.raises(UserError, match=r"does not know. No class 'dogs'. Did you mean 'dog'\? Known: cat, dog, newt"):
        match_classes(source_of(["cat", "dogs"]), ["cat", "dog", "newt"])
    many = [f"class number {index}" for index in range(1000)]
    with pytest.raises(UserError, match=r"\(2 such classes\). No class 'class number 7b'.*and others") as error:
        match_classes(source_of(["class number 7b", "wolf"]), many)
    assert len(str(error.value)) < 300


def test_names_that_occur_twice_are_told_apart_by_their_places_or_not_at_all():
    names = ["crane", "cat", "crane"]
    assert match_classes(source_of(names, labels=[0, 2]), names).label_ids_of("test").tolist() == [0, 2]
    with pytest.raises(UserError, match="The model has 2 classes 'crane': by name they cannot be told apart"):
        match_classes(source_of(["cat", "crane"]), names)


def test_a_class_that_no_image_has_need_not_be_known():
    numbers = source_of(["0", "1", "2"], labels=[1, 2, 2])  # classes 1 and 2 in a table's numbers
    matched = match_classes(numbers, ["1", "2"])
    assert matched.label_ids_of("test").tolist() == [0, 1, 1] and matched.notes == []
    with pytest.raises(UserError, match="No class '2'"):
        match_classes(numbers, ["0", "1"])


def test_a_table_of_numbers_is_scored_by_a_model_of_their_names(save_model, tmp_path, capsys):
    root = tmp_path / "photos"
    root.mkdir()
    rows = [f"{index}.png,{index % 2 + 1}" for index in range(4)]
    for index, image in enumerate(make_images(4)):
        image.save(root / f"{index}.png")
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    found = scores_of(capsys, tmp_path, save_model(["1", "2"]), "--test_dir", root)
    assert [row["support"] for row in found["per_class"]] == [2, 2]


def test_a_class_folder_without_images_is_told_and_does_not_stop_it(digits, capsys, tmp_path):
    folder, photos, _ = digits
    for name in ("1", "7"):
        shutil.copytree(photos / name, tmp_path / "part" / name)
    (tmp_path / "part" / "3").mkdir()
    code, out, _ = evaluated(capsys, folder, "--test_dir", tmp_path / "part")
    assert code == 0 and "the folder '3' is empty.\n" in out and "images of 2 classes" in out


def test_means_over_classes_are_scikit_learns_over_those_with_images(digits, tmp_path, capsys):
    folder, photos, _ = digits
    for name in ("1", "7", "8"):
        shutil.copytree(photos / name, tmp_path / "part" / name)
    found = scores_of(capsys, tmp_path, folder, "--test_dir", tmp_path / "part")
    pairs = [
        (true, answer)
        for true, row in enumerate(found["confusion"])
        for answer, count in enumerate(row)
        for _ in range(count)
    ]
    truth, answers = map(list, zip(*pairs, strict=True))
    precision = precision_score(truth, answers, labels=[1, 7, 8], average="macro", zero_division=0)
    assert found["precision_macro"] == pytest.approx(precision)
    assert found["recall_macro"] == pytest.approx(recall_score(truth, answers, labels=[1, 7, 8], average="macro"))
    assert found["recall_macro"] != found["accuracy"]


def test_a_dataset_without_a_training_split_can_be_scored(save_model, parquet_repo, tmp_path, capsys):
    repo = parquet_repo(validation=[6], test=[9])
    model = save_model(["class 0", "class 1", "class 2"])
    for streaming in ("false", "true"):
        found = scores_of(capsys, tmp_path, model, "--dataset_name", repo, "--streaming", streaming)
        assert found["num_images"] == 9 and [row["support"] for row in found["per_class"]] == [3, 3, 3]
    with pytest.raises(UserError, match="has no training split; it has: "):
        open_source(str(repo))
    for split, labels in (("validation", ["class 0", "class 0"]), ("test", ["class 1", "class 2", "class 0"])):
        table = datasets.Dataset.from_dict({"image": make_images(len(labels)), "label": labels})
        (tmp_path / "texts" / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(tmp_path / "texts" / "data" / f"{split}-00000-of-00001.parquet")
    found = scores_of(capsys, tmp_path, model, "--dataset_name", tmp_path / "texts")
    assert found["num_images"] == 3 and [row["support"] for row in found["per_class"]] == [1, 1, 1]


def test_a_part_of_the_classes_can_be_scored(digits, capsys, tmp_path):
    folder, photos, _ = digits
    for name in ("1", "7"):
        shutil.copytree(photos / name, tmp_path / "part" / name)
    code, out, _ = evaluated(capsys, folder, "--test_dir", tmp_path / "part")
    assert code == 0 and "note: part lacks 8 of the model's 10 classes: '0', '2', '3', '4', '5' and 3 more." in out
    assert "images of 2 classes" in out and "over 2 classes with images" in out


# ---------------------------------------------------------------- several classes an image


def test_several_classes_an_image_are_scored_as_scikit_learn_does(save_model, tmp_path, capsys):
    names, truth = ["red", "green", "blue"], []
    root = tmp_path / "photos"
    root.mkdir()
    with open(root / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "labels"])
        for index, image in enumerate(make_images(16)):
            image.save(root / f"{index:02d}.png")
            truth.append([index & 1, index >> 1 & 1, index >> 2 & 1])
            table.writerow([f"{index:02d}.png", "|".join(n for n, on in zip(names, truth[-1], strict=True) if on)])
    folder = save_model(names, problem_type="multi_label_classification")
    found = scores_of(capsys, tmp_path, folder, "--test_dir", root)
    model, processor, _ = open_model(str(folder))
    paths = sorted(map(str, root.glob("*.png")))
    answers = np.array([[name in one.answer for name in names] for one in predict(model, processor, paths)])
    assert found["accuracy"] == accuracy_score(truth, answers)
    assert found["f1_macro"] == pytest.approx(f1_score(truth, answers, average="macro", zero_division=0))
    assert "confusion" not in found and "calibration" not in found
    code, out, _ = evaluated(capsys, folder, "--test_dir", root)
    assert code == 0 and "Mean average precision" in out and "Confusion" not in out
    assert "Exact match" in out and "Accuracy" not in out
    code, _, err = evaluated(capsys, folder, "--test_dir", root, "--picture", tmp_path / "a.png")
    assert code == 2 and "any number an image" in err
    rows = [f"{index:02d}.png,{names[index % 3]}" for index in range(16)]  # each image happens to have one class
    (root / "metadata.csv").write_text("\n".join(["file_name,labels", *rows]))
    found = scores_of(capsys, tmp_path, folder, "--test_dir", root)
    expected = accuracy_score([[name == names[index % 3] for name in names] for index in range(16)], answers)
    assert found["accuracy"] == expected
    code, _, err = evaluated(capsys, folder, "--dataset_name", "digits")
    assert code == 2 and "gives an image any number of classes, digits has one class for each" in err


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "Say what to score: either --test_dir FOLDER or --dataset_name NAME."),
        (["--dataset_name", "digits", "--test_dir", "x"], "Say what to score"),
        (["--dataset_name", "digits", "--split", "validation"], "No split of digits 'validation'. Known: test, train."),
        (["--dataset_name", "digits", "--split", "tests"], "No split 'tests'. Did you mean 'test'?"),
        (["--dataset_name", "digits", "--streaming"], "--streaming has no effect here"),
        (["--dataset_name", "digits", "--bad_images", "skip"], "--bad_images has no effect here"),
        (["--dataset_name", "digits", "--bad_images", "sikp"], "No bad_images 'sikp'. Did you mean 'skip'?"),
        (["--dataset_name", "digits", "--match_classes", "position"], "--match_classes position has no effect here"),
        (["--dataset_name", "digits", "--match_classes", "names"], "No match_classes 'names'. Did you mean 'name'?"),
        (["--dataset_name", "digits", "--eval_batch_size", "0"], "--eval_batch_size must be at least 1, got 0."),
        (["--dataset_name", "digits", "--picture", "a.pdf"], "--picture a.pdf: the picture is a PNG"),
        (["--test_dir", "photos", "--split", "test"], "--split has no effect here"),
        (["--test_dir", "nothing"], "--test_dir nothing: there is no such folder."),
        (["--test_dir", "photos", "--label_column_name", "x"], "--label_column_name has no effect here"),
    ],
)
def test_what_a_person_gets_wrong_is_said_in_one_line(digits, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(digits[0].parent)
    code, _, err = evaluated(capsys, "run", *arguments)
    assert code == 2 and err.startswith(f"error: {text}") and err.count("\n") == 1


def test_a_folder_of_splits_is_said_to_be_one_by_the_flag_of_this_command(digits, tmp_path, capsys):
    (tmp_path / "all" / "train").mkdir(parents=True)
    (tmp_path / "all" / "test").mkdir()
    _, _, err = evaluated(capsys, digits[0], "--test_dir", tmp_path / "all")
    assert "holds splits, not classes" in err and "--train_dir" not in err
    assert err.rstrip().endswith(f"did you mean --test_dir {tmp_path / 'all' / 'test'}?")


def test_images_that_cannot_be_read_stop_it_or_are_left_out_and_named(digits, tmp_path, capsys):
    folder, photos, _ = digits
    for name in ("1", "7"):
        shutil.copytree(photos / name, tmp_path / "set" / name)
    (tmp_path / "set" / "7" / "broken.png").write_text("no image")
    code, _, err = evaluated(capsys, folder, "--test_dir", tmp_path / "set")
    assert code == 2 and "broken.png cannot be read as an image" in err and "--bad_images skip" in err
    found = scores_of(capsys, tmp_path, folder, "--test_dir", tmp_path / "set", "--bad_images", "skip")
    assert found["bad_images"] == [str(tmp_path / "set" / "7" / "broken.png")] and found["num_images"] == 72
    _, out, _ = evaluated(capsys, folder, "--test_dir", tmp_path / "set", "--bad_images", "skip")
    assert "1 image(s) cannot be read and are left out:" in out and "broken.png: it does not begin" in out


def test_damaged_weights_are_no_score(digits, save_model, capsys):
    folder = save_model([str(digit) for digit in range(10)], num_channels=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"].fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors")
    code, _, err = evaluated(capsys, folder, "--dataset_name", "digits")
    assert code == 2 and "The loss is nan: the model's weights are damaged" in err


# ---------------------------------------------------------------- the text


def test_of_images_without_any_class_there_is_no_mean_over_classes():
    rows = [{"class": "cat", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}]
    assert class_means(rows) == {}
    results = {
        "per_class": with_recall_intervals(rows), "accuracy": 1.0, "accuracy_interval": [0.5, 1.0], "f1_macro": 0.0,
        "is_multi_label": True,
    }  # fmt: skip
    assert "Macro recall" not in overall(results)
    rows = [{**rows[0], "support": 2, "recall": 0.5}]
    text = overall({**results, "per_class": with_recall_intervals(rows), **class_means(rows)})
    assert "Macro recall" in text and "balanced accuracy" not in text  # that is of images with one class each


def test_many_classes_are_shown_by_their_mistakes(digits, capsys, tmp_path):
    files = ("-o", tmp_path / "confusion.png", "--confusion", tmp_path / "new" / "confusion.csv")
    results = scores_of(capsys, tmp_path, digits[0], "--dataset_name", "digits", *files)
    assert Image.open(tmp_path / "confusion.png").width > 300
    lines = (tmp_path / "new" / "confusion.csv").read_text().splitlines()
    assert lines[4] == ",".join(map(str, ["3", *results["confusion"][3]])) and len(lines) == 11
    num_classes = 60
    counts = np.eye(num_classes, dtype=int) * 5
    counts[3, 4], counts[8, 2] = 31, 7
    rows = [
        {"class": f"kind {k}", "precision": 1.0, "recall": 5 / counts[k].sum(), "f1": 1.0, "support": counts[k].sum()}
        for k in range(num_classes)
    ]
    many = {"class_names": [row["class"] for row in rows], "confusion": counts.tolist()}
    text = score_text({**results, **many, "per_class": with_recall_intervals(rows)})
    assert "The 20 of 60 classes with the lowest recall:" in text
    assert text.endswith("images):\n  kind 3 -> kind 4  31\n  kind 8 -> kind 2  7")
    listed = [line.split("  ")[0] for line in text.splitlines() if line.startswith("kind")]
    assert listed[:2] == ["kind 3", "kind 8"] and len(listed) == 20
