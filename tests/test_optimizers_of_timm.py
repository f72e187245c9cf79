"""LAMB and Lion against timm's and their algorithms; Nesterov's momentum, in SGD and in Adam, against its formula."""

import pytest
import timm.optim
import torch
from test_optimization import RECIPE, groups_of, take_steps, tiny_model

from modeling_vit_scratch.training.optimization import OPTIMIZERS

THEIRS = {
    "lamb": lambda groups: timm.optim.Lamb(groups, eps=1e-8, max_grad_norm=None),
    "lion": lambda groups: timm.optim.Lion(groups, betas=(0.9, 0.999)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_they_take_timms_steps(name):
    model, other = tiny_model().double(), tiny_model().double()
    optimizer = OPTIMIZERS[name](groups_of(model, name), RECIPE)
    theirs = THEIRS[name](
        [{"params": group.parameters, "weight_decay": group.weight_decay, "rate_scale": group.rate_scale}
         for group in groups_of(other, name)]
    )  # fmt: skip
    take_steps(model, optimizer, range(5), torch.float64)
    take_steps(other, theirs, range(5), torch.float64)
    start, of_names = (dict(network.named_parameters()) for network in (tiny_model().double(), other))
    for key, parameter in model.named_parameters():
        if name == "lion" and key.endswith("k_proj.bias"):  # its gradient is rounding alone, whose sign Lion takes
            continue
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


def test_adams_nesterov_momentum_and_its_own_decay():
    """Dozat's Nadam for one gradient g, step after step, in numbers; the decay 0.05 shrinks weights apart from it."""
    recipe = RECIPE.replace(optim="nadamw", layer_decay=1.0, weight_decay=0.05, adam_epsilon=1e-12)
    model = tiny_model().double()
    weight = model.classifier.weight
    value, mean, square, product = weight.detach().clone(), 0.0, 0.0, 1.0
    optimizer = OPTIMIZERS["nadamw"](groups_of(model, "nadamw", recipe), recipe)
    for step in range(1, 5):
        gradient = float(step)
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        now, after = (0.9 * (1 - 0.5 * 0.96 ** (0.004 * t)) for t in (step, step + 1))
        product *= now
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        ahead = after * mean / (1 - product * after) + (1 - now) * gradient / (1 - product)
        value = value * (1 - 1e-2 * 0.05) - 1e-2 * ahead / (square / (1 - 0.999**step)) ** 0.5
        torch.testing.assert_close(weight.detach(), value, rtol=1e-6, atol=0)  # a float32 counts the momenta
