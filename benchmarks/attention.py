"""Which exact attention is fastest where: products (eager), PyTorch's fused one (sdpa), two batched products, compiled.

python benchmarks/attention.py                                               a table by precision and tokens
    --output benchmarks/results/attention-cpu.json                           keeps the numbers
    --head_dim 32                                                            channels a head, 64 where not said
python benchmarks/attention.py --device cuda

Forward and backward of attention alone, from queries, keys and values as the network has them (transposed views of
(B, N, A, F)) to the tokens' outputs. Candidates take turns; milliseconds are medians of the rounds.
`sdpa`, the default, takes "products" where this table says so (is_faster_as_products in functions_vit_scratch.py).
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable

import torch
from peers import SHAPES, ours
from recorded import markdown_table, write_record
from torch import nn
from train_step import PRECISION_NAMES, PRECISIONS, seconds
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_vit_scratch.functions_vit_scratch import product_attention_forward
from modeling_vit_scratch.modeling_vit_scratch import eager_attention_forward
from modeling_vit_scratch.training.machine import keep_freed_memory

CASES = {16: 256, 65: 128, 197: 16, 257: 16, 577: 4, 1025: 2}  # tokens: images, so that each takes a moment
CANDIDATES: dict[str, Callable] = {
    "eager": eager_attention_forward,
    "sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"],
    "products": product_attention_forward,
}


def candidate(module: nn.Module, attention: Callable, inputs: list[torch.Tensor], precision: str) -> Callable[[], None]:
    scaling = inputs[0].shape[-1] ** -0.5
    gradient = torch.randn(inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device)

    def step():
        heads = [states.detach().requires_grad_() for states in inputs]
        with torch.autocast(gradient.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output, _ = attention(module, *(states.transpose(1, 2) for states in heads), None, scaling=scaling)
        output.backward(gradient)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--num_heads", type=int, default=3)
    parser.add_argument("--head_dim", type=int, default=64, help="channels a head")
    parser.add_argument("--compile", action="store_true", help="also each compiled")
    parser.add_argument("--output", help="a JSON file to keep the numbers in")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the processes that train
    module = ours(SHAPES["nano"]).vit.layers[0].attention.to(arguments.device)
    rows = []
    for precision, dtype in PRECISIONS.items():
        for num_tokens, batch_size in CASES.items():
            torch.manual_seed(0)
            candidates = dict(CANDIDATES)
            if arguments.compile:
                torch.compiler.reset()  # for these shapes, as a network has its own
                candidates |= {f"{name}, compiled": torch.compile(attention) for name, attention in CANDIDATES.items()}
            size = (batch_size, num_tokens, arguments.num_heads, arguments.head_dim)
            inputs = [torch.randn(size, device=arguments.device, dtype=dtype) for _ in range(3)]
            steps = {name: candidate(module, attention, inputs, precision) for name, attention in candidates.items()}
            taken: dict[str, list[float]] = {name: [] for name in steps}
            for step in steps.values():
                step(), step()
            for turn in range(arguments.rounds):
                for name in random.Random(turn).sample(list(steps), len(steps)):
                    taken[name].append(1000 * seconds(steps[name], arguments.device))
            medians = {name: statistics.median(times) for name, times in taken.items()}
            rows.append({"precision": precision, "tokens": num_tokens, "images": batch_size, "milliseconds": medians})
            print(rows[-1], flush=True)
    print(table(rows))
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        settings["threads"] = torch.get_num_threads()
        write_record(arguments.output, "attention.py", sys.argv[1:], arguments.device, settings=settings, rows=rows)


def table(rows: list[dict]) -> str:
    names = list(rows[0]["milliseconds"])
    lines = [
        [PRECISION_NAMES[row["precision"]], str(row["tokens"]), str(row["images"]),
         *(f"{row['milliseconds'][name]:.2f}" for name in names),
         min(row["milliseconds"], key=row["milliseconds"].get)]
        for row in rows
    ]  # fmt: skip
    return markdown_table(["precision", "tokens", "images", *(f"{name}, ms" for name in names), "fastest"], lines)


if __name__ == "__main__":
    main()
