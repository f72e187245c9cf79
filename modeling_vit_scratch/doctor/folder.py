"""What is wrong with a set of images: every image is looked at once, and each check says what it found."""

import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..data.decoding import UPRIGHT, BadImageError, opened, orientation_of, upright
from ..data.examples import Example
from ..data.listing import shown, some
from ..data.scan import BadImage, ImageFacts, Scan, blocks_of
from ..data.splits import Source
from ..errors import UserError, unknown
from ..image_processing_vit_scratch import pil_to_channels
from .findings import Finding, NotApplicable, Verdict

NUM_NAMED = 5  # images, or groups of them, in a finding
FEWEST_IMAGES = 10  # of a class in training
MOST_UNEVEN = 3.0  # images of the largest class for one of the smallest
MOST_ELONGATED = 3.0  # of a central crop of such an image, two thirds are never seen
# what becomes of pictures that are not plain RGB; those of one kind, if it is plain, are as they were meant
PLAIN = ("RGB", "grey", "palette")
BECOMES = {
    "grey": "grey is repeated to three channels among RGB",
    "palette": "palettes become the colours they stand for",
    "transparent": "transparency is dropped, the colour stored below it shows",
    "CMYK": "CMYK is converted without its colour profile",
    "16 bit": "of 16 bits the upper 8 are kept, a dark image turns black",
    "fractions": "of fractions those from 0 to 255 are kept",
}


# ---------------------------------------------------------------- looking


@dataclass(frozen=True)
class Looked(ImageFacts):
    """More of a readable image: its kind of picture, whether its EXIF turns it, and a digest of its upright RGB pixels,
    which are equal where two files show the same, whatever their format."""

    kind: str
    is_turned: bool
    digest: bytes


@dataclass(frozen=True)
class Seen:
    """A readable image: its split, name and classes, and what it is."""

    split: str
    name: str
    classes: tuple[str, ...]
    is_known: bool  # its label is one of a class, or of none where an image may have none
    facts: Looked


@dataclass
class Images:
    """Every image of a source, looked at once. strangers: what is wrong with labels of no class."""

    source: Source
    scans: dict[str, Scan] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[BadImage]:
        return [image for scan in self.scans.values() for image in scan.bad]

    @property
    def num_images(self) -> int:
        return sum(scan.num_images for scan in self.scans.values())

    def counts(self, split: str) -> dict[str, int]:
        """How many readable images of the split each class has, in the order of the classes."""
        counted = Counter(name for image in self.seen if image.split == split for name in image.classes)
        return {name: counted[name] for name in self.source.class_names}

    def copies(self) -> list[list[Seen]]:
        """Groups of images whose pixels are the same, in the order of their first."""
        groups: dict[bytes, list[Seen]] = defaultdict(list)
        for image in self.seen:
            groups[image.facts.digest].append(image)
        return [group for group in groups.values() if len(group) > 1]

    def shorter_sides(self) -> list[int]:
        return [min(image.facts.size) for image in self.seen]

    def elongations(self) -> list[float]:
        """The longer side over the shorter one."""
        return [max(image.facts.size) / min(image.facts.size) for image in self.seen]


def look_closer(example: Example) -> Looked | BadImageError:
    """What data.scan's look_at says of an image, which is broken for both or for none, and more; decoded once."""
    try:
        with opened(example) as image:
            mode, format_name, is_turned = image.mode, image.format, orientation_of(image) in UPRIGHT
            picture = upright(image)
            pixels = pil_to_channels(picture, 3)
            digest = hashlib.blake2b(repr(pixels.size).encode() + pixels.tobytes(), digest_size=16).digest()
            kind, is_animated = kind_of(picture), False
            with contextlib.suppress(Exception):  # asks for a second frame, which may be what is broken
                is_animated = bool(getattr(image, "is_animated", False))
            return Looked(mode, format_name, picture.size, is_animated, kind, is_turned, digest)
    except BadImageError as error:
        return error


def kind_of(image: Image.Image) -> str:
    """RGB, grey, or what else the decoded picture is; transparent only where some pixel is."""
    if image.has_transparency_data:
        if image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            return "transparent"
        return {"LA": "grey", "L": "grey", "P": "palette", "PA": "palette"}.get(image.mode, "RGB")
    if image.mode.startswith("I"):
        return "16 bit"
    return {"L": "grey", "1": "grey", "P": "palette", "F": "fractions"}.get(image.mode, image.mode)


