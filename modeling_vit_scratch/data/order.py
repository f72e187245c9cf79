"""Which sample when, as pure arithmetic of (seed, purpose, epoch, step): nothing here reads a clock or a global state.

A run is one endless row of samples: sample s of the run belongs to epoch s // N and is position s % N of that epoch;
step b with global batch B takes samples b*B to b*B + B - 1. So an epoch shows each sample exactly once whatever B is
(but where samples are repeated on purpose), every batch is full, and the position of a run is its step.
"""

import hashlib
from functools import lru_cache

import numpy as np


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed for the purpose that the parts name: the same parts give the same seed on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derived_rng(*parts: int | str) -> np.random.Generator:
    """A fresh numpy generator for the purpose that the parts name."""
    return np.random.Generator(np.random.Philox(derived_seed(*parts)))


# ---------------------------------------------------------------- held-out samples


def stratified_holdout(labels: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """A mask (N,) that is True for the held-out samples: `rate` of each class, but never a class's last one."""
    mask = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(round(rate * len(rows)), len(rows) - 1)
        mask[derived_rng(seed, "holdout", int(label)).permutation(rows)[:count]] = True
    return mask


def stratified_subset(labels: np.ndarray, count: int, seed: int, has_each: bool) -> np.ndarray:
    """A mask (N,) that is True for `count` samples: of each class its share, with `has_each` one of each before.

    A larger count keeps those of a smaller one.
    """
    places = np.empty(len(labels))
    classes = derived_rng(seed, "subset").permutation(np.unique(labels))  # among equals, a drawn order
    for index, label in enumerate(classes):
        rows = np.flatnonzero(labels == label)
        shares = (np.arange(len(rows)) + (index + 1) / (len(classes) + 1)) / len(rows)
        if has_each:
            shares[0] = index / len(classes) - 1  # before all that are not the first of their class
        places[derived_rng(seed, "subset", int(label)).permutation(rows)] = shares
    mask = np.zeros(len(labels), dtype=bool)
    mask[np.argsort(places, kind="stable")[:count]] = True
    return mask


def hash_limit(rate: float) -> np.uint64:
    """The number that a share `rate` of all hashes is below."""
    return np.uint64(min(int(rate * 2**64), 2**64 - 1))


def row_hashes(seed: int, purpose: str, shard: int, num_rows: int) -> np.ndarray:
    """uint64 (num_rows,): a number for each row of a shard, spread evenly, known without any label."""
    values = np.arange(num_rows, dtype=np.uint64) + np.uint64(derived_seed(seed, purpose, shard))
    with np.errstate(over="ignore"):  # splitmix64: arithmetic modulo 2**64
        values += np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values ^= values >> np.uint64(31)
    return values


# ---------------------------------------------------------------- resident sets


EPOCHS = 2**32  # more than a run has: views of a sample that comes again in an epoch are counted in steps of it


class ResidentOrder:
    """The order of a set in memory: each epoch a fresh permutation of all samples, the same for any number of ranks.

    repeats: how often a sample stands in a row: repeated augmentation within a batch (1901.09335; as DeiT's sampler,
    1902.05509). An epoch then has as many positions as without, for the first N / repeats of its permutation.
    """

    def __init__(self, num_samples: int, seed: int, repeats: int = 1):
        self.num_samples, self.seed, self.repeats = num_samples, seed, repeats
        self._places = lru_cache(maxsize=2)(self._lay_out)  # a batch touches at most two epochs at a time

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, how often each stood before in this epoch), in the epoch's order, each to be repeated."""
        samples = derived_rng(self.seed, "order", epoch).permutation(self.num_samples)
        return samples, np.zeros_like(samples)

    def __getstate__(self):
        return {"num_samples": self.num_samples, "seed": self.seed, "repeats": self.repeats}

    def __setstate__(self, state):
        self.__init__(**state)

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(views, samples) of the global batch of this step, both (batch_size,): a view is the epoch, and another
        number where a sample comes again in it, so that no sample has the same one twice."""
        positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        places, copies = np.divmod(offsets, self.repeats)
        samples, times = np.empty((2, batch_size), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here], times[here] = (column[places[here]] for column in self._places(int(epoch)))
        return epochs + (times * self.repeats + copies) * EPOCHS, samples

    @staticmethod
    def local_positions(batch_size: int, rank: int, world_size: int) -> np.ndarray:
        """Which positions of a global batch this rank computes."""
        return np.arange(rank, batch_size, world_size)


def _times_before(samples: np.ndarray) -> np.ndarray:
    """How often each number stood before in the row."""
    order = np.argsort(samples, kind="stable")
    numbers = samples[order]
    times = np.empty_like(samples)
    times[order] = np.arange(len(samples)) - np.searchsorted(numbers, numbers)
    return times


class BalancedOrder(ResidentOrder):
    """The order of a set in memory in which every class comes equally often, its images as evenly as that allows.

    An epoch has as many positions as there are samples, N / K for each of the K classes that are there (with repeats
    but for one sample's). A class fills its share from fresh permutations of its own samples: a small class repeats
    them, a large one leaves some out until another epoch. labels: the class of each sample (N,).
    """

    def __init__(self, labels: np.ndarray, seed: int, repeats: int = 1):
        super().__init__(len(labels), seed, repeats)
        self.labels = np.asarray(labels)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = derived_rng(self.seed, "balanced order", epoch)
        num_places = -(-self.num_samples // self.repeats)
        classes = rng.permutation(np.unique(self.labels))  # the first ones get what does not divide
        drawn = []
        for index, label in enumerate(classes):
            own = np.flatnonzero(self.labels == label)
            count = num_places // len(classes) + int(index < num_places % len(classes))
            rounds = [rng.permutation(own) for _ in range(-(-count // len(own)))]
            drawn += [np.concatenate(rounds)[:count]] if rounds else []  # more classes than places: not all have one
        samples = rng.permutation(np.concatenate(drawn))
        return samples, _times_before(samples)

    def __getstate__(self):
        return {"labels": self.labels, "seed": self.seed, "repeats": self.repeats}


# ---------------------------------------------------------------- streams


class StreamOrder:
    """The order of a stream of shards: lanes that each read a contiguous part, samples dealt from them in turn.

    An epoch lays the shards end to end in an order drawn for it, turned by a drawn offset, and cuts that row of N
    samples into `num_lanes` parts whose lengths differ by one at most. Each lane shuffles its part in windows of
    `window` samples. Sample t of the epoch is number t // num_lanes of lane t % num_lanes. So any sample is found from
    (seed, epoch, t) alone, each comes exactly once an epoch, a rank or worker reads only the lanes that it owns, and
    going on in the middle opens one window a lane.

    shard_sizes: samples in each shard. The number of lanes is fixed for a run; ranks that divide it get equal shares.
    """

    def __init__(self, shard_sizes: list[int], seed: int, num_lanes: int = 24, window: int = 256):
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        self.num_lanes = max(1, min(num_lanes, self.num_samples))
        self.seed, self.window = seed, window
        self._layout = lru_cache(maxsize=2)(self._lay_out)

    def __getstate__(self):
        return {
            "shard_sizes": self.sizes.tolist(),
            "seed": self.seed,
            "num_lanes": self.num_lanes,
            "window": self.window,
        }

    def __setstate__(self, state):
        self.__init__(**state)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(shards in their order, where each ends, the offset by which the row is turned)."""
        rng = derived_rng(self.seed, "shards", epoch)
        order = rng.permutation(len(self.sizes))
        return order, np.cumsum(self.sizes[order]), int(rng.integers(self.num_samples))

    def lane_length(self, lane: int) -> int:
        return self.num_samples // self.num_lanes + int(lane < self.num_samples % self.num_lanes)

    def lane_start(self, lane: int) -> int:
        return lane * (self.num_samples // self.num_lanes) + min(lane, self.num_samples % self.num_lanes)

    def batch(self, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epochs, lanes, numbers within the lane) of the global batch of this step, each (batch_size,)."""
        positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        return epochs, offsets % self.num_lanes, offsets // self.num_lanes

    def window_pieces(self, epoch: int, lane: int, index: int) -> list[tuple[int, np.ndarray]]:
        """What to read for window `index` of a lane: (shard, ascending numbers of samples in it), piece by piece."""
        start = self.lane_start(lane) + index * self.window
        stop = min(start + self.window, self.lane_start(lane) + self.lane_length(lane))
        order, ends, turn = self._layout(epoch)
        positions = (np.arange(start, stop, dtype=np.int64) + turn) % self.num_samples
        places = np.searchsorted(ends, positions, side="right")
        pieces = []
        for place in dict.fromkeys(places.tolist()):  # in reading order
            shard = int(order[place])
            numbers = positions[places == place] - (ends[place] - self.sizes[shard])
            pieces.append((shard, np.sort(numbers)))  # the turned row may end and begin in one shard
        return pieces

    def window_permutation(self, epoch: int, lane: int, index: int) -> np.ndarray:
        """How the window's samples are dealt: number i within the window is element permutation[i] of its pieces."""
        length = min(self.window, self.lane_length(lane) - index * self.window)
        return derived_rng(self.seed, "window", epoch, lane, index).permutation(length)
