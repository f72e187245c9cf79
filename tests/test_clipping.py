"""Clipped gradients against torch's and timm's, and what they do to a run."""

import pytest
import torch
from accelerate import Accelerator
from test_optimization import backward, tiny_model
from test_run_train import TINY, run
from timm.utils.agc import adaptive_clip_grad

from modeling_vit_scratch.training.clipping import clip_by_weights, clip_gradients
from modeling_vit_scratch.training.recipe import Recipe
from modeling_vit_scratch.training.recording import read_metrics


def without_classifier(model):
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("classifier.")]


THEIRS = {
    "norm": lambda model, limit: torch.nn.utils.clip_grad_norm_(model.parameters(), limit),
    "value": lambda model, limit: torch.nn.utils.clip_grad_value_(model.parameters(), limit),
    "agc": lambda model, limit: adaptive_clip_grad(without_classifier(model), limit, eps=1e-3),
}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def with_gradients():
    model = tiny_model().double()
    backward(model, 0, torch.float64)
    return model


@pytest.mark.parametrize(("mode", "limit"), [("norm", 0.1), ("value", 1e-2), ("agc", 1e-2)])
def test_gradients_are_clipped_as_by_torch_and_timm(mode, limit):
    mine, theirs, plain = with_gradients(), with_gradients(), gradients(with_gradients())
    norm = clip_gradients(Accelerator(cpu=True), mine, mine, Recipe(clip_mode=mode, max_grad_norm=limit))
    THEIRS[mode](theirs, limit)
    torch.testing.assert_close(norm, torch.stack([g.norm() for g in plain.values()]).norm())  # as it was before
    clipped = gradients(mine)
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(clipped[name], gradient, rtol=1e-6, atol=1e-12)
    changed = {name for name in plain if not torch.equal(clipped[name], plain[name])}
    assert len(changed) > 5
    assert ("classifier.weight" in changed) == (mode != "agc")


@pytest.mark.parametrize("mode", THEIRS)
def test_a_limit_of_0_clips_nothing_and_nothing_hides_a_gradient_that_is_not_finite(mode):
    model, plain = with_gradients(), gradients(with_gradients())
    clip_gradients(Accelerator(cpu=True), model, model, Recipe(clip_mode=mode, max_grad_norm=0))
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients(model).items())
    model.classifier.bias.grad[0] = torch.nan
    norm = clip_gradients(Accelerator(cpu=True), model, model, Recipe(clip_mode=mode, max_grad_norm=0.1))
    assert not torch.isfinite(norm)


def test_a_unit_of_zeros_may_move():
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.tensor([[3.0, 0, 4], [0, 0, 0]])
    clip_by_weights(parameter, 0.01)
    torch.testing.assert_close(parameter.grad, torch.tensor([[6e-6, 0, 8e-6], [0, 0, 0]]))


def test_a_run_clips_as_it_is_told(tmp_path):
    """The first gradient is the same, the weights after it are not."""
    losses = {}
    for mode, limit in (("norm", 0), ("value", 1e-5), ("agc", 1e-4)):
        run(tmp_path / mode, "--recipe", "digits", "--optim", "sgd", "--config_overrides", TINY, "--max_steps", 2,
            "--logging_steps", 1, "--warmup_steps", 0, "--clip_mode", mode, "--max_grad_norm", limit)  # fmt: skip
        rows = [row for row in read_metrics(tmp_path / mode / "metrics.jsonl") if "loss" in row]
        losses[mode] = [(row["loss"], row["grad_norm"]) for row in rows]
    assert len({first for first, _ in losses.values()}) == 1
    assert len({second for _, second in losses.values()}) == 3