def look_at_all(source: Source, num_threads: int) -> Images:
    """Every image of every split, each read and decoded once. Raises UserError where the data cannot be read."""
    images = Images(source)
    bar = tqdm(total=sum(map(len, source.splits.values())), unit="image", leave=False, disable=None)
    with bar:
        for name, split in source.splits.items():
            scan = images.scans[name] = Scan()
            for block in blocks_of(split, num_threads, look_closer):
                for shard, row, example, look in block:
                    scan.add(shard, row, example, look)
                    classes = _classes(images, example)
                    if isinstance(look, Looked):
                        images.seen.append(Seen(name, example.name, classes or (), classes is not None, look))
                bar.update(len(block))
    return images


def _classes(images: Images, example: Example) -> tuple[str, ...] | None:
    """The names of its classes; None, and a line among the strangers, for a label of no class."""
    source = images.source
    try:
        ids = source.class_ids(example.label, example.name)
    except UserError as error:
        images.strangers.append(str(error))
        return None
    return tuple(source.class_names[index] for index in ids)


# ---------------------------------------------------------------- checks


def readable_images(images: Images) -> Verdict:
    """Every file can be decoded whole."""
    bad = images.bad
    reasons = (f"{shown(image.name)} ({image.reason})" for image in bad)
    return Verdict(
        not bad,
        f"{len(bad):,} of {images.num_images:,} cannot be read",
        "none",
        some(reasons, NUM_NAMED),
        "replace or remove them, or train with --bad_images skip, which leaves them out and names them",
    )


def known_labels(images: Images) -> Verdict:
    """Every label is one of the classes of training."""
    return Verdict(
        not images.strangers,
        f"{len(images.strangers):,} with a label of no class",
        "none",
        some((text.rstrip(".") for text in images.strangers), NUM_NAMED),
        "mend the labels, or leave out the split: some test splits on the Hub have -1 for what is kept secret",
    )


def every_class_in_every_split(images: Images) -> Verdict:
    """No class lacks images in a split."""
    absent = {
        split: [repr(name) for name, count in images.counts(split).items() if not count] for split in images.scans
    }
    absent = {split: names for split, names in absent.items() if names}
    return Verdict(
        not absent,
        f"{sum(map(len, absent.values()))} of {len(images.source.class_names)} x {len(images.scans)} are empty",
        "none",
        "; ".join(f"{split} has no readable images of {some(names, NUM_NAMED)}" for split, names in absent.items()),
        "add images of them, or remove the class: one without training images is never answered, one without test "
        "images never scored",
    )


def enough_images(images: Images) -> Verdict:
    """Each class that has training images has some to learn from."""
    counts = {name: count for name, count in images.counts("train").items() if count}
    few = sorted((name for name in counts if counts[name] < FEWEST_IMAGES), key=counts.get)
    return Verdict(
        not few,
        f"{min(counts.values(), default=0):,} training images of the smallest class",
        f"at least {FEWEST_IMAGES}",
        some((f"{name!r} {counts[name]}" for name in few), NUM_NAMED),
        "gather more, merge classes, or train only the head of a pretrained checkpoint (--finetune head)",
    )


def even_classes(images: Images) -> Verdict:
    """No class has far more training images than another."""
    counts = {name: count for name, count in images.counts("train").items() if count}
    if len(counts) < 2:
        raise NotApplicable("fewer than two classes have training images")
    largest, smallest = max(counts, key=counts.get), min(counts, key=counts.get)
    ratio = counts[largest] / counts[smallest]
    remedy = "train with --class_weights balanced or --balanced_sampler, and judge by the recall of each class"
    return Verdict(
        ratio <= MOST_UNEVEN,
        f"largest / smallest = {ratio:.1f}",
        f"at most {MOST_UNEVEN:g}",
        f"{largest!r} has {counts[largest]:,} training images, {smallest!r} {counts[smallest]:,}: answers lean to the "
        "large classes",
        "gather more images of the small classes" if images.source.is_multi_label else remedy,
    )


def smallest_side(images: Images) -> float:
    """Below this shorter side an image is tiny beside the others: a quarter of their median, within 32 and 224 pixels,
    but never more than half of it, since a set may be of small images."""
    middle = median(images.shorter_sides())
    return min(max(32, middle / 4), 224, middle / 2)


def large_enough(images: Images) -> Verdict:
    """No image is tiny beside the others."""
    _require_readable(images)
    least = smallest_side(images)
    tiny = sorted((image for image in images.seen if min(image.facts.size) < least), key=lambda i: min(i.facts.size))
    return Verdict(
        not tiny,
        f"{len(tiny):,} with a side below {least:g} pixels, the smallest {min(images.shorter_sides())}",
        "none",
        some((f"{shown(image.name)} ({image.facts.size[0]} x {image.facts.size[1]})" for image in tiny), NUM_NAMED),
        "look at them: thumbnails and icons are blurs once they are enlarged; fetch the originals or remove them",
    )


