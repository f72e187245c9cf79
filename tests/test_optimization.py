"""Parameter groups against names listed by hand, schedules against transformers' own."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.training.optimization import (
    OPTIMIZERS,
    SCHEDULES,
    learning_rate_at,
    num_warmup_steps,
    parameter_groups,
)
from modeling_vit_scratch.training.recipes import FIELDS, RECIPES

TINY = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20, "image_size": 8}


def tiny_model(**fields):
    return ViTScratchForImageClassification(ViTScratchConfig(**{**TINY, "patch_size": 4, "num_labels": 3, **fields}))


def test_matrices_decay_and_nothing_else():
    model = tiny_model(num_register_tokens=2, layer_scale_init=0.1, qk_norm=True)
    decayed, kept = parameter_groups(model, 0.05)
    layer = "vit.layers.0."
    assert set(decayed.names) == {
        "vit.embeddings.patch_embeddings.projection.weight",
        *(f"{layer}attention.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        f"{layer}mlp.fc1.weight",
        f"{layer}mlp.fc2.weight",
        "classifier.weight",
    }
    assert (decayed.weight_decay, kept.weight_decay) == (0.05, 0.0)
    assert {"vit.embeddings.cls_token", "vit.embeddings.register_tokens", "vit.embeddings.position_embeddings"} < set(
        kept.names
    )


@pytest.mark.parametrize("fields", [{}, {"classifier": "mlp"}, {"num_register_tokens": 2, "embedding_norm": True}])
def test_every_parameter_stands_in_exactly_one_group(fields):
    model = tiny_model(**fields)
    names = [name for group in parameter_groups(model, 0.1) for name in group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    model.vit.requires_grad_(False)
    names = [name for group in parameter_groups(model, 0.1) for name in group.names]
    assert sorted(names) == sorted(f"classifier.{name}" for name, _ in model.classifier.named_parameters())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_is_a_choice_and_lowers_a_loss(name):
    assert name in FIELDS["optim"].metadata["choices"]
    torch.manual_seed(0)
    model = tiny_model()
    optimizer = OPTIMIZERS[name](parameter_groups(model, 0.05), RECIPES["digits"].replace(learning_rate=1e-2))
    pixels, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    losses = []
    for _ in range(20):
        loss = model(pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "name, theirs", [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_equal_transformers_after_warmup(name, theirs, warmup):
    # transformers starts warmup at a rate of 0, a step that learns nothing; ours at 1/warmup, so only the rest compares
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = theirs(optimizer, warmup, 50)
    for step in range(50):
        if step >= warmup:
            assert learning_rate_at(step, 50, 0.3, float(warmup), name) == pytest.approx(
                optimizer.param_groups[0]["lr"]
            )
        optimizer.step()
        scheduler.step()


def test_warmup_rises_in_a_line_to_the_highest_rate():
    rates = [learning_rate_at(step, 100, 1.0, 4, "constant") for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("given, steps", [(0, 0), (0.1, 20), (0.001, 1), (1, 1), (30, 30)])
def test_warmup_under_one_is_a_share_of_all_steps(given, steps):
    assert num_warmup_steps(given, 200) == steps


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_is_a_choice_and_never_leaves_its_range(name):
    assert name in FIELDS["lr_scheduler_type"].metadata["choices"]
    rates = [learning_rate_at(step, 97, 1.0, 0.1, name) for step in range(97)]
    assert max(rates) <= 1.0 and min(rates) >= 0.0
