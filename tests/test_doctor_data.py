"""`vit-scratch doctor --data` finds what is wrong with images, by name, and suggests a command that can be run."""

import json
import os
import shlex
import shutil

import datasets
import numpy as np
import pytest
from conftest import make_images
from PIL import ExifTags, Image

from modeling_vit_scratch import cli
from modeling_vit_scratch.data.folders import open_folders
from modeling_vit_scratch.data.scan import scan_split
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.data.splits import Split
from modeling_vit_scratch.doctor.folder import CHECKS, examine_images, kind_of, smallest_side
from modeling_vit_scratch.doctor.folder_report import facts_of, suggestion
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.effects import check_recipe
from modeling_vit_scratch.training.flags import parse_arguments


def doctor(capsys, *arguments):
    """(exit code, stdout, stderr) of `vit-scratch doctor`."""
    capsys.readouterr()
    code = cli.main(["doctor", *map(str, arguments), "--cpu_threads", "1"])
    return code, *capsys.readouterr()


def examined(**folders):
    """(images, findings by check) of folders, by the trainer's flags of the same names."""
    source = open_source(**{name: str(path) for name, path in folders.items()}, train_val_split=0.0)
    images, findings = examine_images(source)
    return images, {finding.check: finding for finding in findings}


def failed(findings):
    return {name for name, finding in findings.items() if finding.passed is False}


def suggested(findings, images, *data_flags):
    """The recipe that the suggested flags parse to; the trainer's own check finds none of them idle."""
    flags, _ = suggestion(images, list(findings.values()), list(data_flags))
    recipe, chosen = parse_arguments(flags)
    check_recipe(recipe, chosen)
    return recipe


# ---------------------------------------------------------------- findings


def test_a_good_set_has_no_findings(image_folder):
    train, test = image_folder(cat=12, dog=15), image_folder("test", seed=50, cat=2, dog=3)
    images, findings = examined(train_dir=train, test_dir=test)
    assert list(findings) == list(CHECKS)
    assert all(finding.passed for finding in findings.values())
    facts = facts_of(images)
    assert facts["classes"] == {"train": {"cat": 12, "dog": 15}, "test": {"cat": 2, "dog": 3}}
    assert facts["num_images"] == {"train": 27, "test": 5} and facts["kinds"] == {"RGB": 32}
    assert facts["width"] == {"min": 24, "median": 24, "max": 24} and facts["elongation"]["max"] == 1.2


def test_broken_images_are_those_of_the_scan(image_folder):
    root = image_folder(cat=12, dog=12)
    (root / "cat" / "3.png").write_text("no image")
    (root / "dog" / "5.png").write_bytes((root / "dog" / "5.png").read_bytes()[:200])
    (root / "dog" / "7.png").write_bytes(b"")
    images, findings = examined(train_dir=root)
    split = open_source(train_dir=str(root), train_val_split=0.0).splits["train"]
    expected = scan_split(split, num_threads=1)
    assert images.bad == expected.bad and len(images.bad) == 3
    scan = images.scans["train"]
    assert (scan.kinds, scan.labels, scan.smallest) == (expected.kinds, expected.labels, expected.smallest)
    assert failed(findings) == {"readable_images"}
    assert findings["readable_images"].measured == "3 of 24 cannot be read"
    assert f"{root / 'cat' / '3.png'} (it does not begin as JPEG" in findings["readable_images"].cause
    assert facts_of(images)["classes"]["train"] == {"cat": 11, "dog": 10}


def test_uneven_and_small_classes_are_named(image_folder):
    _, findings = examined(train_dir=image_folder(cat=4, dog=13, newt=10))
    assert failed(findings) == {"even_classes", "enough_images"}
    assert findings["even_classes"].measured == "largest / smallest = 3.2"
    assert "'dog' has 13 training images, 'cat' 4" in findings["even_classes"].cause
    assert "--class_weights balanced" in findings["even_classes"].remedy
    assert findings["enough_images"].cause == "'cat' 4"


def test_a_class_that_a_split_lacks_is_named(image_folder):
    train, test = image_folder(cat=10, dog=10, newt=10), image_folder("test", seed=50, cat=2, newt=1)
    (test / "newt" / "0.png").write_text("no image")  # its only one
    _, findings = examined(train_dir=train, test_dir=test)
    finding = findings["every_class_in_every_split"]
    assert finding.measured == "2 of 3 x 2 are empty"
    assert finding.cause == "test has no readable images of 'dog', 'newt'"