def proportions(images: Images) -> Verdict:
    """No image is so long that the central square shows little of it."""
    _require_readable(images)
    pairs = zip(images.seen, images.elongations(), strict=True)
    long = sorted((pair for pair in pairs if pair[1] > MOST_ELONGATED), key=lambda pair: -pair[1])
    return Verdict(
        not long,
        f"longer / shorter side is {max(images.elongations()):.2f} at most",
        f"at most {MOST_ELONGATED:g}",
        f"{len(long):,} of them: "
        + some((f"{shown(i.name)} ({i.facts.size[0]} x {i.facts.size[1]})" for i, _ in long), NUM_NAMED),
        "cut or pad them: evaluation sees the central square only, or squashes the whole where a checkpoint does so",
    )


def one_kind_of_picture(images: Images) -> Verdict:
    """All are RGB, or all grey, so that nothing is converted."""
    _require_readable(images)
    kinds = Counter(image.facts.kind for image in images.seen)
    common, _ = kinds.most_common(1)[0]
    odd = [kind for kind in kinds if kind != common or kind not in PLAIN]
    examples = {image.facts.kind: image for image in reversed(images.seen)}  # the first of each
    return Verdict(
        not odd,
        ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common()),
        "one plain kind",
        "; ".join(f"{BECOMES.get(kind, f'{kind} becomes RGB')} ({shown(examples[kind].name)})" for kind in odd),
        "all are read as said; convert them yourself where that is not what they mean, and see that no class can be "
        "told by its kind of picture",
    )


def no_copies(images: Images) -> Verdict:
    """No picture is twice in a split under the same label."""
    groups = []
    for copies in images.copies():
        places: dict[Any, list[Seen]] = defaultdict(list)
        for image in copies:
            places[image.split, image.classes].append(image)
        groups += [group for group in places.values() if len(group) > 1]
    return Verdict(
        not groups,
        f"{sum(len(group) - 1 for group in groups):,} copies of {len(groups):,} images",
        "none",
        _named(groups),
        "keep one of each: copies count double, and one may be held out for validation while the other trains",
    )


def no_leaks(images: Images) -> Verdict:
    """No picture of one split is in another."""
    if len(images.scans) < 2:
        raise NotApplicable("there is one split")
    groups = [group for group in images.copies() if len({image.split for image in group}) > 1]
    return Verdict(
        not groups,
        f"{len(groups):,} in several splits",
        "none",
        _named(groups),
        "remove them from training, or the scores are those of images that were learned by heart",
    )


def one_label_each(images: Images) -> Verdict:
    """No picture has two labels. Labels of no class are known_labels' to name."""
    groups = [group for group in images.copies() if len({image.classes for image in group if image.is_known}) > 1]
    return Verdict(
        not groups,
        f"{len(groups):,} with copies under other labels",
        "none",
        _named(groups),
        "decide which label is right, and remove the other copy",
    )


def _require_readable(images: Images):
    if not images.seen:
        raise NotApplicable("no image can be read")


def _named(groups: Iterable[list[Seen]]) -> str:
    texts = [
        " = ".join(f"{shown(image.name)} ({image.split}: {', '.join(image.classes) or 'none'})" for image in group)
        for group in groups
    ]
    return "; ".join(texts[:NUM_NAMED]) + (f"; and {len(texts) - NUM_NAMED:,} more" if len(texts) > NUM_NAMED else "")


CHECKS: dict[str, Callable[[Images], Verdict]] = {
    "readable_images": readable_images,
    "known_labels": known_labels,
    "every_class_in_every_split": every_class_in_every_split,
    "enough_images": enough_images,
    "even_classes": even_classes,
    "large_enough": large_enough,
    "proportions": proportions,
    "one_kind_of_picture": one_kind_of_picture,
    "no_copies": no_copies,
    "no_leaks": no_leaks,
    "one_label_each": one_label_each,
}


def examine_images(source: Source, skip: Collection[str] = (), num_threads: int = 1) -> tuple[Images, list[Finding]]:
    """What every image of a source is, and the findings of every check on them, in the order of CHECKS.

    skip: checks whose failing is meant. num_threads: that decode. Raises UserError for names that are no checks, before
    it looks, and where the data cannot be read.
    """
    for name in skip:
        if name not in CHECKS:
            raise unknown("check of images", name, CHECKS)
    images = look_at_all(source, num_threads)
    return images, [_finding(name, images, name in skip) for name in CHECKS]


def _finding(name: str, images: Images, is_skipped: bool) -> Finding:
    if is_skipped:
        return Finding(name, None, "not applicable: skipped on request")
    try:
        verdict = CHECKS[name](images)
    except NotApplicable as reason:
        return Finding(name, None, f"not applicable: {reason}")
    if verdict.passed:
        verdict = verdict._replace(cause="", remedy="")
    return Finding(name, *verdict)
