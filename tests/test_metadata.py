"""Labels from metadata files and from lists in tables: one, several or none an image."""

import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_images
from opened_sources import examples_of, labels_by_file, refusal

from modeling_vit_scratch.data.labels import multi_label_holdout
from modeling_vit_scratch.data.order import stratified_holdout
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.data.splits import Source
from modeling_vit_scratch.errors import UserError


@pytest.fixture
def metadata_folder(tmp_path):
    """A maker of folders of images beside a metadata file, given as text or, for parquet, as columns."""

    def make(content, name="photos", ending="csv", images=("a.png", "b.png", "sub/c.png", "sub/d.png")):
        root = tmp_path / name
        for image, path in zip(make_images(len(images)), images, strict=True):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / path)
        if ending == "parquet":
            pq.write_table(pa.table(content), root / "metadata.parquet")
        else:
            (root / f"metadata.{ending}").write_text(content, encoding="utf-8")
        return root

    return make


ROWS = "file_name,label\na.png,newt\nb.png,cat\nsub/c.png,newt\nsub/d.png,cat\n"


def test_metadata_names_the_class_whatever_the_folder(metadata_folder):
    source = open_source(train_dir=str(metadata_folder(ROWS)), train_val_split=0)
    assert source.class_names == ["cat", "newt"] and not source.is_multi_label
    assert labels_by_file(source) == {"a.png": "newt", "b.png": "cat", "c.png": "newt", "d.png": "cat"}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_metadata_says_what_the_imagefolder_of_datasets_says(metadata_folder, tmp_path, ending):
    rows = [dict(zip(("file_name", "label"), line.split(","), strict=True)) for line in ROWS.split()[1:]]
    content = ROWS if ending == "csv" else "\n".join(map(json.dumps, rows))
    root = metadata_folder(content, ending=ending)
    cache = str(tmp_path / "cache")
    table = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=cache)
    table = table.cast_column("image", datasets.Image(decode=False))
    theirs = {os.path.basename(row["image"]["path"]): row["label"] for row in table}
    assert labels_by_file(open_source(train_dir=str(root), train_val_split=0)) == theirs


@pytest.mark.parametrize(
    "ending, content",
    [
        ("csv", "file_name,labels\na.png,x| y\nb.png,\nsub/c.png,y\nsub\\d.png,z\n"),
        (
            "jsonl",
            '{"file_name": "a.png", "labels": ["x", "y"]}\n{"file_name": "b.png", "labels": []}\n\n'
            '{"file_name": "./sub/c.png", "labels": "y"}\n{"file_name": "sub/d.png", "labels": ["z"]}\n',
        ),
        (
            "parquet",
            {
                "file_name": ["a.png", "b.png", "sub/c.png", "sub/d.png"],
                "labels": [["x", "y"], [], ["y"], ["z"]],
            },
        ),
    ],
)
def test_an_image_may_have_several_labels_or_none(metadata_folder, ending, content):
    source = open_source(train_dir=str(metadata_folder(content, ending=ending)), train_val_split=0)
    assert source.is_multi_label and source.class_names == ["x", "y", "z"]
    assert labels_by_file(source) == {"a.png": ("x", "y"), "b.png": (), "c.png": ("y",), "d.png": ("z",)}
    assert source.label_sets_of("train") == [(0, 1), (), (1,), (2,)]
    vectors = np.stack([source.label_vector(example.label, example.name) for example in examples_of(source)])
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    with pytest.raises(UserError, match="photos has several classes an image; what counts images by their class"):
        source.label_ids_of("train")


def test_numbers_are_the_ids_and_gaps_are_said_aloud(metadata_folder):
    numbers = ROWS.replace("newt", "3").replace("cat", "1")
    root = metadata_folder(numbers)
    held = metadata_folder(numbers.replace("a.png,3", "a.png,03"), name="held")
    source = open_source(train_dir=str(root), validation_dir=str(held))
    assert source.class_names == ["0", "1", "2", "3"]
    assert source.label_ids_of("validation").tolist() == [3, 1, 3, 1]
    assert source.notes[0] == f"--train_dir {root} has no images of 2 of the 4 classes: '0', '2'."


def test_numbers_of_validation_are_names_where_training_has_names(metadata_folder):
    train = metadata_folder(ROWS.replace("cat", "7"))
    held = metadata_folder(ROWS.replace("cat", "7").replace("newt", "7"), name="held")
    source = open_source(train_dir=str(train), validation_dir=str(held))
    assert source.class_names == ["7", "newt"] and source.label_ids_of("validation").tolist() == [0] * 4


