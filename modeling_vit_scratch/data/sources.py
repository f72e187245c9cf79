"""Which images: named datasets, Hub repositories, local folders in their layout, image folders, scikit-learn's digits.

`open_source` finds columns, labels and splits and says, in one line, what it could not decide.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..errors import UserError, quiet_hub, unknown
from .examples import ArrayExamples, Examples, ParquetExamples, TableExamples, TarExamples, read_footer
from .folders import SPLIT_NAMES, open_folders
from .labels import classes_of
from .remote import hub_errors, load_builder, note
from .splits import Source, Split, hold_out, limit_samples

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")  # in this order, where features alone do not decide
LISTS = (datasets.List, datasets.LargeList)  # column types of several labels an image


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


EMPTY = "The {} split is empty: it is left out."


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
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    needs_training: bool = True,
    train_split_name: str | None = None,
    validation_split_name: str | None = None,
    test_split_name: str | None = None,
) -> Source:
    """The source that the flags of the same names describe. Raises UserError for what cannot be found or decided.

    needs_training: whether a dataset without a training split is refused; else all of its splits tell the classes.
    """
    if train_dir is not None:
        given = {"train": train_dir, "validation": validation_dir, "test": test_dir}
        source = _open_folders(given, label_column_name, streaming)
    elif dataset_name == "digits":
        source = _open_digits(streaming)
    else:
        source = _open_table(
            dataset_name, dataset_config_name, image_column_name, label_column_name, streaming, needs_training,
            {"train": train_split_name, "validation": validation_split_name, "test": test_split_name},
        )  # fmt: skip
    if len(source.class_names) < 2 and needs_training:
        raise UserError(
            f"{source.name} has a single class ({', '.join(source.class_names) or 'none'}); a classifier needs two."
        )
    if "train" not in source.splits:
        return source
    if not len(source.splits["train"]):
        raise UserError(f"{source.name}: the training split is empty.")
    hold_out(source, train_val_split, seed)
    limit_samples(source, max_train_samples, max_eval_samples, seed)
    return source


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


def _open_folders(given: dict[str, str | None], label_column: str | None, streaming: bool) -> Source:
    found = open_folders(given, label_column)
    splits = {name: Split(examples) for name, examples in found.examples.items()}
    name = Path(str(given["train"])).name
    return Source(
        name, splits, found.class_names, found.label_ids, streaming,
        is_multi_label=found.is_multi_label, notes=found.notes,
    )  # fmt: skip


# ---------------------------------------------------------------- Hub repositories, and local folders in their layout


def _open_table(
    dataset_name: str | None,
    config_name: str | None,
    image_column: str | None,
    label_column: str | None,
    streaming: bool,
    needs_training: bool,
    split_names: dict[str, str | None],
) -> Source:
    row, location = _locate(dataset_name)
    config_name = config_name or row.config_name
    builder = load_builder(location, config_name)
    files = {str(split): list(urls) for split, urls in builder.config.data_files.items()}
    kind = type(builder).__module__.rpartition(".")[2]
    if kind.endswith("folder") and os.path.isdir(location):
        raise UserError(f"--dataset_name {dataset_name} is a folder of images: name it with --train_dir instead.")
    used = _used_splits(str(dataset_name), split_names, row, list(files), needs_training)
    if ("train" not in used and needs_training) or not used:
        flag = "train" if needs_training else "test"
        raise UserError(
            f"{dataset_name} has no training split; it has: {', '.join(files)}. Name one with --{flag}_split_name."
        )
    is_told = (label_column or row.label_column) is not None
    first, empty = next(iter(used)), []  # training's, where there is one, tells the types of columns
    image_column, label_column = image_column or row.image_column, label_column or row.label_column

    if kind == "webdataset" and streaming:
        if image_column or label_column:
            raise UserError(
                f"{dataset_name} is a webdataset: streamed, its images and .cls labels need no column names."
            )
        remote = [url for split in used.values() for url in files[split] if not os.path.exists(url)]
        if remote:
            raise UserError(
                f"{dataset_name} is a webdataset on the Hub: a stream needs its length, which remote tar files do not "
                f"tell. Fetch it first (hf download {dataset_name} --repo-type dataset --local-dir FOLDER, then "
                "--dataset_name FOLDER), or use --streaming false, or a copy in parquet."
            )
        examples = {ours: TarExamples(files[split]) for ours, split in used.items()}
        columns = ("image", "label")
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    elif streaming:
        if kind != "parquet":
            raise UserError(
                f"{dataset_name} is stored as {'single files' if kind.endswith('folder') else kind}; --streaming true "
                "reads parquet and webdataset. Use --streaming false, or a copy in parquet."
            )
        with hub_errors(str(dataset_name)), quiet_hub():
            features = _stream_features(files[used[first]][0], builder.info.features)
            columns = find_columns(features, image_column, label_column, dataset_name)
            examples = {ours: ParquetExamples(files[split], *columns) for ours, split in used.items()}
            _compare_with_card(dataset_name, builder.info.splits, used, examples)
    else:
        with hub_errors(dataset_name), quiet_hub():
            tables = {ours: _load_split(location, config_name, ours, split) for ours, split in used.items()}
        empty = [ours for ours, table in tables.items() if table is None]
        tables = {ours: table for ours, table in tables.items() if table is not None}
        if not tables:
            raise UserError(f"{dataset_name}: its splits ({', '.join(used.values())}) are empty.")
        features = next(iter(tables.values())).features
        columns = find_columns(features, image_column, label_column, dataset_name)
        examples = {
            ours: TableExamples(table, *columns, f"{Path(dataset_name).name} {ours}") for ours, table in tables.items()
        }
    feature = features[columns[1]]
    is_multi_label = isinstance(feature, LISTS)
    ruling = [examples["train"]] if "train" in used else list(examples.values())
    class_names, label_ids = _classes(feature.feature if is_multi_label else feature, ruling, is_multi_label)
    notes = [] if is_told else _other_labels(features, columns[1])
    notes += [EMPTY.format(ours) for ours in empty]
    if needs_training:
        is_plain = kind != "webdataset" and not is_multi_label  # a tar is read whole for its labels
        for ours in [ours for ours in examples if ours != "train"]:
            if reason := _usable(ours, examples[ours], is_plain):
                notes.append(reason)
                del examples[ours]
    splits = {ours: Split(found) for ours, found in examples.items()}
    repository = None if os.path.isdir(location) else location
    return Source(
        str(dataset_name), splits, class_names, label_ids, streaming,
        repository=repository, is_multi_label=is_multi_label, notes=notes,
    )  # fmt: skip


def _other_labels(features: datasets.Features, label_column: str) -> list[str]:
    """A note where other columns hold classes too."""
    others = [name for name, feature in features.items() if name != label_column and _has_classes(feature)]
    if not others:
        return []
    return [
        f"The labels are those of the column {label_column}; {', '.join(others)} would do too (--label_column_name)."
    ]


def _load_split(location: str, config_name: str | None, ours: str, split: str) -> datasets.Dataset | None:
    """A split as a table; None for an empty one, which `datasets` does not load, beside that of training."""
    try:
        return datasets.load_dataset(location, config_name, split=split)
    except ValueError as error:
        if ours == "train" or "corresponds to no data" not in str(error):
            raise
        return None


def _usable(ours: str, examples: Examples, is_plain: bool) -> str | None:
    """Why a validation or test split cannot be scored, in words; None where it can."""
    if not sum(examples.shard_sizes):
        return EMPTY.format(ours)
    if is_plain and _are_hidden(examples.first_labels()) and _are_hidden(examples.labels()):
        return f"The labels of the {ours} split are hidden: it is left out."
    return None


def _are_hidden(labels: list[Any]) -> bool:
    return all(label is None or label == -1 for label in labels)


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


def _used_splits(
    dataset_name: str, named: dict[str, str | None], row: DatasetRow, available: list[str], needs_training: bool
) -> dict[str, str]:
    """Which of the dataset's splits serve as ours: those named by flags, of the others the ones that can be meant.

    None serves twice. Raises UserError for a name that the dataset has not, or that two flags give.
    """
    chosen = {ours: split for ours, split in named.items() if split is not None}
    for ours, split in chosen.items():
        if split not in available:
            raise UserError(
                f"--{ours}_split_name {split}: {dataset_name} has no such split. It has: {', '.join(available)}."
            )
        if list(chosen.values()).count(split) > 1:
            raise UserError(f"--{ours}_split_name {split}: another flag names that split too; one of them can have it.")
    free = [split for split in available if split not in chosen.values()]
    theirs = {ours: chosen.get(ours) or _split_name(ours, row, free, needs_training) for ours in SPLIT_NAMES}
    taken = theirs["train"]  # a lone split that is called test or validation is not scored on what it trained
    return {ours: split for ours, split in theirs.items() if split and (ours == "train" or split != taken)}


def _split_name(ours: str, row: DatasetRow, available: list[str], needs_training: bool) -> str | None:
    # a known row's splits hold as far as they exist: a copy of the dataset may have fewer
    if row.splits:
        return row.splits.get(ours) if row.splits.get(ours) in available else None
    named = {name for split, names in SPLIT_NAMES.items() if split != "train" for name in names}
    if ours == "train" and len(available) == 1 and (needs_training or available[0] not in named):
        return available[0]
    return next((name for name in SPLIT_NAMES[ours] if name in available), None)


def _stream_features(url: str, stated: datasets.Features | None) -> datasets.Features:
    """The types of columns as the repository's card states them, as load_dataset takes them, else as the file does."""
    written = datasets.Features.from_arrow_schema(read_footer(url).schema.to_arrow_schema())
    return stated if stated is not None and set(stated) == set(written) else written


