"""`vit-scratch export`: images of a dataset as files in a folder a class, as a person looks at them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.decoding import BadImageError, opened
from ..data.examples import Example
from ..data.loading import RowReader
from ..data.splits import Source
from ..errors import UserError
from .command_flags import add_trainers_flags, trainers_options
from .flags import Parser, exit_code
from .recipe import FIELDS
from .scoring import OF_TABLE, SPLITS, open_split

DEFAULT_COUNT = 9
NUM_AT_ONCE = 256  # images in memory
# of Pillow's formats; else the format's own name
ENDINGS = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}


def export(source: Source, split: str, samples: Sequence[int], folder: Path) -> tuple[list[Path], list[str]]:
    """Writes these samples of a split; the files, and in plain words what could not be written.

    An image of one class lies in a folder of the class's name, one whose label is no class's beside those folders, and
    where images have several classes a metadata.jsonl names them: as --train_dir and `predict` read folders. Encoded
    images are written as they are, pixels as PNG. Raises UserError where the folder cannot be written.
    """
    reader, folders = RowReader(source, source.splits[split]), _class_folders(source)
    written, left_out, rows = [], [], []
    try:
        for start in range(0, len(samples), NUM_AT_ONCE):
            chunk = samples[start : start + NUM_AT_ONCE]
            for sample, example in zip(chunk, reader.examples(np.asarray(chunk, dtype=np.int64)), strict=True):
                ids = _class_ids(source, example)
                place = folder / folders[ids[0]] if ids and not source.is_multi_label else folder
                place.mkdir(parents=True, exist_ok=True)
                try:
                    written.append(_write(example, place / f"{split}-{sample:06d}"))
                except BadImageError as error:
                    left_out.append(str(error))
                    continue
                if source.is_multi_label:
                    names = [source.class_names[index] for index in ids]
                    rows.append({"file_name": written[-1].name, "labels": names})
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}.") from error
    return written, left_out


def _class_ids(source: Source, example: Example) -> tuple[int, ...]:
    """The classes of an image; none where its label is no class's, for the Hub hides the labels of some test splits."""
    try:
        return source.class_ids(example.label, example.name)
    except UserError:
        return ()


def _class_folders(source: Source) -> list[str]:
    """A folder's name for each class. Raises UserError where two classes would have the same."""
    names = [name.replace("/", "_").replace("\\", "_").lstrip(".") or "_" for name in source.class_names]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice and not source.is_multi_label:
        raise UserError(f"{source.name} has several classes that would lie in the folder {twice[0]!r}.")
    return names


def _write(example: Example, stem: Path) -> Path:
    with opened(example) as image:
        raw, is_array = example.image, isinstance(example.image, np.ndarray)
        ending = ".png" if is_array else ENDINGS.get(image.format, f".{image.format.lower()}")
        path = stem.with_name(stem.name + ending)
        if is_array:
            image.save(path)
            return path
    path.write_bytes(Path(raw).read_bytes() if isinstance(raw, str) else raw)
    return path


# ---------------------------------------------------------------- the command


def build_parser() -> Parser:
    parser = Parser(
        prog="vit-scratch export",
        description="Writes images of a dataset as files, in a folder for each class: to look at, for predict and "
        "attention, or as --train_dir.",
        allow_abbrev=False,
    )
    parser.add_argument("--dataset_name", required=True, help=FIELDS["dataset_name"].metadata["help"])
    add_trainers_flags(parser, OF_TABLE)
    parser.add_argument("--split", help=f"{', '.join(SPLITS)} [test, else validation]")
    parser.add_argument("--index", metavar="INT,INT", help="the images' places in the split, from 0 on")
    parser.add_argument("--count", metavar="INT", type=int, help=f"or so many from the first on [{DEFAULT_COUNT}]")
    parser.add_argument("--output_dir", metavar="FOLDER", type=Path, required=True, help="new, or empty")
    return parser


def main(arguments: list[str]) -> int:
    """Writes images as the command line says; the exit code."""
    parser = build_parser()
    return exit_code(lambda: _run(parser.parse_args(arguments)))


def _run(own: Any):
    folder = own.output_dir.expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--output_dir {folder} is not empty: name another folder.")
    options = trainers_options(own, ("dataset_name", *OF_TABLE))
    source, split = open_split(options, None, own.split)
    samples = _samples(own, len(source.splits[split]))
    written, left_out = export(source, split, samples, folder)
    for reason in left_out:
        print(f"left out: {reason}")
    for path in written[:DEFAULT_COUNT]:
        print(path)
    more = f", the first {DEFAULT_COUNT} of them above" if len(written) > DEFAULT_COUNT else ""
    print(f"{len(written):,} of {len(source.splits[split]):,} images of {source.name}'s {split} split{more}")


def _samples(own: Any, num_images: int) -> list[int]:
    if own.index is None:
        count = DEFAULT_COUNT if own.count is None else own.count
        if count < 1:
            raise UserError(f"--count must be at least 1, got {count}.")
        return list(range(min(count, num_images)))
    if own.count is not None:
        raise UserError("--index names the images and --count says how many: give one of them.")
    words = own.index.split(",")
    if not all(word.strip().isdecimal() and int(word) < num_images for word in words):
        raise UserError(f"--index takes numbers from 0 to {num_images - 1}, with commas; got {own.index}.")
    return list(dict.fromkeys(map(int, words)))