def test_the_named_label_column_is_taken(metadata_folder, image_folder):
    root = metadata_folder(ROWS.replace("label", "species"))
    source = open_source(train_dir=str(root), label_column_name="species", train_val_split=0)
    assert source.class_names == ["cat", "newt"]
    assert refusal(train_dir=root, label_column_name="kind") == (
        f"--label_column_name kind: {root}/metadata.csv has no such column; it has: 'file_name', 'species'."
    )
    plain = image_folder(name="plain", cat=2, dog=2)
    assert refusal(train_dir=plain, label_column_name="kind") == (
        f"--label_column_name has no effect here: {plain} has no metadata file, its folders' names are the classes."
    )


def test_class_folders_and_metadata_may_serve_different_splits(metadata_folder, image_folder):
    held = image_folder(name="held", cat=2, newt=1)
    several = metadata_folder(ROWS.replace("a.png,newt", "a.png,newt|cat"))
    source = open_source(train_dir=str(several), validation_dir=str(held))
    assert source.label_sets_of("validation") == [(0,), (0,), (1,)]
    text = refusal(train_dir=held, validation_dir=several)
    assert text.startswith(f"{several}/metadata.csv gives several labels to an image, but --train_dir {held} one")
    stranger = metadata_folder(ROWS.replace("b.png,cat", "b.png,wolf"), name="stranger")
    assert refusal(train_dir=held, validation_dir=stranger) == (
        f"{stranger}/b.png has the class 'wolf', which the training folder has not (cat, newt); rename it, or add "
        "training images of it."
    )


@pytest.mark.parametrize(
    "content, text",
    [
        (ROWS.replace("a.png", "/a.png"), "line 2 names /a.png; expected a path from {root} on, neither absolute nor"),
        (ROWS.replace("a.png", "C:\\a.png"), "line 2 names C:\\a.png; expected a path from {root} on, neither"),
        (ROWS.replace("a.png", "../a.png"), "line 2 names ../a.png; expected a path from {root} on, neither absolute"),
        (ROWS + "e.png,cat\n", "line 6 names e.png, which is not in {root}; mend the row, or remove it."),
        (ROWS + "metadata.csv,cat\n", "line 6 names metadata.csv, which is no image by its name; mend the row"),
        (ROWS + "./a.png,cat\n", "line 6 names a.png a second time; keep one row an image."),
        (ROWS + "a.png,cat,3\n", "line 6 has 3 fields where the first line has 2; put a field that holds a comma in"),
        (ROWS.replace("b.png,cat", "b.png,"), "line 3 has no 'label'; every image needs one."),
        (ROWS.replace("b.png,cat", ",cat"), "line 3 has no file_name; every row names an image by its path from"),
        (ROWS.replace("b.png,cat", "b.png,cat|cat"), "line 3 has the label 'cat' more than once; expected the names"),
        (ROWS.replace("file_name", "file"), "has no column 'file_name', the image's path from there; it has: 'file', "),
        (ROWS.replace(",", ";"), "it has: 'file_name;label', so put commas between the columns."),
        (ROWS.replace("label", "age"), "has no column 'label' or 'labels': name it with --label_column_name, or move"),
        ("file_name,label,labels\na.png,1,2\n", "has several label columns: name it with --label_column_name; it has"),
        ("", "has no column 'file_name', the image's path from there; it has: none."),
        (ROWS + '"e.png', "cannot be read: unexpected end of data; mend it, or remove it."),
    ],
)
def test_a_row_that_does_not_fit_is_named(metadata_folder, content, text):
    root = metadata_folder(content)
    found = refusal(train_dir=root)
    assert found.startswith(f"{root}/metadata.csv") and text.format(root=root) in found


@pytest.mark.parametrize(
    "line, text",
    [
        ("{a", "line 2 is not JSON: Expecting property name enclosed in double quotes at character 2; mend the line."),
        ("[1]", 'line 2 is not an object such as {"file_name": "1.jpg", "label": "cat"}.'),
        ('{"file_name": "b.png"}', "line 2 has no 'label'; every image needs one (an empty list: none of the classes)"),
        ('{"file_name": "b.png", "label": 1.5}', "line 2 has the label 1.5; expected a name, a whole number, or a lis"),
        ('{"file_name": "b.png", "label": [0, 1, 0]}', "line 2 has the label 0 more than once; expected the names or "),
    ],
)
def test_a_line_of_json_that_does_not_fit_is_named(metadata_folder, line, text):
    first = '{"file_name": "a.png", "label": 1}\n'
    root = metadata_folder(first + line, ending="jsonl", images=("a.png", "b.png"))
    assert refusal(train_dir=root).startswith(f"{root}/metadata.jsonl {text}")


