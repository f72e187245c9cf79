"""Which images: named datasets, Hub repositories, local folders in their layout, image folders, scikit-learn's digits.

`open_source` finds columns, labels and splits and says, in one line, what it could not decide.
"""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from ..errors import UserError, unknown
from .examples import ArrayExamples, Examples, FolderExamples, ParquetExamples, TableExamples, TarExamples
from .order import hash_holdout, stratified_holdout

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")  # in this order, where features alone do not decide
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class DatasetRow:
    """What is known of a dataset beforehand: where it lies, its columns, and which of its splits serves as ours."""

    repository: str | None = None  # None: comes with scikit-learn
    config_name: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    splits: dict[str, str] = field(default_factory=dict)


DATASETS: dict[str, DatasetRow] = {
    "digits": DatasetRow(),
    "cifar10": DatasetRow("uoft-cs/cifar10", "plain_text", "img", "label", {"train": "train", "test": "test"}),
    "mnist": DatasetRow("ylecun/mnist", "mnist", "image", "label", {"train": "train", "test": "test"}),
    # the Hub's test labels are all -1, so its validation split is our test; ours is held out of the training split
    "imagenet-1k": DatasetRow(
        "ILSVRC/imagenet-1k", None, "image", "label", {"train": "train", "test": "validation"}
    ),
}  # fmt: skip


class Split:
    """The rows of some examples that belong to one split: all of them, or those a mask per shard keeps."""

    def __init__(self, examples: Examples, mask_of_shard: Callable[[int], np.ndarray] | None = None):
        self.examples = examples
        self.mask_of_shard = mask_of_shard
        self.shard_sizes = list(examples.shard_sizes)
        if mask_of_shard is not None:
            self.shard_sizes = [int(mask_of_shard(shard).sum()) for shard in range(len(examples.shard_sizes))]

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def rows(self, shard: int) -> np.ndarray:
        """The rows of this shard that belong to the split, ascending."""
        if self.mask_of_shard is None:
            return np.arange(self.shard_sizes[shard])
        return np.flatnonzero(self.mask_of_shard(shard))


class _FixedMask:
    """A mask over one shard, as a picklable callable."""

    def __init__(self, mask: np.ndarray):
        self.mask = mask

    def __call__(self, shard: int) -> np.ndarray:
        return self.mask


class _HashMask:
    """The mask of rows that hash(seed, shard, row) gives to validation, or, inverted, to training."""

    def __init__(self, shard_sizes: list[int], rate: float, seed: int, inverted: bool):
        self.shard_sizes, self.rate, self.seed, self.inverted = shard_sizes, rate, seed, inverted

    def __call__(self, shard: int) -> np.ndarray:
        return hash_holdout(self.seed, shard, self.shard_sizes[shard], self.rate) ^ self.inverted


@dataclass
class Source:
    """A dataset ready to be ordered and loaded. `class_names` rules every split; `label_ids` maps raw labels to ids."""

    name: str
    splits: dict[str, Split]
    class_names: list[str]
    label_ids: dict[Any, int] | None  # None: labels are the ids already
    streaming: bool
    held_out: bool = False  # the validation split was taken out of the training split
    repository: str | None = None  # on the Hub, where it came from there

    def label_id(self, label: Any, where: str) -> int:
        """The class id of a raw label. Raises UserError, naming the row, for one that is not among the classes."""
        number = self.label_ids.get(label) if self.label_ids is not None else label
        if isinstance(number, (int, np.integer)) and 0 <= number < len(self.class_names):
            return int(number)
        raise UserError(
            f"{where} has the label {label!r}, which is not among the {len(self.class_names)} classes "
            f"({', '.join(self.class_names[:5])}{', ...' if len(self.class_names) > 5 else ''})."
        )

    def label_ids_of(self, split_name: str) -> np.ndarray:
        """The class id of every sample of a split (N,), in the split's own order; reads labels, decodes nothing."""
        split = self.splits[split_name]
        ids = np.array(
            [self.label_id(label, f"{self.name} row {row}") for row, label in enumerate(split.examples.labels())]
        )
        starts = np.cumsum([0, *split.examples.shard_sizes])
        rows = [starts[shard] + split.rows(shard) for shard in range(len(split.shard_sizes))]
        return ids[np.concatenate(rows)]


