"""Tiny runs that scripts start beside themselves, kill and compare: their images, their processes, what they leave.

A run of one process or of several ranks is forked from a server that has imported everything: a start costs a second
and not the ten of importing. Ranks get the variables that torchrun sets; `launch` is for what the launcher itself does.
"""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
from PIL import Image
from recorded import ROOT

from modeling_vit_scratch.training.checkpointing import checkpoints
from modeling_vit_scratch.training.publishing import final_scores
from modeling_vit_scratch.training.recording import read_metrics

TIMINGS = ("images_per_second", "data_wait")
NUM_CLASSES, SIDE = 3, 16
LONGEST_END = 60.0  # seconds within which the other rank must end when one is killed
POLL = 0.002  # seconds

# ---------------------------------------------------------------- what is trained


def generate(folder: Path, is_stream: bool, train: int = 499, test: int = 101, shards: int = 3, sides: Any = (SIDE,)):
    """Images of noise tinted by their class: PNGs in class folders, or parquet shards of unequal lengths.

    Split sizes are primes unless told. sides: of the images in turn.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        labels = [number % NUM_CLASSES for number in range(count)]
        images = []
        for number, label in enumerate(labels):
            side = sides[number % len(sides)]
            pixels = rng.integers(0, 200, (side, side, 3), dtype=np.uint8)
            pixels[:, :, label] += 55
            images.append(Image.fromarray(pixels))
        if is_stream:
            write_shards(folder / "data", split, images, labels, shards)
            continue
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / f"class{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def write_shards(folder: Path, split: str, images: list[Any], labels: list[int], shards: int):
    """Parquet files of 20 rows a group; each shard is longer than the one before."""
    names = [f"class{label}" for label in range(NUM_CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    folder.mkdir(parents=True, exist_ok=True)
    bounds = sorted({round(len(images) * (index / shards) ** 1.5) for index in range(shards + 1)})
    for shard, (start, stop) in enumerate(pairwise(bounds)):
        rows = {"image": images[start:stop], "label": labels[start:stop]}
        path = folder / f"{split}-{shard:05d}-of-{len(bounds) - 1:05d}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=20)


NETWORK = "patch_size=4,hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
# everything that draws: dropout of units, branches and patches, augmentation, mixing, with averaged weights
RANDOM = {
    "config_overrides": f"{NETWORK},hidden_dropout_prob=0.1,drop_path_rate=0.1,patch_drop_rate=0.25",
    "full_size_step": 0.7, "auto_augment": "randaugment", "color_jitter": 0.3, "vertical_flip_prob": 0.25,
    "random_erasing_prob": 0.25, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "bce_loss": "true", "bce_target_thresh": 0,
    "ema_decay": 0.9,
}  # fmt: skip


def words_of(flags: dict[str, Any]) -> list[str]:
    """The command line of these flags, without those that are None."""
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def data_flags(data: Path, is_stream: bool) -> dict[str, Any]:
    """The flags that name what `generate` wrote."""
    if is_stream:
        return {"dataset_name": data, "streaming": "true", "stream_lanes": 6, "stream_window": 16}
    return {"train_dir": data / "train", "test_dir": data / "test"}


# ---------------------------------------------------------------- starting


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Forks processes from one that has imported everything, which it has when this returns."""
    # a killed process leaves a lock of tqdm's behind, of which the server's warden speaks at the end
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_vit_scratch.training.loop", "modeling_vit_scratch.results.report"])
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


