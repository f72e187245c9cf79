"""Whether an epoch shows each sample once, and how well streams mix classes: two tables.

python benchmarks/stream_order.py                  about three minutes on two cores, most of it starting workers
python benchmarks/stream_order.py --only mixing    seconds

Each sample once: parquet shards of unequal lengths that nothing divides, read at random or streamed, for every number
of ranks and DataLoader workers, from the start and going on in the middle of the epoch with another number of both.
Images carry their own number, so what came is counted from pixels. Ranks take turns in one process.

Mixing: 10 classes of 500 rows, stored class after class: the number of classes in the batches of an epoch, beside that
of a random permutation. No image is read.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from modeling_vit_scratch import ViTScratchImageProcessor  # noqa: E402
from modeling_vit_scratch.data.decoding import Decoder  # noqa: E402
from modeling_vit_scratch.data.loading import TrainingData  # noqa: E402
from modeling_vit_scratch.data.order import ResidentOrder, StreamOrder  # noqa: E402
from modeling_vit_scratch.data.sources import open_source  # noqa: E402
from modeling_vit_scratch.data.splits import Source  # noqa: E402

SHARDS = {1: [53], 2: [31, 22], 5: [3, 17, 1, 23, 9], 8: [5, 11, 2, 13, 1, 7, 8, 6]}  # 53 samples: a prime
BATCH_SIZE, NUM_LANES, WINDOW = 12, 7, 4  # none divides another
RANKS, WORKERS = (1, 2, 3), (0, 1, 3)


def write_shards(folder: Path, sizes: list[int], row_group: int = 5):
    """Parquet shards of 2 x 2 images whose first pixel is the number of the row over all shards."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    (folder / "data").mkdir(parents=True)
    start = 0
    for index, size in enumerate(sizes):
        numbers = range(start, start + size)
        images = [Image.fromarray(np.full((2, 2, 3), number, dtype=np.uint8)) for number in numbers]
        rows = {"image": images, "label": [number % 2 for number in numbers]}
        path = folder / "data" / f"train-{index:05d}-of-{len(sizes):05d}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=row_group)
        start += size


def samples(source: Source, start: int, stop: int, world_size: int, num_workers: int) -> Iterator[tuple[int, int]]:
    """(position in the run, number of the sample) of all that the ranks together see in steps start, ..., stop - 1."""
    # a crop draws, so that the set is not kept decoded but read at random; of one colour, it stays what it was
    decoder = Decoder(ViTScratchImageProcessor(size={"height": 2, "width": 2}), 0, (0.5, 1.0))
    for rank in range(world_size):
        settings = (BATCH_SIZE, 0, rank, world_size, num_workers, torch.device("cpu"), NUM_LANES, WINDOW)
        data = TrainingData(source, decoder, *settings)
        for step, batch in zip(range(start, stop), data.batches(start, stop), strict=True):
            positions = step * BATCH_SIZE + batch.positions
            yield from zip(positions.tolist(), batch.images[:, 0, 0, 0].tolist(), strict=True)


def epoch_counts(source: Source, *parts: tuple[int, int]) -> tuple[int, int, int]:
    """(samples seen, missing, seen again) in the run's second epoch, which the parts share evenly by steps.

    parts: (ranks, workers) of each part, the later ones going on where the one before stopped.
    """
    num_samples = len(source.splits["train"])
    first, last = num_samples // BATCH_SIZE, -(-2 * num_samples // BATCH_SIZE)  # it starts and ends inside batches
    bounds = np.linspace(first, last, len(parts) + 1).round().astype(int).tolist()
    seen: Counter[int] = Counter()
    for part, start, stop in zip(parts, bounds, bounds[1:], strict=False):
        numbers = samples(source, start, stop, *part)
        seen.update(number for position, number in numbers if position // num_samples == 1)
    return sum(seen.values()), num_samples - len(seen), sum(seen.values()) - len(seen)


def epochs_table() -> list[str]:
    lines = ["| shards | read | ranks | workers | seen of 53 | missing | twice |", "|---|---|---|---|---|---|---|"]
    for num_shards, sizes in SHARDS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder) / "set", sizes)
            for is_streamed in (False, True):
                source = open_source(str(Path(folder) / "set"), streaming=is_streamed, train_val_split=0)
                read = "streamed" if is_streamed else "at random"
                settings = [(ranks, workers) for ranks in RANKS for workers in WORKERS]
                cases = [(f"{r}", f"{w}", epoch_counts(source, (r, w))) for r, w in settings]
                cases += [
                    (f"{r}, then {4 - r}", f"{w}, then {3 - w}", epoch_counts(source, (r, w), (4 - r, 3 - w)))
                    for r, w in ((1, 0), (2, 1), (3, 3))
                ]
                for ranks, workers, counts in cases:
                    lines.append(f"| {num_shards} | {read} | {ranks} | {workers} | {' | '.join(map(str, counts))} |")
                    print(lines[-1], file=sys.stderr, flush=True)
    return lines


# ---------------------------------------------------------------- mixing


def classes_in_batches(labels: np.ndarray, order: StreamOrder | ResidentOrder, batch_size: int) -> np.ndarray:
    """The number of classes in each batch of the first epoch; labels are those of the rows in their stored order."""
    dealt = labels
    if isinstance(order, StreamOrder):
        starts, lanes = np.cumsum([0, *order.sizes]), []
        for lane in range(order.num_lanes):
            windows = []
            for index in range(-(-order.lane_length(lane) // order.window)):
                pieces = order.window_pieces(0, lane, index)
                rows = np.concatenate([starts[shard] + numbers for shard, numbers in pieces])
                windows.append(rows[order.window_permutation(0, lane, index)])
            lanes.append(labels[np.concatenate(windows)])
        steps = np.arange(order.num_samples)
        dealt = np.array([lanes[step % order.num_lanes][step // order.num_lanes] for step in steps])
    else:
        dealt = labels[order.batch(0, len(labels))[1]]
    batches = dealt[: len(dealt) // batch_size * batch_size].reshape(-1, batch_size)
    return np.array([len(np.unique(batch)) for batch in batches])


def mixing_table() -> list[str]:
    lines = ["| order | shards | lanes | window | classes a batch of 64: mean | least |", "|---|---|---|---|---|---|"]
    labels = np.repeat(np.arange(10), 500)
    found = classes_in_batches(labels, ResidentOrder(5000, 0), 64)
    lines.append(f"| random permutation | | | | {found.mean():.2f} | {found.min()} |")
    for num_shards in (1, 2, 8):
        for num_lanes, window in ((24, 256), (8, 256), (4, 256), (4, 1250), (1, 256)):
            order = StreamOrder([5000 // num_shards] * num_shards, 0, num_lanes, window)
            found = classes_in_batches(labels, order, 64)
            lines.append(f"| stream | {num_shards} | {num_lanes} | {window} | {found.mean():.2f} | {found.min()} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("epochs", "mixing"))
    chosen = parser.parse_args().only
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    for name, table in (("epochs", epochs_table), ("mixing", mixing_table)):
        if chosen in (None, name):
            print("\n".join(table()), flush=True)


if __name__ == "__main__":
    main()