def test_copies_leaks_and_two_labels_are_told_apart(image_folder):
    train, test = image_folder(cat=12, dog=12), image_folder("test", seed=50, cat=2, dog=2)
    shutil.copy(train / "cat" / "0.png", train / "cat" / "copy.png")
    Image.open(train / "cat" / "1.png").save(train / "dog" / "1-other.bmp")  # the same pixels in another format
    Image.open(train / "dog" / "2.png").save(test / "dog" / "leak.tiff")
    images, findings = examined(train_dir=train, test_dir=test)
    assert failed(findings) == {"no_copies", "no_leaks", "one_label_each"}
    assert findings["no_copies"].cause == f"{train}/cat/0.png (train: cat) = {train}/cat/copy.png (train: cat)"
    assert findings["one_label_each"].cause == f"{train}/cat/1.png (train: cat) = {train}/dog/1-other.bmp (train: dog)"
    assert findings["no_leaks"].cause == f"{train}/dog/2.png (train: dog) = {test}/dog/leak.tiff (test: dog)"
    assert len(images.copies()) == 3


def test_one_pixel_makes_another_image(image_folder):
    root = image_folder(cat=12, dog=12)
    pixels = np.array(Image.open(root / "cat" / "0.png"))
    pixels[3, 4, 2] ^= 1
    Image.fromarray(pixels).save(root / "cat" / "near.png")
    Image.fromarray(pixels.reshape(24, 20, 3)).save(root / "cat" / "reshaped.png")  # equal bytes, another shape
    assert not failed(examined(train_dir=root)[1])


def test_tiny_and_long_images_are_found(image_folder):
    root = image_folder(size=(120, 200), cat=12, dog=12)
    make_images(1, (31, 60))[0].save(root / "cat" / "tiny.png")
    make_images(1, (100, 301))[0].save(root / "cat" / "long.png")
    _, findings = examined(train_dir=root)
    assert failed(findings) == {"large_enough", "proportions"}
    assert findings["large_enough"].cause == f"{root / 'cat' / 'tiny.png'} (60 x 31)"
    assert findings["proportions"].cause == f"1 of them: {root / 'cat' / 'long.png'} (301 x 100)"


@pytest.mark.parametrize(("side", "least"), [(8, 4), (32, 16), (64, 32), (120, 32), (500, 125), (3000, 224)])
def test_tiny_is_measured_by_the_others(image_folder, side, least):
    images, _ = examined(train_dir=image_folder(size=(8, 8), cat=1, dog=1))
    images.shorter_sides = lambda: [side] * 3
    assert smallest_side(images) == least


def test_kinds_of_pictures_are_told_by_what_becomes_of_them():
    rgb = make_images(1)[0]
    opaque, clear = rgb.convert("RGBA"), rgb.convert("RGBA")
    clear.putpixel((0, 0), (9, 9, 9, 254))
    palette = rgb.quantize(8)
    clear_palette = palette.copy()
    clear_palette.info["transparency"] = palette.getpixel((0, 0))
    sixteen = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8))
    pictures = {
        "RGB": [rgb, opaque], "transparent": [clear, clear_palette], "palette": [palette], "16 bit": [sixteen],
        "grey": [rgb.convert(mode) for mode in ("L", "1", "LA")], "CMYK": [rgb.convert("CMYK")],
        "fractions": [rgb.convert("F")], "YCbCr": [rgb.convert("YCbCr")],
    }  # fmt: skip
    for kind, examples in pictures.items():
        assert [kind_of(image) for image in examples] == [kind] * len(examples)


def test_odd_pictures_are_named_with_what_becomes_of_them(image_folder):
    root = image_folder(cat=12, dog=12)
    for name, mode in (("a.tiff", "CMYK"), ("b.png", "L")):
        make_images(1, (20, 24), seed=99)[0].convert(mode).save(root / "cat" / name)
    images, findings = examined(train_dir=root)
    assert failed(findings) == {"one_kind_of_picture"}
    assert findings["one_kind_of_picture"].measured == "RGB 24, CMYK 1, grey 1"
    assert f"CMYK is converted without its colour profile ({root}/cat/a.tiff)" in findings["one_kind_of_picture"].cause
    for name in ("cat", "dog"):  # all grey, as scans are
        for path in (root / name).iterdir():
            Image.open(path).convert("L").save(path)
    assert examined(train_dir=root)[1]["one_kind_of_picture"].passed


