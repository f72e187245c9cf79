"""Broken images have one owner: found, named, counted, and left out as if they had never been there."""

import json
import pickle
import shutil
from collections import Counter

import datasets
import numpy as np
import pytest
from conftest import make_images
from PIL import Image
from test_run_train import TINY, equal, launch, metrics, run, weights

from modeling_vit_scratch.data import scan as scanning
from modeling_vit_scratch.data.examples import Example
from modeling_vit_scratch.data.scan import scan_split, scan_steps, without_bad
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.data.splits import Split, hold_out
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training import loop
from modeling_vit_scratch.training.flags import main


def broken(folder, *names):
    """The folder with these images cut to the half of their bytes."""
    for name in names:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder


def split_of(folder) -> Split:
    return open_source(train_dir=str(folder), train_val_split=0).splits["train"]


def stream(root, bad, sizes=(9, 7, 11), row_group=4):
    """A repository of parquet shards whose rows `bad` (shard, row) hold no image, and the labels of the good rows."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    root.mkdir()
    (root / "data").mkdir()
    for shard, size in enumerate(sizes):
        images = [{"bytes": None, "path": None}] * size
        for row, image in enumerate(make_images(size, seed=shard)):
            image.save(root / "image.png")
            content = b"no image" if (shard, row) in bad else (root / "image.png").read_bytes()
            images[row] = {"bytes": content, "path": None}
        (root / "image.png").unlink()
        labels = [row % 3 for row in range(size)]
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(root / "data" / f"train-{shard:05d}-of-{len(sizes):05d}.parquet", batch_size=row_group)
    return root


# ---------------------------------------------------------------- finding them


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_scan_names_what_cannot_be_read_in_order(image_folder, num_threads, monkeypatch):
    monkeypatch.setattr(scanning, "BLOCK", 4)
    folder = broken(image_folder(cat=6, dog=9), "cat/2.png", "dog/8.png")
    (folder / "dog" / "0.png").write_bytes(b"")
    progress = []
    scan = scan_split(split_of(folder), num_threads, lambda seen: progress.append((seen.num_images, len(seen.bad))))
    rows = [(image.shard, image.row) for image in scan.bad]
    assert rows == [(0, 2), (0, 6), (0, 14)]
    assert [image.name for image in scan.bad] == [
        str(folder / name) for name in ("cat/2.png", "dog/0.png", "dog/8.png")
    ]
    assert scan.bad[1].reason == "it is empty" and "truncated" in scan.bad[0].reason
    assert progress == [(4, 1), (8, 2), (12, 2), (15, 3)]
    assert scan.labels == {"cat": 5, "dog": 7} and scan.bad_labels == {"cat": 1, "dog": 2}


def test_a_scan_counts_kinds_sizes_and_animations(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
    pictures = make_images(3, (20, 24))
    pictures[0].save(tmp_path / "cat" / "a.jpg")
    pictures[0].convert("L").save(tmp_path / "cat" / "b.jpg", "PNG")  # an ending that lies
    exif = Image.Exif()
    exif[0x0112] = 6
    make_images(1, (10, 40))[0].save(tmp_path / "dog" / "a.jpg", exif=exif)  # stands 10 pixels wide
    make_images(1, (7, 5))[0].save(tmp_path / "dog" / "b.png")
    pictures[1].quantize(8).save(tmp_path / "dog" / "c.gif", save_all=True, append_images=[pictures[2].quantize(8)])
    scan = scan_split(split_of(tmp_path), 2)
    assert scan.num_images == 5 and not scan.bad and scan.num_animated == 1
    expected = {("RGB", "JPEG"): 2, ("L", "PNG"): 1, ("RGB", "PNG"): 1, ("P", "GIF"): 1}
    assert scan.kinds == Counter(expected)
    assert (scan.smallest, scan.largest) == ((5, 7), (24, 20))


def test_a_second_frame_that_is_broken_does_not_count(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        pictures = [picture.quantize(64) for picture in make_images(2, (60, 60))]
        pictures[0].save(tmp_path / label / "a.gif", save_all=True, append_images=pictures[1:])
    path = tmp_path / "cat" / "a.gif"
    path.write_bytes(path.read_bytes()[:-2_000])
    assert not scan_split(split_of(tmp_path), 1).bad


def test_what_is_no_file_at_all_is_looked_at_too():
    scan = scan_split(open_source("digits", train_val_split=0).splits["test"], 1)
    assert scan.num_images == 360 and scan.kinds == {("L", None): 360} and scan.largest == (8, 8)


def test_a_scan_holds_one_block_at_a_time(image_folder, monkeypatch):
    monkeypatch.setattr(scanning, "BLOCK", 4)
    split, reads = split_of(image_folder(cat=6, dog=9)), []
    real = split.examples.read
    monkeypatch.setattr(split.examples, "read", lambda shard, rows: (reads.append(len(rows)), real(shard, rows))[1])
    steps = scan_steps(split, 2)
    assert next(steps).num_images == 4 and reads == [4]  # nothing is read ahead
    assert [scan.num_images for scan in steps] == [8, 12, 15] and reads == [4, 4, 4, 3]


def test_fewer_rows_than_expected_are_an_error(image_folder, monkeypatch):
    split = split_of(image_folder(cat=6, dog=9))
    real = split.examples.read
    monkeypatch.setattr(split.examples, "read", lambda shard, rows: real(shard, rows)[:-1])
    with pytest.raises(UserError, match="Expected 15 rows of shard 0 from row 0 on, got 14; fetch the data again"):
        scan_split(split, 1)


# ---------------------------------------------------------------- leaving them out


@pytest.mark.parametrize("masked", [False, True])
def test_a_split_without_bad_rows_has_the_others_in_their_order(tmp_path, masked):
    bad = {(0, 0), (0, 8), (1, 3), (2, 5)}
    source = open_source(str(stream(tmp_path / "repo", bad)), streaming=True, train_val_split=0.3 * masked, seed=1)
    for name, split in source.splits.items():
        found = scan_split(split, 2)
        assert {(image.shard, image.row) for image in found.bad} == {
            (shard, row) for shard, row in bad if row in split.rows(shard)
        }
        rest = pickle.loads(pickle.dumps(without_bad(split, found.bad)))
        for shard in range(3):
            expected = [row for row in split.rows(shard) if (shard, row) not in bad]
            assert rest.rows(shard).tolist() == expected and rest.shard_sizes[shard] == len(expected)
        assert len(rest) == len(split) - len(found.bad)
        assert not scan_split(rest, 1).bad, name
    assert without_bad(rest, []) is rest


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_belong_neither_to_training_nor_to_validation(tmp_path, streaming):
    bad = {(0, 0), (1, 3), (2, 5)}
    source = open_source(str(stream(tmp_path / "repo", bad)), streaming=streaming, train_val_split=0)
    train = source.splits["train"]
    source.splits["train"] = without_bad(train, scan_split(train, 1).bad)
    hold_out(source, 0.3, 0)
    parts = [
        {(shard, int(row)) for shard in range(len(split.shard_sizes)) for row in split.rows(shard)}
        for split in source.splits.values()
    ]
    everything = {(shard, row) for shard, size in enumerate(train.examples.shard_sizes) for row in range(size)}
    assert parts[0].isdisjoint(parts[1]) and len(parts[0] | parts[1]) == 27 - 3
    left_out = everything - parts[0] - parts[1]
    assert left_out == (bad if streaming else {(0, 0), (0, 9 + 3), (0, 16 + 5)})


# ---------------------------------------------------------------- --bad_images

FOLDER = ["--recipe", "folder", "--max_steps", 6, "--train_batch_size", 8, "--image_size", 16, "--train_val_split", 0.2,
          "--dataloader_num_workers", 0, "--save_steps", 2]  # fmt: skip


def photos(image_folder, name):
    train = image_folder(f"{name}/train", cat=12, dog=13)
    test = image_folder(f"{name}/test", seed=7, cat=5, dog=4)
    return train, test, ["--train_dir", train, "--test_dir", test]


def bad_photos(image_folder, name):
    train, test, arguments = photos(image_folder, name)
    broken(train, "cat/3.png", "dog/11.png"), broken(test, "dog/0.png")
    return [train / "cat/3.png", train / "dog/11.png", test / "dog/0.png"], arguments


@pytest.mark.parametrize("own_validation", [False, True])
def test_skipping_is_as_if_the_files_were_not_there(image_folder, tmp_path, capsys, own_validation):
    paths, arguments = bad_photos(image_folder, "photos")
    if own_validation:
        validation = broken(image_folder("photos/validation", seed=9, cat=4, dog=4), "cat/1.png")
        paths.insert(2, validation / "cat/1.png")
        arguments += ["--validation_dir", validation]
    common = [*FOLDER, *arguments, "--max_train_samples", 15, "--max_eval_samples", 2]
    if own_validation:
        common[common.index("--train_val_split") : common.index("--train_val_split") + 2] = []
    skipped = run(tmp_path / "skipped", *common, "--bad_images", "skip")
    out = capsys.readouterr().out
    assert "--bad_images skip: every image is looked at once (25 train, " in out
    assert f"{len(paths)} image(s) cannot be read and are left out (2 train, " in out
    assert all(f"  {path} (" in out for path in paths)
    for path in paths:
        path.unlink()
    removed = run(tmp_path / "removed", *common)
    assert equal(weights(tmp_path / "skipped"), weights(tmp_path / "removed"))
    assert metrics(tmp_path / "skipped") == metrics(tmp_path / "removed")
    assert skipped["dataset"]["splits"] == removed["dataset"]["splits"]
    assert {name: skipped["dataset"]["splits"][name] for name in ("train", "validation")} == {
        "train": 15,
        "validation": 2,
    }
    assert loop.final_scores(skipped) == loop.final_scores(removed)
    expected = {"train": 2, **({"validation": 1} if own_validation else {}), "test": 1}
    assert skipped["bad_images"] == expected and "bad_images" not in removed
    assert set(skipped["bad_image_names"]) == set(map(str, paths))


def test_a_resumed_run_scans_no_more_and_ends_the_same(image_folder, tmp_path, monkeypatch, capsys):
    _, arguments = bad_photos(image_folder, "photos")
    common = [*FOLDER, *arguments, "--bad_images", "skip"]
    run(tmp_path / "whole", *common)

    class Killed(Exception):
        pass

    real = loop.learning_rate_at

    def die_at_step_3(step, *rest):
        if step == 3:
            raise Killed
        return real(step, *rest)

    monkeypatch.setattr(loop, "learning_rate_at", die_at_step_3)
    with pytest.raises(Killed):
        run(tmp_path / "broken", *common)
    monkeypatch.setattr(loop, "learning_rate_at", real)
    monkeypatch.setattr("modeling_vit_scratch.training.bad_images.scan_steps", None)
    capsys.readouterr()
    run(tmp_path / "broken", *common)
    assert f"{tmp_path / 'broken' / 'bad_images.json'} says which images cannot be read.\n3 image(s) cannot" in (
        capsys.readouterr().out
    )
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_a_record_of_other_images_is_made_anew(image_folder, tmp_path, capsys):
    paths, arguments = bad_photos(image_folder, "photos")
    common = [*FOLDER, *arguments, "--bad_images", "skip"]
    with pytest.raises(UserError):  # after the scan: the result is kept for a start without the mistake
        run(tmp_path / "run", *common, "--preset", "vit_b")
    path = tmp_path / "run" / "bad_images.json"
    record = json.loads(path.read_text())
    assert [image["name"] for image in record["train"]["bad"]] == list(map(str, paths[:2]))
    assert record["train"]["num_images"] == 25 and record["test"]["bad"][0]["row"] == 5

    def says(text):
        capsys.readouterr()
        with pytest.raises(UserError):
            run(tmp_path / "run", *common, "--preset", "vit_b")
        assert text in capsys.readouterr().out

    says("says which images cannot be read")
    paths[0].unlink()
    says("is not of these images (train: 25 images then, 24 now): they are looked at anew.")
    paths[1].rename(paths[1].with_name("13.png"))
    says(f"is not of these images (train: {paths[1]} is no longer where it was): they are looked at anew.")
    path.write_text("{")
    says("is not of these images (it cannot be read: ")
    says("2 image(s) cannot be read and are left out (1 train, 1 test):")
    results = run(tmp_path / "run", *common, "--overwrite_output_dir", "true")
    assert results["bad_images"] == {"train": 1, "test": 1}


def test_going_on_without_skipping_is_refused_and_starting_afresh_forgets_the_record(image_folder, tmp_path):
    _, _, arguments = photos(image_folder, "photos")
    run(tmp_path / "run", *FOLDER, *arguments, "--bad_images", "skip")
    with pytest.raises(UserError, match=r"another recipe \(bad_images: 'skip' -> 'error'\)"):
        run(tmp_path / "run", *FOLDER, *arguments)
    results = run(tmp_path / "run", *FOLDER, *arguments, "--overwrite_output_dir", "true")
    assert "bad_images" not in results and not (tmp_path / "run" / "bad_images.json").exists()


def test_by_default_training_stops_at_the_first_bad_image_and_says_how_to_go_on(image_folder, tmp_path, capsys):
    paths, arguments = bad_photos(image_folder, "photos")
    for path in paths[1:]:
        path.unlink()
    arguments = [*map(str, [*FOLDER, *arguments]), "--output_dir", str(tmp_path / "run"), "--max_steps", "12"]
    assert main([*arguments, "--report_to", "none", "--config_overrides", TINY]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert line.startswith(f"error: {paths[0]} cannot be read as an image: ")
    assert line.endswith("; mend or remove it, or leave such images out with --bad_images skip.")


def test_a_class_or_split_left_without_images_is_an_error_that_names_it(image_folder, tmp_path):
    train, test, arguments = photos(image_folder, "photos")
    common = [*FOLDER, *arguments, "--bad_images", "skip"]
    shutil.copytree(test, tmp_path / "kept")
    broken(test, *(f"cat/{index}.png" for index in range(5)), *(f"dog/{index}.png" for index in range(4)))
    with pytest.raises(
        UserError, match=r"leave the test split empty: none of its 9 images can be read \(.*cat/0.png: "
    ):
        run(tmp_path / "run", *common)
    shutil.rmtree(test)
    (tmp_path / "kept").rename(test)
    broken(train, *(f"dog/{index}.png" for index in range(13)))
    with pytest.raises(
        UserError, match="leave the class 'dog' without training images: none of its 13 can be read; mend them, or"
    ):
        run(tmp_path / "run", *common)


def test_a_split_of_which_too_much_is_bad_stops_the_run_unless_it_is_allowed(image_folder, tmp_path):
    train, _, arguments = photos(image_folder, "photos")
    broken(train, *(f"dog/{index}.png" for index in range(6)))
    common = [*FOLDER, *arguments, "--bad_images", "skip"]
    with pytest.raises(UserError, match=r"leave out 24% of the train split, 6 of 25 images .*--max_bad_images 0.24\."):
        run(tmp_path / "run", *common)
    assert run(tmp_path / "run", *common, "--max_bad_images", 0.24)["bad_images"]["train"] == 6
    with pytest.raises(UserError, match="--max_bad_images has no effect here: it goes with --bad_images skip"):
        run(tmp_path / "other", *FOLDER, *arguments, "--max_bad_images", 0.5)


def test_the_digits_have_no_files_to_skip(tmp_path):
    with pytest.raises(UserError, match="--bad_images has no effect here: digits are numbers, not image files"):
        run(tmp_path / "run", "--max_steps", 1, "--bad_images", "skip")


def test_a_stream_leaves_bad_rows_out_of_every_lane(tmp_path):
    bad = {(0, 0), (1, 3), (2, 5)}
    root = stream(tmp_path / "repo", bad)
    arguments = ["--dataset_name", root, "--recipe", "cifar10", "--streaming", "true", "--max_steps", 6,
                 "--train_batch_size", 8, "--stream_lanes", 4, "--stream_window", 4]  # fmt: skip
    with pytest.raises(UserError, match="repo/data/train-0000.-of-00003.parquet row . cannot be read as an image"):
        run(tmp_path / "error", *arguments, "--train_val_split", 0)
    results = run(tmp_path / "run", *arguments, "--bad_images", "skip", "--train_val_split", 0.2)
    assert sum(results["dataset"]["splits"].values()) == 24
    assert results["bad_images"] == {"train": 3}
    assert [name.rpartition("/")[2] for name in results["bad_image_names"]] == [
        f"train-0000{shard}-of-00003.parquet row {row}" for shard, row in sorted(bad)
    ]


def test_two_processes_leave_out_what_the_first_one_found(image_folder, tmp_path):
    _, arguments = bad_photos(image_folder, "photos")
    common = [*FOLDER, *arguments, "--bad_images", "skip", "--report_to", "none", "--config_overrides", TINY]
    done = launch(2, *common, "--output_dir", tmp_path / "two", "--cpu_threads", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("3 image(s) cannot be read and are left out (2 train, 1 test):") == 1
    one = run(tmp_path / "one", *common)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["bad_images"] == one["bad_images"] == {"train": 2, "test": 1}
    assert two["dataset"] == one["dataset"] and sum(map(sum, two["confusion"]["test"])) == 8
    pairs = zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-4) for a, b in pairs if "loss" in a)


def test_each_of_an_images_several_labels_counts():
    scan, example = scanning.Scan(), Example(np.zeros((4, 5), np.uint8), ["cat", "dog"], "row 0")
    scan.add(0, 0, example, scanning.look_at(example))
    assert scan.labels == {"cat": 1, "dog": 1} and scan.smallest == (5, 4)