def train_in_fork(
    flags: list[str],
    log: str,
    environment: dict[str, str] | None = None,
    dies_at: int | None = None,
    has_pictures: bool = True,
):
    """What a forked process does: run_train.py, with its output in a file.

    dies_at: the step before which it kills itself with SIGKILL. has_pictures: plots and report take longer to draw than
    a tiny run takes to train.
    """
    from modeling_vit_scratch.training import loop, publishing
    from modeling_vit_scratch.training.flags import main

    os.environ.update(environment or {})
    # its decoding workers are forked from it, as those of `python run_train.py`, not from a server of their own
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # what it said stays said when it is killed
    if not has_pictures:
        publishing.write_plots = publishing.write_report = lambda *_: None
    if dies_at is not None:
        real = loop.learning_rate_at

        def rate_or_death(step: int, *rest: Any) -> float:
            if step == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(step, *rest)

        loop.learning_rate_at = rate_or_death
    sys.exit(main(flags))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_ranks(
    server: Any, flags: list[str], log: Path, num_ranks: int = 1, dies_at: int | None = None, seconds: float = 300
) -> int | None:
    """The exit code of a run of so many forked processes: the first that is not 0; None if it hangs so long.

    The other ranks' output stands beside the log. No pictures are drawn.
    """
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    ranks = []
    for rank in range(num_ranks):
        place = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        place |= {name: str(num_ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        environment = {} if num_ranks == 1 else {**rendezvous, **place}
        own_log = str(log) if rank == 0 else f"{log}.{rank}"
        ranks.append(server.Process(target=train_in_fork, args=(flags, own_log, environment, dies_at, False)))
        ranks[-1].start()
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return next((code for code in codes if code != 0), 0)


def launch(flags: list[str], log: Path, num_processes: int) -> subprocess.Popen:
    """`accelerate launch` of the run on the CPU, going on beside us."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes", str(num_processes)]
    command += ["--main_process_port", str(free_port()), str(ROOT / "run_train.py"), *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    with open(log, "wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


@dataclass
class Started:
    """A run that goes on beside us: its folder, its first process, and its exit code once it has ended."""

    run: Path
    log: Path
    since: float  # of time.time()
    process: psutil.Process
    poll: Callable[[], int | None]

    def step(self) -> int:
        """The step of the newest row that this start wrote to metrics.jsonl; 0 before its first."""
        metrics = self.run / "metrics.jsonl"
        try:
            if metrics.stat().st_mtime < self.since:
                return 0
            with open(metrics, "rb") as file:
                file.seek(max(0, metrics.stat().st_size - 2048))
                lines = file.read().split(b"\n")
            return json.loads(lines[-2])["step"] if len(lines) > 1 else 0
        except (OSError, ValueError):
            return 0

    def is_saving(self) -> bool:
        """Whether a checkpoint of this start is half written, or an old one half removed."""
        try:
            partial = [path.stat().st_mtime for path in (self.run / "checkpoints").glob(".partial-*")]
        except OSError:
            return False
        return any(changed >= self.since for changed in partial)

    def beginning(self) -> str:
        """Where it went on, as it said."""
        said = self.log.read_text(errors="replace")
        found = re.search(r"going on from \S*step-0*(\d+)", said)
        if found:
            return f"went on from step {found.group(1)}"
        return "found the run finished" if ", finished:" in said else "began anew or had not said from where"

    def kill_all(self):
        """Ends every process of the run at once; stopped first, so that none starts another meanwhile."""
        family = [self.process]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.suspend()
                family += [child for child in member.children() if child not in family]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.wait(LONGEST_END)

    def kill_rank(self, rank: int):
        """Ends one rank of several; the launcher is their parent."""
        for child in self.process.children():
            if child.environ().get("RANK") == str(rank):
                child.kill()

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it has not ended after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL)
        return self.poll()


def start(
    run: Path, log: Path, flags: list[str], num_processes: int, server: Any, has_pictures: bool = True, **variables: str
) -> Started:
    """The run, started: forked where it is one process, by `accelerate launch` where it is several.

    has_pictures, and variables of the environment, are for a forked process.
    """
    since, flags = time.time(), [*flags, "--output_dir", str(run)]
    log.touch()
    if num_processes == 1:
        forked = server.Process(target=train_in_fork, args=(flags, str(log), variables, None, has_pictures))
        forked.start()
        return Started(run, log, since, psutil.Process(forked.pid), lambda: forked.exitcode)
    launched = launch(flags, log, num_processes)
    return Started(run, log, since, psutil.Process(launched.pid), launched.poll)


# ---------------------------------------------------------------- what it leaves


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without timings."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def fingerprint(run: Path) -> dict[str, Any]:
    """What a finished run leaves: SHA-256 of its tensor files and of its metrics without timings, and its scores.

    Averaged weights are None where there are none.
    """
    last = checkpoints(run / "checkpoints")[0]
    averaged = last / "averaged.safetensors"
    return {
        "weights": sha256((last / "model.safetensors").read_bytes()),
        "averaged weights": sha256(averaged.read_bytes()) if averaged.exists() else None,
        "optimizer": sha256((last / "optimizer.safetensors").read_bytes()),
        "published model": sha256((run / "model" / "model.safetensors").read_bytes()),
        "metrics": sha256(json.dumps(metrics_of(run)).encode()),
        "scores": final_scores(json.loads((run / "results.json").read_text(encoding="utf-8"))),
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def working_folder(prefix: str) -> Iterator[Path]:
    """A folder that is removed unless something goes wrong."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    except BaseException:
        print(f"What was written is kept in {folder}.", file=sys.stderr)
        raise
    shutil.rmtree(folder)
