"""Streams: each sample once an epoch, classes mixed, the Hub's failures outlived, its refusals in one line."""

import io
import json
import math
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_images
from hub_stand_in import HubStandIn
from safetensors.torch import load_file

from modeling_vit_scratch.data import remote
from modeling_vit_scratch.data.class_mix import NUM_BATCHES, ClassMix, expected_classes
from modeling_vit_scratch.data.examples import ParquetExamples
from modeling_vit_scratch.data.order import ResidentOrder, StreamOrder
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.recording import DataWait, Progress

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


def write_shard(path, images, labels):
    """A parquet shard of these images, five in a row group."""
    names = [f"class {index}" for index in range(max(labels) + 1)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path, batch_size=5)


# ---------------------------------------------------------------- trying again


class Answer(OSError):
    def __init__(self, status, **headers):
        super().__init__(f"{status} from nowhere")
        self.response = type("Response", (), {"status_code": status, "headers": headers})()


@pytest.mark.parametrize("error", [TimeoutError("10 s"), ConnectionResetError("gone"), Answer(503), Answer(500)])
def test_what_time_mends_is_tried_again_with_growing_waits_each_said_once(error, capsys):
    waits, failures = [], [error] * 3

    def read():
        if failures:
            raise failures.pop()
        return "content"

    assert remote.retried(read, "hf://datasets/me/ds/x.parquet", waits.append) == "content"
    assert waits == [1, 2, 4]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[1].startswith("Shard hf://datasets/me/ds/x.parquet: ")
    assert lines[1].endswith("; trying again in 2 s (3 of 6)")


def test_what_stays_broken_ends_in_one_line_that_says_how_to_go_on():
    waits = []

    def read():
        raise TimeoutError("the read timed out")

    with pytest.raises(UserError) as caught:
        remote.retried(read, "hf://x.parquet", waits.append)
    assert waits == [1, 2, 4, 8, 16] and sum(waits) < 60
    assert str(caught.value) == (
        "Shard hf://x.parquet could not be read in 6 tries: the read timed out. Start the same command again when the "
        "network is back: a run goes on from its last checkpoint."
    )


def test_a_hub_that_counts_requests_is_asked_again_when_it_says():
    waits, answers = [], [Answer(429, ratelimit='"resolvers";r=0;t=55'), Answer(429, **{"retry-after": "9999"})]

    def read():
        if answers:
            raise answers.pop(0)

    remote.retried(read, "hf://x.parquet", waits.append)
    assert waits == [55, remote.LONGEST_WAIT]


@pytest.mark.parametrize(
    "error, url",
    [(Answer(status), "hf://x.parquet") for status in (401, 403, 404)]
    + [(ValueError("no parquet"), "hf://x.parquet"), (TimeoutError("a slow disk"), "/data/x.parquet")],
)
def test_what_time_does_not_mend_is_not_tried_again(error, url):
    tries = []

    def read():
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        remote.retried(read, url, lambda seconds: pytest.fail("waited"))
    assert len(tries) == 1


def test_a_corrupt_local_shard_is_named_at_once(parquet_repo):
    root = parquet_repo(train=[11, 7])
    whole = root / "data" / "train-00001-of-00002.parquet"
    content = bytearray(whole.read_bytes())
    content[4:400] = b"\xff" * 396
    whole.write_bytes(content)
    examples = ParquetExamples([str(path) for path in sorted((root / "data").iterdir())], "image", "label")
    assert len(examples.read(0, range(11))) == 11
    with pytest.raises(UserError, match="train-00001-of-00002.parquet: row group 0 cannot be read as parquet"):
        examples.read(1, range(7))
    whole.write_bytes(content[:200])
    with pytest.raises(UserError, match="train-00001-of-00002.parquet: its footer cannot be read as parquet"):
        ParquetExamples([str(whole)], "image", "label")


# ---------------------------------------------------------------- the Hub's stand-in

