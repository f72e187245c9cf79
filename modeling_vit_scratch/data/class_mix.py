"""Whether a stream mixes its classes: a set that is stored class after class trains badly unless many lanes read it."""

import numpy as np
import torch

from .order import StreamOrder
from .remote import note

NUM_BATCHES = 20  # the first ones of a run or of its resumption
LEAST_SHARE = 0.6  # of the classes that random draws of equally frequent classes would show in a batch


def expected_classes(num_classes: int, num_samples: int) -> float:
    """How many of `num_classes` equally frequent classes `num_samples` random draws show, on average."""
    return num_classes * (1 - (1 - 1 / num_classes) ** num_samples)


class ClassMix:
    """Looks at the labels of a stream's first batches, which are still on the CPU, and says once where they lack
    classes because the shards lie sorted.

    Few classes in a batch are no proof: some may be rare or absent. They are held against the order of storage only
    where samples of one lane, which are neighbours in a shard, share their class more often than samples of the batch.
    """

    def __init__(self, order: StreamOrder, num_classes: int):
        self.order, self.num_classes = order, num_classes
        self.labels: list[np.ndarray] = []
        self.lanes: list[np.ndarray] = []
        self.is_done = False

    def watch(self, step: int, batch_size: int, labels: torch.Tensor, positions: torch.Tensor):
        """Takes this process's part of a step's batch, whose size over all processes is batch_size."""
        if self.is_done:
            return
        _, lanes, _ = self.order.batch(step, batch_size)
        self.labels.append(labels.numpy())
        self.lanes.append(lanes[positions.numpy()])
        if len(self.labels) == NUM_BATCHES:
            self.is_done = True
            if warning := self.warning():
                note(warning)

    def warning(self) -> str | None:
        """What to say of the batches seen so far, if anything."""
        found = np.mean([len(np.unique(labels)) for labels in self.labels])
        expected = np.mean([expected_classes(self.num_classes, len(labels)) for labels in self.labels])
        if found >= LEAST_SHARE * expected or not self._lies_sorted():
            return None
        size = round(np.mean([len(labels) for labels in self.labels]))
        return (
            f"The first {len(self.labels)} batches of {size} images have {found:.1f} classes each, well-mixed ones "
            f"would have about {expected:.1f}: the shards lie sorted by class. Raise --stream_lanes (now "
            f"{self.order.num_lanes}) or --stream_window (now {self.order.window}), or store the rows shuffled."
        )

    def _lies_sorted(self) -> bool:
        labels, lanes = np.concatenate(self.labels), np.concatenate(self.lanes)
        if len(np.unique(lanes)) == 1:
            return True  # nothing to compare with
        within = [_agreement(labels[lanes == lane]) for lane in np.unique(lanes)]
        same, pairs = np.sum(within, axis=0)
        same_at_all, pairs_at_all = _agreement(labels)
        return same / max(pairs, 1) > 1.5 * same_at_all / max(pairs_at_all, 1)


def _agreement(labels: np.ndarray) -> tuple[int, int]:
    """(pairs of samples that share their class, pairs of samples)."""
    counts = np.unique(labels, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1)).sum() // 2), len(labels) * (len(labels) - 1) // 2
