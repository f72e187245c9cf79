"""What pretrained weights are worth: ways of fine-tuning a checkpoint on a folder beside training the same network from
nothing, each within the same time, or the same steps (one from nothing takes as long as one of `full`, others less);
a table of accuracy, seconds and trained parameters over seeds.

accelerate launch run_train.py --recipe cifar10 --time_budget 15m --output_dir outputs/cifar10
python benchmarks/finetuning.py outputs/cifar10/model flowers/train flowers/val --image_size 48 \
    --output benchmarks/results/finetuning-flowers-cpu.json
python benchmarks/finetuning.py --write     puts the recorded table between the README's markers

From nothing: the checkpoint's own configuration, drawn anew, with the recipe `folder`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from markers import is_written, with_table
from recorded import ROOT, read_record, write_record
from results_table import spread

from modeling_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.configuration_vit_scratch import architecture_fields

# of a small network after a short pretraining: ten times the rates that the recipe has for large ones
WAYS = {
    "full": ["--learning_rate", "1e-3", "--layer_decay", "1", "--head_learning_rate_scale", "1"],
    "last:2": ["--learning_rate", "1e-3", "--head_learning_rate_scale", "1"],
    "attention": ["--learning_rate", "1e-3", "--layer_decay", "1", "--head_learning_rate_scale", "1"],
    "lora": ["--learning_rate", "3e-3"],
    "head": [],
}
KEPT = ("validation_accuracy", "trainable_parameters", "num_parameters", "steps", "train_seconds", "versions")


def from_nothing(model: str, image_size: int) -> list[str]:
    """Flags of a new network of the checkpoint's configuration at another size, and of how it is trained."""
    config = ViTScratchConfig.from_pretrained(model)
    fields = {
        name: getattr(config, name) for name in architecture_fields() if name not in ("image_size", "num_channels")
    }
    overrides = ",".join(f"{name}={json.dumps(value)}" for name, value in fields.items())
    return ["--recipe", "folder", "--preset", "micro", "--config_overrides", overrides, "--image_size", str(image_size)]


def way(name: str, arguments: argparse.Namespace) -> list[str]:
    """The flags of one row of the table."""
    length = ["--time_budget", arguments.time_budget]
    if arguments.max_steps is not None:
        length = ["--max_steps", str(arguments.max_steps)]
    if name == "scratch":
        return [*from_nothing(arguments.model, arguments.image_size), *length]
    flags = ["--model_name_or_path", arguments.model, "--image_size", str(arguments.image_size)]
    flags += ["--finetune", name, *WAYS[name]]
    # the head's features are computed once: its epochs take seconds
    return flags if name == "head" else [*flags, *length]


def run(flags: list[str], seed: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What results.json kept of one run, and the seconds that the whole command took."""
    command = ["run_train.py", *flags, "--train_dir", arguments.train_dir, "--validation_dir", arguments.validation_dir]
    command += ["--seed", str(seed), "--report_to", "none", "--cpu_threads", str(arguments.cpu_threads)]
    words = [sys.executable, str(ROOT / command[0]), *command[1:], "--output_dir", str(folder)]
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    row = {name: results[name] for name in KEPT}
    return {"seed": seed, "command": " ".join(command), "seconds": round(time.perf_counter() - began, 1), **row}


def table(ways: dict[str, list[dict[str, Any]]]) -> str:
    """One row a way: mean and standard deviation of accuracy over the seeds, mean seconds, trained parameters."""
    lines = ["| | validation accuracy, % | seconds | steps | trained parameters |", "|---|---|---|---|---|"]
    for name, runs in ways.items():
        scores = [100 * row["validation_accuracy"] for row in runs]
        seconds, steps = (statistics.mean(row[column] for row in runs) for column in ("seconds", "steps"))
        trained = runs[0]["trainable_parameters"]
        lines.append(f"| {name} | {spread(scores, 1)} | {seconds:,.0f} | {steps:,.0f} | {trained:,} |")
    return "\n".join(lines)


def with_recorded(readme: str) -> str:
    """The README with the recorded table between its markers."""
    record = read_record("finetuning-flowers")
    return with_table(readme, "fine-tuning", "finetuning.py", table(record["ways"]))


def main():
    if is_written(ROOT / "README.md", with_recorded):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint of this package: a model folder")
    parser.add_argument("train_dir")
    parser.add_argument("validation_dir")
    parser.add_argument("--image_size", type=int, default=48)
    parser.add_argument("--time_budget", default="3m", help="of each run, but for the head's")
    parser.add_argument("--max_steps", type=int, help="of each run, but for the head's, instead of a time")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--ways", default="scratch,full,last:2,attention,lora,head")
    parser.add_argument("--cpu_threads", type=int, default=2)
    parser.add_argument("--output", metavar="FILE", help="write the runs there as JSON")
    arguments = parser.parse_args()
    ways: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.ways.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, arguments.seeds.split(",")):
            for name, runs in ways.items():
                runs.append(run(way(name, arguments), seed, arguments, Path(folder) / f"{name}-{seed}"))
                print(
                    f"{name}, seed {seed}: {runs[-1]['validation_accuracy']:.4f}, {runs[-1]['seconds']} s", flush=True
                )
    print(table(ways))
    if arguments.output:
        write_record(arguments.output, "finetuning.py", sys.argv[1:], ways=ways)


if __name__ == "__main__":
    main()
