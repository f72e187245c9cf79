"""What runs far larger than this machine would need: the tables of docs/scale.md, computed from recorded numbers.

python benchmarks/scale.py               prints the tables from benchmarks/results/scale-cpu.json and input-cpu.json
python benchmarks/scale.py --write       puts them between the markers of docs/scale.md
python benchmarks/scale.py --measure     measures scale-cpu.json anew, first: two minutes, 5 GB of disk for a while

Measured: the order's start, a window and a batch; reading a shard's footer; drawing the held-out rows; writing and
verifying checkpoints (weights, two moments of AdamW, averaged weights). One thread. What only computes is counted in
seconds of the processor, so that other programs do not lengthen it; what waits for the disk by the clock, the shortest
of three.
"""

import argparse
import math
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from markers import with_table
from recorded import RESULTS, ROOT, read_record, write_record

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.data.examples import ROW_GROUP_CACHE_BYTES, read_footer
from modeling_vit_scratch.data.order import StreamOrder, hash_limit, row_hashes
from modeling_vit_scratch.training.checkpointing import damage, save_checkpoint
from modeling_vit_scratch.training.recipe import Recipe

PAGE = ROOT / "docs" / "scale.md"

# Not measured here. ImageNet-21k: its autumn 2011 release; ImageNet-1k's 138 GB hold 1,281,167 images, 108 kB each.
# Web images: LAION-400M's page gives 10 TB for 400 million images of 256 pixels.
SETS = {
    "ImageNet-21k": {"images": 14_197_122, "bytes": 108_000},
    "a billion web images of 256 px": {"images": 1_000_000_000, "bytes": 25_000},
}
SHARD_BYTES = 500_000_000  # as `datasets` writes them
NUM_GPUS = 64
WORKERS_PER_GPU = 8
LANES_PER_WORKER = 3
GPU_RATES = (500, 1000, 2000)  # images/s of one GPU: it depends on the network, the precision and the GPU
BATCH_SIZE = 4096
MOST_SAVING = 0.02  # of the training time
SIZES = ((1_000, 24), (10_000, 1_024), (10_000, 8_192), (50_000, 1_536), (100_000, 8_192))  # shards, lanes

# ---------------------------------------------------------------- measuring


def cpu_seconds(act: Callable[[], Any], rounds: int = 5) -> float:
    """The processor's time of a call, the median of some."""
    return statistics.median(timed(act, time.process_time, rounds))


def clock_seconds(act: Callable[[], Any]) -> float:
    """The time of a call, the least of three: whatever else uses the disk only adds to it."""
    return min(timed(act, time.perf_counter, 3))


