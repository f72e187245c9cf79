"""Streams from a Hub: its failures outlived, its refusals in one line."""

import io
import json
import math
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_images, write_shard
from hub_stand_in import HubStandIn
from safetensors.torch import load_file

from modeling_vit_scratch.data import remote
from modeling_vit_scratch.data.examples import ParquetExamples
from modeling_vit_scratch.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


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


def files_by_class(**counts: int) -> dict[str, bytes]:
    """PNGs in a folder a class, a split each, as the Hub keeps folders of images."""
    files = {}
    for split, count in counts.items():
        for index, image in enumerate(make_images(count, seed=count)):
            held = io.BytesIO()
            image.save(held, format="PNG")
            files[f"{split}/{('cat', 'dog', 'emu')[index % 3]}/{index}.png"] = held.getvalue()
    return files


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
        hub.add("datasets", "me/files", files_by_class(train=12, test=6))
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
            "files": (flags("files", "me/files", *short, streamed=False), None),
            "files, streamed": (flags("0", "me/files", *short), None),
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
        ("files, streamed", "me/files is stored as single files; --streaming true reads parquet and webdataset."),
        ("tars", "Fetch it first (hf download me/tars --repo-type dataset --local-dir FOLDER"),
    ],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub_runs, name, message):
    assert message in only_error(hub_runs[0][name])


def test_a_folder_of_images_on_the_hub_trains(hub_runs):
    outcomes, folder, *_ = hub_runs
    assert outcomes["files"]["code"] == 0, outcomes["files"]
    results = json.loads((folder / "files" / "results.json").read_text())
    assert results["class_names"] == ["cat", "dog", "emu"] and results["dataset"]["splits"] == {"train": 12, "test": 6}


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
