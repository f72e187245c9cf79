"""What a teacher is worth: a network trained for the same steps from labels alone, and from a teacher's answers too; a
table of test accuracy over seeds. Runs that lie finished in --output_dir are not trained again.

accelerate launch run_train.py --recipe cifar10 --time_budget 15m --output_dir outputs/cifar10
python benchmarks/distillation.py outputs/cifar10 --output benchmarks/results/distillation-cpu.json
python benchmarks/distillation.py --write     puts the recorded table between the README's markers
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from markers import is_written, with_table
from recorded import ROOT, markdown_table, read_record, write_record
from results_table import spread

WAYS = {
    "labels": [],
    "soft": ["--distillation_alpha", "0.5", "--distillation_temperature", "2"],
    "softer": ["--distillation_alpha", "0.9", "--distillation_temperature", "4"],
    "hard": ["--distillation_type", "hard"],
}
KEPT = ("test_accuracy", "validation_accuracy", "num_parameters", "steps", "train_seconds", "teacher")


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What results.json kept of one run."""
    flags = ["--recipe", "cifar10", "--dataset_name", arguments.dataset_name, "--preset", arguments.preset]
    flags += ["--max_steps", str(arguments.max_steps), "--eval_steps", "0.5", "--seed", str(seed)]
    if name != "labels":
        flags += ["--teacher_name_or_path", arguments.teacher, *WAYS[name]]
    folder = Path(arguments.output_dir) / f"{name}-seed{seed}"
    words = [sys.executable, str(ROOT / "run_train.py"), *flags, "--report_to", "none", "--output_dir", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}\n{done.stdout}{done.stderr}")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {"way": name, "seed": seed, "command": results["command"], **{key: results[key] for key in KEPT}}


def table(record: dict[str, Any]) -> str:
    """One row a way of learning: mean and deviation of test accuracy over the seeds, mean seconds of training."""
    rows = []
    for name in dict.fromkeys(row["way"] for row in record["runs"]):
        runs = [row for row in record["runs"] if row["way"] == name]
        scores = [100 * row["test_accuracy"] for row in runs]
        learned = "labels alone" if name == "labels" else f"`{' '.join(WAYS[name])}`"
        seconds = statistics.mean(row["train_seconds"] for row in runs)
        rows.append([learned, spread(scores, 1), str(len(runs)), f"{seconds:,.0f}"])
    return markdown_table(["learned", "test accuracy, %", "seeds", "seconds of training"], rows)


def with_recorded(readme: str) -> str:
    """The README with the recorded table between its markers."""
    return with_table(readme, "distillation", "distillation.py", table(read_record("distillation")))


def main():
    if is_written(ROOT / "README.md", with_recorded):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a finished run's folder or another model")
    parser.add_argument("--dataset_name", default="cifar10")
    parser.add_argument("--preset", default="nano", help="of the student")
    parser.add_argument("--max_steps", type=int, default=1200)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--output_dir", default="outputs/distillation", help="of the runs")
    parser.add_argument("--output", metavar="FILE", help="write the runs there as JSON")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.ways.split(","):
            runs.append(run(name, seed, arguments))
            print(f"{name}, seed {seed}: {runs[-1]['test_accuracy']:.4f}, {runs[-1]['train_seconds']} s", flush=True)
    teacher = Path(arguments.teacher) / "results.json"
    taught = json.loads(teacher.read_text(encoding="utf-8")) if teacher.is_file() else {}
    kept = {key: taught.get(key) for key in ("command", "test_accuracy", "num_parameters", "steps", "train_seconds")}
    print(table({"runs": runs}))
    if arguments.output:
        write_record(arguments.output, "distillation.py", sys.argv[1:], runs=runs, teacher=kept)


if __name__ == "__main__":
    main()
