"""Encoded images with their labels, by shard and row: in memory, in a table, in parquet or tar shards, in folders.

Every class here answers the same two questions: how many rows has each shard (`shard_sizes`), and what stands in
these rows of that shard (`read`). Nothing is decoded here.
"""

import os
import tarfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow.parquet as pq

from ..errors import UserError
from .remote import is_remote, note, open_shard, retried

Result = TypeVar("Result")

# Encoded bytes of row groups kept per process, so that lanes that read one row group share it (CIFAR-10 and MNIST on
# the Hub are one row group a split: 120 MB and 20 MB).
ROW_GROUP_CACHE_BYTES = 512 * 1024**2
NUM_FOOTERS_AT_ONCE = 16
LONG_SECONDS = 10  # reading footers is announced after this


@dataclass
class Example:
    """One undecoded row: `image` is encoded bytes, a file's path or a uint8 array; `name` is for people."""

    image: bytes | str | np.ndarray
    label: Any
    name: str


class ArrayExamples:
    """Images that are already pixels: uint8 (N, H, W) or (N, H, W, C), with integer labels (N,). One shard."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, name: str):
        self.images, self.label_values, self.name = images, labels, name
        self.shard_sizes = [len(images)]

    def read(self, shard: int, rows: Sequence[int]) -> list[Example]:
        return [Example(self.images[row], int(self.label_values[row]), f"{self.name} row {row}") for row in rows]

    def labels(self) -> list[Any]:
        return self.label_values.tolist()


class FolderExamples:
    """Image files with the labels of their folders or a metadata file. One shard, in the order of the sorted paths."""

    def __init__(self, paths: list[str], labels: list[Any]):
        self.paths, self.label_values = paths, labels
        self.shard_sizes = [len(paths)]

    def read(self, shard: int, rows: Sequence[int]) -> list[Example]:
        return [Example(self.paths[row], self.label_values[row], self.paths[row]) for row in rows]

    def labels(self) -> list[Any]:
        return list(self.label_values)


class TableExamples:
    """A `datasets.Dataset`: memory-mapped, any row at any time. One shard."""

    def __init__(self, table: datasets.Dataset, image_column: str, label_column: str, name: str):
        self.image_column, self.label_column, self.name = image_column, label_column, name
        table = table.select_columns([image_column, label_column])
        self.table = table.cast_column(image_column, datasets.Image(decode=False))
        self.shard_sizes = [len(table)]

    def read(self, shard: int, rows: Sequence[int]) -> list[Example]:
        columns = self.table[list(map(int, rows))]
        pairs = zip(rows, columns[self.image_column], columns[self.label_column], strict=True)
        return [Example(encoded_image(image), label, f"{self.name} row {row}") for row, image, label in pairs]

    def labels(self) -> list[Any]:
        return list(self.table[self.label_column])

    def first_labels(self) -> list[Any]:
        """Some labels."""
        return list(self.table[:100][self.label_column])


def encoded_image(cell: Any) -> bytes | str:
    """The bytes of an image cell of a Hub table (a struct of bytes and path), or its path where it has no bytes."""
    if isinstance(cell, dict):
        return cell["bytes"] if cell.get("bytes") is not None else cell["path"]
    return cell


def read_footer(url: str) -> pq.FileMetaData:
    """What a parquet shard says of itself at its end. Raises UserError for one that is not there or not whole."""
    return _read_parquet(url, "its footer", None, lambda file: file.metadata)


def _read_parquet(
    url: str, what: str, footer: pq.FileMetaData | None, read: Callable[[pq.ParquetFile], Result]
) -> Result:
    """What `read` makes of the shard, opened anew at each try, since a handle that failed may give stale bytes."""

    def once() -> Result:
        with open_shard(url) as handle:
            return read(pq.ParquetFile(handle, metadata=footer))

    try:
        return retried(once, url)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"Shard {url} is no longer there. Put it back and start the same command again: a run goes on from its "
            "last checkpoint."
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"Shard {url}: {what} cannot be read as parquet: {reason}. Fetch it again.") from error


def read_footers(urls: list[str]) -> list[pq.FileMetaData]:
    """The footers of shards in their order: remote ones several at a time, and said where it takes long."""
    footers = [read_footer(urls[0])] if urls else []  # alone: where the Hub is out of reach, one line says so
    with ThreadPoolExecutor(NUM_FOOTERS_AT_ONCE if any(map(is_remote, urls)) else 1) as pool:
        waiting = [pool.submit(read_footer, url) for url in urls[1:]]
        started, is_said = time.monotonic(), False
        try:
            for future in waiting:
                footers.append(future.result())
                if not is_said and time.monotonic() - started > LONG_SECONDS:
                    note(f"Reading how many rows each of {len(urls)} shards has: {len(footers)} are done.")
                    is_said = True
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return footers


class ParquetExamples:
    """Parquet shards, local or on the Hub, read by row group without decoding.

    pyarrow reads them rather than `datasets.IterableDataset`, whose shuffle buffer loses and repeats rows on resume
    (datasets issue 7901) and which cannot start in the middle of a shard. No file stays open between reads: the
    footers are kept, so that opening one again costs the Hub no request, and a read-ahead buffer is as large as its
    row group. Raises UserError, naming the shard, for what cannot be read.
    """

    def __init__(self, urls: list[str], image_column: str, label_column: str):
        self.urls, self.image_column, self.label_column = urls, image_column, label_column
        self._forget_rows()
        self.footers = read_footers(urls)
        self.row_group_ends = []
        for footer in self.footers:
            sizes = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
            self.row_group_ends.append(np.cumsum(sizes, dtype=np.int64))
        self.shard_sizes = [int(ends[-1]) if len(ends) else 0 for ends in self.row_group_ends]

    def _forget_rows(self):
        self._process = os.getpid()
        self._cache: OrderedDict[tuple[int, int], tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_process", "_cache", "_lock")  # a worker reads its own
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state)
        self._forget_rows()

    def _row_group(self, shard: int, group: int) -> tuple[Any, Any]:
        key = (shard, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        names = [self.image_column, self.label_column]
        table = _read_parquet(
            self.urls[shard],
            f"row group {group}",
            self.footers[shard],
            lambda file: file.read_row_group(group, columns=names),
        )
        columns = table.column(self.image_column), table.column(self.label_column)
        self._cache[key] = columns
        while len(self._cache) > 1 and sum(c.nbytes for c, _ in self._cache.values()) > ROW_GROUP_CACHE_BYTES:
            self._cache.popitem(last=False)
        return columns

    def read(self, shard: int, rows: Sequence[int]) -> list[Example]:
        if self._process != os.getpid():
            self._forget_rows()  # a forked worker may have been given a lock that is held
        rows = np.asarray(rows, dtype=np.int64)
        ends = self.row_group_ends[shard]
        groups = np.searchsorted(ends, rows, side="right")
        examples: list[Example] = []
        url = self.urls[shard]
        with self._lock:
            for group in np.unique(groups):  # rows come in ascending order
                wanted = rows[groups == group]
                start = int(ends[group - 1]) if group else 0
                images, labels = self._row_group(shard, int(group))
                taken = wanted - start
                pairs = zip(wanted, images.take(taken).to_pylist(), labels.take(taken).to_pylist(), strict=True)
                examples += [Example(encoded_image(image), label, f"{url} row {row}") for row, image, label in pairs]
        return examples

    def labels(self) -> list[Any]:
        """Every label in shard order: reads the label column alone."""
        labels: list[Any] = []
        for url, footer in zip(self.urls, self.footers, strict=True):
            table = _read_parquet(url, "its labels", footer, lambda file: file.read(columns=[self.label_column]))
            labels += table.column(0).to_pylist()
        return labels

    def first_labels(self) -> list[Any]:
        """Some labels, those of one row group, which cost one look at a shard that may be far away."""
        shard = next(index for index, size in enumerate(self.shard_sizes) if size)
        read = lambda file: file.read_row_group(0, columns=[self.label_column])  # noqa: E731
        return _read_parquet(self.urls[shard], "its labels", self.footers[shard], read).column(0).to_pylist()


class TarExamples:
    """WebDataset shards on this machine: tar files whose members `key.jpg` and `key.cls` make an example.

    The headers are read once, so that any row can be reached. Raises UserError for a truncated archive and for a key
    that lacks its image or its label.
    """

    LABEL_ENDINGS = ("cls", "txt", "label")
    IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "gif", "tif", "tiff")

    def __init__(self, paths: list[str]):
        self.paths = paths
        self.index = [self._read_index(path) for path in paths]
        self.shard_sizes = [len(rows) for rows in self.index]

    def _read_index(self, path: str) -> list[tuple[str, int, int, int, int]]:
        members: dict[str, dict[str, tuple[int, int]]] = {}
        size = os.path.getsize(path)
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    folder, _, file_name = member.name.rpartition("/")
                    stem, _, ending = file_name.partition(".")
                    if not member.isfile() or not stem:
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"{member.name} ends past the end of the file")
                    key = f"{folder}/{stem}" if folder else stem
                    members.setdefault(key, {})[ending.lower()] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"Shard {path} is not a whole tar archive: {error}. Fetch it again.") from error
        rows = []
        for key, parts in members.items():
            image = next((parts[ending] for ending in self.IMAGE_ENDINGS if ending in parts), None)
            label = next((parts[ending] for ending in self.LABEL_ENDINGS if ending in parts), None)
            if image is None or label is None:
                missing = "image" if image is None else "label (.cls)"
                raise UserError(f"Shard {path}: example {key!r} has no {missing}, only {', '.join(sorted(parts))}.")
            rows.append((key, *image, *label))
        return rows

    def read(self, shard: int, rows: Sequence[int]) -> list[Example]:
        examples = []
        with open(self.paths[shard], "rb") as file:
            for row in rows:
                key, image_start, image_size, label_start, label_size = self.index[shard][row]
                file.seek(image_start)
                image = file.read(image_size)
                file.seek(label_start)
                text = file.read(label_size).decode("utf-8", "replace").strip()
                label = int(text) if text.lstrip("-").isdigit() else text
                examples.append(Example(image, label, f"{self.paths[shard]} {key}"))
        return examples

    def labels(self) -> list[Any]:
        return [
            example.label for shard, size in enumerate(self.shard_sizes) for example in self.read(shard, range(size))
        ]


Examples = ArrayExamples | FolderExamples | TableExamples | ParquetExamples | TarExamples