def test_every_image_needs_a_row_and_every_folder_one_metadata_file(metadata_folder):
    root = metadata_folder(ROWS.replace("sub/c.png,newt\n", ""))
    assert refusal(train_dir=root) == (
        f"{root}/sub/c.png has no row in {root}/metadata.csv; add one, or remove the image."
    )
    (root / "metadata.jsonl").touch()
    assert refusal(train_dir=root) == (
        f"--train_dir has {root}/metadata.csv and {root}/metadata.jsonl: keep one of them."
    )
    os.rename(root / "metadata.jsonl", root / "sub" / "metadata.jsonl")
    assert refusal(train_dir=root) == (
        f"{root}/sub/metadata.jsonl is not read: metadata lies in {root} itself; move its rows there, file names from "
        "there on, or rename it."
    )


def test_metadata_in_another_encoding_is_refused_and_a_byte_order_mark_is_not(metadata_folder):
    root = metadata_folder(ROWS)
    (root / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + ROWS.encode())
    assert open_source(train_dir=str(root), train_val_split=0).class_names == ["cat", "newt"]
    (root / "metadata.csv").write_bytes(ROWS.replace("cat", "k\u00e4fer").encode("latin-1"))
    assert refusal(train_dir=root).startswith(f"{root}/metadata.csv cannot be read: 'utf-8' codec can't decode byte")
    os.rename(root / "metadata.csv", root / "metadata.parquet")
    assert refusal(train_dir=root).startswith(f"{root}/metadata.parquet cannot be read: ")


# ---------------------------------------------------------------- several labels: held out, and in tables


def test_holding_out_of_sets_of_one_is_holding_out_of_labels():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    expected = stratified_holdout(labels, 0.2, 3)
    assert np.array_equal(multi_label_holdout([(label,) for label in labels.tolist()], 5, 0.2, 3), expected)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_every_class_keeps_an_image_in_training_when_images_have_several(rate):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sets = [tuple(np.flatnonzero(row).tolist()) for row in rng.random((60, 12)) < rng.random(12) * 0.4]
        mask = multi_label_holdout(sets, 12, rate, seed)
        kept = {label for labels, is_out in zip(sets, mask, strict=True) if not is_out for label in labels}
        assert kept == {label for labels in sets for label in labels}
        assert 0 < mask.sum() <= rate * 60 + 7  # each of 13 strata rounds by a half at most


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["classes", "names", "numbers"])
def test_tables_whose_label_column_is_a_list_have_several_labels_an_image(tmp_path, streaming, kind):
    names = ["x", "y", "z"] if kind != "numbers" else ["0", "1", "2"]
    inner = {
        "classes": datasets.ClassLabel(names=names),
        "names": datasets.Value("string"),
        "numbers": datasets.Value("int64"),
    }[kind]
    cells = [[0, 2], [1], [], [2]] * 10
    column = cells if kind != "names" else [[names[label] for label in cell] for cell in cells]
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(inner)})
    table = datasets.Dataset.from_dict({"image": make_images(40), "labels": column}, features=features)
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train-0.parquet")
    source = open_source(str(tmp_path), streaming=streaming, train_val_split=0)
    assert source.is_multi_label and source.class_names == names
    assert source.label_sets_of("train") == [tuple(cell) for cell in cells]
    assert source.label_vector(column[0], "row 0").tolist() == [1, 0, 1]
    held = open_source(str(tmp_path), streaming=streaming, train_val_split=0.2)
    assert held.held_out and len(held.splits["train"]) + len(held.splits["validation"]) == 40


@pytest.mark.parametrize(
    "label, text",
    [
        ([0, 1, 0], "row 7 has a class more than once in [0, 1, 0]; expected the classes of the image, not a row of 0"),
        ([3], "row 7 has the label 3, which is not among the 3 classes (a, b, c)."),
        (None, "row 7 has the label None; expected a list of classes, as the other images have."),
    ],
)
def test_a_list_of_labels_that_does_not_fit_names_its_row(label, text):
    source = Source("x", {}, ["a", "b", "c"], None, streaming=False, is_multi_label=True)
    with pytest.raises(UserError) as caught:
        source.label_vector(label, "row 7")
    assert str(caught.value).startswith(text)
