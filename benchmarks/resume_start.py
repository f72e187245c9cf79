"""Seconds from the command to the first step of a run that goes on inside a streamed epoch. One table.

python benchmarks/resume_start.py                                       2,000,000 generated rows in 100 shards
python benchmarks/resume_start.py --dataset_name DIR                    and a set of yours, such as CIFAR-10's one shard
    --output benchmarks/results/resume-start-cpu.json                   keeps the numbers

Nobody trains up to the middle of the epoch: a run takes its first step and saves, and that checkpoint, with its step
moved to 10, 50 or 90 % of the epoch, is saved anew by the program's own `save_checkpoint`, which is all that a
checkpoint knows of its place in the data. Each start is a fresh process, ended after its first step; the least of
--repeats counts, since whatever else the machine does only adds to it. Shards were just written: they lie in memory.

The generated images are one PNG of 4 x 4 pixels, the labels differ. Beside the 100 shards of 20,000 rows, 20 row groups
each, there is one shard of 50,000 rows in a single row group, as the Hub's CIFAR-10 is.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from recorded import ROOT, markdown_table, write_record
from started_runs import NUM_CLASSES, words_of, working_folder

from modeling_vit_scratch.training.checkpointing import load_checkpoint, save_checkpoint

PLACES = (None, 0.1, 0.5, 0.9)  # shares of an epoch; None: a new run
BATCH_SIZE = 100
PARTS = ("import", "source", "data", "rest", "first batch", "step")
NETWORK = "hidden_size=16,num_hidden_layers=1,num_attention_heads=1,intermediate_size=16"

# Runs in a process of its own: the command, to its first step; prints the seconds at which each part was done.
MEASURED = """
import json, sys, time
began = float(sys.argv[1])
from modeling_vit_scratch.training import flags, loop
done = {"import": time.time() - began}

def marks(name, act):
    def marked(*args, **kwargs):
        result = act(*args, **kwargs)
        done.setdefault(name, time.time() - began)
        return result
    return marked

class Enough(Exception):
    pass

def first_batch(self, start, stop, read=loop.TrainingData.batches):
    done["rest"] = time.time() - began
    for batch in read(self, start, stop):
        done.setdefault("first batch", time.time() - began)
        yield batch

def advance(self):
    done["step"] = time.time() - began
    raise Enough

loop.source_of = marks("source", loop.source_of)
loop.TrainingData.__init__ = marks("data", loop.TrainingData.__init__)
loop.TrainingData.batches = first_batch
loop.Progress.advance = advance
try:
    loop.train(*flags.parse_arguments(sys.argv[2:]))
except Enough:
    print(json.dumps(done))
"""

# ---------------------------------------------------------------- the set


def write_set(folder: Path, num_shards: int, num_rows: int, row_group: int) -> Path:
    """Parquet shards of one tiny image and labels in turn; all are copies of the first."""
    held = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(held, "PNG")
    names = [f"class{label}" for label in range(NUM_CLASSES)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {
        "image": [{"bytes": held.getvalue(), "path": None}] * num_rows,
        "label": [row % NUM_CLASSES for row in range(num_rows)],
    }
    table = pa.table(rows, schema=features.arrow_schema)
    (folder / "data").mkdir(parents=True)
    first = folder / "data" / f"train-00000-of-{num_shards:05d}.parquet"
    pq.write_table(table, first, row_group_size=row_group)
    for shard in range(1, num_shards):
        shutil.copyfile(first, folder / "data" / f"train-{shard:05d}-of-{num_shards:05d}.parquet")
    return folder


# ---------------------------------------------------------------- going on


def run_flags(data: Path | str, run: Path) -> list[str]:
    flags = {
        "recipe": "cifar10", "dataset_name": data, "streaming": "true", "num_train_epochs": 1, "save_steps": 1,
        "train_batch_size": BATCH_SIZE, "train_val_split": 0, "config_overrides": NETWORK, "report_to": "none",
        "image_size": 4, "cpu_threads": 1, "dataloader_num_workers": 0, "output_dir": run,
    }  # fmt: skip
    return words_of(flags)


def first_checkpoint(flags: list[str], run: Path) -> Path:
    """The checkpoint of a run's first step, after which a signal ends it."""
    process = subprocess.Popen([sys.executable, str(ROOT / "run_train.py"), *flags], stdout=subprocess.DEVNULL)
    saved = run / "checkpoints" / "step-000001"
    while not saved.exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    if process.wait() != 3:
        raise SystemExit(f"The first step failed: run_train.py {' '.join(flags)} ended with code {process.returncode}.")
    return saved


