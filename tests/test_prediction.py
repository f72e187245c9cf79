"""`vit-scratch predict`: the answers of a pipeline of transformers, said so that people and programs can read them."""

import csv
import io
import json
import os

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from small_vit import build
from transformers import pipeline

from modeling_vit_scratch import ViTScratchImageProcessor, ViTScratchModel, cli
from modeling_vit_scratch.data.decoding import BadImageError
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.results.model_folder import save_model_folder
from modeling_vit_scratch.results.plots import LIGHT
from modeling_vit_scratch.results.prediction import Prediction, as_csv, as_table, image_paths, open_model, predict
from modeling_vit_scratch.results.prediction_grid import RIGHT, WRONG, grid_figure, write_prediction_grid
from modeling_vit_scratch.weights import load_pretrained

CLASSES = ("cat", "dog", "newt", 'a "b", c', "emu")
CROPPED = {"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture
def model_folder(tmp_path):
    """A maker of a run's folder with a small model: its class names and fields of its configuration and processor."""

    def make(classes=CLASSES, processor=CROPPED, name="run", **fields):
        names = dict(enumerate(classes))
        model = build(num_labels=len(classes), id2label=names, label2id={v: k for k, v in names.items()}, **fields)
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text("{}")
        processor = ViTScratchImageProcessor(**processor)
        save_model_folder(tmp_path / name / "model", model, model.state_dict(), processor)
        return tmp_path / name

    return make


def answers(run, paths, **options):
    model, processor, _ = open_model(str(run))
    return list(predict(model, processor, list(map(str, paths)), **options))


def predicted(capsys, *arguments):
    """(exit code, stdout, stderr) of `vit-scratch predict`."""
    capsys.readouterr()
    code = cli.main(["predict", *map(str, arguments), "--cpu_threads", "1"])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("processor", [CROPPED, {"size": {"height": 32, "width": 32}}])
def test_answers_are_those_of_a_pipeline_of_transformers(model_folder, image_folder, problem_type, processor):
    run = model_folder(processor=processor, problem_type=problem_type)
    paths = sorted(image_folder(size=(45, 61), cat=2, other=3).rglob("*.png"))
    Image.open(paths[0]).convert("L").save(paths[0])
    classify = pipeline("image-classification", str(run / "model"))
    for found, expected in zip(answers(run, paths, top_k=4), classify(list(map(str, paths)), top_k=4), strict=True):
        assert found.labels == [row["label"] for row in expected]
        # a batch of five sums in another order than a batch of one
        assert found.probabilities == pytest.approx([row["score"] for row in expected], abs=1e-5)
        over_a_half = [row["label"] for row in expected if row["score"] > 0.5]
        several = problem_type.startswith("multi")
        assert found.answer == (over_a_half if several else [expected[0]["label"]])
        assert found.target == (None if several or "other" in found.path else "cat")


def test_batches_and_threads_change_nothing(model_folder, image_folder):
    run, paths = model_folder(), sorted(image_folder(cat=3, dog=4).rglob("*.png"))
    one, all_together = answers(run, paths, batch_size=1), answers(run, paths, batch_size=5, num_threads=3)
    assert [(row.path, row.labels) for row in one] == [(row.path, row.labels) for row in all_together]
    assert [row.path for row in one] == list(map(str, paths))
    for first, second in zip(one, all_together, strict=True):
        assert first.probabilities == pytest.approx(second.probabilities, abs=1e-6)


def test_the_target_is_the_nearest_folder_of_a_class(model_folder, tmp_path):
    run = model_folder()
    names = ["dog/a/b.png", "dog/cat/b.png", "Dog/b.png", "b.png", "dogs/b.png"]
    for name, image in zip(names, make_images(5), strict=True):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "set" / name)
    found = answers(run, [tmp_path / "set" / name for name in names])
    assert [row.target for row in found] == ["dog", "cat", None, None, None]
    assert [row.is_right for row in found[2:]] == [None] * 3
    assert found[0].is_right == (found[0].labels[0] == "dog")


def test_what_lies_around_the_named_folders_is_no_target(model_folder, image_folder, capsys):
    run = model_folder()
    inside = image_folder("cat/photos", size=(8, 8), dog=1, other=1)  # as the folder of somebody who is called cat
    cases = {
        inside: ["dog", None], inside / "dog": ["dog"], inside / "other": [None], inside.parent: ["dog", "cat"],
        inside / "dog" / "0.png": ["dog"], inside / "other" / "0.png": [None],
    }  # fmt: skip
    for named, expected in cases.items():
        code, out, _ = predicted(capsys, run, named, "--format", "json")
        assert code == 0 and [row["target"] for row in json.loads(out)] == expected, named


