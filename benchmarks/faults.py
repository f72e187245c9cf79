"""What goes wrong in a run, done for real: what it says, what is lost, whether it goes on to the same end. One table.

python benchmarks/faults.py                                                  every fault, eight minutes on one core
python benchmarks/faults.py --only shard                                     those whose name holds a word
    --output benchmarks/results/faults-cpu.json                              keeps the numbers

A tiny network learns 499 generated images from parquet shards, streamed, for 60 steps with a checkpoint every 20, with
dropout, augmentation, mixing and averaged weights. After each fault its cause is mended, the same command is given
again, and what it ends with is compared bit for bit with the run that nothing happened to: weights, averaged weights,
optimizer, published model, scores, metrics without timings. Every error must be one line without a traceback. The exit
code is 1 where a row is not as it should be.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from recorded import ROOT, markdown_table, write_record
from safetensors.torch import load_file
from started_runs import (
    LONGEST_END,
    NETWORK,
    RANDOM,
    SIDE,
    Started,
    data_flags,
    fingerprint,
    fork_server,
    generate,
    metrics_of,
    sha256,
    start,
    train_ranks,
    words_of,
    working_folder,
)

from modeling_vit_scratch.training.checkpointing import checkpoints, step_of

sys.path.insert(0, str(ROOT / "tests"))

from hub_stand_in import HubStandIn

STEPS, SAVE_STEPS = 60, 20
LONGEST_RUN = 240.0  # seconds after which a start is taken to hang
SAID = ("error: ", "stopped by a signal", "passing over", "Shard ")  # how the lines begin that a person must see


@dataclass
class Outcome:
    """What came of a fault."""

    fault: str
    said: str
    exit_code: int | None  # None: it hung
    lost: str
    same: bool | None = None  # whether the run ended as the one without the fault; None: there is nothing to go on to
    expected_code: int = 2

    @property
    def is_ok(self) -> bool:
        return self.exit_code == self.expected_code and self.same is not False and "Traceback" not in self.said


class Bench:
    """The images, the flags, and the runs in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.server = folder, fork_server()
        self.wholes: dict[tuple[str, int], dict[str, Any]] = {}
        self.data = folder / "set"
        generate(self.data, is_stream=True)

    def flags(self, data: Path | str | None = None, **changes: Any) -> list[str]:
        fixed = {
            "recipe": "cifar10", "image_size": SIDE, "max_steps": STEPS, "train_batch_size": 8, "train_val_split": 0.1,
            "logging_steps": 1, "save_steps": SAVE_STEPS, "eval_steps": 30, "report_to": "none", "cpu_threads": 1,
            **data_flags(data or self.data, is_stream=True), **RANDOM,
        }  # fmt: skip
        return words_of({**fixed, **changes})

    def copy_of_set(self, name: str) -> Path:
        return Path(shutil.copytree(self.data, self.folder / name))

    def begin(self, name: str, flags: list[str], num_processes: int = 1, **variables: str) -> Started:
        log = self.folder / f"{name}.log"
        return start(self.folder / name, log, flags, num_processes, self.server, has_pictures=False, **variables)

    def run(self, name: str, flags: list[str], **variables: str) -> Started:
        """The run of one process, ended."""
        started = self.begin(name, flags, **variables)
        if started.wait(LONGEST_RUN) is None:
            started.kill_all()
        return started

    def whole(self, name: str, flags: list[str], num_ranks: int = 1) -> dict[str, Any]:
        """What the run that nothing happens to ends with."""
        if (name, num_ranks) not in self.wholes:
            output = self.folder / f"whole-{name}-{num_ranks}"
            code = train_ranks(
                self.server, [*flags, "--output_dir", str(output)], output.with_suffix(".log"), num_ranks
            )
            if code != 0:
                raise SystemExit(f"A run without any fault ended with code {code}: see {output}.log")
            self.wholes[name, num_ranks] = fingerprint(output)
        return self.wholes[name, num_ranks]

    def ends_the_same(self, name: str, flags: list[str]) -> bool:
        """Whether the same command, given again, ends as the run that nothing happened to."""
        again = self.run(name, flags)
        return again.poll() == 0 and fingerprint(again.run) == self.whole("streamed", self.flags())

    def killed_run(self, name: str) -> Path:
        """The folder of a run that was killed before step 45: checkpoints of steps 20 and 40."""
        output = self.folder / name
        train_ranks(self.server, [*self.flags(), "--output_dir", str(output)], output.with_suffix(".log"), dies_at=45)
        return output


