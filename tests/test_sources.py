"""Datasets are found, their columns and splits told, and what cannot be told is said in one line."""

import io
import tarfile
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import make_images
from sklearn.datasets import load_digits

from modeling_vit_scratch.data.sources import DATASETS, find_columns, open_source
from modeling_vit_scratch.errors import UserError


def as_png(image):
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    return encoded.getvalue()


def class_counts(source, split):
    found = source.splits[split]
    ids = [
        source.label_id(example.label, example.name)
        for shard in range(len(found.shard_sizes))
        for example in found.examples.read(shard, found.rows(shard))
    ]
    return np.bincount(ids, minlength=len(source.class_names)).tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_digits_have_a_fixed_stratified_test_split_of_360(streaming):
    first, second = (open_source("digits", streaming=streaming, seed=seed) for seed in (0, 1))
    assert len(first.splits["test"]) == 360
    assert max(class_counts(first, "test")) - min(class_counts(first, "test")) <= 2
    rows = [np.stack([e.image for e in s.splits["test"].examples.read(0, range(360))]) for s in (first, second)]
    assert np.array_equal(*rows)
    assert sum(len(split) for split in first.splits.values()) == 1797
    # 16 grey levels on 0..255 and back without loss
    everything = np.concatenate([first.splits[name].examples.images for name in ("train", "test")])
    assert sorted(np.round(everything * (16 / 255)).sum((1, 2))) == sorted(load_digits().images.sum((1, 2)))


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_folders_give_every_row_once_over_their_splits(parquet_repo, streaming):
    root = parquet_repo(train=[20, 13, 30], test=[9])
    source = open_source(str(root), streaming=streaming, train_val_split=0.2, seed=3)
    assert source.class_names == ["class 0", "class 1", "class 2"]
    assert source.held_out and len(source.splits["test"]) == 9
    counts = np.array([class_counts(source, "train"), class_counts(source, "validation")])
    assert counts.sum() == 63 and (counts.sum(0) == 21).all()
    names = [
        {e.name for shard in range(len(s.shard_sizes)) for e in s.examples.read(shard, s.rows(shard))}
        for s in (source.splits["train"], source.splits["validation"])
    ]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 63


