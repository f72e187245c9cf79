"""Every image of a split looked at once: which cannot be read, and what kinds of pictures there are.

This is the one place that decides which images are broken; what is left out of a split is left out by its mask, so
that order, epochs, lanes, counts and resume see a split that never had these rows.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from .decoding import BadImageError, opened, upright
from .examples import Example
from .splits import Split

BLOCK = 256  # examples read at once: no more than these are held, whatever the size of the split


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read: its row in a shard (of all rows there, not of the split's), its name, and why."""

    shard: int
    row: int
    name: str
    reason: str


@dataclass(frozen=True)
class ImageFacts:
    """What a readable image is: PIL's mode and format (None: it was pixels already), (width, height) upright, and
    whether it has more frames or pages than the first, which is the one that counts."""

    mode: str
    format: str | None
    size: tuple[int, int]
    is_animated: bool


@dataclass
class Scan:
    """What was seen of a split so far: the bad images, and of the readable ones how many of each kind and label.

    smallest, largest: (width, height) of those with the fewest and the most pixels; None where none was readable.
    labels, bad_labels: raw labels of the readable and of the bad images; each of several labels of an image counts.
    """

    num_images: int = 0  # looked at, bad ones included
    bad: list[BadImage] = field(default_factory=list)
    kinds: Counter[tuple[str, str | None]] = field(default_factory=Counter)  # (mode, format)
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    num_animated: int = 0
    labels: Counter[Any] = field(default_factory=Counter)
    bad_labels: Counter[Any] = field(default_factory=Counter)

    def add(self, shard: int, row: int, example: Example, seen: ImageFacts | BadImageError):
        self.num_images += 1
        parts = example.label if isinstance(example.label, (list, tuple, np.ndarray)) else [example.label]
        if isinstance(seen, BadImageError):
            self.bad.append(BadImage(shard, row, seen.name, seen.reason))
            self.bad_labels.update(parts)
            return
        self.labels.update(parts)
        self.kinds[seen.mode, seen.format] += 1
        self.num_animated += seen.is_animated
        pixels = seen.size[0] * seen.size[1]
        if self.smallest is None or pixels < self.smallest[0] * self.smallest[1]:
            self.smallest = seen.size
        if self.largest is None or pixels > self.largest[0] * self.largest[1]:
            self.largest = seen.size


def look_at(example: Example) -> ImageFacts | BadImageError:
    """What the example's image is, decoded whole; the error where it cannot be."""
    try:
        with opened(example) as image:
            mode, kind = image.mode, image.format
            size = upright(image).size
            is_animated = False
            with contextlib.suppress(Exception):  # asks for a second frame, which may be what is broken
                is_animated = bool(getattr(image, "is_animated", False))
            return ImageFacts(mode, kind, size, is_animated)
    except BadImageError as error:
        return error


def blocks_of(
    split: Split, num_threads: int, look: Callable[[Example], ImageFacts | BadImageError]
) -> Iterator[list[tuple[int, int, Example, ImageFacts | BadImageError]]]:
    """(shard, row, example, what `look` says of it) of every image, in blocks.

    Raises UserError where fewer rows come than a shard has, for a shard that cannot be read, and for a disk that fails.
    """
    with ThreadPoolExecutor(num_threads) as pool:  # PIL releases the interpreter while it decodes
        for shard in range(len(split.shard_sizes)):
            rows = split.rows(shard)
            for start in range(0, len(rows), BLOCK):
                block = rows[start : start + BLOCK]
                examples = split.examples.read(shard, block)
                if len(examples) != len(block):
                    raise UserError(
                        f"Expected {len(block)} rows of shard {shard} from row {block[0]} on, got {len(examples)}; "
                        "fetch the data again."
                    )
                looks = pool.map(look, examples)
                rows_and_looks = zip(block.tolist(), examples, looks, strict=True)
                yield [(shard, row, example, seen) for row, example, seen in rows_and_looks]


def scan_steps(split: Split, num_threads: int) -> Iterator[Scan]:
    """The scan as it grows, once a block of images; the last is of the whole split. Errors as of blocks_of."""
    scan = Scan()
    for block in blocks_of(split, num_threads, look_at):
        for seen in block:
            scan.add(*seen)
        yield scan
    if scan.num_images != len(split):
        raise UserError(f"Expected {len(split):,} images, looked at {scan.num_images:,}; fetch the data again.")
    if not scan.num_images:
        yield scan


def scan_split(split: Split, num_threads: int, say: Callable[[Scan], None] = lambda scan: None) -> Scan:
    """What every image of the split is, or why it cannot be read. `say` is called after each block. Errors as above."""
    scan = Scan()
    for scan in scan_steps(split, num_threads):
        say(scan)
    return scan


# ---------------------------------------------------------------- leaving them out


class WithoutRows:
    """The mask of a split without some rows of its shards, as a picklable callable."""

    def __init__(self, split: Split, rows_of_shard: dict[int, list[int]]):
        self.shard_sizes, self.mask_of_shard = list(split.examples.shard_sizes), split.mask_of_shard
        self.rows_of_shard = rows_of_shard

    def __call__(self, shard: int) -> np.ndarray:
        if self.mask_of_shard is None:
            mask = np.ones(self.shard_sizes[shard], dtype=bool)
        else:
            mask = self.mask_of_shard(shard).copy()
        mask[self.rows_of_shard.get(shard, [])] = False
        return mask


def without_bad(split: Split, bad: list[BadImage]) -> Split:
    """The split without these rows; the split itself where there are none."""
    if not bad:
        return split
    rows_of_shard: dict[int, list[int]] = {}
    for image in bad:
        rows_of_shard.setdefault(image.shard, []).append(image.row)
    return Split(split.examples, WithoutRows(split, rows_of_shard))
