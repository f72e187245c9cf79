"""Past this machine: what 1,024 processes with 8 workers each would read of 10,000 shards, without starting one."""

import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_vit_scratch.data import loading
from modeling_vit_scratch.data.examples import Example
from modeling_vit_scratch.data.loading import _StreamDataset
from modeling_vit_scratch.data.order import StreamOrder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import scale

NUM_SHARDS, NUM_RANKS, NUM_WORKERS = 10_000, 1_024, 8
MORE_RANKS = 1_536
NUM_LANES = 24_576  # 24 for each of 1,024 ranks, 16 for each of 1,536; 3 and 2 for each of their workers
BATCH_SIZE = 24_000  # no multiple of the lanes or the ranks
EPOCH = 3


@pytest.fixture(scope="module")
def shard_sizes():
    """Sizes as they come: most shards alike, some of one row, some empty, some ten times as long."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 60, NUM_SHARDS)
    sizes[rng.permutation(NUM_SHARDS)[:300]] = rng.choice([0, 1, 500], 300)
    return sizes.tolist()


@pytest.fixture(scope="module")
def order(shard_sizes):
    return StreamOrder(shard_sizes, seed=11, num_lanes=NUM_LANES, window=8)


@pytest.fixture(scope="module")
def rows_of_lanes(order):
    """For each lane the rows of epoch EPOCH in the order in which they are dealt, numbered over all shards."""
    starts = np.cumsum(np.concatenate(([0], order.sizes)))
    return [dealt_rows(order, lane, starts) for lane in range(NUM_LANES)]


def dealt_rows(order, lane, starts):
    windows = []
    for index in range(-(-order.lane_length(lane) // order.window)):
        pieces = order.window_pieces(EPOCH, lane, index)
        rows = np.concatenate([starts[shard] + numbers for shard, numbers in pieces])
        windows.append(rows[order.window_permutation(EPOCH, lane, index)])
    return np.concatenate(windows)


def reader_of(lanes, world_size, num_workers):
    """The reader of each lane: rank * num_workers + worker. Held against what the readers do by a test."""
    return lanes % world_size * num_workers + lanes // world_size % num_workers


def steps_of_epoch(order):
    """The steps that have a sample of the epoch, the first and last of which share it with another epoch."""
    return range(EPOCH * order.num_samples // BATCH_SIZE, -(-(EPOCH + 1) * order.num_samples // BATCH_SIZE))


def rows_by_reader(order, rows_of_lanes, steps, world_size):
    """(rows of the epoch, the reader of each), step after step."""
    for step in steps:
        epochs, lanes, numbers = order.batch(step, BATCH_SIZE)
        inside = epochs == EPOCH
        pairs = zip(lanes[inside].tolist(), numbers[inside].tolist(), strict=True)
        rows = np.array([rows_of_lanes[lane][number] for lane, number in pairs])
        yield rows, reader_of(lanes[inside], world_size, NUM_WORKERS)


def test_each_sample_comes_once_though_the_run_stops_and_goes_on_with_more_ranks(order, rows_of_lanes):
    steps = steps_of_epoch(order)
    stopped = steps[len(steps) // 2]
    fresh = pickle.loads(pickle.dumps(order))  # of the run that goes on
    parts = (
        (order, range(steps[0], stopped), NUM_RANKS),
        (fresh, range(stopped, steps[-1] + 1), MORE_RANKS),
    )
    seen, readers = [], []
    for part_order, part_steps, world_size in parts:
        found = list(rows_by_reader(part_order, rows_of_lanes, part_steps, world_size))
        seen += [rows for rows, _ in found]
        readers.append(len(np.unique(np.concatenate([by for _, by in found]))))
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(order.num_samples))
    assert readers == [NUM_RANKS * NUM_WORKERS, MORE_RANKS * NUM_WORKERS]  # nobody idles


@pytest.mark.parametrize("world_size", [NUM_RANKS, MORE_RANKS])
def test_ranks_stay_within_a_batch_of_each_other(order, world_size):
    read = np.zeros(world_size, dtype=np.int64)
    for step in steps_of_epoch(order):
        _, lanes, _ = order.batch(step, BATCH_SIZE)
        share = np.bincount(lanes % world_size, minlength=world_size)
        read += share
        is_whole = order.num_samples - step * BATCH_SIZE % order.num_samples >= BATCH_SIZE
        assert share.max() - share.min() <= (1 if is_whole else 2)  # two epochs meet in a batch
        assert read.max() - read.min() <= BATCH_SIZE / world_size


def test_ranks_that_do_not_divide_the_lanes_differ_by_one_lane(order):
    _, lanes, _ = order.batch(0, NUM_LANES)
    share = np.bincount(lanes % 1000, minlength=1000)
    assert (share.min(), share.max()) == (24, 25)


@pytest.mark.parametrize("world_size, rank, worker", [(1024, 0, 0), (1024, 777, 5), (1024, 1023, 7), (1536, 1300, 3)])
def test_a_reader_opens_its_own_lanes_alone_and_starts_in_seconds(monkeypatch, order, world_size, rank, worker):
    reads = []

    def read(shard, rows):
        reads.append((shard, len(rows)))
        return [Example(np.zeros(1), 0, f"{shard} {row}") for row in rows]

    split = SimpleNamespace(examples=SimpleNamespace(read=read), rows=lambda shard: np.arange(order.sizes[shard]))
    source = SimpleNamespace(is_multi_label=False, label_id=lambda label, name: label)
    reader = SimpleNamespace(split=split, source=source, decoder=lambda *example: torch.zeros(1, dtype=torch.uint8))
    monkeypatch.setattr(loading, "get_worker_info", lambda: SimpleNamespace(id=worker, num_workers=NUM_WORKERS))
    step = steps_of_epoch(order)[7]
    began = time.perf_counter()
    fresh = pickle.loads(pickle.dumps(order))  # what a worker is given
    batch = next(iter(_StreamDataset(reader, fresh, BATCH_SIZE, range(step, step + 1), rank, world_size)))
    # the arithmetic of a start in the middle of an epoch takes milliseconds; seconds leave room for a busy machine
    assert time.perf_counter() - began < 5
    _, lanes, _ = order.batch(step, BATCH_SIZE)
    expected = np.flatnonzero(reader_of(lanes, world_size, NUM_WORKERS) == rank * NUM_WORKERS + worker)
    assert batch.positions.tolist() == expected.tolist() and len(expected) >= 1
    num_windows = len(np.unique(lanes[expected]))
    assert sum(length for _, length in reads) <= num_windows * order.window  # one window a lane, nothing skipped


def test_the_position_of_a_run_is_its_step_however_far_it_has_come(order):
    billion = StreamOrder([100_000] * NUM_SHARDS, seed=0, num_lanes=NUM_LANES)
    last_step = 20 * billion.num_samples // BATCH_SIZE  # 20 epochs of a billion samples
    epochs, lanes, numbers = billion.batch(last_step, BATCH_SIZE)
    assert epochs.max() == 20 and (numbers >= 0).all() and lanes.max() < NUM_LANES
    index, epoch, lane = int(numbers[0]) // billion.window, int(epochs[0]), int(lanes[0])
    pieces = billion.window_pieces(epoch, lane, index)
    num_rows = sum(len(rows) for _, rows in pieces)
    assert num_rows == len(billion.window_permutation(epoch, lane, index)) and 1 <= len(pieces) <= 2
    assert all(rows.min() >= 0 and rows.max() < 100_000 for _, rows in pieces)


# ---------------------------------------------------------------- the page


def test_the_tables_of_the_page_are_made_from_recorded_numbers():
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.with_tables(page) == page


def test_a_changed_number_of_the_page_would_be_seen():
    page = scale.PAGE.read_text(encoding="utf-8")
    assert "14,197,122" in page and scale.with_tables(page.replace("14,197,122", "14,197,123")) == page


def test_what_a_set_needs_is_computed_from_its_images():
    found = {"footer": {"seconds": 0.5, "bytes_of_row_group": 200.0}, "holdout_rows_per_second": 1e6}
    facts = scale.set_facts(found, images=10_000_000, bytes=50_000)
    assert facts["bytes"] == "0.5 TB" and facts["shards of 500 MB"] == "1,000, 10,000 images each"
    assert facts["row groups of 100 images"] == "100,000 of 5.0 MB"
    assert facts["footers in memory of each process, 1,000 a row group"] == "2 MB"
    assert facts["footers parsed"] == "500 s on one core"
    assert facts["validation rows drawn by hash"] == "20 s on one core"  # of two masks
