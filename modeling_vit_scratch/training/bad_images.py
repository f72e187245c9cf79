"""--bad_images skip: every image is looked at once, and those that cannot be read are left out of all splits."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.scan import BadImage, Scan, scan_steps, without_bad
from ..data.splits import Source
from ..errors import UserError
from .machine import agree
from .run_folder import write_json

RECORD = "bad_images.json"  # in the run's folder
NUM_NAMED = 10  # of the bad images, on the screen
NUM_RECORDED = 100  # in results.json; bad_images.json has all
SECONDS_BETWEEN_NEWS = 30  # also the longest that processes which do not scan wait: they would give up in the end

BadImages = dict[str, list[BadImage]]  # split name -> what cannot be read of it


def leave_out_bad_images(
    accelerator: Accelerator, source: Source, folder: Path, largest_share: float
) -> dict[str, Any]:
    """Takes the images that cannot be read out of every split of the source, and returns what results.json says of it.

    The main process looks at every image, or reads what the folder's bad_images.json says of these splits, so that a
    run that goes on leaves out the same. Raises UserError in every process for a split that would be left without
    images or without more than this share of them, and for a class that would be left without training images.
    """
    work = _find(source, folder, torch.get_num_threads(), largest_share)  # nothing runs yet
    bad: BadImages | None = None
    while bad is None:
        news, bad = agree(accelerator, lambda: next(work))
        accelerator.print(news, flush=True)
    for name, images in bad.items():
        source.splits[name] = without_bad(source.splits[name], images)
    named = [image.name for images in bad.values() for image in images]
    return {
        "bad_images": {name: len(images) for name, images in bad.items()},
        "bad_image_names": named[:NUM_RECORDED],
    }


def _find(
    source: Source, folder: Path, num_threads: int, largest_share: float
) -> Iterator[tuple[str, BadImages | None]]:
    """(what to say, None) while it works, then (what to say, the bad images of each split)."""
    path, sizes = folder / RECORD, {name: len(split) for name, split in source.splits.items()}
    if path.exists():
        known, difference = _read(path, source)
        if known is not None:
            yield f"{path} says which images cannot be read.\n{_summary(known)}", known
            return
        yield f"{path} is not of these images ({difference}): they are looked at anew.", None
    counts = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    yield f"--bad_images skip: every image is looked at once ({counts}).", None
    bad: BadImages = {}
    for name, split in source.splits.items():
        said = time.monotonic()
        scan = Scan()
        for scan in scan_steps(split, num_threads):
            if time.monotonic() - said > SECONDS_BETWEEN_NEWS:
                said = time.monotonic()
                yield f"looked at {scan.num_images:,} of {sizes[name]:,} {name} images, {len(scan.bad)} bad", None
        check_what_is_left(source, name, scan, largest_share)
        bad[name] = scan.bad
    lists = {name: [dataclasses.asdict(image) for image in images] for name, images in bad.items()}
    write_json(path, {name: {"num_images": sizes[name], "bad": found} for name, found in lists.items()})
    yield _summary(bad), bad


def _read(path: Path, source: Source) -> tuple[BadImages | None, str]:
    """(the bad images that the file names, ""), or (None, what differs) where it is of other splits."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        bad = {name: [BadImage(**image) for image in found["bad"]] for name, found in record.items()}
        then = {name: found["num_images"] for name, found in record.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return None, f"it cannot be read: {error}"
    for name in {**source.splits, **then}:
        now = len(source.splits[name]) if name in source.splits else 0
        if then.get(name, 0) != now:
            return None, f"{name}: {then.get(name, 0):,} images then, {now:,} now"
    for name, images in bad.items():
        for image in images:
            shards = source.splits[name].examples.shard_sizes
            is_there = image.shard < len(shards) and image.row < shards[image.shard]
            if not is_there or source.splits[name].examples.read(image.shard, [image.row])[0].name != image.name:
                return None, f"{name}: {image.name} is no longer where it was"
    return bad, ""


def check_what_is_left(source: Source, name: str, scan: Scan, largest_share: float):
    """Raises UserError where nothing of a split can be read, nothing of a class of training, or too little."""
    if not scan.bad:
        return
    first = scan.bad[0]
    if len(scan.bad) == scan.num_images:
        raise UserError(
            f"--bad_images skip would leave the {name} split empty: none of its {scan.num_images:,} images can be read "
            f"({first.name}: {first.reason}); mend them."
        )
    empty = [label for label in scan.bad_labels if not scan.labels[label]] if name == "train" else []
    if empty:
        raise UserError(
            f"--bad_images skip would leave the class {source.class_names[source.label_id(empty[0], first.name)]!r} "
            f"without training images: none of its {scan.bad_labels[empty[0]]:,} can be read; mend them, or remove the "
            "class."
        )
    share = len(scan.bad) / scan.num_images
    if share > largest_share:
        raise UserError(
            f"--bad_images skip would leave out {share:.0%} of the {name} split, {len(scan.bad):,} of "
            f"{scan.num_images:,} images ({first.name}: {first.reason}); mend them, or allow it: "
            f"--max_bad_images {enough_for(share):g}."
        )


def enough_for(share: float) -> float:
    """The least --max_bad_images of two digits that lets a split through of which this share is bad."""
    return min(1.0, math.ceil(100 * share) / 100)


def _summary(bad: BadImages) -> str:
    images = [(name, image) for name, found in bad.items() for image in found]
    if not images:
        return "Every image can be read."
    counts = ", ".join(f"{len(found):,} {name}" for name, found in bad.items() if found)
    lines = [f"{len(images):,} image(s) cannot be read and are left out ({counts}):"]
    lines += [f"  {image.name} ({name}): {image.reason}" for name, image in images[:NUM_NAMED]]
    if len(images) > NUM_NAMED:
        lines.append(f"  and {len(images) - NUM_NAMED:,} more; {RECORD} names them all")
    return "\n".join(lines)