# Runs one after another in one process, since importing takes longer than they do. Each: flags and a token.
DRIVER = """
import contextlib, io, json, os, sys
from modeling_vit_scratch.data import examples, remote
from modeling_vit_scratch.training.flags import main

examples.ROW_GROUP_CACHE_BYTES = 0  # each window asks the Hub
remote.WAITS = (0.01, 0.02, 0.03, 0.04, 0.05)
outcomes = {}
for name, (flags, token) in json.loads(sys.argv[1]).items():
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(flags)
    outcomes[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
print(json.dumps(outcomes))
"""
TINY = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=24"
COMMON = ["--recipe", "cifar10", "--config_overrides", TINY, "--cpu_threads", "1", "--report_to", "none",
          "--train_batch_size", "16"]  # fmt: skip
STREAMED = ["--streaming", "true", "--stream_lanes", "4", "--stream_window", "8"]


def card(num_rows: int) -> bytes:
    return f"""---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names: {{'0': class 0, '1': class 1, '2': class 2}}
  splits:
  - name: train
    num_examples: {num_rows}
    num_bytes: 1
---
""".encode()


def tar_of_one() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for ending, content in (("png", b"x"), ("cls", b"1")):
            info = tarfile.TarInfo(f"a.{ending}")
            info.size = 1
            archive.addfile(info, io.BytesIO(content))
    return held.getvalue()