def timed(act: Callable[[], Any], clock: Callable[[], float], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        began = clock()
        act()
        times.append(clock() - began)
    return times


def measure_order(num_shards: int, num_lanes: int) -> dict[str, float]:
    """Seconds of StreamOrder: its making and first window after it was sent to a worker, a window, a batch's places."""
    sizes = np.random.default_rng(0).integers(1, 20_000, num_shards).tolist()
    order = StreamOrder(sizes, 0, num_lanes)

    def start():
        pickle.loads(pickle.dumps(StreamOrder(sizes, 0, num_lanes))).window_pieces(1, 0, 0)

    def open_windows():
        for lane in range(100):
            order.window_pieces(0, lane % num_lanes, lane // num_lanes)
            order.window_permutation(0, lane % num_lanes, lane // num_lanes)

    open_windows()
    return {
        "num_shards": num_shards, "num_lanes": num_lanes, "num_samples": order.num_samples,
        "start": cpu_seconds(start), "window": cpu_seconds(open_windows) / 100,
        "batch": cpu_seconds(lambda: [order.batch(step, BATCH_SIZE) for step in range(100)]) / 100,
    }  # fmt: skip


def measure_footer(folder: Path) -> dict[str, float]:
    """Seconds to parse a local shard's footer, and its bytes for each row group, both of 200 row groups."""
    num_groups = 200
    image = pa.array([{"bytes": bytes(64), "path": "n01440764_10026.JPEG"}] * 10 * num_groups)
    path = folder / "shard.parquet"
    pq.write_table(pa.table({"image": image, "label": [1] * 10 * num_groups}), path, row_group_size=10)
    num_bytes = read_footer(str(path)).serialized_size
    return {"seconds": cpu_seconds(lambda: read_footer(str(path)), 21), "bytes_of_row_group": num_bytes / num_groups}


def measure_checkpoint(preset: str, folder: Path) -> dict[str, Any]:
    """Bytes of a checkpoint of this network, and the seconds to write and to verify it."""
    model = ViTScratchForImageClassification(ViTScratchConfig.from_preset(preset))
    weights = model.state_dict()
    moments = {f"{name}/{m}": torch.randn_like(w) for name, w in weights.items() for m in ("exp_avg", "exp_avg_sq")}
    averages = {name: weight.clone() for name, weight in weights.items()}

    def save() -> Path:
        return save_checkpoint(folder / preset, 1, weights, moments, {}, averages)

    return {
        "preset": preset, "parameters": model.num_parameters(),
        "bytes": sum(file.stat().st_size for file in save().iterdir()),
        "write": clock_seconds(save), "verify": clock_seconds(lambda: damage(folder / preset / "step-000001")),
    }  # fmt: skip


def measure_step(preset: str, batch_size: int = 128, side: int = 32) -> float:
    """Seconds of a training step of a network on one thread, without augmentation."""
    model = ViTScratchForImageClassification(ViTScratchConfig.from_preset(preset, image_size=side)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.randn(batch_size, 3, side, side), torch.zeros(batch_size, dtype=torch.int64)

    def step():
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return cpu_seconds(step)


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        return {
            "order": [measure_order(*size) for size in SIZES],
            "footer": measure_footer(folder),
            "holdout_rows_per_second": 1e7
            / cpu_seconds(lambda: [row_hashes(0, "holdout", s, 10_000) < hash_limit(0.1) for s in range(1000)]),
            "checkpoints": [measure_checkpoint(preset, folder) for preset in ("micro", "vit_s_16", "vit_b_16")],
            "micro_step": measure_step("micro"),
        }


# ---------------------------------------------------------------- tables


def table(header: str, rows: list[list[str]]) -> str:
    lines = [f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def order_table(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['num_shards']:,}", f"{row['num_lanes']:,}", f"{row['num_samples'] / 1e6:,.0f} million",
            f"{1e3 * row['start']:.1f}", f"{1e6 * row['window']:.0f}", f"{1e6 * row['batch']:.0f}",
        ]
        for row in found["order"]
    ]  # fmt: skip
    return table(f"shards | lanes | samples | start, ms | a window, µs | a batch of {BATCH_SIZE:,}, µs", rows)


def checkpoint_table(found: dict[str, Any]) -> str:
    rows = [
        [
            f"`{row['preset']}`", f"{row['parameters'] / 1e6:.1f}", f"{row['bytes'] / 1e6:,.0f}", f"{row['write']:.2f}",
            f"{row['bytes'] / row['write'] / 1e6:,.0f}", f"{row['verify']:.2f}",
            f"{row['write'] / MOST_SAVING:,.0f}",
        ]
        for row in found["checkpoints"]
    ]  # fmt: skip
    header = "network | million parameters | MB | written in s | MB/s | verified in s"
    return table(f"{header} | least seconds between two for {MOST_SAVING:.0%}", rows)


def set_table(found: dict[str, Any]) -> str:
    """What a stream of each set is: bytes, shards, requests, the start of a run."""
    columns = {name: set_facts(found, **facts) for name, facts in SETS.items()}
    names = next(iter(columns.values()))
    return table(" | ".join(["", *columns]), [[name, *(facts[name] for facts in columns.values())] for name in names])


def set_facts(found: dict[str, Any], images: int, bytes: int) -> dict[str, str]:
    total, footer = images * bytes, found["footer"]
    shards = math.ceil(total / SHARD_BYTES)
    num_lanes = NUM_GPUS * WORKERS_PER_GPU * LANES_PER_WORKER
    facts = {
        "images": f"{images:,}",
        "bytes an image (assumed)": f"{bytes:,}",
        "bytes": f"{total / 1e12:.1f} TB",
        f"shards of {SHARD_BYTES / 1e6:.0f} MB": f"{shards:,}, {images // shards:,} images each",
        "`--stream_lanes`": f"{num_lanes:,}, {images // num_lanes:,} images each",
    }
    for rows in (100, 1000):
        groups = math.ceil(images / shards / rows) * shards
        facts |= {
            f"row groups of {rows:,} images": f"{groups:,} of {rows * bytes / 1e6:.1f} MB",
            f"requests an epoch, {rows:,} images a row group": f"{groups + num_lanes:,}",
            f"footers in memory of each process, {rows:,} a row group": (
                f"{groups * footer['bytes_of_row_group'] / 1e6:,.0f} MB"
            ),
        }
    window = Recipe.__dataclass_fields__["stream_window"].default
    masks = 2 * images / found["holdout_rows_per_second"]
    facts |= {
        "footers parsed": f"{shards * footer['seconds']:,.0f} s on one core",
        "footers fetched, 16 at once, 0.1 s a request (assumed)": f"{shards * 0.1 / 16:,.0f} s",
        "validation rows drawn by hash": f"{masks:,.0f} s on one core",
        "windows in memory of each worker": f"{LANES_PER_WORKER * window * bytes / 1e6:,.0f} MB",
        "row groups kept by each worker, at most": f"{ROW_GROUP_CACHE_BYTES / 1e6:,.0f} MB",
    }
    return facts


def gpu_table(found: dict[str, Any], images_per_core: float) -> str:
    """What 64 GPUs of several speeds ask for: cores, bytes, requests, time, and how often to save ViT-B/16."""
    write = next(row["write"] for row in found["checkpoints"] if row["preset"] == "vit_b_16")
    columns = []
    for rate in GPU_RATES:
        total = NUM_GPUS * rate
        facts = {
            "images/s of all": f"{total:,}",
            "decoding cores a GPU": f"{rate / images_per_core:.1f}",
            f"a step of {BATCH_SIZE:,} images": f"{1e3 * BATCH_SIZE / total:.0f} ms",
        }
        for name, values in SETS.items():
            facts |= {
                f"{name}: read": f"{total * values['bytes'] / 1e9:.1f} GB/s",
                f"{name}: requests, 1,000 images each": f"{total / 1000:.0f}/s",
                f"{name}: an epoch": f"{values['images'] / total / 60:,.0f} minutes",
            }
        steps = math.ceil(write / MOST_SAVING / (BATCH_SIZE / total))
        facts[f"least `--save_steps` for {MOST_SAVING:.0%}, ViT-B/16"] = f"{steps:,}"
        columns.append(facts)
    header = " | ".join(["", *(f"{rate:,} images/s a GPU" for rate in GPU_RATES)])
    return table(header, [[name, *(facts[name] for facts in columns)] for name in columns[0]])


def tables() -> dict[str, str]:
    """The tables of the page by the names of their markers."""
    found = read_record("scale")["results"]
    rates = read_record("input")["results"]
    images_per_core = rates["ImageNet sample, 224 px"]["ours, streamed"]["images_per_second"]
    save_steps = Recipe.__dataclass_fields__["save_steps"].default
    micro = found["checkpoints"][0]
    share = micro["write"] / (save_steps * found["micro_step"])
    return {
        "order": order_table(found),
        "checkpoints": checkpoint_table(found)
        + f"\n\nOn one core a step of `micro` on 128 images takes {found['micro_step']:.2f} s: saving every "
        f"{save_steps:.0f} steps, the default, costs {share:.2%} of the time.",
        "sets": set_table(found),
        "gpus": gpu_table(found, images_per_core)
        + f"\n\nA core decodes and crops {images_per_core:,.0f} ImageNet photographs a second.",
    }


def with_tables(page: str) -> str:
    """The page with the tables between their markers."""
    for name, text in tables().items():
        page = with_table(page, name, "scale.py", text)
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure anew and record")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    arguments = parser.parse_args()
    if arguments.measure:
        write_record(RESULTS / "scale-cpu.json", "scale.py", ["--measure"], results=measure(), threads=1)
    if arguments.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
