"""Which rows: the splits of a dataset, what of them is held out for validation, and what is left out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from .examples import Examples, FolderExamples
from .labels import class_counts, multi_label_holdout
from .listing import some
from .order import hash_limit, row_hashes, stratified_holdout, stratified_subset


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

    @classmethod
    def of(cls, split: Split, is_chosen: np.ndarray) -> "_FixedMask":
        """The mask of those rows of a split of one shard that `is_chosen`, a mask over the split's own rows, keeps."""
        mask = np.zeros(split.examples.shard_sizes[0], dtype=bool)
        mask[split.rows(0)[is_chosen]] = True
        return cls(mask)

    def __call__(self, shard: int) -> np.ndarray:
        return self.mask


class _HashMask:
    """The mask of rows whose hash(seed, purpose, shard, row) is below `limit`, or, inverted, of the others, `within` a
    mask."""

    def __init__(
        self,
        shard_sizes: list[int],
        purpose: str,
        limit: np.uint64,
        seed: int,
        inverted: bool = False,
        within: Callable[[int], np.ndarray] | None = None,
    ):
        self.shard_sizes, self.purpose, self.limit, self.seed = shard_sizes, purpose, limit, seed
        self.inverted, self.within = inverted, within

    def __call__(self, shard: int) -> np.ndarray:
        mask = (row_hashes(self.seed, self.purpose, shard, self.shard_sizes[shard]) < self.limit) ^ self.inverted
        return mask if self.within is None else mask & self.within(shard)


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
    is_multi_label: bool = False  # an image has any number of classes
    notes: list[str] = field(default_factory=list)  # what a person would want to know of the data before training

    def label_id(self, label: Any, where: str) -> int:
        """The class id of a raw label. Raises UserError, naming the row, for one that is not among the classes."""
        number = self.label_ids.get(label) if self.label_ids is not None else label
        if isinstance(number, (int, np.integer)) and 0 <= number < len(self.class_names):
            return int(number)
        raise UserError(
            f"{where} has the label {label!r}, which is not among the {len(self.class_names)} classes "
            f"({', '.join(self.class_names[:5])}{', ...' if len(self.class_names) > 5 else ''})."
        )

    def label_set(self, label: Any, where: str) -> tuple[int, ...]:
        """The class ids, ascending, of an image that has any number of classes; `label` is their list.

        Raises UserError, naming the row, for what is no list, and for a class that is unknown or there twice.
        """
        if not isinstance(label, (list, tuple)):
            raise UserError(f"{where} has the label {label!r}; expected a list of classes, as the other images have.")
        ids = sorted(self.label_id(one, where) for one in label)
        if len(set(ids)) < len(ids):
            raise UserError(
                f"{where} has a class more than once in {list(label)!r:.80}; expected the classes of the image, "
                "not a row of 0 and 1."
            )
        return tuple(ids)

    def label_vector(self, label: Any, where: str) -> np.ndarray:
        """1 for each class of an image that has any number of them, else 0, float32 (K,). Errors as `label_set`."""
        vector = np.zeros(len(self.class_names), dtype=np.float32)
        vector[list(self.label_set(label, where))] = 1
        return vector

    def class_ids(self, label: Any, where: str) -> tuple[int, ...]:
        """The ids of an image's classes: one, or any number where images have several. Raises as the two above."""
        return self.label_set(label, where) if self.is_multi_label else (self.label_id(label, where),)

    def label_ids_of(self, split_name: str) -> np.ndarray:
        """The class id of every sample of a split (N,), in the split's own order; reads labels, decodes nothing.

        Raises UserError where images have several classes.
        """
        if self.is_multi_label:
            raise UserError(f"{self.name} has several classes an image; what counts images by their class needs one.")
        return np.array([self.label_id(*labelled) for labelled in self._labels_of(split_name)], dtype=np.int64)

    def label_sets_of(self, split_name: str) -> list[tuple[int, ...]]:
        """The class ids of every sample of a split whose images have any number of them, in the split's own order."""
        return [self.label_set(*labelled) for labelled in self._labels_of(split_name)]

    def _labels_of(self, split_name: str) -> Iterator[tuple[Any, str]]:
        split = self.splits[split_name]
        labels = split.examples.labels()
        starts = np.cumsum([0, *split.examples.shard_sizes])
        for shard in range(len(split.shard_sizes)):
            for row in (starts[shard] + split.rows(shard)).tolist():
                yield labels[row], f"{self.name} row {row}"


