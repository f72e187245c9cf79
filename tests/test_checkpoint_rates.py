"""--config_overrides with --model_name_or_path: what a checkpoint leaves out in training, nothing else."""

from pathlib import Path

import pytest
import torch
from test_run_train import TINY, equal, run

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.overrides import checkpoint_overrides
from modeling_vit_scratch.training.sweep_grid import parse_sweep
from modeling_vit_scratch.weights import load_pretrained


@pytest.fixture
def checkpoint(tmp_path) -> list[str]:
    own = "hidden_dropout_prob=0.125,embedding_dropout_prob=0.25,position_embedding_type=rope2d,head_dim=8"
    run(tmp_path / "start", "--max_steps", 2, "--config_overrides", f"{TINY},{own}")
    return ["--dataset_name", "digits", "--model_name_or_path", str(tmp_path / "start" / "model"), "--max_steps", "2"]


def published(output_dir: Path) -> ViTScratchForImageClassification:
    return ViTScratchForImageClassification.from_pretrained(output_dir / "model")


def test_a_checkpoint_with_other_rates_has_its_own_weights_and_leaves_out_as_the_rates_say(tmp_path, checkpoint):
    rates = {"patch_drop_rate": 0.5, "drop_path_rate": 0.25, "embedding_dropout_prob": None, "mlp_dropout_prob": 0.375}
    model, _ = load_pretrained(str(tmp_path / "start" / "model"), overrides=rates)
    assert equal(model.state_dict(), published(tmp_path / "start").state_dict())
    assert {name: getattr(model.config, name) for name in rates} == rates
    layer = model.vit.layers[-1]
    found = (model.vit.patch_dropout.rate, layer.drop_path.rate, model.vit.embeddings.dropout.p, layer.dropout.p)
    assert found == (0.5, 0.25, 0.125, 0.125) and layer.mlp.hidden_dropout.p == layer.mlp.output_dropout.p == 0.375


@pytest.mark.parametrize("mode", ["full", "last:1", "attention", "lora"])
def test_a_checkpoint_is_finetuned_with_other_rates(tmp_path, checkpoint, mode, tokens):
    given = ["--config_overrides", "patch_drop_rate=0.5,drop_path_rate=0.25", "--gradient_accumulation_steps", 1]
    run(tmp_path / "run", *checkpoint, "--finetune", mode, *given)
    config = published(tmp_path / "run").config
    assert (config.patch_drop_rate, config.drop_path_rate, config.hidden_dropout_prob) == (0.5, 0.25, 0.125)
    assert 8 in {number for is_training, number in tokens if is_training} and tokens[-1][1] == 16


@pytest.mark.parametrize("recipe", ["finetune", "cifar10_5min"])
@pytest.mark.parametrize("overrides, drop_path_rate", [("none", 0.0), ("drop_path_rate=0.1", 0.1)])
def test_a_checkpoint_keeps_its_own_rates_whatever_the_recipe_has_for_networks_of_its_own(
    tmp_path, checkpoint, recipe, overrides, drop_path_rate
):
    own = ["--torch_compile", "false", "--ema_decay", "none", "--recipe", recipe, "--train_batch_size", 50]
    run(tmp_path / "run", *own, *checkpoint, "--config_overrides", overrides)
    config = published(tmp_path / "run").config  # the recipe for five minutes has rates of its own, and qk_norm
    assert (config.hidden_dropout_prob, config.drop_path_rate, config.qk_norm) == (0.125, drop_path_rate, False)


def test_a_frozen_backbone_sees_every_patch(tmp_path, checkpoint, tokens):
    run(tmp_path / "dropped", *checkpoint, "--config_overrides", "patch_drop_rate=0.5")
    tokens.clear()
    start = ["--dataset_name", "digits", "--model_name_or_path", str(tmp_path / "dropped" / "model")]
    kept = ["--config_overrides", "none"]
    run(tmp_path / "head", *start, *kept, "--finetune", "head", "--max_steps", 2, "--rotation_degrees", 5)
    assert {number for _, number in tokens} == {16}
    assert published(tmp_path / "head").config.patch_drop_rate == 0.5  # as it was, for who trains the backbone