def open_source(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_dir: str | None = None,
    validation_dir: str | None = None,
    test_dir: str | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    streaming: bool = False,
    train_val_split: float = 0.1,
    seed: int = 0,
) -> Source:
    """The source that the flags of the same names describe. Raises UserError for what cannot be found or decided."""
    if train_dir is not None:
        source = _open_folders(train_dir, validation_dir, test_dir, streaming)
    elif dataset_name == "digits":
        source = _open_digits(streaming)
    else:
        source = _open_table(dataset_name, dataset_config_name, image_column_name, label_column_name, streaming)
    if len(source.class_names) < 2:
        raise UserError(
            f"{source.name} has a single class ({', '.join(source.class_names) or 'none'}); a classifier needs two."
        )
    if not len(source.splits["train"]):
        raise UserError(f"{source.name}: the training split is empty.")
    if "validation" not in source.splits and train_val_split > 0:
        _hold_out(source, train_val_split, seed)
    return source


def _hold_out(source: Source, rate: float, seed: int):
    examples = source.splits["train"].examples
    if source.streaming:
        sizes = list(examples.shard_sizes)
        masks = {name: _HashMask(sizes, rate, seed, inverted=name == "train") for name in ("train", "validation")}
    else:
        held_out = stratified_holdout(source.label_ids_of("train"), rate, seed)
        masks = {"train": _FixedMask(~held_out), "validation": _FixedMask(held_out)}
    splits = {name: Split(examples, mask) for name, mask in masks.items()}
    if len(splits["validation"]) == 0:
        return  # too few images to hold any out
    source.splits.update(splits)
    source.held_out = True


# ---------------------------------------------------------------- scikit-learn's digits


