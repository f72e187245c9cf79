"""The parts of a batch, whose gradients are summed: one after the other, or on a CPU several at once.

A CPU computes two halves of a batch by one thread each faster than the whole by two threads, which wait for each other
after every product (benchmarks/NOTES.md). The sums are made in the order of the parts: the bits are those of the same
parts one after the other, or of a process for each.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchDropPath
from .features import HeadOnFeatures
from .recipe import Recipe
from .sharding import is_sharded

# part -> the loss whose gradient is wanted, and what is counted of it
Compute = Callable[[slice], tuple[torch.Tensor, torch.Tensor]]

MEASURED_THREADS = 2  # with more, parts at once are left to who asks for them
# FLOP of a step, below which halves wait for each other in Python, which runs one thread at a time
WORTH_HALVES = {"bf16": 40e9, "no": 10e9}


def parts_of(num_images: int, count: int) -> list[slice]:
    """Every count-th image for each part; fewer parts where there are fewer images."""
    return [slice(index, None, count) for index in range(min(count, num_images))]


class PartsAtOnce:
    """Computes `count` parts of a batch at once, each with a share of this thread's threads."""

    def __init__(self, network: nn.Module, count: int):
        self.count, self.num_threads = count, torch.get_num_threads()
        self.threads_each = self.num_threads // count
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.pool = ThreadPoolExecutor(count - 1, "part", torch.set_num_threads, (self.threads_each,))

    def sum_gradients(self, parts: Sequence[slice], compute: Compute) -> list[torch.Tensor]:
        """Adds the parts' gradients to the parameters', in their order; returns what is counted of each."""
        counted = []
        torch.set_num_threads(self.threads_each)
        try:
            for first in range(0, len(parts), self.count):
                counted += self._at_once(parts[first : first + self.count], compute)
        finally:
            torch.set_num_threads(self.num_threads)
        return counted

    def _at_once(self, parts: Sequence[slice], compute: Compute) -> list[torch.Tensor]:
        futures = [self.pool.submit(self._gradients, compute, part) for part in parts[1:]]
        try:
            loss, counts = compute(parts[0])
            loss.backward()
        finally:
            wait(futures)  # nobody may compute on while an error is on its way
        counted = [counts]
        for gradients, counts in (future.result() for future in futures):
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            counted.append(counts)
        return counted

    def _gradients(self, compute: Compute, part: slice) -> tuple[Sequence[torch.Tensor | None], torch.Tensor]:
        loss, counts = compute(part)
        return torch.autograd.grad(loss, self.parameters, allow_unused=True), counts


class BatchParts:
    """How a run takes its batches apart: the parts that the recipe accumulates, and those computed at once.

    step_flops: of an image, in an initial step (True) and in one of the others. Raises UserError for --cpu_parts that
    cannot be.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, network: nn.Module, step_flops: Callable[[bool], float]
    ):
        self.accelerator, self.network = accelerator, network
        # one process with two parts sums the gradients of the same images as two processes with one part each
        self.num_parts = -(-recipe.gradient_accumulation_steps // accelerator.num_processes)
        count = num_parts_at_once(recipe, accelerator, network)
        self.at_once = PartsAtOnce(network, count) if count > 1 else None
        self.is_worth = dict.fromkeys((True, False), count > 1)  # an initial step, one of the others
        if count > 1 and recipe.cpu_parts is None:
            least = WORTH_HALVES[accelerator.mixed_precision]
            self.is_worth = {kind: step_flops(kind) * recipe.train_batch_size >= least for kind in (True, False)}

    def lines(self) -> list[str]:
        """What a run says of it: a line where parts are computed at once."""
        if not any(self.is_worth.values()):
            return []
        some = "" if all(self.is_worth.values()) else ", where a step is long enough for that"
        return [f"each batch in {self.at_once.count} parts at once, {self.at_once.threads_each} thread(s) each{some}"]

    def sum_gradients(self, num_images: int, compute: Compute, is_initial: bool) -> list[torch.Tensor]:
        """Adds the gradients of a batch of so many images to the parameters'; returns what is counted of each part."""
        if self.is_worth[is_initial]:
            return self.at_once.sum_gradients(parts_of(num_images, self.num_parts * self.at_once.count), compute)
        parts, counted = parts_of(num_images, self.num_parts), []
        for index, part in enumerate(parts):
            with self.accelerator.no_sync(self.network) if index + 1 < len(parts) else nullcontext():
                loss, counts = compute(part)
                self.accelerator.backward(loss)
            counted.append(counts)
        return counted


def usual_parts_at_once() -> int:
    """In how many parts at once a batch that is worth it is computed where nobody asks for another number."""
    return 2 if torch.get_num_threads() == MEASURED_THREADS else 1


def num_parts_at_once(recipe: Recipe, accelerator: Accelerator, network: nn.Module) -> int:
    """In how many parts at once this process computes a batch. Raises UserError for --cpu_parts that cannot be so."""
    threads, asked = torch.get_num_threads(), recipe.cpu_parts
    obstacle = _obstacle(recipe, accelerator, network)
    if asked is None:
        return usual_parts_at_once() if obstacle is None else 1
    if asked > 1 and obstacle is not None:
        raise UserError(f"--cpu_parts {asked}: {obstacle}. Leave it out.")
    if asked > threads:
        raise UserError(f"--cpu_parts {asked}: there are {threads} threads, and each part needs one (--cpu_threads).")
    return asked


def _obstacle(recipe: Recipe, accelerator: Accelerator, network: nn.Module) -> str | None:
    """What keeps a process from computing parts at once, as a sentence of --cpu_parts; None: nothing."""
    if accelerator.device.type != "cpu":
        return "parts are computed at once on a CPU alone"
    if accelerator.num_processes > 1 or is_sharded(accelerator):
        return "the processes are the parts already"
    if recipe.torch_compile or recipe.gradient_checkpointing:
        return "it goes with neither --torch_compile nor --gradient_checkpointing"
    if isinstance(accelerator.unwrap_model(network), HeadOnFeatures):
        return "the frozen backbone sees each image once"
    if recipe.specimen is not None:
        return "a specimen is not trained so"
    if any(_draws(module) for module in network.modules()):
        return "dropout draws, and parts at once would draw in another order each time"
    return None


def _draws(module: nn.Module) -> bool:
    """Whether a module draws numbers in training (patch dropout is given its own)."""
    if isinstance(module, ViTScratchDropPath):
        return module.rate > 0
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return getattr(module, "attention_dropout", 0.0) > 0
