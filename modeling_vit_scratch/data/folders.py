"""Folders of images as people have them: a folder a class, or a table of labels beside the images.

`open_folders` finds images and classes, and says in one line what keeps it from that.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

from ..errors import UserError
from .examples import FolderExamples
from .labels import classes_of
from .listing import IMAGE_ENDINGS, Listing, shown, some
from .metadata import labels_from_metadata

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass
class Folders:
    """Image folders as found: the examples of each split, the classes that rule them all, and what to tell a person."""

    examples: dict[str, FolderExamples]
    class_names: list[str]
    label_ids: dict[Any, int] | None  # None: labels are the ids already
    is_multi_label: bool
    notes: list[str] = field(default_factory=list)


@dataclass
class _Found:
    """One split: its images, their raw labels, and the metadata file they come from, None: the folders' names."""

    split: str
    flag: str
    root: str
    paths: list[str]
    labels: list[Any]
    metadata: str | None
    empty_classes: list[str]

    @property
    def is_multi_label(self) -> bool:
        return any(isinstance(label, tuple) for label in self.labels)

    def convert(self, of_one: Callable[[Any], Any]):
        """Puts `of_one` of each raw label, alone or one of several, in its place."""
        self.labels = [
            tuple(map(of_one, label)) if isinstance(label, tuple) else of_one(label) for label in self.labels
        ]


def open_folders(
    folders: dict[str, str | None], label_column: str | None, ruling: str = "train", is_multi_label: bool = False
) -> Folders:
    """The images and classes of these folders (split -> folder, None: no such split).

    ruling: the split that rules the classes. is_multi_label: single labels of its metadata file are sets of one, for a
    model that gives an image any number. Raises UserError, naming the file or class, for what cannot be trained on, or
    scored, as it lies there.
    """
    given = {split: folder for split, folder in folders.items() if folder is not None}
    notes: list[str] = []
    found = {split: _index_folder(split, folder, label_column, notes, ruling) for split, folder in given.items()}
    notes += _overlap_notes(found.values())
    if label_column is not None and not any(split.metadata for split in found.values()):
        raise UserError(
            f"--label_column_name has no effect here: {shown(found[ruling].root)} has no metadata file, "
            "its folders' names are the classes."
        )
    if is_multi_label and found[ruling].metadata is not None and not found[ruling].is_multi_label:
        found[ruling].labels = [(label,) for label in found[ruling].labels]
    _bring_to_one_kind(found, found[ruling])
    class_names, label_ids = classes_of(flat(found[ruling].labels))
    known = range(len(class_names)) if label_ids is None else label_ids
    for split in found.values():
        if split.split != ruling:
            _refuse_strangers(split, known, class_names)
        present = set(flat(split.labels))
        missing = [repr(name) for label, name in zip(known, class_names, strict=True) if label not in present]
        if missing and ruling == "train":
            notes.append(
                f"{split.flag} {shown(split.root)} has no images of {len(missing)} of the {len(class_names)} classes: "
                f"{some(missing)}."
            )
        for name in sorted(set(split.empty_classes).difference(class_names)):
            what = "" if split.split == ruling else ", and no class of training"
            notes.append(f"{split.flag} {shown(split.root)}: the folder {name!r} is empty{what}.")
    examples = {name: FolderExamples(split.paths, split.labels) for name, split in found.items()}
    return Folders(examples, class_names, label_ids, found[ruling].is_multi_label, notes)


def flat(labels: Iterable[Any]) -> Iterable[Any]:
    """Every single label of images that have one each or several."""
    return chain.from_iterable(label if isinstance(label, tuple) else (label,) for label in labels)


def _overlap_notes(found: Iterable[_Found]) -> list[str]:
    """A note of each two splits that are one folder. Raises UserError where one lies inside the other."""
    notes = []
    for first, second in combinations(found, 2):
        (name, real), (other_name, other_real) = (
            (f"{split.flag} {shown(split.root)}", os.path.join(os.path.realpath(split.root), ""))
            for split in (first, second)
        )
        if real == other_real:
            notes.append(f"{other_name} is the folder of {first.flag} too: its scores are those of the same images.")
        elif real.startswith(other_real) or other_real.startswith(real):
            inner, outer = (name, other_name) if real.startswith(other_real) else (other_name, name)
            raise UserError(f"{inner} lies inside {outer}, so its images are in both; put the two side by side.")
    return notes


