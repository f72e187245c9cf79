"""Streams: each sample once an epoch, classes mixed, waiting told."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images, write_shard

from modeling_vit_scratch.data.class_mix import NUM_BATCHES, ClassMix, expected_classes
from modeling_vit_scratch.data.order import ResidentOrder, StreamOrder
from modeling_vit_scratch.data.sources import open_source

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import stream_order  # noqa: E402

# ---------------------------------------------------------------- each sample once an epoch


@pytest.mark.parametrize("streaming", [False, True], ids=["at random", "streamed"])
@pytest.mark.parametrize("num_shards", stream_order.SHARDS)
def test_an_epoch_shows_each_sample_once_over_any_ranks_and_going_on_with_others(tmp_path, num_shards, streaming):
    stream_order.write_shards(tmp_path / "set", stream_order.SHARDS[num_shards])
    source = open_source(str(tmp_path / "set"), streaming=streaming, train_val_split=0)
    for parts in ([(1, 0)], [(2, 0)], [(3, 0)], [(1, 0), (3, 0)], [(3, 0), (2, 0), (1, 0)]):
        assert stream_order.epoch_counts(source, *parts) == (53, 0, 0), parts


@pytest.mark.parametrize("streaming", [False, True], ids=["at random", "streamed"])
@pytest.mark.parametrize("parts", [[(1, 1)], [(1, 3)], [(2, 1), (1, 3)], [(1, 3), (3, 0)]])
def test_an_epoch_shows_each_sample_once_over_any_workers(tmp_path, parts, streaming):
    stream_order.write_shards(tmp_path / "set", stream_order.SHARDS[5])
    source = open_source(str(tmp_path / "set"), streaming=streaming, train_val_split=0)
    assert stream_order.epoch_counts(source, *parts) == (53, 0, 0)


def test_a_sample_left_out_or_shown_twice_would_be_counted(tmp_path, monkeypatch):
    stream_order.write_shards(tmp_path / "set", stream_order.SHARDS[2])
    source = open_source(str(tmp_path / "set"), streaming=True, train_val_split=0)
    real = StreamOrder.window_permutation
    monkeypatch.setattr(StreamOrder, "window_permutation", lambda *where: np.zeros_like(real(*where)))
    seen, missing, twice = stream_order.epoch_counts(source, (1, 0))
    assert seen == 53 and missing == twice > 30  # each window of 4 shows its first sample alone


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("num_shards", [1, 2, 8])
def test_a_class_sorted_stream_is_mixed_nearly_as_a_permutation_mixes_it(num_shards):
    labels = np.repeat(np.arange(10), 500)
    shuffled = stream_order.classes_in_batches(labels, ResidentOrder(5000, 0), 64)
    streamed = stream_order.classes_in_batches(labels, StreamOrder([5000 // num_shards] * num_shards, 0), 64)
    # a batch of 64 random draws lacks a class once in 85 batches
    assert abs(shuffled.mean() - expected_classes(10, 64)) < 0.02
    assert streamed.mean() > 9.95 and streamed.min() >= 9


def test_expected_classes_are_those_that_draws_show():
    draws = np.random.default_rng(0).integers(0, 30, (20_000, 40))
    counted = np.mean([len(np.unique(row)) for row in draws])
    assert expected_classes(30, 40) == pytest.approx(counted, abs=0.05)  # standard error 0.01
    assert expected_classes(1, 5) == 1


def warning_of(labels, num_lanes, window=256, num_classes=10, batch_size=64):
    """What is said of a stream of one shard whose rows have these labels."""
    order = StreamOrder([len(labels)], 3, num_lanes, window)
    mix = ClassMix(order, num_classes)
    mix.is_done = True  # nothing is printed
    for step in range(NUM_BATCHES):
        found = []
        for epoch, lane, number in zip(*order.batch(step, batch_size), strict=True):
            index, offset = divmod(int(number), window)
            rows = np.concatenate([numbers for _, numbers in order.window_pieces(int(epoch), int(lane), index)])
            found.append(labels[rows[order.window_permutation(int(epoch), int(lane), index)[offset]]])
        mix.labels.append(np.array(found))
        mix.lanes.append(order.batch(step, batch_size)[1])
    return mix.warning()


def test_a_stream_whose_batches_lack_classes_is_told_and_what_to_do():
    labels = np.repeat(np.arange(10), 500)
    for num_lanes, window in ((4, 256), (2, 64), (1, 256)):
        said = warning_of(labels, num_lanes, window)
        assert said.startswith("The first 20 batches of 64 images have ")
        assert "well-mixed ones would have about 10.0: the shards lie sorted by class" in said
        assert f"Raise --stream_lanes (now {num_lanes}) or --stream_window (now {window})" in said
    assert warning_of(labels, 24) is None and warning_of(labels, 4, window=1250) is None
    # 1,000 classes in order: 24 lanes show little more than 24 of the 62 that a batch would have
    said = warning_of(np.repeat(np.arange(1000), 500), 24, 20, num_classes=1000)
    assert 24 <= float(said.split()[8]) < 28 and "would have about 62.0" in said


def test_a_mixed_stream_of_rare_or_absent_classes_is_not_told():
    rng = np.random.default_rng(0)
    rare = np.where(rng.random(5000) < 0.97, 0, rng.integers(1, 10, 5000))
    for num_lanes in (2, 24):
        assert warning_of(rare, num_lanes) is None
        assert warning_of(rng.integers(0, 10, 5000), num_lanes, num_classes=1000) is None  # 10 of 1,000 names are used
        assert warning_of(rng.integers(0, 1000, 5000), num_lanes, num_classes=1000) is None
    assert warning_of(np.sort(np.where(rng.random(5000) < 0.4, 0, rng.integers(1, 10, 5000))), 3) is not None


def test_class_sorted_batches_are_said_once_by_the_first_rank(tmp_path, capsys):
    write_shard(tmp_path / "sorted" / "train.parquet", make_images(1, (2, 2)) * 300, [row // 30 for row in range(300)])
    source = open_source(str(tmp_path / "sorted"), streaming=True, train_val_split=0)
    for rank in (1, 0):
        data = stream_order.TrainingData(source, decoder(), 12, 0, rank, 2, 0, torch.device("cpu"), 2, 64)
        capsys.readouterr()
        for _ in range(2):
            assert sum(1 for _ in data.batches(0, NUM_BATCHES + 3)) == NUM_BATCHES + 3
        assert capsys.readouterr().err.count("the shards lie sorted by class") == 1 - rank


def decoder():
    return stream_order.Decoder(stream_order.ViTScratchImageProcessor(size={"height": 2, "width": 2}))