def test_a_folder_gives_its_images_sorted_and_says_what_it_leaves_out(image_folder, tmp_path):
    root = image_folder(b=1, a=2)
    for name in ("notes.txt", "a/more.txt", ".hidden.png", "b/.cache/x.png", "last.jpg", "c.heic"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    paths, notes = image_paths([str(root), str(root / "notes.txt")])
    expected = ["c.heic", "last.jpg", "a/0.png", "a/1.png", "b/0.png", "notes.txt"]  # a file that is named is taken
    assert paths == [str(root / name) for name in expected]
    assert notes == [f"{root}: 2 file(s) that are no images are left out: .txt 2."]
    (root / "a" / "circle").symlink_to(root)
    with pytest.raises(UserError, match="circle is a link to a folder that it lies in"):
        image_paths([str(root)])


def test_the_command_predicts_the_rest_and_names_what_cannot_be_read(model_folder, image_folder, capsys):
    run, root = model_folder(), image_folder(cat=3, dog=2)
    (root / "dog" / "0.png").write_text("no image")
    code, out, err = predicted(capsys, run, root, "--top_k", 2)
    lines = out.splitlines()
    assert code == 2 and len(lines) == 6  # heads, four images, the count
    assert lines[0].split() == ["image", "target", "1", "2"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        [str(root / name), name[:3]] for name in ("cat/0.png", "cat/1.png", "cat/2.png", "dog/1.png")
    ]
    count = sum("right" in line for line in lines[1:5])
    assert lines[5] == f"{count} of 4 with a known class are right ({25 * count}.0%)"
    assert f"{root / 'dog' / '0.png'} cannot be read as an image: it does not begin as JPEG" in err
    last = "error: 1 of 5 files cannot be read as images and have no prediction; mend or remove them."
    assert err.splitlines()[-1] == last


def test_csv_and_json_are_what_python_gives(model_folder, image_folder, capsys):
    run, root = model_folder(), image_folder(cat=2, **{'a "b", c': 2})
    broken = root / "cat" / "z\nz.png"
    broken.write_text("no image")
    found = answers(run, sorted(root.rglob("*.png")), top_k=3)
    code, out, err = predicted(capsys, run, root, "--format", "csv", "--top_k", 3)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 2 and "with a known class are right" in err and "known class" not in out
    pairs = [name for rank in "123" for name in (f"label_{rank}", f"probability_{rank}")]
    assert list(rows[0]) == ["file", "target", *pairs, "error"]
    assert [(row["file"], row["target"]) for row in rows] == [(one.path, one.target) for one in found]
    for row, one in zip(rows, found, strict=True):
        assert [row[f"label_{rank}"] for rank in "123" if one.labels] == one.labels
        numbers = [float(row[f"probability_{rank}"]) for rank in "123" if one.labels]
        assert numbers == pytest.approx(one.probabilities, abs=1e-6)
    unreadable = {row["file"]: row for row in rows}[str(broken)]
    assert unreadable["error"].startswith("it does not begin as JPEG") and unreadable["label_1"] == ""
    listed = json.loads(predicted(capsys, run, root, "--format", "json", "--top_k", 3)[1])
    assert [(row["path"], row["labels"], row["target"]) for row in listed] == [
        (one.path, one.labels, one.target) for one in found
    ]
    assert listed[0]["probabilities"] == pytest.approx(found[0].probabilities, abs=1e-6)


def test_a_model_of_several_classes_answers_with_every_class_over_a_half():
    several = Prediction("a.png", None, ["red", "blue"], [0.9, 0.6], ["red", "blue", "green"])
    none = Prediction("b.png", None, ["red", "blue"], [0.3, 0.2], [])
    table = as_table([several, none], has_several=True).splitlines()
    assert table[0].split() == ["image", "answer", "1", "2"]
    assert table[1] == "a.png  red, blue, green   90.0% red   60.0% blue" and "none" in table[2]
    rows = list(csv.DictReader(io.StringIO(as_csv([several, none], has_several=True))))
    assert [row["answer"] for row in rows] == ["red|blue|green", ""]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing.png"], "nothing.png: there is no such file or folder."),
        (["empty"], "There are no images in empty; expected files that end in .jpg"),
        (["one.png", "--top_k", "6"], "--top_k must be from 1 to 5, the number of classes of the model; got 6."),
        (["one.png", "--top_k", "0"], "--top_k must be from 1 to 5"),
        (["one.png", "--format", "xml"], "--format must be one of table, csv, json; got 'xml'."),
        (["one.png", "--batch_size", "0"], "--batch_size must be at least 1, got 0."),
        (["one.png", "-o", "a.jpg"], "--picture a.jpg: the picture is a PNG; expected a name that ends in .png."),
        (["one.png", "--top", "2"], "Unrecognized arguments: --top 2."),
    ],
)
def test_what_a_person_gets_wrong_is_said_in_one_line(model_folder, tmp_path, monkeypatch, capsys, arguments, text):
    run = model_folder()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_images(1)[0].save("one.png")
    code, out, err = predicted(capsys, run, *arguments)
    assert code == 2 and out == "" and err.splitlines()[-1].startswith(f"error: {text}")