def move(saved: Path, folder: Path, step: int) -> Path:
    """The checkpoint at another step, the only one of its folder."""
    held = load_checkpoint(saved)
    state = {**held.state, "position": {**held.state["position"], "step": step}}
    state = {name: value for name, value in state.items() if name != "step"}
    shutil.rmtree(folder, ignore_errors=True)
    return save_checkpoint(folder, step, held.model, held.optimizer, state, held.averaged)


def measure(flags: list[str]) -> dict[str, float]:
    """Seconds that each part of a start takes, to the end of its first step."""
    command = [sys.executable, "-c", MEASURED, str(time.time()), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        raise SystemExit(f"A start failed:\n{done.stderr}")
    ends = json.loads(done.stdout.splitlines()[-1])
    return {name: ends[name] - before for name, before in zip(PARTS, (0.0, *ends.values()), strict=False)}


def measure_set(name: str, data: Path | str, folder: Path, repeats: int) -> Iterator[dict[str, Any]]:
    """What a start takes at each of PLACES."""
    run = folder / "run"
    flags = run_flags(data, run)
    saved = first_checkpoint(flags, run)
    total_steps = load_checkpoint(saved).state["position"]["total_steps"]
    kept = Path(shutil.copytree(saved, folder / "step-000001"))
    for place in PLACES:
        step = 0 if place is None else round(place * total_steps)
        found = []
        for _ in range(repeats):
            if place is None:
                shutil.rmtree(run)
            else:
                move(kept, run / "checkpoints", step)
            found.append(measure(flags))
        best = min(found, key=lambda parts: sum(parts.values()))
        yield {"set": name, "rows": total_steps * BATCH_SIZE, "step": step, "of": total_steps, "seconds": best}


# ---------------------------------------------------------------- the table

HEADER = ["set", "starts at step", "import", "open the source", "order and network", "other", "first batch",
          "first step", "all, s", "without import"]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    seconds = row["seconds"]
    place = f"{row['step']:,} of {row['of']:,}" if row["step"] else f"0 of {row['of']:,}, a new run"
    total = sum(seconds.values())
    numbers = [*(seconds[part] for part in PARTS), total, total - seconds["import"]]
    return [row["set"], place, *(f"{number:.2f}" for number in numbers)]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", help="a folder of parquet shards to measure as well", metavar="DIR")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", help="a JSON file for the numbers")
    arguments = parser.parse_args(words)
    rows = []
    with working_folder("resume-start-") as folder:
        sets: dict[str, Path | str] = {
            "100 shards of 20,000 rows": write_set(folder / "many", 100, 20_000, 1_000),
            "1 shard, 1 row group of 50,000": write_set(folder / "one", 1, 50_000, 50_000),
        }
        if arguments.dataset_name:
            sets[Path(arguments.dataset_name).name] = Path(arguments.dataset_name).resolve()  # runs start elsewhere
        for number, (name, data) in enumerate(sets.items()):
            own = folder / f"runs-{number}"
            own.mkdir()
            for row in measure_set(name, data, own, arguments.repeats):
                rows.append(row)
                print(" | ".join(cells(row)), file=sys.stderr, flush=True)
    print(markdown_table(HEADER, list(map(cells, rows))))
    if arguments.output:
        write_record(arguments.output, "resume_start.py", words or sys.argv[1:], rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