def _open_digits(streaming: bool) -> Source:
    """1,797 handwritten digits of 8 x 8 pixels; 360 of them, stratified and always the same, are the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    splits = {
        name: Split(ArrayExamples(images[rows], digits.target[rows], f"digits {name}"))
        for name, rows in (("train", np.sort(train)), ("test", np.sort(test)))
    }
    return Source("digits", splits, [str(name) for name in digits.target_names], None, streaming)


# ---------------------------------------------------------------- folders of images


def _open_folders(train_dir: str, validation_dir: str | None, test_dir: str | None, streaming: bool) -> Source:
    found = {}
    for name, folder in (("train", train_dir), ("validation", validation_dir), ("test", test_dir)):
        if folder is not None:
            found[name] = _index_folder(folder, f"--{name}_dir")
    class_names = sorted(set(found["train"][1]))
    for name, (_, labels) in found.items():
        strangers = sorted(set(labels) - set(class_names))
        if strangers:
            raise UserError(
                f"The {name} folder has the class {strangers[0]!r}, which the training folder has not "
                f"({', '.join(class_names[:10])}); rename it, or add training images of it."
            )
    splits = {name: Split(FolderExamples(*paths_and_labels)) for name, paths_and_labels in found.items()}
    label_ids = {name: index for index, name in enumerate(class_names)}
    return Source(Path(train_dir).name, splits, class_names, label_ids, streaming)


def _index_folder(folder: str, flag: str) -> tuple[list[str], list[str]]:
    """Paths of the images below `folder`, sorted, and the name of the first folder below it that each lies in."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder.")
    paths, labels = [], []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        for directory, subfolders, files in os.walk(entry.path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            images = sorted(f for f in files if f.lower().endswith(IMAGE_ENDINGS) and not f.startswith("."))
            paths += [os.path.join(directory, name) for name in images]
            labels += [entry.name] * len(images)
    if not paths:
        raise UserError(
            f"{flag} {folder}: there are no images in folders below it; expected {folder}/<class>/<image>.jpg "
            f"(endings: {' '.join(IMAGE_ENDINGS)})."
        )
    return paths, labels


# ---------------------------------------------------------------- Hub repositories, and local folders in their layout


def _open_table(
    dataset_name: str | None,
    config_name: str | None,
    image_column: str | None,
    label_column: str | None,
    streaming: bool,
) -> Source:
    row, location = _locate(dataset_name)
    config_name = config_name or row.config_name
    builder = _load_builder(location, config_name)
    files = {str(split): list(urls) for split, urls in builder.config.data_files.items()}
    kind = type(builder).__module__.rpartition(".")[2]
    if kind.endswith("folder"):
        raise UserError(f"--dataset_name {dataset_name} is a folder of images: name it with --train_dir instead.")
    theirs = {ours: _split_name(ours, row, list(files)) for ours in SPLIT_NAMES}
    if theirs["train"] is None:
        raise UserError(f"{dataset_name} has no training split; it has: {', '.join(files)}.")
    used = {ours: split for ours, split in theirs.items() if split is not None}
    image_column, label_column = image_column or row.image_column, label_column or row.label_column

    if kind == "webdataset" and streaming:
        if image_column or label_column:
            raise UserError(
                f"{dataset_name} is a webdataset: streamed, its images and .cls labels need no column names."
            )
        local = [url for split in used.values() for url in files[split] if not os.path.exists(url)]
        if local:
            raise UserError(f"{dataset_name}: webdataset shards are streamed from a local folder only, not {local[0]}.")
        examples = {ours: TarExamples(files[split]) for ours, split in used.items()}
        columns = ("image", "label")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    elif streaming:
        if kind != "parquet":
            raise UserError(f"{dataset_name} is stored as {kind}; --streaming true reads parquet and webdataset.")
        with _hub_errors(str(dataset_name)):
            features = _parquet_features(files[used["train"]][0])
        columns = find_columns(features, image_column, label_column, dataset_name)
        with _quiet_hub():
            examples = {ours: ParquetExamples(files[split], *columns) for ours, split in used.items()}
    else:
        with _hub_errors(dataset_name), _quiet_hub():
            tables = {ours: datasets.load_dataset(location, config_name, split=s) for ours, s in used.items()}
        features = tables["train"].features
        columns = find_columns(features, image_column, label_column, dataset_name)
        examples = {
            ours: TableExamples(table, *columns, f"{Path(dataset_name).name} {ours}") for ours, table in tables.items()
        }
    class_names, label_ids = _classes(features[columns[1]], examples["train"])
    splits = {ours: Split(found) for ours, found in examples.items()}
    repository = None if os.path.isdir(location) else location
    return Source(str(dataset_name), splits, class_names, label_ids, streaming, repository=repository)


def _locate(dataset_name: str | None) -> tuple[DatasetRow, str]:
    """The row of a name and where `datasets` finds it: a known name, then a local folder, then a Hub repository."""
    if dataset_name in DATASETS:
        return DATASETS[dataset_name], DATASETS[dataset_name].repository
    path = Path(dataset_name or "").expanduser()
    if path.is_dir():
        return DatasetRow(), str(path)
    if str(dataset_name).startswith((".", "/", "~")) or str(dataset_name).count("/") > 1:
        raise UserError(f"--dataset_name {dataset_name}: there is no such folder.")
    if "/" not in str(dataset_name):
        raise UserError(f"{unknown('dataset', dataset_name, DATASETS)} Or a folder, or a Hub repository owner/name.")
    return DatasetRow(), dataset_name


def _split_name(ours: str, row: DatasetRow, available: list[str]) -> str | None:
    # a known row's splits hold as far as they exist: a copy of the dataset may have fewer
    if row.splits:
        return row.splits.get(ours) if row.splits.get(ours) in available else None
    if ours == "train" and len(available) == 1:
        return available[0]
    return next((name for name in SPLIT_NAMES[ours] if name in available), None)


def _parquet_features(url: str) -> datasets.Features:
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open(url, "rb") as file:
        return datasets.Features.from_arrow_schema(pq.read_schema(file))


def find_columns(
    features: datasets.Features, image_column: str | None, label_column: str | None, name: str
) -> tuple[str, str]:
    """The image column and the label column: as named, or the only ones that can be meant.

    Raises UserError listing the columns where a named one is missing or several would do.
    """
    listing = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())
    for flag, column in (("--image_column_name", image_column), ("--label_column_name", label_column)):
        if column is not None and column not in features:
            raise UserError(f"{flag} {column}: {name} has no such column. It has: {listing}.")
    if image_column is None:
        images = [column for column, feature in features.items() if _kind(feature) == "image"]
        if len(images) != 1:
            found = "no image column" if not images else f"several image columns ({', '.join(images)})"
            raise UserError(f"{name} has {found}: name it with --image_column_name. It has: {listing}.")
        image_column = images[0]
    if label_column is None:
        labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(labels) != 1:
            known = [column for column in LABEL_COLUMNS if column in features]
            if not known:
                found = "no label column" if not labels else f"several label columns ({', '.join(labels)})"
                raise UserError(f"{name} has {found}: name it with --label_column_name. It has: {listing}.")
            labels = known
        label_column = labels[0]
    return image_column, label_column


