"""Gradients that are not finite stay away from the weights, waited for or not."""

import copy
from functools import partial

import pytest
import torch

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.guard import FiniteGuard, poisoned

FUSED = [torch.optim.AdamW, torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)]


def test_a_finite_loss_is_left_as_it_is_bit_for_bit():
    weight = torch.randn(50, requires_grad=True)
    (plain,) = torch.autograd.grad((weight**3).sum(), weight)
    loss = (weight**3).sum()
    (guarded,) = torch.autograd.grad(poisoned(loss), weight)
    assert torch.equal(poisoned(loss), loss) and torch.equal(plain, guarded)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_loss_whose_gradient_is_finite_sends_back_nan(value):
    weight = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(poisoned(weight.sum() + value), weight)
    assert gradient.isnan().all()


@pytest.mark.parametrize("kind", FUSED, ids=["adamw", "adam", "sgd"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_fused_optimizers_skip_the_step_without_waiting(kind, value):
    weight = torch.nn.Parameter(torch.arange(1.0, 9.0))
    optimizer = kind([weight], lr=0.1, fused=True)
    guard = FiniteGuard(optimizer, weight.device, may_wait=False)
    assert not guard.waits
    for step, gradient in enumerate([1.0, value, 1.0]):
        weight.grad = torch.full_like(weight, gradient)
        before, state = weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        assert guard.watch(weight.grad.norm(), step)
        optimizer.step()
        changed = not torch.equal(before, weight)
        assert changed == (step == 0)  # from the bad one on nothing moves
        if step:
            entries = optimizer.state_dict()["state"][0]
            assert all(torch.equal(state[0][name], entries[name]) for name in entries if entries[name] is not None)
    with pytest.raises(UserError, match=r"not finite at step 2, rate 1.00e-01: .* nowhere"):
        guard.check(0.1, lambda: "nowhere")


def test_other_optimizers_are_told_not_to_step():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    guard = FiniteGuard(torch.optim.Muon([weight], lr=0.1), weight.device, may_wait=False)
    assert guard.waits and guard.watch(torch.tensor(1.0), 0)
    guard.check(0.1, str)
    assert not guard.watch(torch.tensor(float("nan")), 6)
    with pytest.raises(UserError, match="step 7"):
        guard.check(0.1, str)
