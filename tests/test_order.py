"""The order of data is arithmetic: each sample once an epoch, whatever reads it."""

import itertools
import pickle

import numpy as np
import pytest

from modeling_vit_scratch.data.order import (
    BalancedOrder,
    ResidentOrder,
    StreamOrder,
    derived_seed,
    hash_limit,
    row_hashes,
    stratified_holdout,
    stratified_subset,
)


def stream_samples(order: StreamOrder, start: int, count: int) -> list[tuple[int, int, int]]:
    """(epoch, shard, row) of the samples start, start + 1, ... of a run, found one by one."""
    found = []
    for position in range(start, start + count):
        epochs, lanes, numbers = order.batch(position, 1)
        epoch, lane, number = int(epochs[0]), int(lanes[0]), int(numbers[0])
        index, offset = divmod(number, order.window)
        pieces = order.window_pieces(epoch, lane, index)
        rows = [(shard, int(row)) for shard, numbers in pieces for row in numbers]
        found.append((epoch, *rows[order.window_permutation(epoch, lane, index)[offset]]))
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 37, 64])
def test_resident_epochs_show_each_sample_once_whatever_the_batch(batch_size):
    order = ResidentOrder(37, seed=3)
    steps = -(-3 * 37 // batch_size)
    pairs = [pair for step in range(steps) for pair in zip(*order.batch(step, batch_size), strict=True)]
    for epoch in range(3):
        assert sorted(sample for e, sample in pairs if e == epoch) == list(range(37))[: len(pairs) - 37 * epoch]


@pytest.mark.parametrize("batch_size", [5, 48])
def test_a_repeated_sample_stands_in_a_row_and_is_drawn_anew_each_time(batch_size):
    order = pickle.loads(pickle.dumps(ResidentOrder(37, seed=3, repeats=3)))
    views, samples = map(np.concatenate, zip(*(order.batch(step, batch_size) for step in range(240 // batch_size))))
    plain = ResidentOrder(37, seed=3).batch(0, 240)[1]
    for epoch in range(6):  # of 37 positions: 12 samples three times and one once
        first = plain[37 * epoch : 37 * epoch + 13]
        assert np.array_equal(samples[37 * epoch : 37 * epoch + 37], np.repeat(first, 3)[:37])
    assert len(set(zip(views.tolist(), samples.tolist(), strict=True))) == len(samples)


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_a_balanced_epoch_is_balanced_with_repeats_and_shows_no_sample_twice_alike(repeats):
    labels = np.repeat([0, 1, 2, 3], [50, 40, 8, 2])
    order = pickle.loads(pickle.dumps(BalancedOrder(labels, seed=1, repeats=repeats)))
    for epoch in range(3):
        views, samples = order.batch(epoch, 100)
        counts = np.bincount(labels[samples], minlength=4)
        assert abs(counts - 25).max() <= repeats and counts.sum() == 100
        assert len(set(zip(views.tolist(), samples.tolist(), strict=True))) == 100
        assert len(np.unique(samples[: 99 // repeats * repeats].reshape(-1, repeats), axis=1)[0]) == 1
    assert (views % 2**32 == 2).all()  # the epoch, where a sample has not been before: as without repeats


def test_a_subset_has_of_each_class_its_share_and_grows():
    labels = np.repeat([5, 7, 9, 11], [100, 50, 3, 1])
    masks = [stratified_subset(labels, count, 1, has_each=True) for count in range(len(labels) + 1)]
    assert [mask.sum() for mask in masks] == list(range(len(labels) + 1))
    assert all((larger >= smaller).all() for smaller, larger in itertools.pairwise(masks))
    assert all(set(labels[mask]) == {5, 7, 9, 11} for mask in masks[4:])
    for count in range(8, len(labels)):
        for label, size in ((5, 100), (7, 50)):
            assert abs((labels[masks[count]] == label).sum() - count * size / len(labels)) <= 2
    assert not np.array_equal(masks[60], stratified_subset(labels, 60, 2, has_each=True))
    shares = [stratified_subset(labels, count, 1, has_each=False) for count in range(len(labels) + 1)]
    assert all((larger >= smaller).all() for smaller, larger in itertools.pairwise(shares))
    for count, mask in enumerate(shares):
        assert mask.sum() == count
        for label, size in ((5, 100), (7, 50), (9, 3), (11, 1)):
            assert abs((labels[mask] == label).sum() - count * size / len(labels)) < 2


def test_resident_epochs_differ_from_each_other_and_between_seeds():
    first, second = (ResidentOrder(100, seed).batch(0, 200)[1] for seed in (1, 2))
    assert not np.array_equal(first[:100], first[100:])
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_a_resident_batch_without_overlap(world_size):
    parts = [ResidentOrder.local_positions(16, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts)) == list(range(16))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("sizes", [[1], [50], [3, 0, 41, 7], [11] * 8])
@pytest.mark.parametrize("num_lanes", [1, 4, 24])
def test_stream_epochs_show_each_sample_once(sizes, num_lanes):
    order = StreamOrder(sizes, seed=5, num_lanes=num_lanes, window=4)
    everything = sorted((shard, row) for shard, size in enumerate(sizes) for row in range(size))
    samples = stream_samples(order, 0, 2 * sum(sizes))
    for epoch in range(2):
        assert sorted((shard, row) for e, shard, row in samples if e == epoch) == everything
    if sum(sizes) > 10:
        assert samples[: sum(sizes)] != [(0, s, r) for _, s, r in samples[sum(sizes) :]]


def test_a_stream_is_found_in_the_middle_without_its_beginning():
    order = StreamOrder([30, 12], seed=1, num_lanes=5, window=4)
    whole = stream_samples(order, 0, 84)
    fresh = pickle.loads(pickle.dumps(StreamOrder([30, 12], seed=1, num_lanes=5, window=4)))
    assert stream_samples(fresh, 50, 34) == whole[50:]


def test_lanes_are_read_from_their_own_contiguous_part():
    order = StreamOrder([100], seed=0, num_lanes=7, window=8)
    lengths = [order.lane_length(lane) for lane in range(7)]
    assert sum(lengths) == 100 and max(lengths) - min(lengths) == 1
    assert [order.lane_start(lane) for lane in range(7)] == [sum(lengths[:lane]) for lane in range(7)]


def test_class_sorted_streams_are_mixed():
    # one shard of 10 classes in order: a batch of 128 drawn at random lacks a class once in 70,000 batches
    order = StreamOrder([10_000], seed=2, num_lanes=24, window=64)
    classes = [row // 1000 for _, _, row in stream_samples(order, 0, 128)]
    assert len(set(classes)) == 10


def test_derived_seeds_depend_on_every_part():
    seeds = {derived_seed(1, "a", 2), derived_seed(1, "a", 3), derived_seed(1, "b", 2), derived_seed(2, "a", 2)}
    assert len(seeds) == 4 and derived_seed(1, "a", 2) in seeds
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_stratified_holdout_takes_its_share_of_each_class_and_never_the_last_image():
    labels = np.array([0] * 50 + [1] * 10 + [2])
    mask = stratified_holdout(labels, 0.2, seed=0)
    assert [int(mask[labels == label].sum()) for label in range(3)] == [10, 2, 0]
    assert stratified_holdout(labels, 0.99, seed=0)[labels == 1].sum() == 9
    assert not np.array_equal(mask, stratified_holdout(labels, 0.2, seed=1))


def test_hashes_take_their_share_and_differ_between_shards_and_purposes():
    masks = [row_hashes(7, "holdout", shard, 100_000) < hash_limit(0.1) for shard in range(2)]
    masks.append(row_hashes(7, "subset", 0, 100_000) < hash_limit(0.1))
    # binomial: standard deviation 95 of 10,000
    assert all(abs(int(mask.sum()) - 10_000) < 500 for mask in masks)
    assert (masks[0] & masks[1]).sum() < 1500 and (masks[0] & masks[2]).sum() < 1500
    hashes = row_hashes(0, "holdout", 0, 1000)
    assert not (hashes < hash_limit(0.0)).any() and (hashes < hash_limit(1.0)).all()
    assert np.array_equal(row_hashes(7, "holdout", 0, 50) < hash_limit(0.1), masks[0][:50])


def test_more_classes_than_places_are_drawn_as_far_as_they_go():
    order = BalancedOrder(np.repeat(np.arange(6), 2), seed=0, repeats=3)
    _, samples = order.batch(0, 12)
    assert len(samples) == 12 and len(np.unique(samples)) == 4


def test_a_balanced_epoch_shows_every_class_equally_often_and_its_images_evenly():
    labels = np.repeat([0, 1, 3], [70, 8, 22])  # class 2 has no image
    order = BalancedOrder(labels, seed=5)
    for epoch in range(2):
        _, samples = order.batch(epoch, 100)
        shares = np.bincount(labels[samples], minlength=4)
        assert sorted(shares.tolist()) == [0, 33, 33, 34]
        times = np.bincount(samples, minlength=100)
        assert times[:70].max() == 1 and set(times[70:78]) == {4, 5} and set(times[78:]) <= {1, 2}
    assert not np.array_equal(order.batch(0, 100)[1], order.batch(1, 100)[1])
    assert np.array_equal(pickle.loads(pickle.dumps(order)).batch(1, 100)[1], order.batch(1, 100)[1])
