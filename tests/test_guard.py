"""Gradients that are not finite stay away from the weights, waited for or not."""

import copy
from functools import partial

import pytest
import torch

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.guard import FiniteGuard, poisoned
from modeling_vit_scratch.training.muon import Muon
from modeling_vit_scratch.training.optimization import MuonWithAdamW


def muon_with_adamw(parameters):
    """On a matrix, and on a vector that AdamW takes."""
    (matrix,) = parameters
    vector = torch.nn.Parameter(torch.ones(3))
    vector.grad = torch.ones(3)
    groups = [{"params": [matrix], "is_hidden_matrix": True}, {"params": [vector], "is_hidden_matrix": False}]
    return MuonWithAdamW(groups, muon={"lr": 0.1}, adamw={"lr": 0.1, "fused": True})


KINDS = {
    "adamw": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "adam": partial(torch.optim.Adam, lr=0.1, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "muon": partial(Muon, lr=0.1),
    "muon with adamw": muon_with_adamw,
}


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("bad_step", [0, 1])
def test_optimizers_skip_the_step_without_waiting(kind, value, bad_step):
    if kind == "sgd" and bad_step == 0:
        pytest.skip("torch's fused SGD leaves its momentum uninitialised then, and is not used")
    weight = torch.nn.Parameter(torch.arange(1.0, 9.0).view(4, 2) ** 0.5)
    optimizer = KINDS[kind]([weight])
    guard = FiniteGuard(optimizer, weight.device, may_wait=False)
    assert not guard.waits
    others = [p for group in optimizer.param_groups for p in group["params"] if p is not weight]
    for step in range(3):
        weight.grad = torch.full_like(weight, value if step == bad_step else 1.0)
        before = [parameter.detach().clone() for parameter in (weight, *others)]
        state = copy.deepcopy(optimizer.state_dict()["state"])
        assert guard.watch(weight.grad.norm(), step)
        optimizer.step()
        is_taken = step < bad_step  # from the bad one on nothing moves
        assert all(torch.equal(old, new) != is_taken for old, new in zip(before, (weight, *others), strict=True))
        for index, entries in optimizer.state_dict()["state"].items():
            for name, entry in entries.items():
                if entry is not None and not is_taken:
                    assert torch.equal(entry, state.get(index, {}).get(name, torch.zeros_like(entry)))
    with pytest.raises(UserError, match=rf"not finite at step {bad_step + 1}, rate 1.00e-01: .* nowhere"):
        guard.check(0.1, lambda: "nowhere")


def test_muon_takes_the_same_steps_whether_it_is_watched_or_not():
    weights = []
    for is_watched in (True, False):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(6, 4))
        optimizer = Muon([weight], lr=0.1, weight_decay=0.2)
        guard = FiniteGuard(optimizer, weight.device, may_wait=not is_watched)
        for step in range(4):
            weight.grad = torch.randn(6, 4)
            assert guard.watch(weight.grad.norm(), step)
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def test_other_optimizers_are_told_not_to_step():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    guard = FiniteGuard(torch.optim.Muon([weight], lr=0.1), weight.device, may_wait=False)
    assert guard.waits and guard.watch(torch.tensor(1.0), 0)
    guard.check(0.1, str)
    assert not guard.watch(torch.tensor(float("nan")), 6)
    with pytest.raises(UserError, match="step 7"):
        guard.check(0.1, str)
