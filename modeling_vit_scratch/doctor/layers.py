"""Checks of the layers: residual connections, norms, activations, dropout, and sizes over depth and precision."""

import math

import torch
from torch import nn

from ..data.listing import some
from .anatomy import Call, recording, tensors_in
from .findings import NotApplicable, Verdict
from .learning import one_line
from .subject import Subject, relative_change

MOST_GROWTH = 30.0  # of activations and gradients over the whole depth; healthy starts stay below 8
HALF_TOLERANCE = 0.1  # of the logits' root mean square; bfloat16 has 8 bits: 0.4 % an operation
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@torch.no_grad()
def residual_connections(subject: Subject) -> Verdict:
    """A layer whose matrices are zero passes its tokens on."""
    subject.require_layers()
    worst, where = 1.0, ""
    for layer in subject.observed().layers:
        norms = {id(parameter) for part in layer.module.modules() if _is_norm(part) for parameter in part.parameters()}
        for parameter in layer.module.parameters():
            if id(parameter) not in norms:
                parameter.zero_()
        agreement = _agreement(layer.tokens, layer.again(layer.tokens))
        if agreement < worst or math.isnan(agreement):
            worst, where = agreement, layer.name
    is_passed = worst > 0.5  # it is 0 where a residual connection is missing
    return Verdict(
        is_passed,
        f"correlation {worst:.2f} of what goes in and out" + ("" if is_passed else f" ({where})"),
        "near 1, with the layer's matrices at zero",
        "a branch replaces its input instead of being added to it",
        "x = x + attention(norm(x)), then x = x + mlp(norm(x))",
    )


