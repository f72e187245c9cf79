"""Batches of uint8 images on their way to the device: kept resident, read at random, or streamed by lanes.

All three give the same kind of batch for a step, whatever the number of workers; ranks take disjoint parts of it.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..errors import UserError
from .augmentation.draws import send
from .class_mix import ClassMix
from .decoding import Decoder
from .examples import Example
from .order import BalancedOrder, ResidentOrder, StreamOrder
from .splits import Source, Split

RESIDENT_BYTES = 2 * 1024**3  # splits that decode to no more than this are decoded once and kept
LARGEST_GPU_SHARE = 1 / 16  # of a GPU's memory that a split may take: there may be three; else main memory keeps it


@dataclass
class Batch:
    """What one rank computes of a step's global batch.

    images uint8 (B, C, H, W); labels int64 (B,), or float32 (B, K) of 0 and 1 where an image has any number of classes;
    positions int64 (B,): where each stands in the global batch, or, in evaluation, in the split. Positions stay on the
    CPU, where the draws are made.
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return Batch(*moved, self.positions)

    def pin_memory(self) -> "Batch":
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.positions)

    def __len__(self) -> int:
        return len(self.labels)


def label_tensor(source: Source, examples: list[Example]) -> torch.Tensor:
    """The labels of a batch: class ids int64 (B,), or rows of 0 and 1, float32 (B, K)."""
    if source.is_multi_label:
        rows = [source.label_vector(example.label, example.name) for example in examples]
        return torch.from_numpy(np.stack(rows))
    return torch.tensor([source.label_id(example.label, example.name) for example in examples], dtype=torch.int64)


