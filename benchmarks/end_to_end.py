"""Images a second of whole training runs: run_train.py beside a loop in the way of transformers' example.

python benchmarks/end_to_end.py datasets/cifar10                           CIFAR-10, d192, batch 128, float32 and bf16
    --output benchmarks/results/end-to-end-cpu.json                        keeps the numbers

Each run is a process that the launcher starts: images decoded (or kept), flipped and cropped, logged every 10 steps,
1,000 held-out images scored every 50. The runs take turns; the clock starts after the first steps and stands while
scores are computed. "the step" is train_step.py's for ours, measured before and after each run of ours, for a shared
machine changes from minute to minute, and "of the step" what training reaches of those two. All use all cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peers import SHAPES, ours
from recorded import ROOT, markdown_table, write_record
from started_runs import working_folder
from train_step import PRECISION_NAMES, seconds, training_step

from modeling_vit_scratch.training.batch_parts import usual_parts_at_once
from modeling_vit_scratch.training.machine import keep_freed_memory
from modeling_vit_scratch.training.recording import read_metrics

SHAPE, BATCH_SIZE, LOGGING_STEPS, EVAL_STEPS, NUM_VALIDATION = "d192", 128, 10, 50, 1000
WARM_UP_STEPS = LOGGING_STEPS
RUNS = ("ours", "ours, streamed", "example", "example, 4 workers")


def launched(script: str, precision: str, flags: dict[str, Any]):
    words = ["accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_config.yaml")]
    words += ["--mixed_precision", precision, str(ROOT / script)]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        sys.exit(f"{script} ended with code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def our_run(dataset: str, precision: str, steps: int, is_stream: bool, folder: Path) -> dict[str, float]:
    shape = SHAPES[SHAPE]
    network = {
        "hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_layers, "pooling": "cls",
        "num_attention_heads": shape.num_heads, "intermediate_size": shape.hidden_size * shape.mlp_ratio,
        "use_cls_token": "true", "patch_drop_rate": 0,
    }  # fmt: skip
    flags = {
        "recipe": "cifar10", "optim": "adamw", "dataset_name": dataset, "train_batch_size": BATCH_SIZE,
        "max_steps": steps,
        "config_overrides": ",".join(f"{name}={value}" for name, value in network.items()), "report_to": "none",
        "logging_steps": LOGGING_STEPS, "eval_steps": EVAL_STEPS, "train_val_split": NUM_VALIDATION / 50_000,
        "output_dir": folder, "save_steps": steps,
    }  # fmt: skip
    launched("run_train.py", precision, {**flags, "streaming": "true"} if is_stream else flags)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row and row["step"] > WARM_UP_STEPS]
    images = BATCH_SIZE * LOGGING_STEPS
    training = sum(images / row["images_per_second"] for row in rows)
    return {
        "training": images * len(rows) / training,
        "data_wait": statistics.mean(row["data_wait"] for row in rows),
    }


def example_run(dataset: str, precision: str, steps: int, workers: int, folder: Path) -> dict[str, float]:
    folder.mkdir()
    output = folder / "times.json"
    shards = sorted(Path(dataset).rglob("train*.parquet"))
    if len(shards) != 1:
        sys.exit(f"{dataset} should hold one train*.parquet, as CIFAR-10 does; found {len(shards)}.")
    flags = {
        "train_file": shards[0], "max_steps": steps, "warm_up_steps": WARM_UP_STEPS, "shape": SHAPE,
        "train_batch_size": BATCH_SIZE, "logging_steps": LOGGING_STEPS, "eval_steps": EVAL_STEPS,
        "validation_images": NUM_VALIDATION, "dataloader_num_workers": workers, "output": output,
    }  # fmt: skip
    launched("benchmarks/example_loop.py", precision, flags)
    times = json.loads(output.read_text())
    return {"training": times["images"] / (times["seconds"] - times["evaluating"])}


def step_rate(precision: str, steps: int = 15) -> float:
    """Images a second of our training step alone, taken as run_train.py takes it."""
    shape = SHAPES[SHAPE]
    step = training_step(ours(shape), shape, BATCH_SIZE, precision, "cpu", usual_parts_at_once())
    taken = [seconds(step, "cpu") for _ in range(steps + 3)]
    return BATCH_SIZE / statistics.median(taken[3:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder of CIFAR-10 in the Hub's layout (parquet)")
    parser.add_argument("--max_steps", type=int, default=110)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precisions", default="no,bf16", help="no (float32) and bf16, with commas")
    parser.add_argument("--output", help="a JSON file to keep the numbers in")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()  # as run_train.py does, so that the step alone has no handicap
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "dataset")}
    measured: list[dict[str, Any]] = []
    with working_folder("end-to-end-") as folder:
        for turn in range(arguments.rounds):
            for precision in arguments.precisions.split(","):
                for name in RUNS:
                    place = folder / f"{turn}-{precision}-{name.replace(', ', '-').replace(' ', '-')}"
                    if name.startswith("ours"):
                        before = step_rate(precision)
                        run = our_run(arguments.dataset, precision, arguments.max_steps, "streamed" in name, place)
                        run["step"] = statistics.mean((before, step_rate(precision)))
                    else:
                        workers = 4 if "workers" in name else 0
                        run = example_run(arguments.dataset, precision, arguments.max_steps, workers, place)
                    measured.append({"run": name, "precision": precision, "round": turn, **run})
                    print(measured[-1], flush=True)
                if arguments.output:  # after each turn of a precision: a run takes long and may be stopped
                    write_record(arguments.output, "end_to_end.py", sys.argv[1:], settings=settings, rows=measured)
    print(table(measured))


def rate(measured: list[dict[str, Any]], run: str, precision: str) -> float:
    """Images a second of training in that run, the median of the rounds."""
    return statistics.median(m["training"] for m in measured if (m["run"], m["precision"]) == (run, precision))


def of_the_step(measured: list[dict[str, Any]], run: str, precision: str) -> float:
    """What that run reaches of the step alone, the median of the rounds; in records of before, of all rounds' steps."""
    rows = [m for m in measured if (m["run"], m["precision"]) == (run, precision)]
    if "step" in rows[0]:
        return statistics.median(m["training"] / m["step"] for m in rows)
    return rate(measured, run, precision) / rate(measured, "the step", precision)


def table(measured: list[dict[str, Any]]) -> str:
    rows = []
    for precision in dict.fromkeys(m["precision"] for m in measured):
        for run in dict.fromkeys(m["run"] for m in measured):
            waits = [m["data_wait"] for m in measured if m["run"] == run and "data_wait" in m]
            rows.append([
                PRECISION_NAMES[precision], run, f"{rate(measured, run, precision):,.0f}",
                f"{rate(measured, 'ours', precision) / rate(measured, run, precision):.2f}",
                f"{of_the_step(measured, run, precision):.0%}" if run.startswith("ours") else "",
                f"{statistics.median(waits):.1%}" if waits else "",
            ])  # fmt: skip
    return markdown_table(["precision", "run", "images/s", "ours / this", "of the step", "data wait"], rows)


if __name__ == "__main__":
    main()
