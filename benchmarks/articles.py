"""The articles' recipes, as printed and mended, each for the same steps or time, and a small CNN that trains on the
same images for as long as the mended network: accuracy, size of the weights, time an image.

python benchmarks/articles.py --max_steps 2000 --output benchmarks/results/articles-cpu.json
python benchmarks/articles.py --time_budget 10m --recipes article_4 --data cifar10=datasets/cifar10
python benchmarks/articles.py --time_budget 10m --flags "article_1=--preset article_1_cpu --train_batch_size 64"
python benchmarks/articles.py --write       puts the recorded table between the markers of docs/articles.md

Article 2 has photographs of its own and is left out unless --recipes names it: --train_dir and --test_dir are its.
Runs with the same steps or the same time say nothing of what the articles' own 10 to 200 epochs would reach.
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

import torch
from accelerate import Accelerator
from markers import is_written, with_table
from recorded import RESULTS, ROOT, facts_of, write_json
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from modeling_vit_scratch.data.augmentation import Draws, normalise
from modeling_vit_scratch.data.decoding import Decoder, normalisation
from modeling_vit_scratch.data.loading import EvaluationData, TrainingData
from modeling_vit_scratch.results.record import public_command
from modeling_vit_scratch.training.article_recipes import PRINTED
from modeling_vit_scratch.training.evaluation import evaluate
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.network import build_augmentation, build_network, source_of
from modeling_vit_scratch.training.objectives import SingleLabel

RECORD = RESULTS / "articles-cpu.json"
OF_THEIR_OWN_DATA = [name for name, fields in PRINTED.items() if "dataset_name" in fields]
CNN_RATE, CNN_DECAY = 2e-3, 0.05
TIMED, UNTIMED = 30, 5  # forwards of one image


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions with batch norm, halving the image thrice, and a mean over what is left: 390,000
    parameters, nothing tuned. pixel_values (B, C, H, W) -> logits (B, K)."""

    def __init__(self, num_channels: int, num_labels: int, widths: tuple[int, ...] = (32, 64, 128, 256)):
        super().__init__()
        layers: list[nn.Module] = []
        for index, (before, width) in enumerate(zip((num_channels, *widths), widths, strict=False)):
            layers += [nn.MaxPool2d(2)] if index else []
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(widths[-1], num_labels)

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(self.features(pixel_values)))


