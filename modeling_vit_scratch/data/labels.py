"""From raw labels to classes: what they are called, and which images of several classes are held out."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..errors import UserError
from .order import stratified_holdout

MOST_CLASSES = 1_000_000  # numbers above are not counted up from 0: dates or the keys of some table


def classes_of(labels: Iterable[Any]) -> tuple[list[str], dict[Any, int] | None]:
    """Class names and the map from raw labels to ids (None: labels are the ids), from every label of training.

    Names are sorted; numbers are the ids, from 0 to the greatest. Raises UserError for what is neither.
    """
    found = set(labels)
    kinds = {type(label) for label in found}
    if kinds == {int}:
        if min(found) < 0:
            raise UserError(f"A training label is {min(found)}; labels must be 0, 1, 2, ...; name another column.")
        if max(found) >= MOST_CLASSES:
            raise UserError(f"A training label is {max(found)}; labels must be 0, 1, 2, ...; name another column.")
        return [str(index) for index in range(max(found) + 1)], None
    if kinds == {str}:
        names = sorted(found)
        return names, {name: index for index, name in enumerate(names)}
    types = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
    raise UserError(
        f"Labels of type {types} are not class names or numbers; name the right column with --label_column_name."
    )


def multi_label_holdout(label_sets: list[tuple[int, ...]], num_labels: int, rate: float, seed: int) -> np.ndarray:
    """A mask (N,) that is True for the held-out images: `rate` of those that share their rarest class.

    Every class that has an image keeps one in training.
    """
    counts = class_counts(label_sets, num_labels)
    strata = [min(labels, key=lambda label: (counts[label], label), default=num_labels) for labels in label_sets]
    mask = stratified_holdout(np.array(strata), rate, seed)
    left = class_counts((labels for labels, is_out in zip(label_sets, mask, strict=True) if not is_out), num_labels)
    for row in np.flatnonzero(mask):  # a class that is nowhere the rarest may have lost all its images
        labels = list(label_sets[row])
        if (left[labels] == 0).any():
            mask[row] = False
            left[labels] += 1
    return mask


def class_counts(label_sets: Iterable[tuple[int, ...]], num_labels: int) -> np.ndarray:
    """How many images have each class (K,)."""
    everything = np.array([label for labels in label_sets for label in labels], dtype=np.int64)
    return np.bincount(everything, minlength=num_labels)