def decode_all(source: Source, split: Split, decoder: Decoder, num_threads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every image of a split as one uint8 tensor (N, C, H, W), and the labels (N,) or (N, K)."""
    decoded, labels = [], []
    with ThreadPoolExecutor(num_threads) as pool:  # PIL releases the interpreter while it decodes
        for shard in range(len(split.shard_sizes)):
            rows = split.rows(shard)
            for start in range(0, len(rows), 1024):
                examples = split.examples.read(shard, rows[start : start + 1024])
                decoded.append(torch.stack(list(pool.map(decoder, examples))))
                labels.append(label_tensor(source, examples))
    return torch.cat(decoded), torch.cat(labels)


def home_of(images: torch.Tensor, device: torch.device) -> torch.device:
    """Where a split is kept: on the device, or in main memory where it would take too much of a GPU's."""
    if device.type != "cuda":
        return device
    room = LARGEST_GPU_SHARE * torch.cuda.get_device_properties(device).total_memory
    return device if images.nbytes <= room else torch.device("cpu")


class ResidentImages:
    """A whole split as uint8 on a device, and batches gathered from it by index."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, device: torch.device):
        self.images, self.labels = images.to(device), labels.to(device)

    @classmethod
    def decoded(
        cls, source: Source, split: Split, decoder: Decoder, num_threads: int, device: torch.device
    ) -> "ResidentImages":
        """Every image of the split, kept where there is room."""
        images, labels = decode_all(source, split, decoder, num_threads)
        return cls(images, labels, home_of(images, device))

    def gather(self, samples: np.ndarray, positions: np.ndarray) -> Batch:
        index = send(torch.from_numpy(samples), self.images.device)
        return Batch(self.images[index], self.labels[index], torch.from_numpy(positions))


# ---------------------------------------------------------------- what a worker does


class RowReader:
    """Reads and decodes single rows of a split, by their number over all its shards; without a decoder, reads alone."""

    def __init__(self, source: Source, split: Split, decoder: Decoder | None = None):
        self.source, self.split, self.decoder = source, split, decoder
        self.ends = np.cumsum(split.shard_sizes)

    def examples(self, samples: np.ndarray) -> list[Example]:
        shards = np.searchsorted(self.ends, samples, side="right")
        found: dict[int, Example] = {}
        for shard in np.unique(shards):
            start = self.ends[shard] - self.split.shard_sizes[shard]
            wanted = np.sort(samples[shards == shard])
            rows = self.split.rows(int(shard))[wanted - start]
            found.update(zip(wanted.tolist(), self.split.examples.read(int(shard), rows), strict=True))
        return [found[sample] for sample in samples.tolist()]

    def batch(self, samples: np.ndarray, positions: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        epochs = np.zeros(len(samples), dtype=np.int64) if epochs is None else epochs
        examples = self.examples(samples)
        triples = zip(examples, epochs.tolist(), samples.tolist(), strict=True)
        return collate(self.source, examples, [self.decoder(*triple) for triple in triples], positions)


def collate(source: Source, examples: list[Example], images: list[torch.Tensor], positions: np.ndarray) -> Batch:
    return Batch(torch.stack(images), label_tensor(source, examples), torch.from_numpy(positions))


def joined(parts: list[Batch], is_pinned: bool = False) -> Batch:
    """Parts of a batch as one, in the order of their positions; of several the images are copied, to pinned memory."""
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([part.positions for part in parts]).argsort()
    rows = [image for part in parts for image in part.images]
    # row by row: less than half the time of an index into their concatenation, in the process that trains
    images = torch.empty(len(rows), *rows[0].shape, dtype=rows[0].dtype, pin_memory=is_pinned)
    torch.stack([rows[index] for index in order.tolist()], out=images)
    labels, positions = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("labels", "positions"))
    return Batch(images, labels.pin_memory() if is_pinned else labels, positions)


class _StepDataset(Dataset):
    """Training steps of a set that is read at random: item `step` is this rank's part of that step's batch."""

    def __init__(self, reader: RowReader, order: ResidentOrder, batch_size: int, rank: int, world_size: int):
        self.reader, self.order, self.batch_size = reader, order, batch_size
        self.positions = order.local_positions(batch_size, rank, world_size)

    def __getitem__(self, step: int) -> Batch | UserError:
        epochs, samples = self.order.batch(step, self.batch_size)
        try:
            return self.reader.batch(samples[self.positions], self.positions, epochs[self.positions])
        except UserError as error:
            return error  # a DataLoader would wrap it in a traceback


class _ChunkDataset(Dataset):
    """Evaluation: item i is this rank's part of the samples [i * batch_size, (i + 1) * batch_size)."""

    def __init__(self, reader: RowReader, batch_size: int, rank: int, world_size: int):
        self.reader, self.batch_size, self.rank, self.world_size = reader, batch_size, rank, world_size

    def __getitem__(self, index: int) -> Batch | UserError | None:
        samples = chunk_of(index, self.batch_size, len(self.reader.split), self.rank, self.world_size)
        try:
            return self.reader.batch(samples, samples) if len(samples) else None
        except UserError as error:
            return error


def chunk_of(index: int, batch_size: int, num_samples: int, rank: int, world_size: int) -> np.ndarray:
    """This rank's samples of evaluation batch `index`: none twice, none left out."""
    start = index * batch_size
    return np.arange(start + rank, min(start + batch_size, num_samples), world_size)


class _StreamDataset(IterableDataset):
    """Training steps of a stream: each worker reads some of this rank's lanes and yields its part of every step."""

    def __init__(
        self,
        reader: RowReader,
        order: StreamOrder,
        batch_size: int,
        steps: range,
        rank: int,
        world_size: int,
    ):
        self.reader, self.order, self.batch_size, self.steps = reader, order, batch_size, steps
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch | UserError | None]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        windows: dict[int, tuple[tuple[int, int], list[Example]]] = {}
        for step in self.steps:
            epochs, lanes, numbers = self.order.batch(step, self.batch_size)
            owned = (lanes % self.world_size == self.rank) & (lanes // self.world_size % num_workers == worker)
            positions = np.flatnonzero(owned)
            try:
                yield self._read(epochs, lanes, numbers, positions, windows) if len(positions) else None
            except UserError as error:
                yield error
                return

    def _read(self, epochs, lanes, numbers, positions, windows) -> Batch:
        examples, images = [], []
        for position in positions.tolist():
            epoch, lane, number = int(epochs[position]), int(lanes[position]), int(numbers[position])
            index, offset = divmod(number, self.order.window)
            if windows.get(lane, (None,))[0] != (epoch, index):
                windows[lane] = ((epoch, index), self._open_window(epoch, lane, index))
            example = windows[lane][1][offset]
            sample = self.order.lane_start(lane) + number  # with the epoch, names the draw of its crop
            examples.append(example)
            images.append(self.reader.decoder(example, epoch, sample))
        return collate(self.reader.source, examples, images, positions)

    def _open_window(self, epoch: int, lane: int, index: int) -> list[Example]:
        split = self.reader.split
        examples = []
        for shard, numbers in self.order.window_pieces(epoch, lane, index):
            examples += split.examples.read(shard, split.rows(shard)[numbers])
        return [examples[i] for i in self.order.window_permutation(epoch, lane, index)]


# ---------------------------------------------------------------- what the loop asks for


class TrainingData:
    """The training split in its order: `batches(start, stop)` gives this rank's part of each step's global batch."""

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int,
        device: torch.device,
        num_lanes: int = 24,
        window: int = 256,
        num_threads: int = 1,
        is_balanced: bool = False,
        repeats: int = 1,
    ):
        self.source, self.split = source, source.splits["train"]
        self.batch_size, self.rank, self.world_size, self.num_workers = batch_size, rank, world_size, num_workers
        self.reader = RowReader(source, self.split, decoder)
        self.resident: ResidentImages | None = None
        self.class_mix: ClassMix | None = None
        if source.streaming:
            self.order = StreamOrder(self.split.shard_sizes, seed, num_lanes, window)
            if rank == 0 and not source.is_multi_label:
                self.class_mix = ClassMix(self.order, len(source.class_names))
        else:
            self.order = ResidentOrder(len(self.split), seed, repeats)
            if is_balanced:
                self.order = BalancedOrder(source.label_ids_of("train"), seed, repeats)
            if is_resident(source, self.split, decoder):
                self.resident = ResidentImages.decoded(source, self.split, decoder, num_threads, device)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """This rank's batches of the steps from `start` to before `stop`."""
        steps = range(start, stop)
        if self.resident is not None:
            positions = self.order.local_positions(self.batch_size, self.rank, self.world_size)
            for step in steps:
                _, samples = self.order.batch(step, self.batch_size)
                yield self.resident.gather(samples[positions], positions)
        elif isinstance(self.order, ResidentOrder):
            dataset = _StepDataset(self.reader, self.order, self.batch_size, self.rank, self.world_size)
            yield from _load(dataset, self.num_workers, sampler=steps)
        else:
            shared = (self.order, self.batch_size, steps, self.rank, self.world_size)
            for step, batch in zip(steps, self._merge(_StreamDataset(self.reader, *shared)), strict=True):
                if self.class_mix is not None:
                    self.class_mix.watch(step, self.batch_size, batch.labels, batch.positions)
                yield batch

    def is_interleaved(self, step: int) -> bool:
        """Whether every rank holds each `world_size`-th position of the step's batch, which a stream's lanes, shared
        evenly, give but where an epoch ends inside it; all ranks agree."""
        if isinstance(self.order, ResidentOrder):
            return True
        first, last = step * self.batch_size, (step + 1) * self.batch_size - 1
        num_samples = self.order.num_samples
        return self.order.num_lanes % self.world_size == 0 and first // num_samples == last // num_samples

    def _merge(self, dataset: _StreamDataset) -> Iterator[Batch]:
        """Puts the workers' parts of each step together, in the order of their positions."""
        workers = max(1, min(self.num_workers, -(-self.order.num_lanes // self.world_size)))
        parts: list[Batch | None] = []
        # a DataLoader takes one item of each worker in turn, so `workers` items in a row are one step
        for part in _load(dataset, workers if self.num_workers else 0, pins=workers == 1):  # `joined` pins several
            parts.append(part)
            if len(parts) < workers:
                continue
            yield joined([part for part in parts if part is not None], torch.cuda.is_available())
            parts = []


def is_resident(source: Source, split: Split, decoder: Decoder) -> bool:
    """Whether a split is decoded once and kept: no draw at decoding, and small enough."""
    image_bytes = decoder.size[0] * decoder.size[1] * decoder.processor.num_channels
    return not source.streaming and decoder.crop_scale is None and len(split) * image_bytes <= RESIDENT_BYTES


class EvaluationData:
    """A split in its own order: `batches()` gives each of its samples once over all ranks."""

    def __init__(
        self,
        source: Source,
        split: Split,
        decoder: Decoder,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        device: torch.device,
        num_threads: int = 1,
    ):
        self.split, self.batch_size, self.num_workers = split, batch_size, num_workers
        self.label_shape = (len(source.class_names),) if source.is_multi_label else ()
        self.label_dtype = torch.float32 if source.is_multi_label else torch.int64
        self.rank, self.world_size = rank, world_size
        self.reader = RowReader(source, split, decoder)
        self.resident: ResidentImages | None = None
        if is_resident(source, split, decoder):
            self.resident = ResidentImages.decoded(source, split, decoder, num_threads, device)

    def batches(self) -> Iterator[Batch]:
        num_batches = -(-len(self.split) // self.batch_size)
        if self.resident is not None:
            for index in range(num_batches):
                samples = chunk_of(index, self.batch_size, len(self.split), self.rank, self.world_size)
                if len(samples):
                    yield self.resident.gather(samples, samples)
            return
        dataset = _ChunkDataset(self.reader, self.batch_size, self.rank, self.world_size)
        for batch in _load(dataset, self.num_workers, sampler=range(num_batches)):
            if batch is not None:
                yield batch


def _leave_process_group(_worker: int):
    # torchrun sends SIGTERM to the whole group: it is the trainer's to answer, who still needs its workers for a step
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def lost_worker(error: RuntimeError, num_workers: int | None = None) -> UserError | None:
    """What to say where the error is that a decoding process was killed, else None.

    torch raises it by a signal's handler: in whatever the main thread does just then, a step of the network too.
    """
    if "DataLoader worker" not in str(error):
        return None
    now = "" if num_workers is None else f" (now {num_workers})"
    return UserError(
        "A process that decodes images was killed, often because memory ran out: use fewer --dataloader_num_workers"
        f"{now}. The same command goes on from the last checkpoint."
    )


def _load(dataset: Any, num_workers: int, sampler: range | None = None, pins: bool = True) -> Iterator[Batch | None]:
    # a generator of its own: a DataLoader without one draws its base seed from the global one, which is the model's
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pins and torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_leave_process_group,
    )
    items = iter(loader)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            item = lost_worker(error, num_workers)
            if item is None:
                raise
        if isinstance(item, UserError):
            item.met_alone = True
            raise item
        yield item
