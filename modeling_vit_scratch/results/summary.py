"""A network as a table: the shapes, parameters and operations of its layers, without computing anything."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .text_table import text_table

Shape = tuple[int, ...]
CONVENTION = (
    "A multiplication with its addition is 2 FLOP (1 GMAC is 2 GFLOP), as in torch.utils.flop_counter.\n"
    "Counted are products of matrices, those of attention too (q k^T, and weights times v: the row `attention`);\n"
    "norms, softmax, activations and sums are not."
)


@dataclass(frozen=True)
class Row:
    """What `count` modules of one place in the layers have themselves, without what is inside them.

    shape_in, shape_out: of one module's first tensors, with a batch of one. num_parameters, flops: of all together.
    """

    name: str
    count: int
    shape_in: Shape
    shape_out: Shape
    num_parameters: int
    flops: int


def summarise(config: ViTScratchConfig) -> list[Row]:
    """A row for each module of the network with parameters or products of matrices of its own, in forward's order.

    The modules of the layers, which are all alike, share a row: `layers.*`. The rows' parameters and FLOPs add up to
    the network's. Runs on the meta device: neither weights nor pixels have values.
    """
    model = _without_values(config)
    with _shapes(model) as shapes:
        counter = _counted(model, config.image_height_width)
    flops = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    rows: dict[str, Row] = {}
    for name, (shape_in, shape_out) in shapes.items():
        module = model.get_submodule(name)
        num_parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        inside = (f"{name}.{child}" if name else child for child, _ in module.named_children())
        own_flops = flops.get(name, 0) - sum(flops.get(child, 0) for child in inside)
        if not num_parameters and not own_flops:
            continue
        place = re.sub(r"\blayers\.\d+", "layers.*", name)
        before = rows.get(place, Row(place, 0, shape_in, shape_out, 0, 0))
        rows[place] = Row(
            place, before.count + 1, shape_in, shape_out, before.num_parameters + num_parameters,
            before.flops + own_flops,
        )  # fmt: skip
    return list(rows.values())


def training_flops(
    config: ViTScratchConfig, image_size: tuple[int, int] | None = None, patch_drop_rate: float = 0.0
) -> int:
    """FLOP of one image (height, width), else of the configuration's size, in training all of the network.

    A forward and a backward of twice its operations: the gradients of a product are two products of its size.
    patch_drop_rate: of this training, whatever the configuration says.
    """
    model = _without_values(config)
    model.vit.patch_dropout.train().rate = patch_drop_rate
    return 3 * _counted(model, image_size or config.image_height_width).get_total_flops()


def _without_values(config: ViTScratchConfig) -> ViTScratchForImageClassification:
    with torch.device("meta"):
        model = ViTScratchForImageClassification(copy.deepcopy(config)).eval()
    model.set_attn_implementation("eager")  # torch 2.14 counts its products, but not every fused kernel of them
    return model


def _counted(model: ViTScratchForImageClassification, image_size: tuple[int, int]) -> FlopCounterMode:
    """The counter after one image went through the network."""
    pixel_values = torch.empty(1, model.config.num_channels, *image_size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values, interpolate_pos_encoding=True)
    return counter


@contextmanager
def _shapes(model: nn.Module) -> Iterator[dict[str, tuple[Shape, Shape]]]:
    """Fills with (shape in, shape out) of the modules whose forward runs and gives a tensor, in the order they end."""
    shapes: dict[str, tuple[Shape, Shape]] = {}

    def keep(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any):
        came = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        went = output[0] if isinstance(output, tuple) else output
        if isinstance(went, torch.Tensor):  # the model's own output, a dictionary, has nothing of its own
            shapes[name] = tuple(came.shape), tuple(went.shape)

    hooks = [
        part.register_forward_hook(
            lambda _, args, kwargs, output, name=name: keep(name, args, kwargs, output), with_kwargs=True
        )
        for name, part in model.named_modules()
    ]
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


def summary_text(rows: list[Row]) -> str:
    """The rows as a table, with their sums, and what is counted."""
    num_parameters, flops = sum(row.num_parameters for row in rows), sum(row.flops for row in rows)
    unit, size = ("GFLOP", 1e9) if flops >= 1e9 else ("MFLOP", 1e6)
    cells = [("module", "times", "shape in", "shape out", "parameters", unit)]
    for row in rows:
        shapes = (" x ".join(map(str, shape)) for shape in (row.shape_in, row.shape_out))
        cells.append((row.name, str(row.count), *shapes, f"{row.num_parameters:,}", f"{row.flops / size:.3f}"))
    cells.append(("sum", "", "", "", f"{num_parameters:,}", f"{flops / size:.3f}"))
    total = (
        f"{num_parameters:,} parameters ({num_parameters * 4 / 1024**2:,.1f} MiB in float32), {flops / size:.3f} "
        f"{unit} an image, forward."
    )
    return "\n".join([text_table(cells), "", total, CONVENTION])
