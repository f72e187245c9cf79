"""Checks of what a network gives out and of how it learns."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..data.listing import some
from .anatomy import tensors_in
from .findings import NotApplicable, Verdict
from .subject import Subject

FIRST_LOSS_ABOVE, FIRST_LOSS_BELOW = 1.5, 0.5  # a Xavier head on normalised tokens starts about 1 above ln(K)
NUM_DRAWS = 8  # of the weights, in which outputs of one sign are an activation's and no accident
MEMORISED_IMAGES, MEMORISED_SHARE = 8, 0.1
FEW_STEPS, MANY_STEPS = 40, 150  # above a million parameters, which learn in fewer, and below
LARGEST_MEMORISING = 6.5e6 * 64 * 64  # parameters times pixels: about half a minute on one core


def output_shape(subject: Subject) -> Verdict:
    """Batches of one, two and seven images give finite logits of shape (B, K)."""
    module = subject.copy()
    expected = f"(B, {subject.num_labels}), finite, for any B"
    for count in (1, 2, 7):
        shape = (count, subject.num_labels)
        remedy = "take the batch's size from the images: class_token.expand(len(images), -1, -1)"
        try:
            with torch.no_grad():
                logits = subject.logits(module, subject.images(count))
        except Exception as error:
            cause = "the forward does not take a batch of any size, or not images of this size and channels"
            return Verdict(False, f"B = {count} raised {one_line(error)}", expected, cause, remedy)
        if tuple(logits.shape) != shape:
            cause = "the head has another number of classes, or the output is not the logits of each image"
            return Verdict(
                False, f"{tuple(logits.shape)} for B = {count}", expected, cause, "see the head's last layer"
            )
        if not logits.isfinite().all():
            cause = "the first forward already overflows"
            return Verdict(False, "logits that are not finite", expected, cause, "look at the initialisation first")
    return Verdict(True, f"(7, {subject.num_labels})", expected)


def one_line(error: BaseException) -> str:
    """An exception's class and the beginning of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def outputs_are_logits(subject: Subject) -> Verdict:
    """Outputs take both signs and do not sum to one: nothing stands after the head.

    In one draw of the weights the logits of two classes may all be positive, for they differ little between images.
    """
    for seed in range(1, NUM_DRAWS + 1):
        with torch.no_grad():
            logits = subject.logits(subject.varied(seed), subject.images(7))
        negative = (logits < 0).float().mean().item()
        if negative > 0:
            break
    are_probabilities = negative == 0 and (logits.sum(dim=1) - 1).abs().max().item() < 1e-3
    measured = f"{negative:.0%} negative" + (", each row sums to 1" if are_probabilities else "")
    return Verdict(
        negative > 0,
        measured,
        "some negative, rows with any sum",
        "a softmax stands before the loss" if are_probabilities else "an activation stands after the head",
        "return what the last Linear gives: cross_entropy has the softmax in it",
    )


def first_loss(subject: Subject) -> Verdict:
    """Before training every class is about as likely: the loss on random labels is near ln(K)."""
    count = 32
    with torch.no_grad():
        logits = subject.logits(subject.copy(), subject.images(count))
    loss = nn.functional.cross_entropy(logits, subject.labels(count)).item()
    uniform = math.log(subject.num_labels)
    return Verdict(
        uniform - FIRST_LOSS_BELOW <= loss <= uniform + FIRST_LOSS_ABOVE,
        f"{loss:.3f}",
        f"ln({subject.num_labels}) = {uniform:.3f}, at most {FIRST_LOSS_ABOVE} above",
        f"the logits are too large at the start (deviation {logits.std().item():.3g}): weights are drawn too wide, or "
        "a norm is missing before the head; trained weights do that too",
        "draw matrices with a deviation of 0.02 or 1 / sqrt(inputs), or start the head at zero",
    )


def memorises_one_batch(subject: Subject) -> Verdict:
    """A few images with random labels are learned by heart, without dropout, by AdamW."""
    if subject.num_parameters * math.prod(subject.image_size) > LARGEST_MEMORISING:
        size = f"{subject.num_parameters / 1e6:.1f}M parameters at {subject.image_size[0]} px"
        raise NotApplicable(f"{size} would take more than a minute on a CPU; the limit is 6M at 64 px")
    module = subject.copy()
    images, labels = subject.images(MEMORISED_IMAGES), torch.arange(MEMORISED_IMAGES) % subject.num_labels
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise NotApplicable("no parameter requires a gradient")
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    goal = MEMORISED_SHARE * math.log(subject.num_labels)
    most_steps = FEW_STEPS if subject.num_parameters > 1e6 else MANY_STEPS
    for step in range(most_steps + 1):
        loss = nn.functional.cross_entropy(subject.logits(module, images), labels)
        if loss.item() < goal or step == most_steps or not loss.isfinite():
            break
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 10)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return Verdict(
        loss.item() < goal,
        f"loss {loss.item():.3g} after {step} steps",
        f"below {goal:.3g} within {most_steps} steps",
        "the network cannot learn even these few images: a part is cut off from the gradient, the outputs are squashed "
        "before the loss, or the start is so bad that steps of 1e-3 lead nowhere",
        "mend the other findings first; then look at what the head reads, and at the initialisation",
    )