@pytest.mark.parametrize("mode", ["full", "head"])
def test_a_checkpoint_is_finetuned_with_another_pooling(tmp_path, mode):
    run(tmp_path / "start", "--max_steps", 2, "--config_overrides", f"{TINY},use_cls_token=true,pooling=cls")
    start, overrides = tmp_path / "start" / "model", {"pooling": "mean"}
    model, _ = load_pretrained(str(start), overrides=overrides)
    pixels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = published(tmp_path / "start").vit(pixels).last_hidden_state
        torch.testing.assert_close(model.vit(pixels).pooler_output, states[:, 1:].mean(dim=1))
    flags = ["--dataset_name", "digits", "--model_name_or_path", start, "--finetune", mode, "--max_steps", 2]
    run(tmp_path / "run", *flags, "--config_overrides", "pooling=mean", *(["--rotation_degrees", 5] * (mode == "head")))
    assert published(tmp_path / "run").config.pooling == "mean"


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--config_overrides", "hidden_size=32"],
            "--config_overrides hidden_size has no effect here: the checkpoint decides the network. Pooling may be "
            "another, and what it leaves out in training another share: hidden_dropout_prob,",
        ),
        (
            # what the recipe has for networks of its own, given all the same
            ["--recipe", "mnist", "--config_overrides", "zero_init_residual=true"],
            "--config_overrides zero_init_residual has no effect here",
        ),
        (
            ["--finetune", "head", "--config_overrides", "drop_path_rate=0.1"],
            "--config_overrides drop_path_rate has no effect here: the checkpoint's network is frozen but for its head",
        ),
        (
            ["--finetune", "last:1", "--config_overrides", "embedding_dropout_prob=0.1"],
            "--config_overrides embedding_dropout_prob has no effect here: with --finetune last:1 what it acts on is",
        ),
        (["--finetune", "attention", "--config_overrides", "mlp_dropout_prob=0.1"], "mlp_dropout_prob has no effect"),
        (["--finetune", "lora", "--config_overrides", "mlp_dropout_prob=0.1"], "mlp_dropout_prob has no effect here"),
        (["--config_overrides", "drop_path_rate=1.5"], r"drop_path_rate must lie in \[0, 1\), got 1.5"),
        (["--config_overrides", "drop_path_rate=null"], "drop_path_rate"),
        (["--config_overrides", "pooling=cls"], "pooling='cls' needs use_cls_token=True"),
    ],
)
def test_what_cannot_be_changed_of_a_checkpoint_is_said_in_one_line(tmp_path, checkpoint, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / "run", *checkpoint, *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("own", [[], ["--config_overrides", "hidden_dropout_prob=0.1"]])
def test_a_sweep_over_a_checkpoints_rates_is_checked_before_one_is_trained(own):
    words = ["--recipe", "cifar10_5min", "--dataset_name", "digits", "--model_name_or_path", "a/b", *own]
    plan = parse_sweep([*words, "--grid", "drop_path_rate=0.1,0.2"])
    rates = [checkpoint_overrides(run.recipe, run.chosen) for run in plan.runs]
    own_rates = {"hidden_dropout_prob": 0.1} if own else {}
    assert rates == [{**own_rates, "drop_path_rate": 0.1}, {**own_rates, "drop_path_rate": 0.2}]
    with pytest.raises(UserError, match=r"drop_path_rate must lie in \[0, 1\), got 1.5"):
        parse_sweep([*words, "--grid", "drop_path_rate=0.1,1.5"])
    with pytest.raises(UserError, match="hidden_size has no effect here: the checkpoint decides the network"):
        parse_sweep([*words, "--grid", "hidden_size=16,32"])