@pytest.fixture(scope="module")
def hub_runs(tmp_path_factory):
    """(outcome of each run by name, folder of their outputs, the stand-in, the token that may read me/gated)."""
    folder = tmp_path_factory.mktemp("hub")
    root = folder / "repository"
    for shard, size in (("train-00000-of-00002", 40), ("train-00001-of-00002", 33), ("test-00000-of-00001", 9)):
        write_shard(root / "data" / f"{shard}.parquet", make_images(size, seed=size), [row % 3 for row in range(size)])
    with HubStandIn() as hub:
        for name in ("plain", "flaky", "down", "away", "gated", "private"):
            access = {name: True} if name in ("gated", "private") else {}
            hub.add("datasets", f"me/{name}", root, **access)
        hub.add("datasets", "me/stale", {**hub.repositories["datasets", "me/plain"].files, "README.md": card(80)})
        hub.add("datasets", "me/tars", {"train-0000.tar": tar_of_one()})
        broken = hub.add("datasets", "me/broken", root)
        shard = "data/train-00001-of-00002.parquet"
        content = bytearray(broken.files[shard])
        start = pq.ParquetFile(io.BytesIO(bytes(content))).metadata.row_group(0).column(0).data_page_offset
        content[start : start + 40] = b"\xff" * 40
        broken.files[shard] = bytes(content)
        # each has its row counts read and some row groups, then fails
        hub.fail("me/flaky/resolve/", times=2, status=503, after=40)
        hub.fail("me/flaky/resolve/", times=1, status=None, after=50)
        hub.fail("me/down/resolve/", times=6, status=503, after=40)  # one read's tries
        hub.fail("me/away/resolve/", times=math.inf, status=502)
        right = hub.token("friend", reads=["me/gated", "me/private"])
        other, wrong = hub.token("stranger"), "hf_wrong" + "0" * 29

        def flags(name, repository, *more, streamed=True):
            given = ["--dataset_name", repository, "--output_dir", str(folder / "runs" / name), *more]
            return [*COMMON, *(STREAMED if streamed else []), *given]

        short = ("--max_steps", "2", "--train_val_split", "0")
        going_on = flags("down", "me/down", "--num_train_epochs", "2", "--save_steps", "1", "--logging_steps", "1")
        runs = {
            "plain": (flags("plain", "me/plain", "--num_train_epochs", "2"), None),
            "flaky": (flags("flaky", "me/flaky", "--num_train_epochs", "2"), None),
            "worker": (flags("worker", "me/plain", "--num_train_epochs", "2", "--dataloader_num_workers", "1"), None),
            "down": (going_on, None),
            "down, again": (going_on, None),
            "away": (flags("away", "me/away", *short), None),
            "broken": (flags("broken", "me/broken", *short), None),
            "stale": (flags("stale", "me/stale", *short), None),
            "tars": (flags("tars", "me/tars", *short), None),
            "gated, no token": (flags("1", "me/gated", *short), None),
            "gated, terms not accepted": (flags("2", "me/gated", *short), other),
            "gated, wrong token": (flags("3", "me/gated", *short), wrong),
            "gated, not streamed": (flags("4", "me/gated", *short, streamed=False), None),
            "private, no token": (flags("5", "me/private", *short), None),
            "private, another's token": (flags("6", "me/private", *short), other),
            "gated, right token": (flags("gated", "me/gated", *short), right),
            "private, right token": (flags("private", "me/private", *short, streamed=False), right),
        }
        environment = {**hub.environment(folder / "home"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DRIVER, json.dumps(runs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1]), folder / "runs", hub, (right, other, wrong)


def only_error(outcome):
    """The one line of a run that a person has to mend something for."""
    assert outcome["code"] == 2, outcome
    lines = [line for line in outcome["err"].splitlines() if line and not line.startswith("Shard ")]
    assert len(lines) == 1 and "Traceback" not in outcome["err"], outcome["err"]
    return lines[0]


def same_weights(*outputs):
    first, second = (load_file(output / "model" / "model.safetensors") for output in outputs)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_stream_that_fails_and_comes_back_trains_the_same_weights_bit_for_bit(hub_runs):
    outcomes, folder, hub, _ = hub_runs
    assert outcomes["plain"]["code"] == outcomes["flaky"]["code"] == 0, outcomes["flaky"]["err"]
    said = [line for line in outcomes["flaky"]["err"].splitlines() if line.startswith("Shard ")]
    assert len(said) == 3 and sum("the server answered 503; trying again in" in line for line in said) == 2
    assert all(fault.times in (0, math.inf) for fault in hub.faults)  # each of them was met
    assert "Shard" not in outcomes["plain"]["err"]
    assert same_weights(folder / "plain", folder / "flaky")
    assert same_weights(folder / "plain", folder / "worker")


def test_streams_have_a_length_and_train_for_epochs(hub_runs):
    outcomes, folder, *_ = hub_runs
    results = json.loads((folder / "plain" / "results.json").read_text())
    assert results["steps"] == math.ceil(2 * results["dataset"]["splits"]["train"] / 16)
    assert "2.0" in outcomes["plain"]["out"] or "2 epochs" in outcomes["plain"]["out"]


def test_a_hub_that_is_gone_for_good_ends_the_run_in_one_line_and_the_same_command_goes_on(hub_runs):
    outcomes, folder, *_ = hub_runs
    error = only_error(outcomes["down"])
    assert error.startswith("error: Shard hf://datasets/me/down@") and "could not be read in 6 tries" in error
    assert "the server answered 503. Start the same command again when the network is back" in error
    assert outcomes["down"]["err"].count("trying again in") == 5
    assert outcomes["down, again"]["code"] == 0
    before, after = (re.findall(r"step (\d+)/", outcomes[name]["out"]) for name in ("down", "down, again"))
    assert before and int(after[0]) == int(before[-1]) + 1
    assert same_weights(folder / "plain", folder / "down")
    error = only_error(outcomes["away"])  # it answers for the repository, never for a file
    assert "could not be read in 6 tries: the server answered 502" in error and not (folder / "away").exists()


def test_a_broken_shard_on_the_hub_is_not_asked_for_again(hub_runs):
    outcomes, *_ = hub_runs
    assert "row group 0 cannot be read as parquet" in outcomes["broken"]["err"]
    assert outcomes["broken"]["code"] == 2 and "trying again" not in outcomes["broken"]["err"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("gated, no token", "me/gated is gated: accept its terms at http"),
        ("gated, no token", "then log in with `hf auth login` or set HF_TOKEN."),
        ("gated, not streamed", "me/gated is gated: accept its terms at http"),
        ("gated, terms not accepted", "me/gated is gated and the account of this token may not read it: accept"),
        ("gated, wrong token", "The Hub refuses this token for me/gated: it is mistyped, expired or revoked."),
        ("private, no token", "No dataset 'me/private' on the Hub (or it is private: `hf auth login`)."),
        ("private, another's token", "(or it is private, and this token's account may not read it)"),
        ("tars", "Fetch it first (hf download me/tars --repo-type dataset --local-dir FOLDER"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub_runs, name, message):
    assert message in only_error(hub_runs[0][name])


def test_a_right_token_reads_gated_and_private_data_and_is_written_nowhere(hub_runs):
    outcomes, folder, _, tokens = hub_runs
    for name in ("gated, right token", "private, right token"):
        assert outcomes[name]["code"] == 0, outcomes[name]
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 40
    for token in tokens:
        assert not [path for path in written if token.encode() in path.read_bytes()]
        assert token not in json.dumps(outcomes)


def test_rows_that_the_repositorys_card_counts_otherwise_are_said(hub_runs):
    outcomes, *_ = hub_runs
    assert outcomes["stale"]["code"] == 0, outcomes["stale"]
    assert outcomes["stale"]["err"].count("me/stale: its card says 80 train rows, its files hold 73") == 1
    assert "its card says" not in outcomes["plain"]["err"]


def test_row_counts_of_many_remote_shards_are_read_several_at_a_time(monkeypatch, parquet_repo, capsys):
    import threading
    import time

    from modeling_vit_scratch.data import examples

    path = next((parquet_repo(train=[4]) / "data").iterdir())
    footer, busy, most, lock = pq.read_metadata(path), [], [], threading.Lock()

    def slow_footer(url):
        with lock:
            busy.append(url)
            most.append(len(busy))
        time.sleep(0.02)
        with lock:
            busy.remove(url)
        return footer

    monkeypatch.setattr(examples, "read_footer", slow_footer)
    monkeypatch.setattr(examples, "LONG_SECONDS", 0.03)
    urls = [f"hf://datasets/me/ds/{index}.parquet" for index in range(60)]
    found = ParquetExamples(urls, "image", "label")
    assert found.shard_sizes == [4] * 60
    assert 4 < max(most) <= examples.NUM_FOOTERS_AT_ONCE
    assert capsys.readouterr().err.count("Reading how many rows each of 60 shards has: ") == 1


# ---------------------------------------------------------------- waiting for data


def row(share, step=1):
    return {"step": step, "loss": 1.0, "train_accuracy": 0.5, "images_per_second": 9.0, "data_wait": share}


def test_a_device_that_waits_for_data_is_told_once_and_what_to_do(capsys):
    progress = Progress(100, 0, True, DataWait(num_workers=1, num_cores=8))
    for share in (0.9, 0.1, 0.3, 0.1, 0.3, 0.4, 0.8):  # the first one is the workers' start
        progress.show(row(share))
    lines = [line for line in capsys.readouterr().out.splitlines() if "the device waits" in line]
    remedy = "more --dataloader_num_workers (now 1, of 8 cores), or smaller images"
    assert lines == [f"the device waits for data 23% of the time: {remedy}"]  # the mean of 0.3, 0.1 and 0.3


def test_a_device_that_hardly_waits_is_not_told_and_a_full_machine_gets_other_advice():
    calm, full = DataWait(1, 8), DataWait(8, 8)
    assert not any(calm.advice(row(share)) for share in (0.9, 0.19, 0.1, 0.2, 0.19, 0.15))
    said = [full.advice(row(0.5)) for _ in range(5)]
    assert said == [None, None, None, "the device waits for data 50% of the time: smaller images, or more cores "
                    "(all 8 decode)", None]  # fmt: skip
