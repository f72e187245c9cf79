"""Averaged weights against torch's own and against the formula."""

import math

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.averaging import AveragedWeights, check_decay, half_life


def trained_steps(model, count=5):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        yield model


def test_the_average_equals_torchs():
    ours_model, theirs_model = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    theirs_model.load_state_dict(ours_model.state_dict())
    ours = AveragedWeights(ours_model, 0.9)
    theirs = AveragedModel(theirs_model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in zip(trained_steps(ours_model), trained_steps(theirs_model), strict=True):
        ours.update(ours_model)
        theirs.update_parameters(theirs_model)
    pairs = zip(ours.model.parameters(), theirs.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(ours.model.weight, ours_model.weight)


def test_the_random_start_has_no_part_in_the_average():
    model = torch.nn.Linear(2, 2)
    averaged = AveragedWeights(model, 0.99)
    torch.nn.init.constant_(model.weight, 7.0)
    averaged.update(model)
    assert torch.equal(averaged.model.weight, torch.full((2, 2), 7.0))


def test_a_restored_average_goes_on_as_the_first_did():
    model, twin = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    twin.load_state_dict(model.state_dict())
    whole, broken = AveragedWeights(model, 0.8), AveragedWeights(twin, 0.8)
    for step, _ in enumerate(zip(trained_steps(model), trained_steps(twin), strict=True)):
        whole.update(model)
        broken.update(twin)
        if step in (0, 2):
            tensors = {name: tensor.clone() for name, tensor in broken.model.state_dict().items()}
            broken = AveragedWeights(twin, 0.8)
            broken.load_tensors(tensors, has_begun=True)
    assert torch.equal(whole.model.weight, broken.model.weight)


def test_the_half_life_is_where_a_weight_counts_half():
    assert 0.99 ** half_life(0.99) == pytest.approx(0.5)


def test_an_average_longer_than_the_run_is_refused_with_one_that_fits():
    check_decay(None, 1)
    check_decay(0.999, math.ceil(half_life(0.999)))
    with pytest.raises(UserError, match=r"half-life of 693 steps, the run has 100: .* Try 0.8706"):
        check_decay(0.999, 100)
    check_decay(0.8706, 100)
