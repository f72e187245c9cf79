"""Images a second of one training step of the same network: ours, transformers', timm's, torchvision's, article 4's.

python benchmarks/train_step.py                                              d192 at 32 px, batch 128, float32 and bf16
python benchmarks/train_step.py --shapes nano,micro,d192,vit_s_4,vit_ti_16,vit_s_16,vit_b_16 --compile
python benchmarks/train_step.py --shapes nano,micro,d192,vit_ti_16,vit_s_16 --rounds 5
    --output benchmarks/results/train-step-cpu.json                           keeps the numbers
python benchmarks/train_step.py --device cuda --compile --batch_size 512 --shapes vit_s_16

A step is forward in autocast, cross-entropy, backward, fused AdamW. The networks take turns within one process, in
another order each round; a turn is two steps, the second one timed, for in training a step follows one of its own
network. A number is the median over the rounds. "of peak" is the share of the largest matrix product rate measured
between the rounds (2,048 x 2,048 on a CPU, 8,192 on a GPU), by PyTorch's library or functions_vit_scratch.py's; FLOPs
are matrix products alone, three times the forward's, of the network as the paper has it. "executed" leaves out those
that are not made: ours makes none in the last layer that the class token does not need. "halves at once" is our step
as run_train.py takes it on two threads, a half of the batch by each (training/batch_parts.py). Memory is what a step
needs at its peak beyond the process before, with weights, gradients and the optimizer's state: on a CPU the median of
three processes of its own, for the heap grows otherwise in each.
"""

import argparse
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers import OURS, PEERS, SHAPES, Shape, ours
from recorded import markdown_table, write_record
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from modeling_vit_scratch.functions_vit_scratch import linear_product
from modeling_vit_scratch.training.batch_parts import PartsAtOnce, parts_of, usual_parts_at_once
from modeling_vit_scratch.training.machine import keep_freed_memory

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}
PRECISION_NAMES = {"no": "float32", "bf16": "bf16"}  # in tables
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
COMPILED = " (compiled)"
HALVES = ", halves at once"
MEMORY_PROCESSES = 3  # that measure a network's memory on a CPU


def training_step(
    model: nn.Module, shape: Shape, batch_size: int, precision: str, device: str, num_at_once: int = 1
) -> Callable[[], None]:
    """One step on random images, as a function. num_at_once: parts of the batch that a CPU computes at once."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch_size, 3, shape.image_size, shape.image_size, device=device)
    labels = torch.randint(shape.num_labels, (batch_size,), device=device)

    def loss(part: slice) -> torch.Tensor:
        with torch.autocast(device, PRECISIONS[precision], enabled=precision != "no"):
            logits = model(images[part])
        logits = logits if isinstance(logits, torch.Tensor) else logits.logits
        return nn.functional.cross_entropy(logits.float(), labels[part], reduction="sum") / batch_size

    at_once = PartsAtOnce(model, num_at_once) if num_at_once > 1 else None

    def step():
        if at_once is None:
            loss(slice(None)).backward()
        else:
            at_once.sum_gradients(parts_of(batch_size, num_at_once), lambda part: (loss(part), torch.tensor(0)))
        optimizer.step()
        optimizer.zero_grad()

    return step


class MadeProducts(TorchDispatchMode):
    """FLOPs of the products that are made: torch's FlopCounterMode has hooks everywhere, for which ours makes all."""

    flops = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        output = operation(*arguments, **(named or {}))
        count = flop_registry.get(operation.overloadpacket)
        self.flops += 0 if count is None else count(*arguments, **(named or {}), out_val=output)
        return output


def step_flops(shape: Shape) -> tuple[int, int]:
    """FLOPs of matrix products in one image's training step, forward and twice as many backward: all, and ours."""
    with torch.device("meta"):
        paper, model = ours(shape, "eager"), ours(shape)
        image = torch.empty(1, 3, shape.image_size, shape.image_size)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            paper(image)
        with MadeProducts() as made:
            model(image)
    return 3 * counter.get_total_flops(), 3 * made.flops


def matrix_product_rate(precision: str, device: str) -> float:
    """FLOP/s of one large product of square matrices, the best of five by PyTorch's library and by ours."""
    side = MATRIX_SIDE[device]
    left, right = (torch.randn(side, side, device=device, dtype=PRECISIONS[precision]) for _ in range(2))
    libraries = (lambda: left @ right, lambda: linear_product(left, right.t()))
    return 2 * side**3 / min(seconds(product, device) for product in libraries for _ in range(5))


def seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: Shape, batch_size: int, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images a second by network, the median of the rounds, and the rate of matrix products over the same time."""
    torch.manual_seed(0)
    torch.compiler.reset()  # two libraries share a frame, whose compiled entries of other shapes would reach the limit
    device, steps = arguments.device, {}
    for name in arguments.networks:
        build = PEERS[name]
        steps[name] = training_step(build(shape), shape, batch_size, precision, device)
        if name == OURS and device == "cpu" and usual_parts_at_once() == 2:
            steps[name + HALVES] = training_step(build(shape), shape, batch_size, precision, device, 2)
        if arguments.compile and name != "article 4":
            compiled = torch.compile(build(shape))
            steps[name + COMPILED] = training_step(compiled, shape, batch_size, precision, device)
    for step in steps.values():
        for _ in range(2):  # lazy set-up, the optimizer's state, compilation
            step()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    peaks = []
    for turn in range(arguments.rounds):
        peaks.append(matrix_product_rate(precision, device))
        for name in random.Random(turn).sample(list(steps), len(steps)):
            steps[name]()
            taken[name].append(seconds(steps[name], device))
    rates = {name: batch_size / statistics.median(times) for name, times in taken.items()}
    return {"images_per_second": rates, "matrix_product_rate": statistics.median(peaks), "seconds": taken}


# ---------------------------------------------------------------- memory


def peak_memory(name: str, shape: Shape, batch_size: int, precision: str, device: str) -> float:
    """MiB that three steps of one network need beyond the process before them."""
    if device == "cuda":
        return _cuda_memory(name, shape, batch_size, precision)
    work = (name, shape, batch_size, precision, torch.get_num_threads())
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return statistics.median(pool.apply(_process_memory, work) for _ in range(MEMORY_PROCESSES))


def _cuda_memory(name: str, shape: Shape, batch_size: int, precision: str) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = training_step(PEERS[name](shape), shape, batch_size, precision, "cuda")
    for _ in range(3):
        step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _process_memory(name: str, shape: Shape, batch_size: int, precision: str, threads: int) -> float:
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the processes that train
    tiny = Shape(32, 16, 24, 1, 3, 1, 2)
    build, num_at_once = PEERS[name.removesuffix(HALVES)], 2 if name.endswith(HALVES) else 1
    training_step(build(tiny), tiny, 2, precision, "cpu")()  # imports and libraries' own workspaces come first
    Path("/proc/self/clear_refs").write_text("5")  # the highest size is kept from before exec: it starts anew here
    before = _highest_size()
    step = training_step(build(shape), shape, batch_size, precision, "cpu", num_at_once)
    for _ in range(3):
        step()
    return (_highest_size() - before) / 1024


def _highest_size() -> int:
    """The largest resident size of this process, in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


# ---------------------------------------------------------------- the table


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape_name in arguments.shapes:
        shape = SHAPES[shape_name]
        # images of 224 px hold three times the tokens of 32 px, and a CPU should not wait for minutes
        batch_size = arguments.batch_size or (128 if shape.image_size < 100 else 16)
        flops, our_flops = step_flops(shape)
        for precision in arguments.precisions:
            measured = measure(shape, batch_size, precision, arguments)
            peak = measured["matrix_product_rate"]
            for name, rate in measured["images_per_second"].items():
                memory = math.nan
                if not name.endswith(COMPILED):
                    memory = peak_memory(name, shape, batch_size, precision, arguments.device)
                yield {
                    "shape": shape_name, "batch_size": batch_size, "precision": precision, "network": name,
                    "images_per_second": rate, "gflops": rate * flops / 1e9, "share_of_peak": rate * flops / peak,
                    "executed_share": rate * (our_flops if name.startswith(OURS) else flops) / peak,
                    "ours_over_this": measured["images_per_second"][OURS] / rate, "peak_memory_mib": memory,
                    "matrix_product_gflops": peak / 1e9, "step_seconds": measured["seconds"][name],
                }  # fmt: skip


def as_words(row: dict[str, Any]) -> list[str]:
    memory = row["peak_memory_mib"]
    return [
        row["shape"], PRECISION_NAMES[row["precision"]], row["network"],
        f"{row['images_per_second']:,.1f}", f"{row['gflops']:,.0f}", f"{row['share_of_peak']:.0%}",
        f"{row.get('executed_share', row['share_of_peak']):.0%}",  # older records: all was executed
        f"{row['ours_over_this']:.2f}", "" if math.isnan(memory) else f"{memory:,.0f}",
    ]  # fmt: skip


HEADER = ["shape", "precision", "network", "images/s", "GFLOP/s", "of peak", "executed", "ours / this", "peak MiB"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="d192", help=f"names with commas: {', '.join(SHAPES)}")
    parser.add_argument("--networks", default=",".join(PEERS), help=f"names with commas, {OURS} among them")
    parser.add_argument("--precisions", default="no,bf16", help="no (float32) and bf16, with commas")
    parser.add_argument("--batch_size", type=int, help="else 128 at 32 px, 16 at 224 px")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="each network compiled as well")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="else torch's own choice")
    parser.add_argument("--output", help="a JSON file to keep the numbers in")
    arguments = parser.parse_args()
    for several in ("shapes", "networks", "precisions"):
        setattr(arguments, several, getattr(arguments, several).split(","))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as run_train.py does; it serves all of them
    measured = []
    for row in rows(arguments):
        measured.append(row)
        print(" | ".join(as_words(row)), flush=True)
    print(markdown_table(HEADER, [as_words(row) for row in measured]))
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        settings["threads"] = torch.get_num_threads()
        words, device = sys.argv[1:], arguments.device
        write_record(arguments.output, "train_step.py", words, device, settings=settings, rows=measured)


if __name__ == "__main__":
    main()