def test_models_that_cannot_answer_are_refused(model_folder, tmp_path, capsys):
    run = model_folder()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="begun is a run without model/: it has not finished"):
        open_model(str(tmp_path / "begun"))
    with pytest.raises(UserError, match=r"there is no such folder or file. Did you mean '.*/run'\?"):
        open_model(str(tmp_path / "rnu"))
    assert load_pretrained(str(run))[0].config.id2label[0] == "cat"  # a run's folder, of its model
    with pytest.raises(UserError, match="^nowhere"):  # no word of a flag that is none here
        open_model("nowhere")
    build(ViTScratchModel).save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match="headless has no classifier"):
        open_model(str(tmp_path / "headless"))
    model, processor, _ = open_model(str(run))
    torch.nn.init.constant_(model.classifier.weight, torch.nan)
    make_images(1)[0].save(tmp_path / "one.png")
    with pytest.raises(UserError, match="not finite: its weights are damaged"):
        list(predict(model, processor, [str(tmp_path / "one.png")]))


def test_a_launcher_of_several_processes_is_refused(model_folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = predicted(capsys, model_folder(), "a.png")
    assert code == 2 and err == "error: vit-scratch predict is one process; start it without a launcher.\n"


def test_a_name_that_is_not_utf8_can_be_written():
    path = os.fsdecode(b"caf\xe9.png")
    found = [Prediction(path, None, ["cat"], [1.0], ["cat"])]
    assert "caf\\udce9.png" in as_csv(found, False) and "caf\\udce9.png" in as_table(found, False)
    as_csv(found, False).encode()


# ---------------------------------------------------------------- the picture


def test_right_and_wrong_are_told_apart_without_colour(image_folder):
    root = image_folder(size=(8, 8), cat=2, dog=1)
    paths = [str(root / name) for name in ("cat/0.png", "cat/1.png", "dog/0.png")]
    found = [
        Prediction(paths[0], "cat", ["cat", "dog"], [0.9, 0.1], ["cat"]),
        Prediction(paths[1], "cat", ["dog", "cat"], [0.6, 0.4], ["dog"]),
        Prediction(paths[2], None, ["a $x$", "cat"], [0.5, 0.3], ["a $x$"]),  # no formula
    ]
    figure = grid_figure("three", found, LIGHT)
    images = [axes for axes in figure.axes if axes.images]
    texts = [[text.get_text() for text in axes.texts] for axes in images]
    assert texts == [["✓ cat", "90.0%", "target cat"], ["✗ dog", "60.0%", "target cat"], ["a $x$", "50.0%"]]
    lines = [axes.spines["left"].get_linestyle() for axes in images]
    assert lines[0] != lines[1] and RIGHT[2] != WRONG[2]
    bars = [axes for axes in figure.axes if not axes.images]
    assert len(bars) == 3 and [patch.get_width() for patch in bars[0].patches] == [1, 1, 0.9, 0.1]


def test_the_picture_holds_up_to_64_images(image_folder, tmp_path, model_folder, capsys):
    root = image_folder(size=(8, 8), cat=66)
    code, _, err = predicted(capsys, model_folder(), root, "-o", tmp_path / "all.png")
    assert code == 0 and "all.png: 64 image(s) drawn, of 66: the picture holds no more" in err
    picture = np.asarray(Image.open(tmp_path / "all.png").convert("L"))
    assert picture.shape[1] > 1000 and picture.std() > 10
    with pytest.raises(ValueError, match="one image at least"):
        write_prediction_grid(tmp_path / "no.png", "", [Prediction("a", None, error=str(BadImageError("a", "b")))])