def _kind(feature: Any) -> str:
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return f"{feature.num_classes} classes"
    return getattr(feature, "dtype", type(feature).__name__)


def _classes(feature: Any, examples: Examples) -> tuple[list[str], dict[Any, int] | None]:
    """Class names and the map from raw labels to ids, from the label column's type or else from the labels."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), None
    counts = Counter(examples.labels())
    kinds = {type(label) for label in counts}
    if kinds == {int}:
        if min(counts) < 0:
            raise UserError(f"A training label is {min(counts)}; labels must be 0, 1, 2, ...; name another column.")
        return [str(index) for index in range(max(counts) + 1)], None
    if kinds == {str}:
        names = sorted(counts)
        return names, {name: index for index, name in enumerate(names)}
    raise UserError(
        f"Labels of type {', '.join(sorted(kind.__name__ for kind in kinds))} are not class names or numbers; "
        "name the right column with --label_column_name."
    )


def _load_builder(location: str, config_name: str | None) -> datasets.DatasetBuilder:
    if not os.path.isdir(location) and not _offline():
        with _hub_errors(location), _quiet_hub():
            huggingface_hub.HfApi().dataset_info(location, timeout=30)
    with _hub_errors(location), _quiet_hub():
        return datasets.load_dataset_builder(location, config_name)


def _offline() -> bool:
    return bool(datasets.config.HF_HUB_OFFLINE or huggingface_hub.constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps the Hub client's retry log off the screen: the one line of our own error says it all."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "fsspec", "httpx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turns what `datasets` and the Hub client raise into one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its terms at https://huggingface.co/datasets/{name}, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"No dataset {name!r} on the Hub (or it is private: `hf auth login`).") from error
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            raise UserError(f"No dataset {name!r} on the Hub, or no access to it: {text}") from error
        network = isinstance(error, (ConnectionError, HfHubHTTPError)) or type(error).__module__.startswith("http")
        if network or isinstance(error, TimeoutError):
            raise UserError(
                f"{name} is not on this machine and the Hub cannot be reached. Connect, or give a local copy with "
                "--dataset_name FOLDER, or set HF_HUB_OFFLINE=1 to use what `datasets` has cached."
            ) from error
        raise UserError(f"{name} cannot be loaded: {text}") from error
