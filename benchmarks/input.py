"""Images a second and core from encoded files to batches of uint8 or floats: ours beside what people use.

python benchmarks/input.py                                    generated 1,000-pixel JPEGs alone
python benchmarks/input.py --cifar10 datasets/cifar10 --flowers datasets/flowers/train \
    --imagenet datasets/imagenet-1k-sample --output benchmarks/results/input-cpu.json

One process, one thread, no workers: what a core does, in seconds of processor time. All candidates of a set take turns;
each number is the median of the rounds. Photographs end at 224 pixels in batches of 32, by a random resized crop from a
quarter of the area up (transformers' processors have none: they resize the whole image), CIFAR-10 at 32 pixels in
batches of 128. "without simplejpeg" is ours where that is not installed; "without shrinking" is ours where a JPEG's
codec decodes to the full size alone, never to a half, a fourth or an eighth; by how much the pixels of the 1,000-pixel
JPEGs differ is printed below the table. "decode alone" is PIL to RGB at full size, nothing after it; it does not batch.
"""

import argparse
import importlib.metadata
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from PIL import Image
from recorded import facts_of, write_json
from torchvision.transforms import v2
from transformers import ViTImageProcessor, ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchImageProcessor
from modeling_vit_scratch.data import decoding
from modeling_vit_scratch.data.decoding import Decoder
from modeling_vit_scratch.data.examples import Example
from modeling_vit_scratch.data.loading import TrainingData
from modeling_vit_scratch.data.sources import open_source

Batches = Callable[[], Iterator[int]]  # makes an endless iterator that yields the number of images of each batch
CROP_SCALE = 0.25
RESIDENT = "ours, resident"


def ours(flags: dict[str, Any], size: int, batch_size: int, is_photo: bool, streaming: bool) -> Batches:
    """Our loader without workers; small images are kept decoded unless they are streamed."""

    def batches() -> Iterator[int]:
        source = open_source(**flags, streaming=streaming, train_val_split=0)
        side = {"height": size, "width": size}
        photo = {"do_center_crop": True, "crop_size": side, "size": {"shortest_edge": round(size / 0.875)}}
        processor = ViTScratchImageProcessor(**(photo if is_photo else {"size": side}))
        decoder = Decoder(processor, 0, (CROP_SCALE, 1.0) if is_photo else None)
        data = TrainingData(source, decoder, batch_size, 0, 0, 1, 0, torch.device("cpu"))
        for batch in data.batches(0, 10**9):
            yield len(batch)

    return batches


def without(name: str, value: Any, batches: Batches) -> Batches:
    """The same batches made with a constant of decoding.py changed."""

    def changed() -> Iterator[int]:
        running = batches()
        while True:
            with mock.patch.object(decoding, name, value):
                count = next(running)
            yield count

    return changed


def rows_of(flags: dict[str, Any]) -> datasets.Dataset:
    """The same images as a `datasets.Dataset`, encoded."""
    if "train_dir" in flags:
        table = datasets.load_dataset("imagefolder", data_dir=flags["train_dir"], split="train")
    else:
        table = datasets.load_dataset(flags["dataset_name"])
        table = table["train" if "train" in table else next(iter(table))]
    column = next(name for name, feature in table.features.items() if isinstance(feature, datasets.Image))
    return table.rename_column(column, "image") if column != "image" else table


def shuffled(table: datasets.Dataset, batch_size: int) -> Iterator[list[int]]:
    """Batches of row numbers, epoch after epoch, each in an order of its own."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(table))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield order[start : start + batch_size].tolist()


def with_processor(table: datasets.Dataset, processor: Any, batch_size: int) -> Batches:
    """`datasets` decodes, transformers' image processor resizes and normalises: as its examples do."""

    def batches() -> Iterator[int]:
        for rows in shuffled(table, batch_size):
            images = [image.convert("RGB") for image in table[rows]["image"]]
            yield len(processor(images, return_tensors="pt")["pixel_values"])

    return batches


def with_torchvision(table: datasets.Dataset, transform: Any, batch_size: int) -> Batches:
    """`datasets` decodes, torchvision transforms image by image, as transformers' and timm's training scripts do."""

    def batches() -> Iterator[int]:
        for rows in shuffled(table, batch_size):
            yield len(torch.stack([transform(image.convert("RGB")) for image in table[rows]["image"]]))

    return batches


def decoding_alone(table: datasets.Dataset, batch_size: int) -> Batches:
    encoded = table.cast_column("image", datasets.Image(decode=False))

    def batches() -> Iterator[int]:
        for rows in shuffled(table, batch_size):
            for cell in encoded[rows]["image"]:
                Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]).convert("RGB")
            yield len(rows)

    return batches


