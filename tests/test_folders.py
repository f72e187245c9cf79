"""Folders of images are taken as people have them, and what cannot be is named in one line."""

import json
import os
import shutil
import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_images
from PIL import Image

from modeling_vit_scratch.data.decoding import FORMATS
from modeling_vit_scratch.data.labels import multi_label_holdout
from modeling_vit_scratch.data.listing import IMAGE_ENDINGS, UNREAD_IMAGE_ENDINGS
from modeling_vit_scratch.data.order import stratified_holdout
from modeling_vit_scratch.data.sources import Source, open_source
from modeling_vit_scratch.errors import UserError


def refusal(**arguments):
    """The text of the error that opening these folders ends in: one line that can be printed anywhere."""
    with pytest.raises(UserError) as caught:
        open_source(**{name: str(value) for name, value in arguments.items()})
    text = str(caught.value)
    assert "\n" not in text and text.encode("utf-8")
    return text


def examples_of(source, split="train"):
    found = source.splits[split]
    return [e for shard in range(len(found.shard_sizes)) for e in found.examples.read(shard, found.rows(shard))]


def labels_by_file(source, split="train"):
    return {os.path.basename(example.image): example.label for example in examples_of(source, split)}


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


# ---------------------------------------------------------------- classes


def test_images_come_in_the_order_of_a_walk_through_sorted_names(image_folder):
    root = image_folder(dog=3, cat=2)
    image_folder(name="photos/cat/a/deep", x=2)
    image_folder(name="photos/cat", b=1)
    walked = []
    for name in ("cat", "dog"):
        for folder, subfolders, files in os.walk(root / name):
            subfolders.sort()
            walked += [os.path.join(folder, file) for file in sorted(files)]
    found = examples_of(open_source(train_dir=str(root), train_val_split=0))
    assert [example.image for example in found] == walked
    assert [example.label for example in found] == ["cat"] * 5 + ["dog"] * 3


def test_a_class_that_training_lacks_is_refused_with_the_name_that_was_meant(image_folder):
    train, capitals = image_folder(cat=2, dog=2), image_folder(name="held", Cat=1, dog=1)
    assert refusal(train_dir=train, validation_dir=capitals) == (
        "The validation folder has the class 'Cat', which the training folder has not (cat, dog); did you mean 'cat'?"
    )
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    train = image_folder(name="accents", **{composed: 2, "dog": 2})
    held = image_folder(name="held accents", **{decomposed: 2})
    assert r"has the class 'cafe\u0301'" in refusal(train_dir=train, test_dir=held)
    assert r"did you mean 'caf\xe9'?" in refusal(train_dir=train, test_dir=held)


def test_classes_without_validation_images_are_said_aloud(image_folder):
    train, held = image_folder(cat=2, dog=2, newt=2), image_folder(name="held", cat=1)
    (held / "newt").mkdir()
    (held / "wolf").mkdir()
    source = open_source(train_dir=str(train), validation_dir=str(held))
    assert source.notes == [
        f"--validation_dir {held} has no images of 2 of the 3 classes: 'dog', 'newt'.",
        f"--validation_dir {held}: the folder 'wolf' is empty, and no class of training.",
    ]


def test_an_empty_class_of_training_is_refused(image_folder):
    root = image_folder(cat=2, dog=2)
    (root / "newt").mkdir()
    assert refusal(train_dir=root) == (f"The class 'newt' has no images in {root}/newt; add some or remove the folder.")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_of_one_image_stays_in_training_and_is_said_aloud(image_folder, streaming):
    root = image_folder(cat=30, dog=1, newt=20)
    for seed in range(3):
        source = open_source(train_dir=str(root), streaming=streaming, seed=seed)
        assert list(labels_by_file(source, "validation").values()).count("dog") == 0
        labels = [example.label for example in examples_of(source)]
        assert [labels.count(name) for name in source.class_names] == [27, 1, 18]
        assert source.notes == [
            "1 of the 3 classes have too few training images to hold one out for validation: 'dog' (1)."
        ]