def cost(network: nn.Module, num_channels: int, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters, megabytes of the tensors that a file of the weights holds, and milliseconds of one image."""
    tensors = network.state_dict().values()
    image = torch.randn(1, num_channels, *size)
    network.eval()
    times = []
    with torch.inference_mode():
        for _ in range(UNTIMED + TIMED):
            began = time.perf_counter()
            network(pixel_values=image)
            times.append(time.perf_counter() - began)
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "megabytes": round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6, 2),
        "milliseconds": round(1e3 * statistics.median(times[UNTIMED:]), 2),
    }


def train_recipe(name: str, flags: list[str], folder: Path) -> dict[str, Any]:
    """The row of a recipe's run."""
    words = ["run_train.py", "--recipe", name, *flags, "--report_to", "none"]
    command = [sys.executable, str(ROOT / words[0]), *words[1:], "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    recipe, chosen = parse_arguments(words[1:])
    network, _, _ = build_network(recipe, chosen, source_of(recipe))
    row = {"network": name, "specimen": recipe.specimen, "command": public_command(words)}
    row |= {key: results[key] for key in ("test_accuracy", "test_loss", "steps", "train_seconds")}
    return {**row, **cost(network, network.config.num_channels, network.config.image_height_width)}


def train_cnn(name: str, flags: list[str], seconds: float) -> dict[str, Any]:
    """The row of the CNN: the recipe's images, augmentation and batches, with AdamW, for `seconds`."""
    recipe, chosen = parse_arguments(["--recipe", name, *flags])
    accelerator, source = Accelerator(cpu=True), source_of(recipe)
    vit, processor, _ = build_network(recipe, chosen, source)
    decoder, augment = build_augmentation(recipe, processor)
    num_channels, size, num_labels = vit.config.num_channels, vit.config.image_height_width, vit.config.num_labels
    here, batch_size = (0, 1, 0, torch.device("cpu")), recipe.train_batch_size
    data = TrainingData(source, decoder, batch_size, recipe.seed, *here)
    pixels = normalisation(processor, torch.device("cpu"))

    torch.manual_seed(recipe.seed)
    network = SmallCNN(num_channels, num_labels).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=CNN_RATE, weight_decay=CNN_DECAY)
    step, spent, began = 0, 0.0, time.perf_counter()
    batches = data.batches(0, sys.maxsize)
    while spent < seconds:
        batch = next(batches)
        draws = Draws(recipe.seed, step, batch_size, batch.positions, 1, data.is_interleaved(step))
        images = normalise(augment(batch.images, draws), *pixels)
        loss = nn.functional.cross_entropy(network(pixel_values=images).logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = CNN_RATE * (1 - spent / seconds)
        optimizer.step()
        step, spent = step + 1, time.perf_counter() - began

    held = EvaluationData(source, source.splits["test"], Decoder(processor), recipe.eval_batch_size, *here)
    scores = evaluate(network, held, pixels, accelerator, SingleLabel(num_labels)).scores
    row = {"network": f"CNN, {name.removesuffix('_mended')}", "specimen": None, "command": None}
    row |= {f"test_{score}": scores[score] for score in ("accuracy", "loss")}
    return {**row, "steps": step, "train_seconds": round(spent, 2), **cost(network, num_channels, size)}


def rows_of(name: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of one article: as printed, mended, the CNN."""
    dataset = PRINTED[name].get("dataset_name")
    flags = ["--train_dir", arguments.train_dir, "--test_dir", arguments.test_dir]
    if dataset is not None:
        flags = ["--dataset_name", dict(pair.split("=", 1) for pair in arguments.data).get(dataset, dataset)]
    length = (
        ["--max_steps", str(arguments.max_steps)] if arguments.max_steps else ["--time_budget", arguments.time_budget]
    )
    flags += [*length, "--seed", str(arguments.seed), "--cpu_threads", str(arguments.cpu_threads)]
    flags += dict(pair.split("=", 1) for pair in arguments.flags).get(name, "").split()
    rows = [train_recipe(recipe, flags, folder / recipe) for recipe in (name, f"{name}_mended")]
    return [*rows, train_cnn(f"{name}_mended", flags, rows[1]["train_seconds"])]


def table(rows: list[dict[str, Any]]) -> str:
    """One row a network."""
    lines = [
        "| network | test accuracy, % | steps | seconds of training | parameters | weights, MB | ms an image |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"`{row['network']}`" if row["command"] else row["network"]
        lines.append(
            f"| {name} | {100 * row['test_accuracy']:.2f} | {row['steps']:,} | {row['train_seconds']:,.0f} | "
            f"{row['parameters']:,} | {row['megabytes']:.1f} | {row['milliseconds']:.1f} |"
        )
    return "\n".join(lines)


def with_recorded(page: str) -> str:
    """docs/articles.md with the recorded table between its markers; as it is where nothing is recorded yet."""
    rows = recorded_rows()
    return with_table(page, "articles", "articles.py", table(rows)) if rows else page


def recorded_rows() -> list[dict[str, Any]]:
    """The rows of all calls; none where nothing is recorded yet."""
    return [row for part in parts_of(RECORD) for row in part["rows"]]


def parts_of(record: Path) -> list[dict[str, Any]]:
    """What each call has added to the file: its command, machine and rows."""
    return json.loads(record.read_text(encoding="utf-8"))["parts"] if record.exists() else []


def main():
    if is_written(ROOT / "docs" / "articles.md", with_recorded):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--max_steps", type=int, help="of each run")
    length.add_argument("--time_budget", help="of each run: 10m, 1h")
    parser.add_argument("--recipes", default=",".join(OF_THEIR_OWN_DATA), help="article_0,... as printed")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="a dataset's local folder")
    parser.add_argument("--train_dir", default="", help="article 2's photographs, one folder a class")
    parser.add_argument("--test_dir", default="")
    further = "further flags of an article's runs, in one word"
    parser.add_argument("--flags", action="append", default=[], metavar="NAME=FLAGS", help=further)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--cpu_threads", type=int, default=2)
    parser.add_argument("--output", metavar="FILE", help="add the rows to that JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.cpu_threads)
    rows: list[dict[str, Any]] = []
    before = parts_of(Path(arguments.output)) if arguments.output else []
    facts = facts_of("articles.py", sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.recipes.split(","):
            rows += rows_of(name, arguments, Path(folder))
            print(table(rows[-3:]), flush=True)
            if arguments.output:  # after each article: the runs take long and may be stopped
                write_json(arguments.output, {"parts": [*before, {**facts, "rows": rows}]})
    print(table(rows))


if __name__ == "__main__":
    main()