def _index_folder(split: str, folder: str, label_column: str | None, notes: list[str], ruling: str) -> _Found:
    """The images below a folder in their order with their labels; adds to `notes` what is left out."""
    flag, root = f"--{split}_dir", os.path.expanduser(folder)
    if not os.path.isdir(root):
        what = "is a file; a folder of images is expected" if os.path.exists(root) else "there is no such folder"
        raise UserError(f"{flag} {shown(folder)}: {what}.")
    listing = Listing(root)
    if split == ruling:
        _refuse_splits(listing, flag)
    if len(listing.metadata) > 1:
        raise UserError(f"{flag} has {' and '.join(map(shown, listing.metadata))}: keep one of them.")
    metadata = listing.metadata[0] if listing.metadata else None
    by_class = {os.path.basename(below[0]): listing.images_below(below) for below in listing.folders}
    images = [*listing.loose_images, *chain.from_iterable(by_class.values())]
    if metadata is None and listing.loose_images:
        loose = listing.loose_images[0]
        raise UserError(
            f"{shown(loose)} lies in no class folder, so it has no class; move it to {shown(root)}/<class>/, "
            f"or name its label in {shown(root)}/metadata.csv."
        )
    if not images:
        raise UserError(
            f"{flag} {shown(folder)}: there are no images in folders below it; expected "
            f"{shown(folder)}/<class>/<image>.jpg (endings: {' '.join(IMAGE_ENDINGS)})."
        )
    if (note := listing.left_out_note()) is not None:
        notes.append(note)
    if metadata is not None:
        labels = labels_from_metadata(metadata, root, images, label_column)
        return _Found(split, flag, root, images, labels, metadata, [])
    _refuse_class_names(root, list(by_class))
    empty = [name for name, below in by_class.items() if not below]
    if empty and split == "train":
        raise UserError(
            f"The class {empty[0]!r} has no images in {shown(os.path.join(root, empty[0]))}; add some or remove the "
            "folder."
        )
    labels = [name for name, below in by_class.items() for _ in below]
    return _Found(split, flag, root, images, labels, None, empty)


def _refuse_splits(listing: Listing, flag: str):
    names = [os.path.basename(path) for path, _ in listing.folders]
    aliases = {alias: split for split, known in SPLIT_NAMES.items() for alias in known}
    if not names or not all(name.lower() in aliases for name in names):
        return
    meant: dict[str, str] = {}
    for name in names:
        meant.setdefault(aliases[name.lower()], os.path.join(listing.root, name))
    flags = " ".join(f"--{split}_dir {shown(meant[split])}" for split in SPLIT_NAMES if split in meant)
    if flag == "--test_dir":
        flags = f"{flag} {shown(next(meant[split] for split in reversed(SPLIT_NAMES) if split in meant))}"
    raise UserError(f"{flag} {shown(listing.root)} holds splits, not classes; did you mean {flags}?")


def _refuse_class_names(root: str, names: list[str]):
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"The class folder {name!r} in {shown(root)} has a name that is not UTF-8; rename it."
            ) from None
    counts = Counter(map(_folded, names))
    twins = [name for name in names if counts[_folded(name)] > 1]
    if twins:
        first, second = [name for name in twins if _folded(name) == _folded(twins[0])][:2]
        written = _written_apart(first, second)
        difference = "by case" if written is repr else "in how accents are stored"
        raise UserError(
            f"The class folders {written(first)} and {written(second)} in {shown(root)} differ only {difference}, so "
            "other file systems take them for one; rename or merge them."
        )


def _folded(name: str) -> str:
    """What two names share that only case or the way in which accents are stored tells apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _written_apart(first: str, second: str) -> Callable[[str], str]:
    """`repr`, or `ascii` where the two names look alike."""
    looks = {unicodedata.normalize("NFC", name) for name in (first, second)}
    return ascii if len(looks) == 1 else repr


def _refuse_strangers(found: _Found, known: Iterable[Any], class_names: list[str]):
    for path, labels in zip(found.paths, found.labels, strict=True):
        for label in labels if isinstance(labels, tuple) else (labels,):
            if label in known:
                continue
            twin = next((name for name in class_names if _folded(name) == _folded(str(label))), None)
            written = repr if twin is None else _written_apart(twin, str(label))
            where = f"The {found.split} folder" if found.metadata is None else shown(path)
            raise UserError(
                f"{where} has the class {written(label)}, which the training folder has not "
                f"({some(class_names, 10)}); "
                + (f"did you mean {written(twin)}?" if twin else "rename it, or add training images of it.")
            )


# ---------------------------------------------------------------- metadata: names or numbers, one or several


def _bring_to_one_kind(found: dict[str, _Found], train: _Found):
    """Makes the raw labels of all splits numbers, or names, and one or several an image, as in the ruling `train`."""
    is_number = re.compile(r"-?[0-9]{1,18}").fullmatch
    is_text = train.metadata is None or not train.metadata.endswith(".csv")  # in csv numbers are written like names
    if all(type(label) is int or (not is_text and is_number(label)) for label in flat(train.labels)):
        for split in found.values():
            split.convert(lambda label: int(label) if is_number(str(label)) else label)
    else:
        for split in found.values():
            if split is not train and split.metadata is not None:
                split.convert(str)
    for split in found.values():
        if train.is_multi_label and not split.is_multi_label:
            split.labels = [(label,) for label in split.labels]
        elif split.is_multi_label and not train.is_multi_label:
            raise UserError(
                f"{shown(str(split.metadata))} gives several labels to an image, but --train_dir "
                f"{shown(train.root)} one to each; put training's in lists too."
            )
