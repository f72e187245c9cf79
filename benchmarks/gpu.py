"""What a GPU is asked to show, in the order of its worth, within so many minutes: tests, steps, attention, recipes.

python benchmarks/gpu.py datasets/cifar10 --minutes 20
    --only steps,cifar10_60s        a part of it
    --output_dir results            where records go, benchmarks/results by default; what was printed goes beside them
python benchmarks/gpu.py datasets/cifar10 --quick --output_dir /tmp/try    the same commands, tiny, on the CPU

A part is begun only where its time, a guess for a GPU of the class of an H200, still fits into the minutes, and is
killed after twice as long: less is lost then than the machine's time. The recipes train in bf16. Exit code 1: a part
failed or was killed; the others ran.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from recorded import RESULTS, ROOT

PYTHON = shlex.quote(sys.executable)
STEP = f"{PYTHON} benchmarks/train_step.py --device {{device}}"
TRAIN = f"{PYTHON} run_train.py --dataset_name {{cifar10}} --report_to none"
QUICK_STEP = "--shapes nano --batch_size 4 --rounds 1"
QUICK_TRAIN = (
    "--max_steps 2 --train_batch_size 8 --preset nano --max_train_samples 400 --max_eval_samples 16 "
    "--torch_compile false --ema_decay none"
)


@dataclass
class Part:
    """A command with {device}, {cifar10} and {output}: its record, or the folder of a run, whose results are kept."""

    command: str
    seconds: int  # that it is thought to take
    output: str | None = None  # the record's name
    quick: str = ""  # the flags that make it tiny

    @property
    def is_run(self) -> bool:
        return self.command.startswith(TRAIN)


PARTS = {
    "tests": Part(f"{PYTHON} -m pytest -q -m gpu tests/test_gpu.py", 150),
    "steps": Part(
        f"{STEP} --shapes d192,vit_s_16 --batch_size 256 --rounds 9 --output {{output}}",
        60, "train-step-cuda.json", QUICK_STEP,
    ),
    "cifar10_60s": Part(
        f"{TRAIN} --recipe cifar10_60s --output_dir {{output}}", 130, "runs/cifar10_60s.json", QUICK_TRAIN
    ),
    "compiled": Part(
        f"{STEP} --shapes d192,vit_s_16 --batch_size 256 --rounds 9 --precisions bf16 --compile "
        "--networks ours,transformers,timm --output {output}",
        150, "train-step-compiled-cuda.json", QUICK_STEP,
    ),
    "attention": Part(
        f"{PYTHON} benchmarks/attention.py --device {{device}} --output {{output}}",
        20, "attention-cuda.json", "--rounds 1 --num_heads 1",
    ),
    "cifar10_5min": Part(
        f"{TRAIN} --recipe cifar10_5min --output_dir {{output}}", 380, "runs/cifar10_5min.json", QUICK_TRAIN
    ),
}  # fmt: skip


def run_part(name: str, part: Part, arguments: argparse.Namespace) -> str:
    """How it ended, in a word or two; its record is in place then, and what it printed beside the records."""
    device, precision = ("cpu", "no") if arguments.quick else ("cuda", "bf16" if part.is_run else "no")
    with tempfile.TemporaryDirectory() as scratch, (arguments.output_dir / f"{name}.log").open("w") as log:
        record = arguments.output_dir / (part.output or "")
        paths = {"cifar10": arguments.cifar10, "output": scratch if part.is_run else str(record)}
        command = part.command.format(device=device, **{key: shlex.quote(path) for key, path in paths.items()})
        command += f" {part.quick}" if arguments.quick else ""
        print(f"== {name}: {command}", flush=True)
        process = subprocess.Popen(
            shlex.split(command), cwd=ROOT, env={**os.environ, "ACCELERATE_MIXED_PRECISION": precision},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(None if arguments.quick else 2 * part.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "killed"
        if code == 0 and part.is_run:
            record.parent.mkdir(exist_ok=True)
            shutil.copy(Path(scratch) / "results.json", record)
    return "done" if code == 0 else f"failed with {code}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", help="a folder or a dataset of the Hub with CIFAR-10")
    parser.add_argument("--minutes", type=float, default=20, help="after which no part is begun [20]")
    parser.add_argument("--only", default=",".join(PARTS), help="parts with commas, in their order [all]")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="each for a step or two, on the CPU: whether it works")
    arguments = parser.parse_args()
    if Path(arguments.cifar10).exists():
        arguments.cifar10 = str(Path(arguments.cifar10).resolve())
    arguments.output_dir = arguments.output_dir.resolve()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if unknown := set(arguments.only.split(",")) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    start, ends = time.monotonic(), {}
    for name in arguments.only.split(","):
        begun = time.monotonic()
        if not arguments.quick and begun - start + PARTS[name].seconds > 60 * arguments.minutes:
            ends[name] = "no time left"
        else:
            ends[name] = run_part(name, PARTS[name], arguments)
        print(f"{name}: {ends[name]}, {time.monotonic() - begun:.0f} s", flush=True)
    return int(any(end.startswith(("failed", "killed")) for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
