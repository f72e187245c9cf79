"""Images of a dataset as files: what --train_dir, predict and attention read again."""

import datasets
import numpy as np
import pytest
from conftest import make_images
from PIL import Image
from sklearn.datasets import load_digits

from modeling_vit_scratch import cli
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.results.prediction import image_paths, target_of
from modeling_vit_scratch.training.exporting import export


def run(*arguments):
    return cli.main(["export", *map(str, arguments)])


def test_digits_become_pictures_in_the_folders_of_their_classes(tmp_path, capsys):
    assert run("--dataset_name", "digits", "--index", "3,0,359", "--output_dir", tmp_path / "some") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 of 360 images of digits's test split"
    source = open_source("digits")
    examples = source.splits["test"].examples.read(0, [0, 3, 359])
    paths = sorted((tmp_path / "some").glob("*/*.png"), key=lambda path: path.name)
    assert [path.name for path in paths] == ["test-000000.png", "test-000003.png", "test-000359.png"]
    for path, example in zip(paths, examples, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), example.image)
        assert target_of(str(path), set(source.class_names)) == str(example.label)


def test_digits_are_not_streamed(tmp_path, capsys):
    assert run("--dataset_name", "digits", "--streaming", "true", "--output_dir", tmp_path / "some") == 2
    assert "--streaming has no effect here" in capsys.readouterr().err


def test_a_whole_split_is_trained_on_as_the_set_itself(tmp_path):
    assert run("--dataset_name", "digits", "--split", "train", "--count", 5000, "--output_dir", tmp_path / "all") == 0
    source = open_source(train_dir=str(tmp_path / "all"), train_val_split=0.0)
    counts = np.bincount(source.label_ids_of("train")).tolist()
    theirs = np.bincount(load_digits().target) - np.bincount(open_source("digits").splits["test"].examples.label_values)
    assert source.class_names == [str(digit) for digit in range(10)] and counts == theirs.tolist()


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_encoded_images_are_written_as_they_are_and_hidden_labels_beside_the_classes(tmp_path, streaming):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a/b", "c"])})
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, labels in (("train", [0, 1] * 3), ("test", [0, -1])):
        columns = {"image": make_images(len(labels)), "label": labels}
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    flags = ("--dataset_name", tmp_path / "set", "--streaming", streaming)
    assert run(*flags, "--output_dir", tmp_path / "some") == 0
    found = {path.relative_to(tmp_path / "some").as_posix() for path in (tmp_path / "some").rglob("*.png")}
    assert found == {"a_b/test-000000.png", "test-000001.png"}
    examples = open_source(str(tmp_path / "set")).splits["test"].examples.read(0, [0])
    assert (tmp_path / "some" / "a_b" / "test-000000.png").read_bytes() == examples[0].image


def test_several_labels_an_image_stand_in_a_metadata_file(colours, tmp_path):
    source = open_source(train_dir=str(colours("train", 8)), train_val_split=0.0)
    written, left_out = export(source, "train", range(8), tmp_path / "some")
    again = open_source(train_dir=str(tmp_path / "some"), train_val_split=0.0)
    assert len(written) == 8 and not left_out
    assert again.is_multi_label and again.label_sets_of("train") == source.label_sets_of("train")


def test_what_cannot_be_read_is_named_and_left_out(image_folder, tmp_path):
    root = image_folder(cat=3, dog=3)
    source = open_source(train_dir=str(root), train_val_split=0.0)
    (root / "cat" / "1.png").write_bytes(b"no image")
    written, left_out = export(source, "train", range(6), tmp_path / "some")
    assert len(written) == 5 and len(image_paths([str(tmp_path / "some")])[0]) == 5
    assert len(left_out) == 1 and str(root / "cat" / "1.png") in left_out[0]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--index", "360"), "--index takes numbers from 0 to 359, with commas; got 360."),
        (("--index", "1", "--count", "2"), "give one of them"),
        (("--count", "0"), "--count must be at least 1, got 0."),
        (("--split", "tset"), "Did you mean 'test'?"),
        (("--dataset_name", "digist"), "Did you mean 'digits'?"),
        (("--output_dir", "{here}"), "is not empty: name another folder."),
    ],
)
def test_a_wrong_word_is_said_in_one_line(arguments, text, tmp_path, capsys):
    (tmp_path / "file").touch()
    given = {"--dataset_name": "digits", "--output_dir": str(tmp_path / "new")}
    words = [word.format(here=tmp_path) for word in arguments]
    given.update(zip(words[::2], words[1::2], strict=True))
    assert run(*(word for pair in given.items() for word in pair)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and text in error
    assert not (tmp_path / "new").exists()
