"""Kills a run again and again, resumes it each time, and compares what it ends with with the uninterrupted run's.

python benchmarks/kill_and_resume.py --kills 50                                     a folder of images, kept decoded
python benchmarks/kill_and_resume.py --kills 50 --streaming                         parquet shards, 0 to 2 workers
python benchmarks/kill_and_resume.py --kills 20 --streaming --num_processes 2       accelerate launch, two ranks
    --output benchmarks/results/kill-and-resume-cpu.json                            keeps the numbers

SIGKILL strikes at drawn moments: while a run starts, trains, writes a checkpoint, or scores and publishes at its end.
With two processes it strikes all of them or one rank alone, after which the other must end by itself within a minute.
The network has dropout, stochastic depth and patch dropout, the images flips, RandAugment, colour jitter, erasing,
mixup and CutMix, the weights an average; images are generated. What must be equal, bit for bit: the weights, the
averaged weights, the optimizer's state, the published model, the scores, and metrics.jsonl without its timings. The
exit code is 1 where anything differs.

One process is forked from a server that has imported everything, so that a kill costs about a second and not the ten
of importing. Each start takes the next of --dataloader_num_workers.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from recorded import write_record
from started_runs import (
    LONGEST_END,
    POLL,
    RANDOM,
    SIDE,
    Started,
    data_flags,
    fingerprint,
    fork_server,
    generate,
    start,
    words_of,
)

from modeling_vit_scratch.training.checkpointing import checkpoints, step_of

LONGEST_RUN = 1800.0  # seconds after which a start is taken to hang


def run_flags(data: Path, is_stream: bool, steps: int) -> list[str]:
    """The flags of the run, but for its folder and its workers."""
    flags = {
        "recipe": "cifar10", "image_size": SIDE, "max_steps": steps, "train_batch_size": 32, **RANDOM,
        "train_val_split": 0.1, "logging_steps": 1, "save_steps": max(1, steps // 50),
        "eval_steps": max(1, steps // 10), "report_to": "none", "cpu_threads": 1, **data_flags(data, is_stream),
    }  # fmt: skip
    return words_of(flags)


# ---------------------------------------------------------------- when


@dataclass
class Moment:
    """When a kill strikes: `seconds` after a start, or after what `kind` says that follows a step; on whom."""

    kind: str  # start-up, training, saving, ending
    after_step: int
    seconds: float
    rank: int | None = None  # None: every process


@dataclass
class Pace:
    """How long the uninterrupted run took: to its first step, for a step, and from its last step to its end."""

    start_up: float
    step: float
    ending: float
    total: float


def draw_moment(rng: np.random.Generator, done: int, steps: int, left: int, pace: Pace, num_processes: int) -> Moment:
    """The moment of the next kill of a run that has come to step `done`, when `left` kills are still to come."""
    kind = str(rng.choice(["start-up", "training", "saving"], p=[0.2, 0.5, 0.3]))
    if left == 1 and rng.random() < 0.5:
        kind = "ending"
    # so that the kills share the steps that are left
    step = min(steps - 1, done + 1 + int(rng.uniform(0, 2 * (steps - done) / (left + 1))))
    # what was measured once may go faster another time
    longest = {"start-up": 0.8 * pace.start_up, "training": 2 * pace.step, "saving": 0.01, "ending": 0.5 * pace.ending}
    rank = int(rng.integers(num_processes)) if num_processes > 1 and rng.random() < 0.4 else None
    rank = None if kind == "start-up" else rank  # there may be none yet
    return Moment(kind, step, float(rng.uniform(0, longest[kind])), rank)


def wait_for_moment(moment: Moment, started: Started, steps: int) -> bool:
    """True at that moment of the run; False if the run has ended before."""
    conditions: list[Callable[[], bool]] = []
    if moment.kind != "start-up":
        step = steps if moment.kind == "ending" else moment.after_step
        conditions = [lambda: started.step() >= step]
    if moment.kind == "saving":
        conditions.append(started.is_saving)
    deadline = time.monotonic() + LONGEST_RUN
    for is_met in conditions:
        while not is_met():
            if started.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"{started.run} hangs after {LONGEST_RUN:.0f} s; its output: {started.log}")
            time.sleep(POLL)
    return started.wait(moment.seconds) is None


# ---------------------------------------------------------------- the soak


class Soak:
    """One set, one uninterrupted run and one that is killed, in a folder of their own."""

    def __init__(self, folder: Path, steps: int, is_stream: bool, num_processes: int, workers: list[int]):
        self.folder, self.steps, self.num_processes, self.workers = folder, steps, num_processes, workers
        generate(folder / "set", is_stream)
        self.flags = run_flags(folder / "set", is_stream, steps)
        self.num_starts = 0
        self.started: Started | None = None
        self.server = fork_server() if num_processes == 1 else None

    def start(self, name: str) -> Started:
        """The run of this name, started with the next number of workers."""
        flags = self.flags
        if self.workers:
            flags = [*flags, "--dataloader_num_workers", str(self.workers[self.num_starts % len(self.workers)])]
        self.num_starts += 1
        log = self.folder / f"{name}-{self.num_starts}.log"
        self.started = start(self.folder / name, log, flags, self.num_processes, self.server)
        return self.started

    def stop(self):
        """Ends what still runs: a run does not outlive an error of the soak or Ctrl-C."""
        if self.started is not None and self.started.poll() is None:
            self.started.kill_all()

    def finish(self, started: Started):
        """Waits for the end of a run that nobody kills. Exits where it fails."""
        code = started.wait(LONGEST_RUN)
        if code != 0:
            tail = "\n".join(started.log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"A start that nobody killed ended with code {code}; the end of {started.log}:\n{tail}")

    def run_whole(self) -> Pace:
        """The uninterrupted run, and how long its parts took."""
        began, marks = time.monotonic(), {}
        started = self.start("whole")
        for step in (1, self.steps):
            wait_for_moment(Moment("training", step, 0.0), started, self.steps)
            marks[step] = time.monotonic()
        self.finish(started)
        ended = time.monotonic()
        training = marks[self.steps] - marks[1]
        return Pace(marks[1] - began, training / self.steps, ended - marks[self.steps], ended - began)

    def run_broken(self, num_kills: int, pace: Pace, seed: int) -> list[dict[str, Any]]:
        """The run that is killed so often, to its end; what each kill met. A line is printed for each."""
        rng, kills = np.random.default_rng(seed), []
        for number in range(1, num_kills + 1):
            saved = checkpoints(self.folder / "broken" / "checkpoints")
            done, left = step_of(saved[0]) if saved else 0, num_kills - number + 1
            moment = draw_moment(rng, done, self.steps, left, pace, self.num_processes)
            started = self.start("broken")
            if not wait_for_moment(moment, started, self.steps):
                self.finish(started)
                print(f"kill {number} of {num_kills} ({moment.kind}) came too late: the run was finished", flush=True)
                return kills
            kills.append(self.kill(started, moment))
            print(f"kill {number} of {num_kills}: {describe(kills[-1])}", flush=True)
        started = self.start("broken")
        self.finish(started)
        print(f"the last start {started.beginning()}", flush=True)
        return kills

    def kill(self, started: Started, moment: Moment) -> dict[str, Any]:
        """Strikes at this moment, which is now; what it met."""
        met = {"step": started.step(), "is_saving": started.is_saving()}
        if moment.rank is None:
            started.kill_all()
        else:
            met |= self.kill_one_rank(started, moment.rank)
        return {**asdict(moment), **met, "beginning": started.beginning()}

    def kill_one_rank(self, started: Started, rank: int) -> dict[str, Any]:
        """Kills a rank and waits for the others, who must end by themselves with an error."""
        began = time.monotonic()
        started.kill_rank(rank)
        code = started.wait(LONGEST_END)
        seconds = time.monotonic() - began
        if not code:
            raise SystemExit(f"Rank {rank} was killed; after {seconds:.0f} s the launcher's exit code is {code}.")
        return {"others_ended_after": round(seconds, 2), "exit_code": code}


def describe(kill: dict[str, Any]) -> str:
    """A kill in words."""
    where = f"at step {kill['step']}" if kill["step"] else "before its first step"
    text = f"{kill['kind']} + {kill['seconds']:.3f} s, {where}; it {kill['beginning']}"
    if kill["is_saving"]:
        text += ", a checkpoint half written"
    if kill["rank"] is not None:
        text += f"; rank {kill['rank']} alone, the others ended after {kill['others_ended_after']:.1f} s"
        text += f" with code {kill['exit_code']}"
    return text


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1000, help="length of the run: about 25 s on one core")
    parser.add_argument("--streaming", action="store_true", help="parquet shards, read as they come")
    parser.add_argument("--num_processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--dataloader_num_workers", help="of the starts in turn; 0,2,1 unless told, with --streaming")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", help="a JSON file for the numbers")
    arguments = parser.parse_args(words)
    if arguments.dataloader_num_workers and not arguments.streaming:
        parser.error("--dataloader_num_workers goes with --streaming: images kept decoded need no workers")
    return arguments


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    datasets.disable_progress_bars()
    workers = (arguments.dataloader_num_workers or "0,2,1").split(",") if arguments.streaming else []
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    soak = Soak(folder, arguments.steps, arguments.streaming, arguments.num_processes, [int(w) for w in workers])
    try:
        pace = soak.run_whole()
        print(
            f"uninterrupted: {pace.total:.1f} s, {pace.start_up:.1f} s of them before the first step, "
            f"{1000 * pace.step:.1f} ms a step",
            flush=True,
        )
        kills = soak.run_broken(arguments.kills, pace, arguments.seed)
    finally:
        soak.stop()
    whole, broken = fingerprint(folder / "whole"), fingerprint(folder / "broken")
    differing = [name for name in whole if whole[name] != broken[name]]
    if differing:
        print(f"DIFFERENT after {len(kills)} kills: {', '.join(differing)}. Both runs are kept in {folder}.")
    else:
        print(f"EQUAL after {len(kills)} kills: {', '.join(whole)}.")
        shutil.rmtree(folder)
    if arguments.output:
        write_record(
            arguments.output, "kill_and_resume.py", words or sys.argv[1:],
            settings={name: value for name, value in vars(arguments).items() if name != "output"},
            uninterrupted_seconds=asdict(pace), kills=kills, differing=differing, uninterrupted=whole, killed=broken,
        )  # fmt: skip
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
