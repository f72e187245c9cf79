"""Runs that must end alike do: resumed or not, on one process or several, in one part or three. One table.

python benchmarks/equality.py                                                every row, about ten minutes on one core
python benchmarks/equality.py --quick                                        some of each kind, 90 s
    --output benchmarks/results/equality-cpu.json                            keeps the numbers

Each row trains two runs on generated images (499 to train on, 101 to test: primes, which no batch, process or worker
divides) or takes one that another row trained. "Bits" wants everything equal but timings: weights, averaged weights,
optimizer state, published model, scores, metrics.jsonl. A number wants each logged loss as close as that, the columns
of learning rates equal and every image counted in the same cell of the confusion matrices. A killed run takes SIGKILL
in every process before the steps named, and is started again with the next number of decoding workers; checkpoints are
written every 5 steps. A start that does not end within five minutes hangs, and its row fails. The exit code is 1 where
a row fails.

Processes are forked with the variables that torchrun sets, share a core, and take one thread each; one row starts
`accelerate launch`. Rows with a number have patch dropout, drawn by image, but no other dropout and no mixing, and a
rate of 3e-4: at high rates training itself makes of a rounding a difference that can be seen.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
from recorded import markdown_table, write_record
from started_runs import (
    NETWORK,
    RANDOM,
    SIDE,
    data_flags,
    fingerprint,
    fork_server,
    generate,
    launch,
    metrics_of,
    train_ranks,
    words_of,
)

LONGEST_START = 300.0  # seconds after which a start is taken to hang
FLOAT32, FLOAT64 = 1e-4, 1e-9  # the largest differences of a loss

# What is trained on: the settings of `generate`, and flags. Images of two sizes are read at random and cropped.
SETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kept decoded": ({"is_stream": False}, {}),
    "read at random": ({"is_stream": False, "sides": (SIDE, SIDE + 5)}, {"random_resized_crop_scale": 0.5}),
    "streamed": ({"is_stream": True}, {}),
    "streamed, 1 shard": ({"is_stream": True, "shards": 1}, {}),
    "streamed, 7 shards, 5 lanes": ({"is_stream": True, "shards": 7}, {"stream_lanes": 5}),
    "streamed, 2 test images": ({"is_stream": True, "test": 2}, {"stream_lanes": 7}),
    "kept decoded, 97 and 13": ({"is_stream": False, "train": 97, "test": 13}, {"eval_batch_size": 7}),
}


@dataclass(frozen=True)
class Run:
    """A run of the images of one of SETS."""

    images: str
    steps: int
    flags: tuple[tuple[str, Any], ...]
    num_processes: int = 1
    workers: tuple[int, ...] = ()  # of its starts in turn
    kills: tuple[int, ...] = ()  # the steps before which its starts are killed
    is_launched: bool = False  # by `accelerate launch`

    def __str__(self) -> str:
        parts = ["1 process" if self.num_processes == 1 else f"{self.num_processes} processes"]
        parts += ["accelerate launch"] * self.is_launched
        parts += [f"workers {', '.join(map(str, self.workers))}"] if self.workers else []
        parts += [f"killed at {', '.join(map(str, self.kills))}"] if self.kills else []
        parts += [f"in {value} parts" for name, value in self.flags if name == "gradient_accumulation_steps"]
        return "; ".join(parts)


@dataclass(frozen=True)
class Row:
    """Two runs, and the largest difference that their losses may have; None: not one bit."""

    what: str
    first: Run
    other: Run
    limit: float | None = None
    is_quick: bool = False


@dataclass
class Outcome:
    """What a row's runs ended with. Losses: training and evaluation, as logged."""

    loss_difference: float
    are_rates_equal: bool
    differing: list[str] = field(default_factory=list)  # of what `fingerprint` names
    are_counts_equal: bool = True
    error: str | None = None

    def is_ok(self, limit: float | None) -> bool:
        if self.error is not None:
            return False
        if limit is None:
            return not self.differing
        return self.loss_difference <= limit and self.are_rates_equal and self.are_counts_equal


# ---------------------------------------------------------------- the rows


def rows() -> list[Row]:
    return [*resumed_rows(), *process_rows(), *part_rows(), *stream_rows()]


def resumed_rows() -> list[Row]:
    """Killed three times and going on with other workers, against the run that nothing happened to."""
    flags = (*RANDOM.items(), ("save_steps", 5), ("eval_steps", 12), ("learning_rate", 1e-3))
    found = []
    for images, workers in (
        ("kept decoded", [()]),
        ("read at random", [(0,), (1,), (3,), (0, 3, 1, 2)]),
        ("streamed", [(0,), (1,), (3,), (0, 3, 1, 2)]),
    ):
        for num_processes in (1, 2):
            whole = Run(images, 40, flags, num_processes, workers[0])
            for starts in workers:
                broken = Run(images, 40, flags, num_processes, starts, kills=(7, 18, 36))
                is_quick = (images, num_processes, len(starts)) in (("kept decoded", 1, 0), ("streamed", 2, 4))
                found.append(Row(f"resumed, {images}", whole, broken, is_quick=is_quick))
    launched = Run("streamed", 40, flags, 2, (0,), is_launched=True)
    found.append(Row("launcher, streamed", Run("streamed", 40, flags, 2, (0,)), launched))
    return found


