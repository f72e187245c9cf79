"""LAMB against timm's and its algorithm; Nesterov's momentum against its formula."""

import pytest
import timm.optim
import torch
from test_optimization import RECIPE, groups_of, take_steps, tiny_model

from modeling_vit_scratch.training.optimization import OPTIMIZERS


def test_lamb_takes_timms_steps():
    model, other = tiny_model().double(), tiny_model().double()
    optimizer = OPTIMIZERS["lamb"](groups_of(model, "lamb"), RECIPE)
    theirs = timm.optim.Lamb(
        [{"params": group.parameters, "weight_decay": group.weight_decay, "rate_scale": group.rate_scale}
         for group in groups_of(other, "lamb")],
        eps=1e-8, max_grad_norm=None,
    )  # fmt: skip
    take_steps(model, optimizer, range(5), torch.float64)
    take_steps(other, theirs, range(5), torch.float64)
    start, of_names = (dict(network.named_parameters()) for network in (tiny_model().double(), other))
    for key, parameter in model.named_parameters():
        assert not torch.equal(parameter, start[key])
        torch.testing.assert_close(parameter, of_names[key], rtol=1e-9, atol=1e-12)


def test_a_step_of_lamb_is_as_long_as_the_rate_times_the_tensor():
    """1904.00962, algorithm 2; a tensor without decay takes Adam's step."""
    recipe = RECIPE.replace(layer_decay=1.0)
    model, plain = tiny_model(), tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for network, name in ((model, "lamb"), (plain, "adam")):
        take_steps(network, OPTIMIZERS[name](groups_of(network, name, recipe), recipe.replace(weight_decay=0)), [0])
    adams = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        step = (parameter.detach() - before[name]).norm()
        if parameter.ndim >= 2 and name not in model.no_weight_decay():
            torch.testing.assert_close(step, 1e-2 * before[name].norm(), rtol=1e-3, atol=0)
        else:
            torch.testing.assert_close(parameter, adams[name], rtol=1e-4, atol=1e-7)


def test_nesterovs_momentum_looks_ahead():
    """Two steps of one gradient g at rate r: r (1 + m) g, then r (1 + m + m^2) g; heavy-ball r g, then r (1 + m) g."""
    moved = {}
    for nesterov in (True, False):
        recipe = RECIPE.replace(optim="sgd", nesterov=nesterov, momentum=0.8, weight_decay=0, layer_decay=1.0)
        model = tiny_model().double()
        before = model.classifier.weight.detach().clone()
        optimizer = OPTIMIZERS["sgd"](groups_of(model, "sgd", recipe), recipe)
        steps = []
        for _ in range(2):
            model.classifier.weight.grad = torch.ones_like(before)
            optimizer.step()
            steps.append((before - model.classifier.weight.detach()).mean().item())
        moved[nesterov] = steps
    assert moved[True] == pytest.approx([1e-2 * 1.8, 1e-2 * (1.8 + 2.44)])
    assert moved[False] == pytest.approx([1e-2, 1e-2 * 2.8])