def test_a_validation_split_of_its_own_is_used_and_zero_holds_out_none(parquet_repo):
    root = parquet_repo(train=[20], validation=[8])
    source = open_source(str(root))
    assert not source.held_out and set(source.splits) == {"train", "validation"}
    plain = parquet_repo(name="plain", train=[20])
    assert set(open_source(str(plain), train_val_split=0).splits) == {"train"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_is_limited_to_some_of_its_own_images(parquet_repo, streaming):
    root = parquet_repo(train=[40, 26, 60], test=[9])

    def names(max_train: int | None, max_eval: int | None) -> list[set[str]]:
        limits = {"max_train_samples": max_train, "max_eval_samples": max_eval}
        splits = open_source(str(root), streaming=streaming, train_val_split=0.2, seed=3, **limits).splits
        assert len(splits["test"]) == 9
        found = [
            [e.name for shard in range(len(s.shard_sizes)) for e in s.examples.read(shard, s.rows(shard))]
            for s in (splits["train"], splits["validation"])
        ]
        assert [len(s) for s in (splits["train"], splits["validation"])] == list(map(len, found))
        return [set(part) for part in found]

    whole, few, more = names(None, None), names(10, 5), names(31, None)
    assert [len(part) for part in few] == [10, 5] and len(more[0]) == 31 and more[1] == whole[1]
    assert few[0] < more[0] < whole[0] and few[1] < whole[1]


def test_each_class_has_its_share_of_a_limited_split(image_folder, parquet_repo):
    root = parquet_repo(train=[90])
    source = open_source(str(root), train_val_split=0.1, max_train_samples=31, max_eval_samples=6)
    assert sorted(class_counts(source, "train")) == [10, 10, 11] and class_counts(source, "validation") == [2, 2, 2]
    assert len(open_source("digits", streaming=True, max_train_samples=50).splits["train"]) == 50


def test_a_limit_that_leaves_classes_out_is_told(parquet_repo):
    source = open_source(str(parquet_repo(train=[90])), train_val_split=0, max_train_samples=2)
    assert sorted(class_counts(source, "train")) == [0, 1, 1]
    assert source.notes == ["1 of the 3 classes have no training image left."]


def test_a_limit_that_leaves_nothing_out_is_refused(parquet_repo):
    root = parquet_repo(train=[20], validation=[8])
    with pytest.raises(UserError, match="--max_eval_samples 8 has no effect here: the validation split has 8 images"):
        open_source(str(root), max_eval_samples=8)
    with pytest.raises(UserError, match="--max_train_samples 300 has no effect here: the train split has 20 images"):
        open_source(str(root), max_train_samples=300)


def test_imagenet_tests_on_the_hubs_validation_split():
    assert DATASETS["imagenet-1k"].splits == {"train": "train", "test": "validation"}


def test_streamed_rows_are_those_of_the_table(parquet_repo):
    root = parquet_repo(train=[11, 7], row_group=4)
    streamed = open_source(str(root), streaming=True, train_val_split=0).splits["train"].examples
    table = open_source(str(root), streaming=False, train_val_split=0).splits["train"].examples
    everything = streamed.read(0, range(11)) + streamed.read(1, range(7))
    assert [e.image for e in everything] == [e.image for e in table.read(0, range(18))]
    assert [e.label for e in everything] == table.labels() == streamed.labels()
    assert [e.name for e in streamed.read(0, [3, 9])] == [
        f"{root}/data/train-00000-of-00002.parquet row {i}" for i in (3, 9)
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_what_the_card_says_where_the_files_do_not(tmp_path, streaming):
    cells = [{"bytes": as_png(image), "path": f"{index}.png"} for index, image in enumerate(make_images(6))]
    table = pa.table({"image": cells, "label": [0, 1, 0, 1, 0, 1]})  # no types of `datasets` among its facts
    (tmp_path / "repo" / "data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "repo" / "data" / "train-00000-of-00001.parquet")
    names = {"class_label": {"names": {"0": "cat", "1": "dog"}}}
    features = [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": names}]
    split = {"name": "train", "num_examples": 6, "num_bytes": 1}
    card = yaml.safe_dump({"dataset_info": {"features": features, "splits": [split]}})
    (tmp_path / "repo" / "README.md").write_text(f"---\n{card}---\n")
    source = open_source(str(tmp_path / "repo"), streaming=streaming, train_val_split=0)
    assert source.class_names == ["cat", "dog"] and source.label_ids_of("train").tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_choice_among_columns_of_labels_is_told(tmp_path, streaming):
    features = datasets.Features({"img": datasets.Image()} | {
        name: datasets.ClassLabel(names=["a", "b"]) for name in ("coarse_label", "fine_label")
    })  # fmt: skip
    columns = {"img": make_images(20), "coarse_label": [0, 1] * 10, "fine_label": [1, 0] * 10}
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    flags = {"dataset_name": str(tmp_path), "streaming": streaming, "train_val_split": 0.0}
    (note,) = open_source(**flags).notes
    assert note == "The labels are those of the column fine_label; coarse_label would do too (--label_column_name)."
    assert not open_source(**flags, label_column_name="coarse_label").notes


def write_splits(root, **labels_of):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (root / "data").mkdir(parents=True)
    for split, labels in labels_of.items():
        file = root / "data" / f"{split}-00000-of-00001.parquet"
        columns = {"image": make_images(len(labels) or 1, seed=len(labels)), "label": labels or [0]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
        if not labels:  # datasets 4.8 does not write an empty table
            pq.ParquetWriter(file, pq.read_schema(file)).close()
    return str(root)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("named", "sizes"),
    [
        ({"train": "photos"}, {"train": 9, "test": 4}),
        ({"train": "photos", "validation": "test"}, {"train": 9, "validation": 4}),
        ({"train": "test", "test": "sketches"}, {"train": 4, "test": 5}),
        ({"train": "sketches", "validation": "photos"}, {"train": 5, "validation": 9, "test": 4}),
    ],
)
def test_splits_by_names_of_their_own(parquet_repo, named, sizes, streaming):
    root = parquet_repo(photos=[6, 3], sketches=[5], test=[4])
    flags = {f"{ours}_split_name": theirs for ours, theirs in named.items()}
    source = open_source(str(root), streaming=streaming, train_val_split=0, **flags)
    assert {ours: len(split) for ours, split in source.splits.items()} == sizes


def test_a_name_comes_before_what_is_known_and_what_is_left_alone_is_trained_on(parquet_repo, monkeypatch):
    row = replace(DATASETS["imagenet-1k"], repository=str(parquet_repo(train=[6], validation=[4], test=[3])))
    monkeypatch.setitem(DATASETS, "imagenet-1k", row)
    source = open_source("imagenet-1k", validation_split_name="validation", train_val_split=0)
    assert {ours: len(split) for ours, split in source.splits.items()} == {"train": 6, "validation": 4}
    source = open_source(str(parquet_repo("two", kept=[5], other=[4])), test_split_name="other", train_val_split=0)
    assert {ours: len(split) for ours, split in source.splits.items()} == {"train": 5, "test": 4}


def test_splits_that_no_name_finds_are_listed(parquet_repo):
    root = str(parquet_repo(photos=[6], sketches=[5]))
    for flags, message in (
        ({}, "has no training split; it has: photos, sketches. Name one with --train_split_name."),
        ({"needs_training": False}, "Name one with --test_split_name."),
        ({"train_split_name": "photo"}, "--train_split_name photo: .* has no such split. It has: photos, sketches."),
        ({"train_split_name": "photos", "test_split_name": "photos"}, "another flag names that split too"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(root, **flags)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["test", "validation", "train"])
def test_a_lone_split_is_trained_on_and_not_scored_too(tmp_path, name, streaming):
    root = write_splits(tmp_path / "set", **{name: [0, 1] * 15})
    source = open_source(root, streaming=streaming, train_val_split=0.2)
    assert source.splits.keys() == {"train", "validation"}
    assert sum(len(split) for split in source.splits.values()) == 30
    alone = open_source(root, streaming=streaming, train_val_split=0.0, needs_training=False)  # as evaluate opens it
    assert {split: len(found) for split, found in alone.splits.items()} == {name: 30}


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_that_cannot_be_scored_are_left_out_aloud(tmp_path, streaming):
    root = write_splits(tmp_path / "set", train=[0, 1] * 10, test=[-1] * 4, validation=[])
    source = open_source(root, streaming=streaming, train_val_split=0.2)
    assert {split: len(found) for split, found in source.splits.items()} == {"train": 16, "validation": 4}
    assert sorted(source.notes) == [
        "The labels of the test split are hidden: it is left out.", "The validation split is empty: it is left out.",
    ]  # fmt: skip
    both = open_source(root, streaming=streaming, train_val_split=0.0, needs_training=False)  # as evaluate opens it
    assert len(both.splits["test"]) == 4


def test_a_set_of_empty_splits_is_one_line(tmp_path):
    root = write_splits(tmp_path / "set", test=[], validation=[])
    with pytest.raises(UserError, match=r"its splits \(.*test.*\) are empty"):
        open_source(root, train_val_split=0.0, needs_training=False)


def test_webdataset_folders_are_streamed(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard:04d}.tar", "w") as archive:
            for row, image in enumerate(make_images(5, seed=shard)):
                for ending, content in (("png", as_png(image)), ("cls", str(row % 3).encode())):
                    info = tarfile.TarInfo(f"sample{shard}{row}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    source = open_source(str(tmp_path), streaming=True, train_val_split=0)
    assert source.splits["train"].shard_sizes == [5, 5]
    assert class_counts(source, "train") == [4, 4, 2]
    truncated = tmp_path / "train-0001.tar"
    truncated.write_bytes(truncated.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"train-0001.tar is not a whole tar archive"):
        open_source(str(tmp_path), streaming=True, train_val_split=0)


def test_folders_name_the_classes_for_every_split(image_folder):
    train = image_folder(cat=4, dog=3, newt=2)
    validation = image_folder(name="held", cat=1, newt=1)
    source = open_source(train_dir=str(train), validation_dir=str(validation))
    assert source.class_names == ["cat", "dog", "newt"]
    assert class_counts(source, "validation") == [1, 0, 1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dataset_name": "cifar1"}, "No dataset 'cifar1'. Did you mean 'cifar10'?"),
        ({"dataset_name": "./nowhere"}, "there is no such folder"),
        ({"train_dir": "./nowhere"}, "--train_dir ./nowhere: there is no such folder"),
        ({"train_dir": __file__}, r"test_sources.py: is a file; a folder of images is expected"),
        ({"dataset_name": "me/private"}, "not on this machine and the Hub cannot be reached"),
    ],
)
def test_what_is_not_there_is_said(arguments, message):
    with pytest.raises(UserError) as caught:
        open_source(**arguments)
    assert message in str(caught.value)


def test_folders_that_cannot_train_are_refused(image_folder, tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="there are no images in folders below it"):
        open_source(train_dir=str(tmp_path / "empty"))
    with pytest.raises(UserError, match="has a single class \\(cat\\)"):
        open_source(train_dir=str(image_folder(cat=3)))
    with pytest.raises(UserError, match="has the class 'wolf', which the training folder has not \\(cat, dog\\)"):
        open_source(
            train_dir=str(image_folder(name="two", cat=3, dog=3)),
            validation_dir=str(image_folder(name="other", cat=1, wolf=1)),
        )
    with pytest.raises(UserError, match="name it with --train_dir"):
        open_source(str(tmp_path / "two"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_label_outside_the_classes_names_its_row(tmp_path, streaming):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": make_images(4), "label": [0, 1, -1, 0]}, features=features)
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train-0.parquet")
    with pytest.raises(UserError, match=r"row 2 has the label -1, which is not among the 2 classes \(a, b\)"):
        class_counts(open_source(str(tmp_path), streaming=streaming, train_val_split=0.3 * (not streaming)), "train")


IMAGE, CLASSES = datasets.Image(), datasets.ClassLabel(num_classes=3)


@pytest.mark.parametrize(
    "features, named, expected",
    [
        ({"img": IMAGE, "label": CLASSES}, (None, None), ("img", "label")),
        ({"image": IMAGE, "target": CLASSES}, (None, None), ("image", "target")),
        ({"img": IMAGE, "fine_label": CLASSES, "coarse_label": CLASSES}, (None, None), ("img", "fine_label")),
        (
            {"img": IMAGE, "fine_label": CLASSES, "coarse_label": CLASSES},
            (None, "coarse_label"),
            ("img", "coarse_label"),
        ),
        ({"a": IMAGE, "b": IMAGE, "label": datasets.Value("string")}, ("b", None), ("b", "label")),
    ],
)
def test_columns_are_found_from_the_features(features, named, expected):
    assert find_columns(datasets.Features(features), *named, "x") == expected


@pytest.mark.parametrize(
    "features, named, message",
    [
        ({"img": IMAGE, "label": CLASSES}, ("pic", None), "--image_column_name pic: x has no such column. It has: img"),
        ({"img": IMAGE, "label": CLASSES}, (None, "y"), "--label_column_name y: x has no such column"),
        ({"a": IMAGE, "b": IMAGE, "label": CLASSES}, (None, None), "several image columns (a, b)"),
        ({"text": datasets.Value("string")}, (None, None), "x has no image column"),
        ({"img": IMAGE, "x": CLASSES, "y": CLASSES}, (None, None), "several label columns (x, y)"),
        ({"img": IMAGE, "weight": datasets.Value("int64")}, (None, None), "no label column"),
    ],
)
def test_columns_that_cannot_be_told_are_listed(features, named, message):
    with pytest.raises(UserError) as caught:
        find_columns(datasets.Features(features), *named, "x")
    assert message in str(caught.value)