def wait_for_step(started: Started, step: int):
    """Returns when the run has taken so many steps; its first process then stands still until it is told to go on."""
    deadline = time.monotonic() + LONGEST_RUN
    while started.step() < step:
        if started.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"A run did not come to step {step}: see {started.log}")
        time.sleep(0.002)
    started.process.suspend()


def said(started: Started) -> str:
    """The lines for a person in what a run said, a traceback's first among them; of more than two, first and last."""
    lines = started.log.read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith((*SAID, "Traceback"))]
    if any(line.startswith("Traceback") for line in found) or len(found) <= 2:
        return " / ".join(found)
    return f"{found[0]} / ({len(found) - 2} more lines) / {found[-1]}"


def lost(run: Path) -> str:
    """The steps that were logged after the newest checkpoint."""
    rows, saved = metrics_of(run) if (run / "metrics.jsonl").exists() else [], checkpoints(run / "checkpoints")
    steps = (rows[-1]["step"] if rows else 0) - (step_of(saved[0]) if saved else 0)
    return f"{steps} steps" if steps > 0 else "nothing"


# ---------------------------------------------------------------- data


def change_rows(shard: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]):
    table = pq.read_table(shard)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), shard, row_group_size=20)


def last_shard(data: Path) -> Path:
    return sorted((data / "data").glob("train-*"))[-1]


def cut_image(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows[100]["image"]["bytes"] = rows[100]["image"]["bytes"][:200]
    return rows


def corrupt_image(bench: Bench) -> Iterator[Outcome]:
    """Half an image in the middle of a shard stops the run; once it is mended, the run goes on."""
    data = bench.copy_of_set("set-corrupt")
    change_rows(last_shard(data), cut_image)
    stopped = bench.run("corrupt", bench.flags(data))
    what = said(stopped), stopped.poll(), lost(stopped.run)
    shutil.copyfile(last_shard(bench.data), last_shard(data))
    yield Outcome("half an image in a stream", *what, bench.ends_the_same("corrupt", bench.flags(data)))


def corrupt_image_skipped(bench: Bench) -> Iterator[Outcome]:
    """One process leaves it out as if it had never been there, and two agree with one."""
    plain = {
        "config_overrides": NETWORK, "full_size_step": None, "mixup_alpha": 0, "cutmix_alpha": 0,
        "bce_target_thresh": None, "train_val_split": 0, "eval_steps": None,
    }  # fmt: skip
    data, without = bench.copy_of_set("set-skipped"), bench.copy_of_set("set-without")
    change_rows(last_shard(data), cut_image)
    change_rows(last_shard(without), lambda rows: rows[:100] + rows[101:])
    expected = bench.whole("without", bench.flags(without, **plain))
    flags = bench.flags(data, **plain, bad_images="skip")
    one = bench.run("skipped", flags)
    lines = [line for line in one.log.read_text().splitlines() if "left out" in line]
    is_same = one.poll() == 0 and fingerprint(one.run) == expected
    yield Outcome("half an image, --bad_images skip", " / ".join(lines), one.poll(), "the image", is_same, 0)
    two = bench.folder / "skipped-2"
    code = train_ranks(bench.server, [*flags, "--output_dir", str(two)], two.with_suffix(".log"), 2)
    lines = [line for line in two.with_suffix(".log").read_text().splitlines() if "left out" in line]
    pairs = zip(metrics_of(one.run), metrics_of(two), strict=True) if code == 0 else []
    is_close = code == 0 and all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in pairs if "loss" in a)
    is_named_alike = (one.run / "bad_images.json").read_text() == (two / "bad_images.json").read_text()
    fault = "the same on 2 processes (losses within 1e-4, the same images named)"
    yield Outcome(fault, " / ".join(lines), code, "the image", is_close and is_named_alike, 0)