# ---------------------------------------------------------------- every parameter


def gradients_reach_all_parameters(subject: Subject) -> Verdict:
    """Every parameter that is to be trained gets a gradient that is not zero."""
    module = subject.varied()
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not named:
        raise NotApplicable("no parameter requires a gradient")
    loss = nn.functional.cross_entropy(subject.logits(module, subject.images(8)), subject.labels(8))
    if not loss.requires_grad:
        without = [name for name, _ in named]
    else:
        loss.backward()
        without = [name for name, value in named if value.grad is None or not value.grad.any()]
    frozen = sum(not parameter.requires_grad for parameter in module.parameters())
    reached = f"{len(named) - len(without)} of {len(named)} tensors" + (f", {frozen} more frozen" if frozen else "")
    return Verdict(
        not without,
        reached + (f"; none: {some(without, 3)}" if without else ""),
        "all of them",
        f"{some(without, 3)} do not touch the loss: a .detach(), .data, torch.no_grad() or numpy on the way, or a "
        "module that is built and not called",
        "take that out of the forward, or delete the parameter",
    )


def one_optimizer_group_each(subject: Subject) -> Verdict:
    """Every parameter to be trained stands in one group of the optimizer, and the optimizer holds no stranger."""
    if subject.optimizer is None:
        raise NotApplicable("no optimizer was given")
    held = Counter(id(parameter) for group in subject.optimizer.param_groups for parameter in group["params"])
    named = dict(subject.module.named_parameters())
    missing = [name for name, value in named.items() if value.requires_grad and not held[id(value)]]
    twice = [name for name, value in named.items() if held[id(value)] > 1]
    strangers = len(set(held) - {id(value) for value in subject.module.parameters()})
    parts = [f"in no group: {some(missing, 3)}"] if missing else []
    parts += [f"in several: {some(twice, 3)}"] if twice else []
    parts += [f"{strangers} tensors that are not the network's"] if strangers else []
    return Verdict(
        not parts,
        "; ".join(parts) or f"{len(named)} tensors",
        "each in exactly one group",
        "the groups are made from endings or classes that some parameters do not have, or the optimizer was built "
        "before the network was changed",
        "put what matches no rule into the group without decay, and assert that the groups hold every parameter",
    )


def registered_parameters(subject: Subject) -> Verdict:
    """No tensor of numbers and no module hides in a plain attribute, a list or a dict; what a forward leaves may."""
    known = {id(tensor) for tensor in (*subject.module.parameters(), *subject.module.buffers())}
    modules = set(subject.module.modules())
    left = _left_by_a_forward(subject)
    hidden = []
    for name, value in _plain_attributes(subject.module):
        tensors = [tensor for tensor in tensors_in(value) if tensor.is_floating_point() and id(tensor) not in known]
        if (tensors and name not in left) or any(part not in modules for part in _modules_in(value)):
            hidden.append(name)
    return Verdict(
        not hidden,
        f"hidden: {some(hidden, 3)}" if hidden else "nothing hidden",
        "no tensor or module in plain attributes",
        f"{some(hidden, 3)} is a plain attribute: it is not trained, not saved and stays behind on .to(device)",
        "nn.Parameter for what is trained, register_buffer for what is fixed, nn.ModuleList for a list of modules",
    )


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if not attribute.startswith("_") and attribute != "training":
                yield (f"{name}.{attribute}" if name else attribute), value


def _left_by_a_forward(subject: Subject) -> set[str]:
    """The attributes whose tensors each forward makes anew: maps of attention that are kept to be looked at, say."""
    module = subject.copy()
    before = {name: list(tensors_in(value)) for name, value in _plain_attributes(module)}
    with torch.no_grad(), suppress(Exception):  # a forward that fails is output_shape's to name
        module(subject.images(2))
    after = {name: {id(tensor) for tensor in tensors_in(value)} for name, value in _plain_attributes(module)}
    return {name for name, old in before.items() if not any(id(tensor) in after.get(name, ()) for tensor in old)}


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(part)
