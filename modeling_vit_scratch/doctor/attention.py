"""Attention, seen from below: every product, softmax and scale that PyTorch runs, whatever the module is called."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from .findings import NotApplicable, Verdict
from .subject import Subject

TOLERANCE = 0.01
SAME_VALUES = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "t", "expand", "unsqueeze", "squeeze",
    "select", "slice", "unbind", "split", "split_with_sizes", "chunk", "clone", "contiguous", "_to_copy", "detach",
    "alias", "diagonal", "add", "sub", "masked_fill", "cat",
}  # fmt: skip


@dataclass
class Trace:
    """What is known of a tensor: the factor that multiplied it since it was computed, the width over which query and
    key were multiplied to give it (None: it is no score), and whether softmax has made weights of it."""

    factor: float | None = 1.0
    width: int | None = None
    is_weights: bool = False


@dataclass
class Scores:
    """A softmax over scores: the factor on them (None: it is learned) and the width of a query."""

    factor: float | None
    width: int


class AttentionWatch(TorchDispatchMode):
    """Follows scores from the product of queries and keys to the product of weights and values."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.traces: dict[int, Trace] = {}
        self.kept: list[torch.Tensor] = []  # an id stays a tensor's own while the tensor lives
        self.scores: list[Scores] = []
        self.sums: list[float] = []  # of weights over the keys that are summed with them, the one furthest from 1
        self.num_weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        trace = self._trace(_name(func), args, kwargs)
        if trace is not None:
            for tensor in [output] if isinstance(output, torch.Tensor) else output:
                if isinstance(tensor, torch.Tensor):
                    self.traces[id(tensor)] = trace
                    self.kept.append(tensor)
        return output

    def of(self, value: Any) -> Trace:
        return self.traces.get(id(value), Trace())

    def _trace(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace | None:
        if name in SAME_VALUES:
            parts = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            return self.traces.get(id(parts[0]))
        if name in ("mul", "div"):
            return self._scaled(name, *args[:2])
        if name in ("bmm", "baddbmm"):
            first, second = args[-2:]
            factor = kwargs.get("alpha", 1.0)
            return self._product(first, second, factor)
        if name in ("_softmax", "_safe_softmax"):
            scores = self.of(args[0])
            if scores.width is None:
                return None
            self.scores.append(Scores(scores.factor, scores.width))
            self.num_weights += 1
            return Trace(is_weights=True)
        if name.startswith("_scaled_dot_product"):
            self._fused(args, kwargs)
        return None

    def _scaled(self, name: str, first: Any, second: Any) -> Trace | None:
        if not isinstance(first, torch.Tensor) or (isinstance(second, torch.Tensor) and first.numel() == 1):
            first, second = second, first
        trace = self.of(first)
        if isinstance(second, torch.Tensor) and second.numel() > 1:
            # rotary tables turn queries and keys; a factor of its own for each score is a learned one
            return trace if trace.width is None else Trace(None, trace.width)
        if isinstance(second, torch.Tensor) and second.untyped_storage().data_ptr() in self.own:
            return Trace(None, trace.width, trace.is_weights)
        value = float(second)
        if trace.factor is None or (name == "div" and value == 0):
            return Trace(None, trace.width, trace.is_weights)
        return Trace(trace.factor * value if name == "mul" else trace.factor / value, trace.width, trace.is_weights)

    def _product(self, first: torch.Tensor, second: torch.Tensor, factor: float) -> Trace | None:
        traces = self.of(first), self.of(second)
        for trace, weights, axis in ((traces[0], first, -1), (traces[1], second, -2)):
            if trace.is_weights:
                sums = weights.float().sum(dim=axis).flatten()
                self.sums.append(sums[(sums - 1).abs().argmax()].item())
                return None
        if self.own & {part.untyped_storage().data_ptr() for part in (first, second)}:
            return None  # a Linear
        factors = [trace.factor for trace in traces]
        return Trace(None if None in factors else factors[0] * factors[1] * factor, width=first.shape[-1])

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """torch's own attention: scaled by 1 / sqrt(F) unless told otherwise, and right in all else."""
        query, key = args[:2]
        scale = kwargs.get("scale")
        width = query.shape[-1]
        factors = (self.of(query).factor, self.of(key).factor, width**-0.5 if scale is None else scale)
        self.scores.append(Scores(None if None in factors else factors[0] * factors[1] * factors[2], width))
        self.num_weights += 1
        self.sums.append(1.0)


def _name(func: Any) -> str:
    """The operator's plain name: mul for aten::mul.Tensor and for aten::mul_.Tensor."""
    name = func._schema.name.removeprefix("aten::")
    return name.removesuffix("_") if func._schema.is_mutable else name


def watched(subject: Subject) -> AttentionWatch:
    """What was seen of attention in one forward. Raises NotApplicable where there was none."""
    module = subject.varied()
    looking_on = register_module_forward_hook(lambda *_: None)  # for which our own network computes every key
    with looking_on, torch.no_grad(), AttentionWatch(module) as watch:
        module(subject.images(2))
    if not watch.scores:
        raise NotApplicable("no softmax over products of queries and keys was seen")
    return watch


# ---------------------------------------------------------------- the checks


def attention_scale(subject: Subject) -> Verdict:
    """Scores are q k^T / sqrt(F), F the width of a head (1706.03762, section 3.2.1)."""
    seen = watched(subject).scores
    known = [scores for scores in seen if scores.factor is not None]
    if not known:
        raise NotApplicable("the scale of the scores is learned")
    worst = max(known, key=lambda scores: abs(scores.factor * scores.width**0.5 - 1))
    right = abs(worst.factor * worst.width**0.5 - 1) < TOLERANCE
    return Verdict(
        right,
        f"scores times {worst.factor:.4g}",
        f"1 / sqrt(head's width {worst.width}) = {worst.width**-0.5:.4g}",
        "the scores are scaled by " + _meaning(subject, worst),
        "divide by the root of the width of one head's queries, q.shape[-1] ** 0.5",
    )


def _meaning(subject: Subject, scores: Scores) -> str:
    """Where a wrong scale may come from."""
    divisor = 1 / scores.factor**2 if scores.factor else 0
    if abs(divisor - 1) < TOLERANCE:
        return "nothing at all: softmax of large scores is nearly one-hot and passes no gradient"
    if subject.anatomy.layers:
        shape = subject.anatomy.layers[0].tokens.shape
        if abs(divisor / subject.anatomy.num_tokens - 1) < TOLERANCE:
            return f"the root of the number of tokens, {subject.anatomy.num_tokens}, not of the head's width"
        if abs(divisor / shape[-1] - 1) < TOLERANCE:
            return f"the root of the hidden size, {shape[-1]}, not of the head's width"
    return "something else than the root of the head's width"


def attention_weights(subject: Subject) -> Verdict:
    """Each query's weights sum to one over the keys whose values they weigh."""
    watch = watched(subject)
    expected = "weights of each query sum to 1 over the keys"
    if len(watch.sums) < watch.num_weights:
        return Verdict(
            False,
            f"{watch.num_weights - len(watch.sums)} of {watch.num_weights} softmaxes never multiply the values",
            expected,
            "the weights are not multiplied with the values as matrices, or are not used",
            "multiply them: weights @ values, (B, A, N, N) @ (B, A, N, F)",
        )
    worst = max(watch.sums, key=lambda total: abs(total - 1))
    return Verdict(
        abs(worst - 1) < TOLERANCE,
        f"they sum to {worst:.3g}",
        expected,
        "softmax runs over the wrong axis, or only a part of the weights (their diagonal) meets the values",
        "softmax(dim=-1) on scores (B, A, queries, keys), then weights @ values over all keys",
    )