def shard_disappears(bench: Bench) -> Iterator[Outcome]:
    data = bench.copy_of_set("set-shard")
    started = bench.begin("shard", bench.flags(data))
    wait_for_step(started, 2)
    os.rename(last_shard(data), data / "elsewhere")
    name = last_shard(bench.data).name
    started.process.resume()
    code = started.wait(LONGEST_RUN)
    what = said(started), code, lost(started.run)
    os.rename(data / "elsewhere", data / "data" / name)
    yield Outcome("a shard disappears while it is read", *what, bench.ends_the_same("shard", bench.flags(data)))


def network_fails(bench: Bench) -> Iterator[Outcome]:
    """A Hub on this machine fails in the middle of a stream: three times in a row, and for longer than is waited."""
    with HubStandIn() as hub:
        for name, times, fault in (
            ("network-short", 3, "the Hub answers 503 three times in the middle of a stream"),
            ("network-long", 6, "the Hub answers 503 for longer than 31 s"),
        ):
            hub.add("datasets", f"me/{name}", bench.data)
            hub.fail(f"me/{name}/resolve/", times=times, after=20)
            run, log = bench.folder / name, bench.folder / f"{name}.log"
            flags = [*bench.flags(f"me/{name}"), "--output_dir", str(run)]
            environment = hub.environment(bench.folder / "home")
            code = run_apart([sys.executable, str(ROOT / "run_train.py"), *flags], log, environment)
            what = said(Started(run, log, 0.0, psutil.Process(), lambda: None)), code, lost(run)
            if code == 2:
                code = run_apart([sys.executable, str(ROOT / "run_train.py"), *flags], log, environment)
            is_same = code == 0 and fingerprint(run) == bench.whole("streamed", bench.flags())
            yield Outcome(fault, *what, is_same, expected_code=0 if times == 3 else 2)


def run_apart(command: list[str], log: Path, environment: dict[str, str] | None = None) -> int:
    """The exit code of a command in a process of its own."""
    with open(log, "wb") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=LONGEST_RUN, check=False)
    return done.returncode


# ---------------------------------------------------------------- processes


def worker_killed(bench: Bench) -> Iterator[Outcome]:
    flags = bench.flags(dataloader_num_workers=2)
    started = bench.begin("worker", flags)
    wait_for_step(started, 25)
    started.process.children()[0].kill()
    started.process.resume()
    code = started.wait(LONGEST_RUN)
    what = said(started), code, lost(started.run)
    yield Outcome("a decoding worker takes SIGKILL", *what, bench.ends_the_same("worker", flags))


def rank_killed(bench: Bench) -> Iterator[Outcome]:
    """The other rank must end by itself, with an error."""
    flags = bench.flags()
    expected = bench.whole("streamed", flags, num_ranks=2)
    started = bench.begin("rank", flags, num_processes=2)
    wait_for_step(started, 25)
    began = time.monotonic()
    started.kill_rank(1)
    started.process.resume()
    code = started.wait(LONGEST_END)
    text = f"the launcher ends after {time.monotonic() - began:.1f} s"
    what = lost(started.run)
    again = train_ranks(bench.server, [*flags, "--output_dir", str(started.run)], bench.folder / "rank-again.log", 2)
    is_same = again == 0 and fingerprint(started.run) == expected
    yield Outcome("one of two ranks takes SIGKILL", text, code, what, is_same, expected_code=1)


