"""What is inside a network, found by looking at one forward: tokens, layers, norms. No class is known by name."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FEWEST_MATRICES = 3  # of a layer: attention has at least two, the MLP one


@dataclass
class Call:
    """A module's forward that was seen: its arguments and its first output tensor."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def tokens(self) -> torch.Tensor | None:
        """The first tensor that went in."""
        return next(tensors_in((self.args, self.kwargs)), None)

    @property
    def result(self) -> torch.Tensor | None:
        return next(tensors_in(self.output), None)

    def again(self, tokens: torch.Tensor, extras: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """The output for other tokens; `extras` changes the other tensors among the arguments."""
        old = self.tokens
        replace = lambda tensor: tokens if tensor is old else tensor if extras is None else extras(tensor)  # noqa: E731
        output = self.module(*map_tensors(self.args, replace), **map_tensors(self.kwargs, replace))
        return next(tensors_in(output))


@dataclass
class Anatomy:
    """calls: of every module, in the order in which they ended. layers: the repeated blocks, in their order.

    sequence_axis: 1 where tokens are (B, N, D), 0 where they are (N, B, D).
    """

    module: nn.Module
    images: torch.Tensor
    calls: list[Call]
    layers: list[Call]
    sequence_axis: int

    @property
    def num_tokens(self) -> int:
        return self.layers[0].tokens.shape[self.sequence_axis]

    def select(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        """One token of each image, (B, D)."""
        return tokens.select(self.sequence_axis, index)

    def patch_tokens(self) -> list[int]:
        """Indices of the tokens before the first layer that differ from image to image; the others are class tokens
        and registers."""
        tokens = self.layers[0].tokens
        varies = tokens.std(dim=1 - self.sequence_axis).amax(dim=-1) > 1e-4 * tokens.std()
        return varies.nonzero().flatten().tolist()


def observe(module: nn.Module, images: torch.Tensor, batch_size: int) -> Anatomy:
    """One forward without gradients, looked at from every module."""
    with torch.no_grad(), recording(module) as calls:
        module(images)
    sequence_axis = 1
    layers = find_layers(calls, batch_size)
    if layers and layers[0].tokens.shape[0] != batch_size:
        sequence_axis = 0
    return Anatomy(module, images, calls, layers, sequence_axis)


@contextmanager
def recording(module: nn.Module) -> Iterator[list[Call]]:
    """The list that fills with calls while the module runs."""
    calls: list[Call] = []
    names = {part: name for name, part in module.named_modules()}

    def keep(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any):
        calls.append(Call(names[part], part, args, kwargs, output))

    hooks = [part.register_forward_hook(keep, with_kwargs=True) for part in names]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def find_layers(calls: list[Call], batch_size: int) -> list[Call]:
    """The siblings of one class that map tokens to tokens and hold the most parameters; else the innermost such one."""
    groups: dict[tuple[str, type], list[Call]] = defaultdict(list)
    for call in calls:
        if maps_tokens(call, batch_size) and num_matrices(call.module) >= FEWEST_MATRICES:
            groups[call.name.rpartition(".")[0], type(call.module)].append(call)
    if not groups:
        return []
    repeated = [group for group in groups.values() if len(group) > 1]
    if repeated:
        return max(repeated, key=lambda group: sum(num_weights(call.module) for call in group))
    singles = [group[0] for group in groups.values()]
    return [max(singles, key=lambda call: (num_matrices(call.module), call.name.count(".")))]


def maps_tokens(call: Call, batch_size: int) -> bool:
    before, after = call.tokens, call.result
    return (
        before is not None
        and after is not None
        and before.ndim == 3
        and before.shape == after.shape
        and batch_size in before.shape[:2]
        and before.is_floating_point()
    )


def num_matrices(module: nn.Module) -> int:
    return sum(parameter.ndim == 2 for parameter in module.parameters())


def num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nest of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict:
        return {key: map_tensors(part, change) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(part, change) for part in value)
    return value


def permute_tables(order: torch.Tensor, masks: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """What brings the tensors beside the tokens (rotary tables, masks) into the order of permuted tokens.

    masks: whether one with two axes of N is a mask (N, N), both of whose axes follow, or a table with N channels.
    """
    num_tokens = len(order)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        axes = [axis for axis, length in enumerate(tensor.shape) if length == num_tokens]
        for axis in axes if masks else axes[:1]:
            tensor = tensor.index_select(axis, order)
        return tensor

    return change


# ---------------------------------------------------------------- which pixels a token is made of


def footprints(anatomy: Anatomy, indices: list[int]) -> torch.Tensor:
    """Which pixel values each of these tokens is made of, before the first layer: bool (len(indices), C, H, W)."""
    images = anatomy.images[:1].repeat(2, 1, 1, 1).requires_grad_()
    entering = {}

    def stop(module, args, kwargs):
        entering["tokens"] = next(tensors_in((args, kwargs)))
        raise _Reached

    hook = anatomy.layers[0].module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        anatomy.module(images)
    except _Reached:
        pass
    finally:
        hook.remove()
    tokens = entering["tokens"]
    if not tokens.requires_grad:
        return torch.zeros(len(indices), *images.shape[1:], dtype=torch.bool)
    direction = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(3))
    masks = []
    for index in indices:
        value = (anatomy.select(tokens, index) @ direction).sum()
        (gradient,) = torch.autograd.grad(value, images, retain_graph=True, allow_unused=True)
        gradient = torch.zeros_like(images) if gradient is None else gradient
        size = gradient.abs().amax(dim=0)
        masks.append(size > 1e-6 * size.max())
    return torch.stack(masks)


class _Reached(Exception):
    """The first layer is reached: what comes after it is not needed."""