def test_turned_images_are_counted_upright(image_folder):
    root = image_folder(cat=12, dog=12)
    image = Image.open(root / "cat" / "0.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(root / "cat" / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(root / "dog" / "turned.png")
    images, findings = examined(train_dir=root)
    assert facts_of(images)["num_turned_by_exif"] == 1
    assert failed(findings) == {"one_label_each"}  # what a person sees is the same


def test_a_label_of_no_class_is_found_in_a_table(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (tmp_path / "data").mkdir()
    for split, labels in (("train", [0, 1] * 12), ("test", [-1, -1, 0])):
        columns = {"image": make_images(len(labels), seed=len(labels)), "label": labels}
        if split == "test":  # an image without a label is under no other one
            columns["image"][0] = make_images(24, seed=24)[0]
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    source = open_source(dataset_name=str(tmp_path), train_val_split=0.0)
    findings = {finding.check: finding for finding in examine_images(source)[1]}
    assert findings["known_labels"].measured == "2 with a label of no class"
    assert failed(findings) == {"known_labels", "every_class_in_every_split", "no_leaks"}


def test_several_labels_an_image_are_counted_each(image_folder, tmp_path):
    root = tmp_path / "many"
    root.mkdir()
    for index, image in enumerate(make_images(24)):
        image.save(root / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "labels": ["a", "b"] if index % 6 else ["a"]} for index in range(24)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images, findings = examined(train_dir=root)
    assert facts_of(images)["classes"] == {"train": {"a": 24, "b": 20}}
    assert not failed(findings)
    assert suggested(findings, images, "--train_dir", str(root)).class_weights is None


# ---------------------------------------------------------------- the suggestion


def test_few_photographs_are_fine_tuned(image_folder):
    root = image_folder("my photos", size=(80, 90), cat=12, dog=40)
    (root / "cat" / "0.png").write_text("no image")
    images, findings = examined(train_dir=root)
    recipe = suggested(findings, images, "--train_dir", str(root))
    assert (recipe.finetune, recipe.train_dir, recipe.train_batch_size) == ("head", str(root), 8)
    assert (recipe.bad_images, recipe.class_weights) == ("skip", "balanced")


@pytest.mark.parametrize(
    ("side", "image_size", "patch"), [(8, 8, 2), (20, 20, 4), (28, 28, 4), (32, 32, 4), (63, 60, 4)]
)
def test_small_images_are_learned_from_nothing_at_their_size(image_folder, side, image_size, patch):
    root = image_folder(size=(side, side), cat=12, dog=12)
    images, findings = examined(train_dir=root)
    recipe = suggested(findings, images, "--train_dir", str(root))
    assert (recipe.recipe, recipe.image_size, recipe.num_train_epochs) == ("folder", image_size, 100)
    assert recipe.config_overrides == f"patch_size={patch}" and image_size % patch == 0
    assert (recipe.bad_images, recipe.class_weights) == ("error", None)


@pytest.mark.slow
def test_the_command_that_is_printed_trains(image_folder, tmp_path, capsys):
    root = image_folder("some photos", size=(12, 12), cat=12, dog=40)
    (root / "cat" / "0.png").write_text("no image")
    code, out, _ = doctor(capsys, "--data", root)
    assert code == 1
    words = shlex.split(out.splitlines()[-1])
    assert words[:2] == ["vit-scratch", "train"]
    short = ["--num_train_epochs", "1", "--output_dir", str(tmp_path / "run"), "--cpu_threads", "1"]
    place = words.index("--num_train_epochs")
    assert cli.main([*words[1:place], *words[place + 2 :], *short]) == 0


# ---------------------------------------------------------------- the command


def test_splits_in_one_folder_are_found(image_folder, tmp_path, capsys):
    image_folder("set/train", cat=12, dog=12)
    image_folder("set/val", seed=50, cat=2, dog=2)
    image_folder("set/TEST", seed=90, cat=1, dog=1)
    code, out, err = doctor(capsys, "--data", tmp_path / "set")
    assert code == 0 and err == ""
    assert [line.split() for line in out.splitlines()[:5]] == [
        ["class", "train", "validation", "test"], ["cat", "12", "2", "1"], ["dog", "12", "2", "1"],
        ["unreadable", "0", "0", "0"], ["images", "24", "4", "2"],
    ]  # fmt: skip
    assert f"{len(CHECKS)} checks passed, 0 failed, 0 not applicable" in out
    flags = shlex.split(out.splitlines()[-1])
    for split, name in (("train", "train"), ("validation", "val"), ("test", "TEST")):
        assert flags[flags.index(f"--{split}_dir") + 1] == str(tmp_path / "set" / name)


def test_the_report_as_json_names_every_image(image_folder, capsys):
    root = image_folder(cat=12, dog=12)
    (root / "cat" / "0.png").write_text("no image")
    for index in range(8):
        shutil.copy(root / "dog" / f"{index}.png", root / "dog" / f"copy-{index}.png")
    (root / "notes.txt").write_text("")
    code, out, _ = doctor(capsys, "--data", root, "--format", "json", "--skip", "no_leaks")
    report = json.loads(out)
    assert code == 1 and report["notes"] == [f"{root}: 1 file is no image by its ending and is left out: .txt 1."]
    assert [finding["check"] for finding in report["findings"]] == list(CHECKS)
    assert [image["name"] for image in report["unreadable"]] == [str(root / "cat" / "0.png")]
    groups = [[os.path.basename(image["name"]) for image in group] for group in report["copies"]]
    assert sorted(groups) == [[f"{index}.png", f"copy-{index}.png"] for index in range(8)]
    copies = next(finding for finding in report["findings"] if finding["check"] == "no_copies")
    assert copies["measured"] == "8 copies of 8 images" and copies["cause"].endswith("; and 3 more")
    parse_arguments(report["command"][2:])


def test_a_layout_that_cannot_be_trained_on_is_a_finding(image_folder, capsys):
    root = image_folder(cat=3, dog=2)
    make_images(1)[0].save(root / "loose.png")
    with pytest.raises(UserError) as error:
        open_folders({"train": str(root)}, None)
    code, out, _ = doctor(capsys, "--data", root)
    assert code == 1 and f"layout: {error.value}" in out
    code, out, _ = doctor(capsys, "--data", root, "--format", "json")
    assert code == 1 and json.loads(out)["findings"][0]["cause"] == str(error.value)


def test_nothing_readable_is_still_reported(image_folder, capsys):
    root = image_folder(cat=1, dog=1)
    for path in root.rglob("*.png"):
        path.write_text("no image")
    code, out, _ = doctor(capsys, "--data", root)
    assert code == 1 and "2 of 2 cannot be read" in out and "vit-scratch train" not in out


def test_a_named_set_is_examined_and_has_its_recipe(capsys):
    code, out, _ = doctor(capsys, "--dataset_name", "digits")
    assert code == 0 and out.splitlines()[-1] == "  vit-scratch train --recipe digits"
    assert "grey 1,797" in out


def test_a_mask_is_respected(image_folder):
    source = open_source(train_dir=str(image_folder(cat=12, dog=12)), train_val_split=0.0)
    mask = np.arange(24) % 2 == 0
    source.splits["train"] = Split(source.splits["train"].examples, lambda shard: mask)
    images, _ = examine_images(source)
    assert facts_of(images)["classes"]["train"] == {"cat": 6, "dog": 6}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "Say what to examine: NETWORK, --data FOLDER or --dataset_name NAME."),
        (["--data", "nowhere"], "--data nowhere: there is no such folder."),
        (["--data", "photos", "--test_dir", "nowhere"], "--test_dir nowhere: there is no such folder."),
        (["nano", "--data", "photos"], "nano and a set of images are two things to examine: give one of them."),
        (["nano", "--test_dir", "photos"], "--test_dir goes with --data FOLDER or --dataset_name NAME: leave it out."),
        (["--data", "photos", "--image_size", "8"], "--image_size goes with a network: leave it out."),
        (["--data", "photos", "--dataset_name", "digits"], "--dataset_name goes with a dataset, not with --data"),
        (["--dataset_name", "digits", "--test_dir", "photos"], "--test_dir goes with folders of images, not with"),
        (["--dataset_name", "digit"], "No dataset 'digit'. Did you mean 'digits'?"),
        (["--data", "photos", "--skip", "no_leak"], "No check of images 'no_leak'. Did you mean 'no_leaks'?"),
        (["--data", "set", "--test_dir", "photos"], "--test_dir: set holds a test split already; leave it out."),
        (["--data", "photos", "--format", "xml"], "No --format 'xml'."),
    ],
)
def test_what_a_person_gets_wrong_is_said_in_one_line(image_folder, tmp_path, monkeypatch, capsys, arguments, text):
    image_folder(cat=1, dog=1)
    image_folder("set/train", cat=1, dog=1)
    image_folder("set/test", cat=1, dog=1)
    monkeypatch.chdir(tmp_path)
    code, out, err = doctor(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith(f"error: {text}") and err.count("\n") == 1