def signals(bench: Bench) -> Iterator[Outcome]:
    for name, code in (("SIGTERM", 3), ("SIGINT", 3), ("SIGUSR1", 3), ("SIGKILL", -9)):
        started = bench.begin(name, bench.flags())
        wait_for_step(started, 25)
        started.process.send_signal(getattr(signal, name))
        with suppress(psutil.NoSuchProcess):
            started.process.resume()
        found = started.wait(LONGEST_RUN)
        what = said(started), found, lost(started.run)
        yield Outcome(name, *what, bench.ends_the_same(name, bench.flags()), expected_code=code)


# ---------------------------------------------------------------- disks

ON_A_SMALL_DISK = """
mount -t tmpfs -o size=64m none "$1" || exit 99
head -c $((64 * 1024 * 1024 - $2)) /dev/zero > "$1/filler"
disk=$1; kept=$3; shift 3
"$@" > "$kept/first.log" 2>&1; echo $? > "$kept/first.code"
cp -r "$disk/run" "$kept/first"
rm "$disk/filler"
"$@" > "$kept/second.log" 2>&1; echo $? > "$kept/second.code"
cp -r "$disk/run" "$kept/second"
"""


def disk_full(bench: Bench) -> Iterator[Outcome]:
    """A disk with room for so many bytes; then with more."""
    isolated = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"]
    expected = bench.whole("streamed", bench.flags())
    files = list(checkpoints(bench.folder / "whole-streamed-1" / "checkpoints")[0].iterdir())
    checkpoint = sum(-(-file.stat().st_size // 4096) * 4096 for file in files)  # in pages
    for name, room, save_steps in (
        ("metrics.jsonl", 12 * 1024, STEPS),
        ("a checkpoint", int(1.6 * checkpoint), SAVE_STEPS),
        ("the published model and its report", int(3.5 * checkpoint), SAVE_STEPS),
    ):
        disk, kept = (bench.folder / f"{kind}-{save_steps}-{room}" for kind in ("disk", "kept"))
        disk.mkdir()
        kept.mkdir()
        flags = [*bench.flags(save_steps=save_steps), "--output_dir", str(disk / "run")]
        command = [*isolated, str(disk), str(room), str(kept), sys.executable, str(ROOT / "run_train.py"), *flags]
        if run_apart(command, kept / "shell.log") == 99:
            raise SystemExit(f"No small disk can be mounted here: see {kept}/shell.log")
        first, second = (int((kept / f"{start}.code").read_text()) for start in ("first", "second"))
        stopped = Started(kept / "first", kept / "first.log", 0.0, psutil.Process(), lambda: None)
        is_same = second == 0 and fingerprint(kept / "second") == expected
        yield Outcome(f"the disk is full while {name} is written", said(stopped), first, lost(stopped.run), is_same)


def checkpoint_damaged(bench: Bench) -> Iterator[Outcome]:
    """Each file of the newest checkpoint in turn; the run must go on from the one before."""
    killed = bench.killed_run("damaged")
    names = sorted(file.name for file in (killed / "checkpoints" / "step-000040").iterdir())
    for what, damage in (("cut in half", cut), ("deleted", Path.unlink), ("changed in one bit", flip)):
        texts, codes, same = [], [], []
        for name in names:
            run = bench.folder / f"damaged-{what.split()[0]}-{name}"
            shutil.copytree(killed, run)
            damage(run / "checkpoints" / "step-000040" / name)
            again = bench.run(run.name, bench.flags())
            texts.append(said(again))
            codes.append(again.poll())
            went_back = again.beginning() == "went on from step 20" and texts[-1].startswith("passing over")
            same.append(
                again.poll() == 0 and went_back and fingerprint(again.run) == bench.whole("streamed", bench.flags())
            )
        fault = f"each of {', '.join(names)} of the newest checkpoint {what}"
        worst = next((code for code in codes if code != 0), 0)
        yield Outcome(fault, texts[0], worst, f"{SAVE_STEPS} steps", all(same), expected_code=0)


def cut(file: Path):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# ---------------------------------------------------------------- numbers and settings


def not_finite(bench: Bench) -> Iterator[Outcome]:
    """A rate at which the loss becomes infinite: every number in every checkpoint stays finite."""
    stopped = bench.run("rate", bench.flags(learning_rate=1e30, max_grad_norm=0, save_steps=1, save_total_limit=99))
    saved = checkpoints(stopped.run / "checkpoints")
    tensors = [load_file(folder / "model.safetensors") for folder in saved]
    is_finite = bool(saved) and all(torch.isfinite(t).all() for found in tensors for t in found.values())
    fault = f"--learning_rate 1e30; weights finite in all {len(saved)} checkpoints: {'yes' if is_finite else 'NO'}"
    yield Outcome(fault, said(stopped), stopped.poll(), lost(stopped.run), None if is_finite else False)


def refused(bench: Bench) -> Iterator[Outcome]:
    """Another recipe or precision in a run's folder: refused, and nothing of it touched."""
    for name, fault, changes, variables in (
        ("recipe", "another learning rate", {"learning_rate": 0.02}, {}),
        ("precision", "another precision", {}, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    ):
        run = bench.killed_run(f"refused-{name}")
        before = contents(run)
        again = bench.run(run.name, bench.flags(**changes), **variables)
        text, is_untouched = said(again), contents(run) == before
        is_same = is_untouched and bench.ends_the_same(run.name, bench.flags())
        yield Outcome(f"{fault} in the folder of a run", text, again.poll(), "nothing", is_same)


def contents(folder: Path) -> dict[str, str]:
    return {str(path): sha256(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


# ---------------------------------------------------------------- the table

FAULTS: dict[str, Callable[[Bench], Iterator[Outcome]]] = {
    "corrupt image": corrupt_image,
    "corrupt image skipped": corrupt_image_skipped,
    "shard": shard_disappears,
    "network": network_fails,
    "worker": worker_killed,
    "rank": rank_killed,
    "signal": signals,
    "disk": disk_full,
    "damaged checkpoint": checkpoint_damaged,
    "not finite": not_finite,
    "refused": refused,
}
HEADER = ["fault", "what it says", "exit code", "lost", "then ends the same", "ok"]


def cells(outcome: Outcome) -> list[str]:
    text = outcome.said.replace("|", "\\|")
    code = "hangs" if outcome.exit_code is None else str(outcome.exit_code)
    same = {True: "yes", False: "NO", None: ""}[outcome.same]
    return [outcome.fault, text, code, outcome.lost, same, "yes" if outcome.is_ok else "NO"]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help=f"a part of a name: {', '.join(FAULTS)}")
    parser.add_argument("--output", help="a JSON file for the table")
    arguments = parser.parse_args(words)
    chosen = [act for name, act in FAULTS.items() if arguments.only in name]
    if not chosen:
        parser.error(f"--only {arguments.only}: no fault's name holds it; there are {', '.join(FAULTS)}")
    datasets.disable_progress_bars()
    outcomes, began = [], time.monotonic()
    with working_folder("faults-") as folder:
        bench = Bench(folder)
        for act in chosen:
            for outcome in act(bench):
                outcome = replace(outcome, said=outcome.said.replace(f"{folder}/", ""))
                outcomes.append((outcome, cells(outcome)))
                print(f"{time.monotonic() - began:5.0f} s: {' | '.join(outcomes[-1][1])}", file=sys.stderr, flush=True)
    print(markdown_table(HEADER, [row for _, row in outcomes]))
    is_ok = all(outcome.is_ok for outcome, _ in outcomes)
    if arguments.output:
        rows = [{**asdict(outcome), "is_ok": outcome.is_ok} for outcome, _ in outcomes]
        write_record(arguments.output, "faults.py", words or sys.argv[1:], rows=rows)
    return int(not is_ok)


if __name__ == "__main__":
    sys.exit(main())