def compared(images: str, steps: int, num_processes: int = 1, **flags: Any) -> Run:
    """A run that draws nothing by rank: no dropout but of patches, no mixing."""
    fixed = {"config_overrides": f"{NETWORK},patch_drop_rate=0.25", "full_size_step": 0.7}
    fixed |= {"learning_rate": 3e-4, "eval_steps": max(1, steps // 4)}
    return Run(images, steps, tuple({**fixed, **flags}.items()), num_processes)


OPTIMIZERS = ("adamw", "adam", "sgd", "muon")


def process_rows() -> list[Row]:
    """Two and three processes against one, at the same global batch of 32 images."""
    found = []
    for several in (2, 3):
        pair = (compared("kept decoded", 300, number, optim="adamw") for number in (1, several))
        found.append(Row("processes, adamw, float32", *pair, FLOAT32))
        for optim in OPTIMIZERS:
            flags = {"optim": optim, "dtype": "float64"}
            pair = (compared("kept decoded", 60, number, **flags) for number in (1, several))
            found.append(Row(f"processes, {optim}, float64", *pair, FLOAT64, is_quick=(optim, several) == ("muon", 2)))
        pair = (compared("kept decoded, 97 and 13", 60, number, dtype="float64") for number in (1, several))
        found.append(Row("processes, 97 and 13 images, float64", *pair, FLOAT64))
    return found


def part_rows() -> list[Row]:
    """A batch computed in two and three parts against the whole."""
    found = []
    for parts in (2, 3):
        pair = (compared("kept decoded", 300, gradient_accumulation_steps=number) for number in (1, parts))
        found.append(Row("parts, adamw, float32", *pair, FLOAT32))
        for optim in OPTIMIZERS:
            flags = {"optim": optim, "dtype": "float64"}
            pair = (compared("kept decoded", 60, gradient_accumulation_steps=number, **flags) for number in (1, parts))
            found.append(Row(f"parts, {optim}, float64", *pair, FLOAT64, is_quick=(optim, parts) == ("sgd", 3)))
    return found


def stream_rows() -> list[Row]:
    """Streams whose shards, lanes or test images several processes cannot share evenly; none may wait for ever."""
    found = []
    for images in ("streamed, 1 shard", "streamed, 7 shards, 5 lanes", "streamed, 2 test images"):
        for several in (2, 3):
            pair = (compared(images, 60, number, dtype="float64", ema_decay=0.9) for number in (1, several))
            is_quick = (images, several) == ("streamed, 2 test images", 3)
            found.append(Row(f"processes, {images}", *pair, FLOAT64, is_quick=is_quick))
    return found


# ---------------------------------------------------------------- training and comparing

# (flags, log, number of processes, the step before which all are killed) -> exit code; None: it hangs
Start = Callable[[list[str], Path, int, int | None], int | None]


class Trainer:
    """Trains each run once, in a folder of its own; images are generated when they are first asked for."""

    def __init__(self, folder: Path, start: Start):
        self.folder, self.start = folder, start
        self.trained: dict[Run, Path] = {}

    def outcome(self, row: Row) -> Outcome:
        """What the two runs of a row ended with, trained where they have not been yet."""
        try:
            return compare(self.train(row.first), self.train(row.other))
        except RuntimeError as error:
            return Outcome(math.nan, False, error=str(error))

    def train(self, run: Run) -> Path:
        """The folder of the finished run. Raises RuntimeError where a start hangs or does not end as it should."""
        if run in self.trained:
            return self.trained[run]
        output = self.folder / f"run-{len(self.trained)}"
        flags = [*self.flags(run), "--output_dir", str(output)]
        for number, dies_at in enumerate((*run.kills, None)):
            log = self.folder / f"{output.name}-{number}.log"
            words = [*flags, *self.workers(run, number)]
            code = launched(words, log) if run.is_launched else self.start(words, log, run.num_processes, dies_at)
            expected = 0 if dies_at is None else -9
            if code != expected:
                said = log.read_text(errors="replace").splitlines()[-1:] if log.exists() else []
                what = "hangs" if code is None else f"ended with code {code}"
                raise RuntimeError(f"start {number + 1} of {output.name} {what}: {' '.join(said)}")
        self.trained[run] = output
        return output

    def flags(self, run: Run) -> list[str]:
        settings, own = SETS[run.images]
        data = self.folder / run.images.replace(", ", "-").replace(" ", "-")
        if not data.exists():
            generate(data, **settings)
        fixed = {"recipe": "cifar10", "image_size": SIDE, "max_steps": run.steps, "train_batch_size": 32}
        fixed |= {"logging_steps": 1, "save_steps": run.steps, "report_to": "none", "cpu_threads": 1}
        return words_of({**fixed, **data_flags(data, settings["is_stream"]), **own, **dict(run.flags)})

    @staticmethod
    def workers(run: Run, start: int) -> list[str]:
        return words_of({"dataloader_num_workers": run.workers[start % len(run.workers)]}) if run.workers else []


def launched(flags: list[str], log: Path) -> int | None:
    """The exit code of `accelerate launch` with two processes; None if it hangs."""
    process = launch(flags, log, 2)
    try:
        return process.wait(LONGEST_START)
    except subprocess.TimeoutExpired:
        process.terminate()
        return None


def compare(first: Path, other: Path) -> Outcome:
    """How far apart two finished runs are."""
    before, after = fingerprint(first), fingerprint(other)
    pairs = list(zip(metrics_of(first), metrics_of(other), strict=True))
    losses = [abs(a[name] - b[name]) for a, b in pairs for name in ("loss", "eval_loss") if name in a]
    counted = [json.loads((run / "results.json").read_text(encoding="utf-8"))["confusion"] for run in (first, other)]
    return Outcome(
        loss_difference=max(losses),
        are_rates_equal=all(a.get("learning_rate") == b.get("learning_rate") for a, b in pairs),
        differing=[name for name in before if before[name] != after[name]],
        are_counts_equal=counted[0] == counted[1],
    )


# ---------------------------------------------------------------- the table

HEADER = ["compared", "this run", "with this", "steps", "wanted", "largest difference of losses", "rates", "weights",
          "counted scores", "ok"]  # fmt: skip


def cells(row: Row, outcome: Outcome) -> list[str]:
    wanted = "bits" if row.limit is None else f"{row.limit:.0e}"
    start = [row.what, str(row.other), str(row.first), str(row.first.steps), wanted]
    if outcome.error is not None:
        return [*start, outcome.error, "", "", "", "NO"]
    are_weights_equal = "weights" not in outcome.differing
    wrong = f"NO: {', '.join(outcome.differing)}" if row.limit is None and outcome.differing else "NO"
    return [
        *start,
        f"{outcome.loss_difference:.1e}" if outcome.loss_difference else "0",
        "equal" if outcome.are_rates_equal else "DIFFER",
        "equal bits" if are_weights_equal else "rounded otherwise" if row.limit else "DIFFER",
        "equal" if outcome.are_counts_equal else "DIFFER",
        "yes" if outcome.is_ok(row.limit) else wrong,
    ]


def from_record(record: dict[str, Any]) -> tuple[Row, Outcome]:
    """A row and its outcome, as --output keeps them."""

    def run(kept: dict[str, Any]) -> Run:
        return Run(**{**kept, "flags": tuple(map(tuple, kept["flags"]))})

    row = Row(record["what"], run(record["first"]), run(record["other"]), record["limit"], record["is_quick"])
    return row, Outcome(**{item.name: record[item.name] for item in fields(Outcome)})


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some rows of each kind")
    parser.add_argument("--output", help="a JSON file for the table")
    arguments = parser.parse_args(words)
    datasets.disable_progress_bars()
    server = fork_server()

    def start(flags: list[str], log: Path, num_processes: int, dies_at: int | None) -> int | None:
        return train_ranks(server, flags, log, num_processes, dies_at, LONGEST_START)

    folder = Path(tempfile.mkdtemp(prefix="equality-"))
    trainer, began, table, records = Trainer(folder, start), time.monotonic(), [], []
    for row in rows():
        if arguments.quick and not row.is_quick:
            continue
        outcome = trainer.outcome(row)
        table.append(cells(row, outcome))
        records.append({**asdict(row), **asdict(outcome), "is_ok": outcome.is_ok(row.limit)})
        print(f"{time.monotonic() - began:5.0f} s: {' | '.join(table[-1])}", file=sys.stderr, flush=True)
    is_ok = all(record["is_ok"] for record in records)
    print(markdown_table(HEADER, table))
    print(f"{len(table)} rows, {'all ok' if is_ok else f'NOT all ok, runs kept in {folder}'}")
    if is_ok:
        shutil.rmtree(folder)
    if arguments.output:
        write_record(arguments.output, "equality.py", words or sys.argv[1:], rows=records)
    return int(not is_ok)


if __name__ == "__main__":
    sys.exit(main())