@pytest.mark.parametrize(
    "names, text",
    [
        (("Cat", "cat"), "The class folders 'Cat' and 'cat' in {root} differ only by case, so other file systems"),
        (("cafe\u0301", "caf\u00e9"), r"'cafe\u0301' and 'caf\xe9' in {root} differ only in how accents are stored"),
    ],
)
def test_names_that_other_file_systems_take_for_one_are_refused(image_folder, names, text):
    root = image_folder(**dict.fromkeys(names, 1))
    if len(os.listdir(root)) < 2:
        pytest.skip("this file system takes them for one")
    assert text.format(root=root) in refusal(train_dir=root)


def test_a_folder_of_splits_is_told_from_a_folder_of_classes(image_folder, tmp_path):
    for name in ("Train", "val", "test"):
        image_folder(name=f"data/{name}", cat=1, dog=1)
    root = tmp_path / "data"
    assert refusal(train_dir=root) == (
        f"--train_dir {root} holds splits, not classes; did you mean --train_dir {root}/Train "
        f"--validation_dir {root}/val --test_dir {root}/test?"
    )
    vehicles = image_folder(name="vehicles", train=2, car=2)
    assert open_source(train_dir=str(vehicles)).class_names == ["car", "train"]


def test_a_split_inside_another_is_refused_and_the_same_folder_twice_is_said_aloud(image_folder):
    root = image_folder(cat=2, dog=2)
    inner = image_folder(name="photos/test", cat=1, dog=1)
    text = f"--test_dir {inner} lies inside --train_dir {root}, so its images are in both; put the two side by side."
    assert refusal(train_dir=root, test_dir=inner) == text
    shutil.rmtree(inner)
    source = open_source(train_dir=str(root), test_dir=str(root), train_val_split=0)
    assert source.notes == [
        f"--test_dir {root} is the folder of --train_dir too: its scores are those of the same images."
    ]