def _compare_with_card(name: str | None, stated: Any, used: dict[str, str], examples: dict[str, ParquetExamples]):
    """Says where a stream's files hold another number of rows than the repository's card: a file may be missing."""
    for ours, split in used.items():
        expected = getattr((stated or {}).get(split), "num_examples", None)
        found = sum(examples[ours].shard_sizes)
        if expected and expected != found:
            note(
                f"{name}: its card says {expected:,} {split} rows, its files hold {found:,}; all of those are used. "
                "A file may be missing, or the card is out of date."
            )


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
        labels = labels or [column for column, feature in features.items() if _has_classes(feature)]
        if len(labels) != 1:
            known = [column for column in LABEL_COLUMNS if column in features]
            if not known:
                found = "no label column" if not labels else f"several label columns ({', '.join(labels)})"
                raise UserError(f"{name} has {found}: name it with --label_column_name. It has: {listing}.")
            labels = known
        label_column = labels[0]
    return image_column, label_column


def _has_classes(feature: Any) -> bool:
    """Whether a column holds one of named classes a row, or a list of them."""
    return isinstance(feature.feature if isinstance(feature, LISTS) else feature, datasets.ClassLabel)


def _kind(feature: Any) -> str:
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return f"{feature.num_classes} classes"
    if isinstance(feature, LISTS):
        return f"list of {_kind(feature.feature)}"
    return getattr(feature, "dtype", type(feature).__name__)


def _classes(feature: Any, ruling: list[Examples], is_multi_label: bool) -> tuple[list[str], dict[Any, int] | None]:
    """Class names and the map from raw labels to ids, from the type of one label or else from the labels."""
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), None
    labels = [label for examples in ruling for label in examples.labels()]
    return classes_of(one for label in labels for one in (label or ())) if is_multi_label else classes_of(labels)