def _agreement(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean correlation over channels of each token before and after: 1 also where a post-norm layer scales it."""
    before, after = (tokens - tokens.mean(dim=-1, keepdim=True) for tokens in (before, after))
    return nn.functional.cosine_similarity(before, after, dim=-1).mean().item()


# ---------------------------------------------------------------- norms


def _is_norm(module: nn.Module) -> bool:
    """A module with vectors alone that is called a norm."""
    name = type(module).__name__.lower()
    children = list(module.children())
    return not children and ("norm" in name or name in ("ln", "rms"))


@torch.no_grad()
def normalisation(subject: Subject) -> Verdict:
    """A LayerNorm gives x and a x + c the same output, with another a > 0 and c for every token; an RMSNorm, a x."""
    images = subject.anatomy.images.shape  # what normalises those is no norm of tokens
    calls = [call for call in subject.anatomy.calls if _is_norm(call.module) and _is_tested(call)]
    norms = [call for call in calls if call.tokens.shape != images]
    if not norms:
        raise NotApplicable("no module called a norm that works on the last axis was seen")
    generator = torch.Generator().manual_seed(4)
    faults = []
    for call in norms:
        shape = call.tokens.shape
        values = torch.randn(shape, generator=generator) + torch.randn(*shape[:-1], 1, generator=generator)
        factors = 1 + 3 * torch.rand(*shape[:-1], 1, generator=generator)
        shifts = 3 * torch.randn(*shape[:-1], 1, generator=generator)
        reference = call.module(values)
        if relative_change(call.module(values * factors), reference) > 0.05:
            faults.append((call.name, "does not divide by a token's own deviation"))
        elif not _is_rms(call.module) and relative_change(call.module(values + shifts), reference) > 0.05:
            faults.append((call.name, "does not take a token's own mean away"))
    return Verdict(
        not faults,
        f"{faults[0][0]} {faults[0][1]}" if faults else f"{len(norms)} norms centre and scale",
        "mean and deviation of each token's channels",
        f"{len(faults)} of {len(norms)} norms do not do what LayerNorm does: the mean is not taken from the numerator, "
        "the parentheses are wrong, or the axis is",
        "weight * (x - mean) / (deviation + eps) + bias over the last axis alone: nn.LayerNorm(hidden_size)",
    )


def _is_tested(call: Call) -> bool:
    """A norm of tokens, pooled vectors or heads, as opposed to one of batches, groups or feature maps."""
    batches, instances = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm
    others = (batches, instances, nn.GroupNorm, nn.LocalResponseNorm)
    tokens = call.tokens
    if isinstance(call.module, others) or tokens is None or tokens.ndim < 2 or not tokens.is_floating_point():
        return False
    widths = {parameter.shape[-1] for parameter in call.module.parameters() if parameter.ndim}
    return call.result is not None and call.result.shape == tokens.shape and widths <= {tokens.shape[-1]}


def _is_rms(module: nn.Module) -> bool:
    return "rms" in type(module).__name__.lower()


# ---------------------------------------------------------------- activations


@torch.no_grad()
def nonlinearities(subject: Subject) -> Verdict:
    """Something that is not linear stands between two matrices, and nothing after the last of a branch."""
    calls = subject.anatomy.calls
    linears = [call for call in calls if isinstance(call.module, nn.Linear)]
    if not linears:
        raise NotApplicable("no nn.Linear was called")
    pairs = _pairs(subject)
    late = _one_sided(subject)
    if pairs:
        return Verdict(
            False,
            f"{pairs[0][0]} feeds {pairs[0][1]} directly" + (f", {len(pairs)} such pairs" if len(pairs) > 1 else ""),
            "an activation between two matrices",
            "two matrices with nothing between them are one matrix: the activation is missing",
            "nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Linear(M, D))",
        )
    return Verdict(
        not late,
        f"{some(late, 3)} can hardly be negative" if late else f"{len(linears)} matrices",
        "an activation between two matrices, none after the last",
        "an activation stands after the last matrix of a branch, so that it can add but not subtract",
        "end the branch with its matrix (and dropout)",
    )


def _pairs(subject: Subject) -> list[tuple[str, str]]:
    """Names of matrices whose output is the next one's input; views and dropout in eval mode keep the memory.

    A bottleneck, narrower than what lies on both sides, is a low-rank matrix on purpose. Between the embedding's matrix
    and a layer's stands the residual stream, which both belong to.
    """
    inside = [f"{layer.name}." for layer in subject.anatomy.layers]
    layer_of = lambda name: next((prefix for prefix in inside if name.startswith(prefix)), None)  # noqa: E731
    made: dict[tuple[int, int], tuple[str, nn.Linear]] = {}
    pairs, kept = [], []

    def before(module, args):
        maker = made.get(_memory(args[0]))
        is_pair = maker is not None and layer_of(maker[0]) == layer_of(names[module])
        if is_pair and module.in_features >= min(maker[1].in_features, module.out_features):
            pairs.append((maker[0], names[module]))

    def after(module, args, output):
        kept.append(output)  # memory that is not freed is not given to another tensor
        made[_memory(output)] = (names[module], module)

    module = subject.varied()
    names = {part: name for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    for part in names:
        part.register_forward_pre_hook(before)
        part.register_forward_hook(after)
    module(subject.images(2))
    return pairs


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), tensor._version


def _one_sided(subject: Subject) -> list[str]:
    """Names of parts of a layer, with two matrices or more, whose outputs are never clearly negative."""
    inside = tuple(f"{layer.name}." for layer in subject.anatomy.layers)
    found = []
    for call in subject.anatomy.calls:
        if call.name.startswith(inside) and sum(isinstance(part, nn.Linear) for part in call.module.modules()) >= 2:
            output = call.result
            if output is not None and output.min() > -0.3 and output.max() > 1.0:
                found.append(call.name)
    return found


# ---------------------------------------------------------------- modes


@torch.no_grad()
def dropout_modes(subject: Subject) -> Verdict:
    """Dropout acts in training mode and not in eval mode; one that is built is called."""
    module, images = subject.varied(), subject.images(4)
    dropouts = {part: name for name, part in module.named_modules() if isinstance(part, DROPOUTS) and part.p > 0}
    in_eval = _repeats(subject, module, images)
    module.train()
    with recording(module) as calls:
        in_training = _repeats(subject, module, images)
    called = {call.module for call in calls}
    unused = [name for part, name in dropouts.items() if part not in called]
    expected = "off in eval mode, on in training mode"
    if not in_eval:
        cause = "dropout, or other noise, acts in eval mode: F.dropout without training=self.training is always on"
        remedy = "use nn.Dropout, or F.dropout(x, p, training=self.training)"
        return Verdict(False, "eval mode is random", expected, cause, remedy)
    if not dropouts and in_training:
        raise NotApplicable("no dropout above 0 was found, and training mode is not random")
    if unused:
        cause = f"{some(unused, 3)} is built and never called: the rate that was asked for has no effect"
        return Verdict(
            False, f"never called: {some(unused, 3)}", expected, cause, "call it in forward, or leave it out"
        )
    cause = "dropout is built and does nothing in training mode: train() does not reach it, or training=False is passed"
    return Verdict(
        not in_training,
        "not random in training mode" if in_training else f"{len(dropouts)} modules, off and on as they should be",
        expected,
        cause,
        "call model.train() and leave `training` to the module",
    )


def _repeats(subject: Subject, module: nn.Module, images: torch.Tensor) -> bool:
    """Whether two forwards give the same logits, bit for bit."""
    return torch.equal(subject.logits(module, images), subject.logits(module, images))


@torch.no_grad()
def deterministic_eval(subject: Subject) -> Verdict:
    """In eval mode the same images give the same logits, bit for bit."""
    module, images = subject.varied(), subject.images(4)
    first, second = (subject.logits(module, images) for _ in range(2))
    change = relative_change(second, first)
    return Verdict(
        torch.equal(first, second),
        "the same twice" if change == 0 else f"changes by {change:.2g} of the logits' spread",
        "the same logits twice",
        "something random, or a state that each forward moves on, acts in eval mode",
        "make noise and augmentation depend on self.training, or take them out of the network",
    )


# ---------------------------------------------------------------- sizes


@torch.no_grad()
def activation_growth(subject: Subject) -> Verdict:
    """Tokens keep their size from the first layer's input to the last layer's output, as the network starts."""
    subject.require_layers()
    sizes = _token_sizes(subject)
    growth = sizes[-1] / max(sizes[0], 1e-12)
    return Verdict(
        1 / MOST_GROWTH < growth < MOST_GROWTH,
        f"root mean square {sizes[0]:.3g} -> {sizes[-1]:.3g} over {len(sizes) - 1} layers",
        f"within a factor of {MOST_GROWTH:g}",
        "tokens explode or vanish with depth: weights are drawn too wide or too narrow, or norms or residual "
        "connections are missing",
        "draw matrices with a deviation of 0.02 or 1 / sqrt(inputs), and normalise the input of each branch",
    )


def _token_sizes(subject: Subject) -> list[float]:
    """Root mean square of the tokens before the first layer and after each, in a copy as it came."""
    names = {layer.name for layer in subject.anatomy.layers}
    module = subject.copy()
    with recording(module) as calls:
        module(subject.images(4))
    layers = [call for call in calls if call.name in names]
    return [tokens.pow(2).mean().sqrt().item() for tokens in (layers[0].tokens, *(call.result for call in layers))]


def gradient_growth(subject: Subject) -> Verdict:
    """The gradient keeps its size from the last layer's output back to the first layer's input."""
    anatomy = subject.require_layers()
    module = subject.copy()
    entering: list[torch.Tensor] = []
    leaving: list[torch.Tensor] = []

    def enter(part, args, kwargs):
        if not entering:
            entering.append(next(tensors_in((args, kwargs))).requires_grad_(True))

    names = [layer.name for layer in anatomy.layers]
    module.get_submodule(names[0]).register_forward_pre_hook(enter, with_kwargs=True)
    module.get_submodule(names[-1]).register_forward_hook(
        lambda part, args, output: leaving.append(next(tensors_in(output)))
    )
    module(subject.images(4))
    direction = torch.randn(leaving[-1].shape, generator=torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad((leaving[-1] * direction).sum(), entering[0], allow_unused=True)
    growth = 0.0 if gradient is None else (gradient.pow(2).mean() / direction.pow(2).mean()).sqrt().item()
    return Verdict(
        1 / MOST_GROWTH < growth < MOST_GROWTH,
        f"times {growth:.3g} back through {len(names)} layers",
        f"within a factor of {MOST_GROWTH:g}",
        "gradients explode or vanish with depth: residual connections or norms are missing, or weights are drawn too "
        "wide",
        "x = x + branch(norm(x)) for each branch, and matrices drawn with a deviation of 0.02 or 1 / sqrt(inputs)",
    )


@torch.no_grad()
def half_precision(subject: Subject) -> Verdict:
    """Under autocast, bfloat16 gives nearly the logits of float32, and float16 gives finite ones.

    The scale is their root mean square: the logits of few classes may hardly differ from image to image.
    """
    module, images = subject.varied(), subject.images(8)
    full = subject.logits(module, images)
    size = max(full.pow(2).mean().sqrt().item(), 1e-12)
    remedy = "normalise, scale scores by the head's width, keep sums and softmax in float32, and mask with -inf"
    cause = "numbers on the way are too large, or differ too little, for half precision"
    expected = f"below {HALF_TOLERANCE} of the logits' size"
    changes = {}
    for dtype in (torch.bfloat16, torch.float16):
        try:
            with torch.autocast("cpu", dtype=dtype):
                half = subject.logits(module, images).float()
        except Exception as error:
            return Verdict(False, f"{dtype} raised {one_line(error)}", expected, cause, remedy)
        changes[dtype] = (half - full).abs().max().item() / size if half.isfinite().all() else float("inf")
    worst = max(changes.values())
    measured = ", ".join(f"{str(dtype).partition('.')[2]} {change:.2g}" for dtype, change in changes.items())
    return Verdict(worst < HALF_TOLERANCE, measured, expected, cause, remedy)
