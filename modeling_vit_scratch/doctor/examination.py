"""The checks in their order, and the examination that runs them."""

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..errors import UserError, unknown
from . import attention, layers, learning, tokens
from .findings import Finding, NotApplicable, Verdict
from .learning import one_line
from .subject import Subject

# In the order of a report; where output_shape fails, no other check that runs the network can say anything.
CHECKS: dict[str, Callable[[Subject], Verdict]] = {
    "output_shape": learning.output_shape,
    "outputs_are_logits": learning.outputs_are_logits,
    "first_loss": learning.first_loss,
    "memorises_one_batch": learning.memorises_one_batch,
    "gradients_reach_all_parameters": learning.gradients_reach_all_parameters,
    "registered_parameters": learning.registered_parameters,
    "one_optimizer_group_each": learning.one_optimizer_group_each,
    "batch_independence": tokens.batch_independence,
    "every_patch_counts": tokens.every_patch_counts,
    "true_patches": tokens.true_patches,
    "patch_order_matters": tokens.patch_order_matters,
    "layer_equivariance": tokens.layer_equivariance,
    "token_equivariance": tokens.token_equivariance,
    "pooling": tokens.pooling,
    "attention_scale": attention.attention_scale,
    "attention_weights": attention.attention_weights,
    "residual_connections": layers.residual_connections,
    "normalisation": layers.normalisation,
    "nonlinearities": layers.nonlinearities,
    "dropout_modes": layers.dropout_modes,
    "deterministic_eval": layers.deterministic_eval,
    "activation_growth": layers.activation_growth,
    "gradient_growth": layers.gradient_growth,
    "half_precision": layers.half_precision,
}
NEED_NO_FORWARD = {"registered_parameters", "one_optimizer_group_each"}


def examine(
    module: nn.Module,
    image_size: int | tuple[int, int],
    num_labels: int,
    num_channels: int = 3,
    optimizer: torch.optim.Optimizer | None = None,
    skip: Collection[str] = (),
) -> list[Finding]:
    """The findings of every check on a module that maps images (B, C, H, W) to logits (B, K), in the order of CHECKS.

    image_size: pixels, one number or (height, width). optimizer: the one that is to train the module; None leaves its
    check out. skip: checks whose failing is meant, such as patch_order_matters without positions.
    The module is examined on deep copies: its parameters, buffers and mode, and the global random state, stay as they
    are. Raises UserError for sizes that no image has, fewer than two labels, and for names that are no checks.
    """
    height_width = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(height_width) != 2 or min(*height_width, num_channels) < 1:
        raise UserError(f"Expected positive sizes, got image_size {image_size} and num_channels {num_channels}.")
    if num_labels < 2:
        raise UserError(f"num_labels must be at least 2, got {num_labels}: logits of one class cannot be told apart.")
    for name in skip:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    subject = Subject(module, height_width, num_labels, num_channels, optimizer)
    findings: list[Finding] = []
    with unchanged_randomness():
        for name in CHECKS:
            is_blind = any(finding.check == "output_shape" and finding.passed is False for finding in findings)
            if name in skip:
                findings.append(Finding(name, None, "not applicable: skipped on request"))
            elif is_blind and name not in NEED_NO_FORWARD:
                findings.append(Finding(name, None, "not applicable: the network gives no logits to look at"))
            else:
                findings.append(_finding(name, subject))
    return findings


def _finding(name: str, subject: Subject) -> Finding:
    torch.manual_seed(0)
    try:
        verdict = CHECKS[name](subject)
    except NotApplicable as reason:
        return Finding(name, None, f"not applicable: {reason}")
    except Exception as error:
        cause = "the network does not allow what the check does: it was run in another way than a plain forward"
        remedy = "call it by hand with a batch of random images, with and without gradients, and read the traceback"
        return Finding(name, False, f"raised {one_line(error)}", "no error", cause, remedy)
    if verdict.passed:
        verdict = verdict._replace(cause="", remedy="")
    return Finding(name, *verdict)


@contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Leaves the global random states of torch, numpy and Python, and torch's fast path of attention, as they were.

    The fast path is one fused call, in which nothing can be seen.
    """
    python, numpy = random.getstate(), np.random.get_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(python)
        np.random.set_state(numpy)
