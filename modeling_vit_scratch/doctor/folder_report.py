"""The report on a set of images: counts and sizes, findings, and a command line to train with."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from ..data.listing import some
from ..results.record import printable
from ..results.text_table import text_table
from ..training.bad_images import enough_for
from ..training.recipe import Recipe
from ..training.recipes import RECIPES
from .findings import Finding, report
from .folder import Images

MOST_CLASSES_LISTED = 40
FEW_IMAGES = 10_000  # photographs; with fewer, a pretrained network is ahead of one that is trained from nothing
SMALL_SIDE = 64  # pixels; the recipe `folder` trains at this size
IMAGES_SEEN = 300_000  # in training from nothing, over all epochs
CHECKPOINT = "google/vit-base-patch16-224-in21k"


def facts_of(images: Images) -> dict[str, Any]:
    """Counts by split and class, and what the readable images are; sides in pixels."""
    seen = [image.facts for image in images.seen]
    sides = {
        "width": [facts.size[0] for facts in seen],
        "height": [facts.size[1] for facts in seen],
        "shorter_side": images.shorter_sides(),
        "elongation": [round(value, 3) for value in images.elongations()],
    }
    return {
        "num_images": {split: scan.num_images for split, scan in images.scans.items()},
        "num_unreadable": {split: len(scan.bad) for split, scan in images.scans.items()},
        "classes": {split: images.counts(split) for split in images.scans},
        **{name: dict(zip(("min", "median", "max"), _three(values))) for name, values in sides.items() if values},
        "kinds": dict(Counter(facts.kind for facts in seen).most_common()),
        "formats": dict(Counter(facts.format or "pixels" for facts in seen).most_common()),
        "num_turned_by_exif": sum(facts.is_turned for facts in seen),
        "num_with_more_frames": sum(facts.is_animated for facts in seen),
    }


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), median(values), max(values)


def facts_text(facts: dict[str, Any]) -> str:
    """The counts as a table, and a line each on sizes and kinds."""
    splits = list(facts["classes"])
    names = list(facts["classes"][splits[0]])
    shown = sorted(names, key=lambda name: facts["classes"][splits[0]][name])[:MOST_CLASSES_LISTED]
    rows = [["class", *splits]]
    for name in names if len(names) <= MOST_CLASSES_LISTED else shown:
        rows.append([printable(name), *(f"{facts['classes'][split][name]:,}" for split in splits)])
    if len(names) > MOST_CLASSES_LISTED:
        rows.append([f"and {len(names) - len(shown):,} larger classes", *("" for _ in splits)])
    rows.append(["unreadable", *(f"{facts['num_unreadable'][split]:,}" for split in splits)])
    rows.append(["images", *(f"{facts['num_images'][split]:,}" for split in splits)])
    lines = [text_table(rows), ""]
    if "width" in facts:
        sizes = [("pixels", "min", "median", "max")]
        for name in ("width", "height", "shorter_side", "elongation"):
            sizes.append((name.replace("_", " "), *(f"{value:g}" for value in facts[name].values())))
        lines += [text_table(sizes), ""]
    kinds = (f"{name} {count:,}" for part in ("formats", "kinds") for name, count in facts[part].items())
    lines.append(
        f"{some(kinds, 12)}; turned by EXIF {facts['num_turned_by_exif']:,}; with more frames than the first "
        f"{facts['num_with_more_frames']:,}"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------- a command to train with


def suggestion(images: Images, findings: Sequence[Finding], data_flags: Sequence[str]) -> tuple[list[str], str]:
    """(flags of `vit-scratch train` for these images, why). data_flags: those that name the images."""
    failed = {finding.check for finding in findings if finding.passed is False}
    flags, reason = _length_and_size(images, data_flags)
    if images.bad:
        flags += ["--bad_images", "skip"]
        share = max(len(scan.bad) / scan.num_images for scan in images.scans.values() if scan.num_images)
        if share > Recipe.max_bad_images:
            flags += ["--max_bad_images", f"{enough_for(share):g}"]
    if "even_classes" in failed:
        flags += ["--class_weights", "balanced"]
    return flags, reason


def _length_and_size(images: Images, data_flags: Sequence[str]) -> tuple[list[str], str]:
    name = data_flags[1] if list(data_flags[:1]) == ["--dataset_name"] else None
    if name in RECIPES and RECIPES[name].dataset_name == name:
        return ["--recipe", name, *data_flags[2:]], "this set has a recipe of its own"
    count = sum(image.split == "train" for image in images.seen)
    side = median(images.shorter_sides())
    batch = ["--train_batch_size", str(_batch_size(count))]
    if count < FEW_IMAGES and side >= SMALL_SIDE:
        flags = ["--recipe", "finetune", *data_flags, "--model_name_or_path", CHECKPOINT, "--finetune", "head", *batch]
        return flags, f"{count:,} training images are few: a pretrained network needs to learn its head alone"
    image_size, patch_size = _sizes(int(side))
    epochs = min(100, max(10, round(IMAGES_SEEN / max(count, 1))))
    flags = ["--recipe", "folder", *data_flags, "--image_size", str(image_size)]
    flags += ["--config_overrides", f"patch_size={patch_size}", *batch, "--num_train_epochs", str(epochs)]
    kind = "the images are small" if side < SMALL_SIDE else f"{count:,} training images are enough"
    return flags, f"{kind}: a small network is trained from nothing; {image_size} pixels are quick, try more"


def _batch_size(count: int) -> int:
    """A power of two, so that an epoch has eight steps at least, from 8 to 64; 128 for many images."""
    return 128 if count >= FEW_IMAGES else min(64, max(8, 1 << max(count // 8, 1).bit_length() - 1))


def _sizes(side: int) -> tuple[int, int]:
    """(image size, patch size): eight patches or so along the side, which is the images' own up to SMALL_SIDE."""
    image_size = min(max(side, 8), SMALL_SIDE)
    image_size -= image_size % 4 if image_size > 8 else 0
    return image_size, max(2, image_size // 8 if image_size % 8 == 0 else 4)


# ---------------------------------------------------------------- as text


def as_table(images: Images, findings: Sequence[Finding], data_flags: Sequence[str]) -> str:
    """Notes, counts, findings and the command, for people."""
    parts = [f"note: {printable(note)}" for note in images.source.notes]
    parts += ["", facts_text(facts_of(images)), "", report(list(findings))]
    if images.seen:
        flags, reason = suggestion(images, findings, data_flags)
        parts += ["", f"train, for example ({reason}):", f"  vit-scratch train {shlex.join(flags)}"]
    return "\n".join(parts).lstrip("\n")


def as_json(images: Images, findings: Sequence[Finding], data_flags: Sequence[str]) -> str:
    """The same as an object; with every unreadable image and every group of copies by name."""
    command = None
    if images.seen:
        command = ["vit-scratch", "train", *suggestion(images, findings, data_flags)[0]]
    copies = [
        [{"name": image.name, "split": image.split, "classes": list(image.classes)} for image in group]
        for group in images.copies()
    ]
    content = {
        "notes": images.source.notes,
        "facts": facts_of(images),
        "findings": [asdict(finding) for finding in findings],
        "unreadable": [{"name": image.name, "reason": image.reason} for image in images.bad],
        "copies": copies,
        "command": command,
    }
    return json.dumps(content, indent=1)
