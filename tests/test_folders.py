"""Folders of images are taken as people have them, and what cannot be is named in one line."""

import os
import shutil
import unicodedata

import pytest
from opened_sources import examples_of, labels_by_file, refusal
from PIL import Image

from modeling_vit_scratch.data.decoding import FORMATS
from modeling_vit_scratch.data.listing import IMAGE_ENDINGS, UNREAD_IMAGE_ENDINGS
from modeling_vit_scratch.data.sources import open_source

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