def candidates(flags: dict[str, Any], is_photo: bool) -> dict[str, Batches]:
    size, batch_size = (224, 32) if is_photo else (32, 128)
    table = rows_of(flags)
    floats = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
    crop = v2.RandomResizedCrop(size, scale=(CROP_SCALE, 1.0)) if is_photo else v2.Identity()
    side = {"height": size, "width": size}
    kept = "ours, read at random" if is_photo else RESIDENT
    at_random = ours(flags, size, batch_size, is_photo, streaming=False)
    changed = {
        "ours, at random, without simplejpeg": without("simplejpeg", None, at_random),
        "ours, at random, without shrinking": without("CODEC_DIVISORS", (), at_random),
    }
    return {
        kept: at_random,
        "ours, streamed": ours(flags, size, batch_size, is_photo, streaming=True),
        **(changed if is_photo else {}),
        "torchvision transforms": with_torchvision(table, v2.Compose([crop, floats]), batch_size),
        "transformers' processor (torchvision)": with_processor(table, ViTImageProcessor(size=side), batch_size),
        "transformers' processor (PIL)": with_processor(table, ViTImageProcessorPil(size=side), batch_size),
        "decode alone (PIL)": decoding_alone(table, batch_size),
    }


def generate(folder: Path, count: int = 64, side: int = 1000):
    """JPEGs of `side` pixels with the detail of a photograph: smooth shapes and some noise."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (side // 25, side // 25, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
        target = folder / f"class{index % 2}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(target / f"{index}.jpg", quality=88)


def shrunk_difference(folder: Path, size: int = 224) -> dict[str, float]:
    """By how much pixels differ that a JPEG's codec shrunk first, of 255, in the mean over crops and in the worst one.

    The boxes lie on a grid of 8 pixels, so that both ways crop the same place.
    """
    means = []
    for index, path in enumerate(sorted(folder.rglob("*.jpg"))):
        example = Example(str(path), 0, str(path))

        def draw(full: tuple[int, int], index: int = index) -> decoding.Box:
            box = decoding.random_crop_box(full, (CROP_SCALE, 1.0), random.Random(index))
            return tuple(edge // 8 * 8 for edge in box)

        shrunk = decoding.read_crop(example, draw, (size, size), 3)
        with mock.patch.object(decoding, "CODEC_DIVISORS", ()):
            whole = decoding.read_crop(example, draw, (size, size), 3)
        ours, exact = (decoding.resized(crop, (size, size), 2).float() for crop in (shrunk, whole))
        means.append((ours - exact).abs().mean().item())
    return {"mean": round(statistics.mean(means), 2), "worst": round(max(means), 2)}


def measure(table: dict[str, Batches], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Images a second of each candidate, the median over rounds in which all take turns for about `seconds` each."""
    running = {name: make() for name, make in table.items()}
    for batches in running.values():  # opens files, fills windows and caches
        next(batches)
    rates: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, batches in running.items():
            started, images = time.process_time(), 0
            while time.process_time() - started < seconds:
                images += next(batches)
            rates[name].append(images / (time.process_time() - started))
    return {
        name: {"images_per_second": round(statistics.median(found), 1), "least": round(min(found), 1)}
        for name, found in rates.items()
    }


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Rows: candidates, columns: sets; images a second and core, and ours as a multiple of the best of the others; what
    decodes once, before the clock starts, is left out of that."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    lines = ["| images/s and core | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in names:
        cells = [f"{found[name]['images_per_second']:,.0f}" if name in found else "" for found in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    ratios = []
    for found in results.values():
        rates = {name: values["images_per_second"] for name, values in found.items()}
        theirs = max(r for name, r in rates.items() if not name.startswith(("ours", "decode")))
        ours = max(r for name, r in rates.items() if name.startswith("ours") and name != RESIDENT)
        ratios.append(f"{ours / theirs:.2f}x")
    return "\n".join([*lines, "| ours, against the best of the others | " + " | ".join(ratios) + " |"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", help="a folder of CIFAR-10's parquet files")
    parser.add_argument("--flowers", help="a folder of photographs, one folder a class")
    parser.add_argument("--imagenet", help="a folder of ImageNet's parquet files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each candidate in each round")
    parser.add_argument("--output", help="a JSON file for the numbers")
    arguments = parser.parse_args()
    if decoding.simplejpeg is None:
        parser.error("this measures simplejpeg too: pip install simplejpeg")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        sets = {
            "CIFAR-10, 32 px": ({"dataset_name": arguments.cifar10}, False),
            "flowers, 224 px": ({"train_dir": arguments.flowers}, True),
            "ImageNet sample, 224 px": ({"dataset_name": arguments.imagenet}, True),
            "1,000-px JPEGs, 224 px": ({"train_dir": folder}, True),
        }
        results = {}
        for name, (flags, is_photo) in sets.items():
            if all(flags.values()):
                results[name] = measure(candidates(flags, is_photo), arguments.rounds, arguments.seconds)
        difference = shrunk_difference(Path(folder))
    print(markdown(results))
    print(f"\nThe codec's shrinking changes pixels by {difference['mean']} of 255, {difference['worst']} at worst.")
    if arguments.output:
        facts = facts_of("input.py", sys.argv[1:])
        facts["versions"] |= {name: importlib.metadata.version(name) for name in ("pillow", "simplejpeg")}
        write_json(arguments.output, {**facts, "threads": 1, "results": results, "shrunk_difference": difference})


if __name__ == "__main__":
    main()