# ---------------------------------------------------------------- held out, left out


def _comes_in_shards(source: Source, split: Split) -> bool:
    """Whether labels are not known beforehand; else the split is one shard, even if it is streamed."""
    return source.streaming and not isinstance(split.examples, FolderExamples)


def hold_out(source: Source, rate: float, seed: int):
    """Takes a validation split out of the training split, where there is none and the rate is not 0.

    Rows that a mask has left out of the training split before belong to neither. Resident sets then hold out what they
    would without these rows; a stream's rows are judged by their place in the shard, whatever else lies there. Folders,
    whose labels are known beforehand, are held out of alike either way; each class keeps an image in training.
    """
    if "validation" in source.splits or rate == 0:
        return
    train = source.splits["train"]
    if _comes_in_shards(source, train):
        sizes = list(train.examples.shard_sizes)
        masks = {
            name: _HashMask(sizes, "holdout", hash_limit(rate), seed, name == "train", train.mask_of_shard)
            for name in ("train", "validation")
        }
    else:  # one shard
        num_labels = len(source.class_names)
        if source.is_multi_label:
            label_sets = source.label_sets_of("train")
            is_held_out = multi_label_holdout(label_sets, num_labels, rate, seed)
        else:
            label_ids = source.label_ids_of("train")
            label_sets = label_ids[:, None].tolist()
            is_held_out = stratified_holdout(label_ids, rate, seed)
        source.notes += _too_few_notes(source.class_names, label_sets, is_held_out)
        masks = {"train": _FixedMask.of(train, ~is_held_out), "validation": _FixedMask.of(train, is_held_out)}
    splits = {name: Split(train.examples, mask) for name, mask in masks.items()}
    if len(splits["validation"]) == 0:
        return  # too few images to hold any out
    source.splits.update(splits)
    source.held_out = True


def limit_samples(source: Source, max_train_samples: int | None, max_eval_samples: int | None, seed: int):
    """Leaves in the training and the validation split no more samples than these; None: all of them.

    Where labels are known beforehand, of each class its share, in training at least one image; else, in streams and
    where images have several classes, each sample is as likely. A larger number keeps the samples of a smaller one; the
    validation split does not depend on max_train_samples.

    Raises UserError where a split has no more samples than that.
    """
    limits = (("train", "max_train_samples", max_train_samples), ("validation", "max_eval_samples", max_eval_samples))
    for name, flag, count in limits:
        if count is None or name not in source.splits:
            continue
        split = source.splits[name]
        if count >= len(split):
            raise UserError(f"--{flag} {count} has no effect here: the {name} split has {len(split):,} images.")
        if _comes_in_shards(source, split):
            mask: Callable[[int], np.ndarray] = _smallest_hashes(split, count, seed)
        elif source.is_multi_label:  # one shard, as below
            mask = _FixedMask(_smallest_hashes(split, count, seed)(0))
        else:
            label_ids = source.label_ids_of(name)
            chosen = stratified_subset(label_ids, count, seed, has_each=name == "train")
            mask = _FixedMask.of(split, chosen)
            if name == "train" and count < (num_classes := len(np.unique(label_ids))):
                source.notes.append(f"{num_classes - count} of the {num_classes} classes have no training image left.")
        source.splits[name] = Split(split.examples, mask)


def _smallest_hashes(split: Split, count: int, seed: int) -> _HashMask:
    """The mask of those `count` rows of a split, fewer than all, whose hashes are the smallest."""
    sizes = list(split.examples.shard_sizes)
    hashes = [row_hashes(seed, "subset", shard, size)[split.rows(shard)] for shard, size in enumerate(sizes)]
    limit = np.partition(np.concatenate(hashes), count)[count]
    return _HashMask(sizes, "subset", limit, seed, within=split.mask_of_shard)


def _too_few_notes(class_names: list[str], label_sets: list[Any], is_held_out: np.ndarray) -> list[str]:
    """A line on the classes of which no image is held out; none where each has one."""
    counts = class_counts(label_sets, len(class_names))
    held_out = class_counts([label_sets[row] for row in np.flatnonzero(is_held_out)], len(class_names))
    few = np.flatnonzero((counts > 0) & (held_out == 0))
    if len(few) == 0:
        return []
    names = some(f"{class_names[label]!r} ({counts[label]})" for label in few)
    return [
        f"{len(few)} of the {len(class_names)} classes have too few training images to hold one out for validation: "
        f"{names}."
    ]