def test_a_class_name_that_is_not_utf8_is_refused_escaped(image_folder):
    root = image_folder(cat=2, dog=2)
    try:
        os.mkdir(os.fsencode(root) + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    expected = rf"The class folder 'caf\udce9' in {root} has a name that is not UTF-8; rename it."
    shutil.copy(root / "cat" / "0.png", os.fsencode(root) + b"/caf\xe9/0.png")
    assert refusal(train_dir=root) == expected


def test_a_file_name_that_is_not_utf8_is_read_and_printed_escaped(image_folder):
    root = image_folder(cat=2, dog=2)
    try:
        shutil.copy(root / "cat" / "0.png", os.fsencode(root) + b"/cat/\xff.png")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    assert len(open_source(train_dir=str(root), train_val_split=0).splits["train"]) == 5
    os.rename(os.fsencode(root) + b"/cat/\xff.png", os.fsencode(root) + b"/cat/\xff\n.heic")
    assert rf"{root}/cat/\udcff\n.heic is an image of a kind that is not read here" in refusal(train_dir=root)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("ending", IMAGE_ENDINGS)
def test_every_ending_taken_for_an_image_belongs_to_a_format_that_is_decoded(ending):
    Image.init()
    assert Image.registered_extensions()[ending] in FORMATS
    assert ending not in UNREAD_IMAGE_ENDINGS


def test_what_systems_leave_behind_is_no_image_and_no_class(image_folder):
    root = image_folder(cat=2, dog=2)
    for name in ("cat/.hidden.png", "cat/Thumbs.db", "dog/.DS_Store", "desktop.ini", ".cache/x.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    (root / "__MACOSX" / "cat" / "._0.png").touch()
    source = open_source(train_dir=str(root), train_val_split=0)
    assert source.class_names == ["cat", "dog"] and len(source.splits["train"]) == 4 and source.notes == []


def test_other_files_are_left_out_aloud(image_folder):
    root = image_folder(cat=2, dog=2)
    (root / "cat" / "a.txt").touch()
    assert open_source(train_dir=str(root), train_val_split=0).notes == [
        f"{root}: 1 file is no image by its ending and is left out: .txt 1."
    ]
    for name in ("cat/b.TXT", "dog/c.pdf", "README"):
        (root / name).touch()
    assert open_source(train_dir=str(root), train_val_split=0).notes == [
        f"{root}: 4 files are no images by their ending and are left out: .txt 2, no ending 1, .pdf 1."
    ]


@pytest.mark.parametrize("name", ["cat/a.HEIC", "cat/below/b.nef", "c.svg"])
def test_images_that_are_not_read_here_are_refused(image_folder, name):
    root = image_folder(cat=2, dog=2)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).touch()
    ending = os.path.splitext(name)[1].lower()
    assert refusal(train_dir=root) == (
        f"{root}/{name} is an image of a kind that is not read here ({ending}); convert it to JPEG or PNG, or remove "
        "it."
    )


def test_an_image_beside_the_class_folders_has_no_class(image_folder):
    root = image_folder(cat=2, dog=2)
    shutil.copy(root / "cat" / "0.png", root / "loose.png")
    assert refusal(train_dir=root) == (
        f"{root}/loose.png lies in no class folder, so it has no class; move it to {root}/<class>/, or name its label "
        f"in {root}/metadata.csv."
    )


def test_links_within_the_folder_are_followed(image_folder, tmp_path):
    root = image_folder(cat=2, dog=3)
    (root / "cat" / "link.png").symlink_to("0.png")
    (root / "dog" / "more").symlink_to("../cat")
    (tmp_path / "elsewhere").symlink_to(root)
    source = open_source(train_dir=str(tmp_path / "elsewhere"), train_val_split=0)
    assert [example.label for example in examples_of(source)].count("cat") == 3
    assert len(source.splits["train"]) == 3 + 3 + 3


@pytest.mark.parametrize(
    "link, target, text",
    [
        ("cat/out.png", "{other}/fox/0.png", "is a link to {other}/fox/0.png, outside {root}; put a copy in its place"),
        ("fox", "{other}/fox", "is a link to {other}/fox, outside {root}; put a copy in its place"),
        ("fox", "../photos2/fox", "is a link to {other}/fox, outside {root}; put a copy in its place"),
        ("cat/gone.png", "nothing.png", "is a link to nothing.png, which is not there; remove it"),
        ("cat/me", "me", "is a link to me, which is not there; remove it"),
        ("cat/up", "..", "is a link to a folder that it lies in ({root}); remove it"),
        ("cat/here", ".", "is a link to a folder that it lies in ({root}/cat); remove it"),
    ],
)
def test_links_that_lead_out_nowhere_or_in_a_circle_are_refused(image_folder, link, target, text):
    root, other = image_folder(cat=2, dog=2), image_folder(name="photos2", fox=2)
    (root / link).symlink_to(target.format(other=other))
    assert refusal(train_dir=root) == f"{root}/{link} {text.format(root=root, other=other)}."


def test_two_links_that_form_a_circle_are_refused(image_folder):
    root = image_folder(cat=2, dog=2)
    (root / "cat" / "to dog").symlink_to("../dog")
    (root / "dog" / "to cat").symlink_to("../cat")
    assert "is a link to a folder that it lies in" in refusal(train_dir=root)


def test_what_cannot_be_read_is_named(image_folder, monkeypatch):
    root = image_folder(cat=2, dog=2)
    scandir, access = os.scandir, os.access  # root may read everything, so the rights are played

    def closed(path):
        if str(path) == f"{root}/dog":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        assert f"{root}/dog cannot be listed: Permission denied; give yourself the right" in refusal(train_dir=root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: access(path, mode) and path != f"{root}/cat/1.png")
        assert f"{root}/cat/1.png cannot be read: permission denied; allow it" in refusal(train_dir=root)
    os.mkfifo(root / "cat" / "pipe.png")
    assert refusal(train_dir=root) == f"{root}/cat/pipe.png is neither a file nor a folder; remove it."


# ---------------------------------------------------------------- metadata


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
