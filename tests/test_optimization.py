"""Parameter groups against names listed by hand and timm's, optimizers against torch's own."""

import pytest
import timm
import timm.optim
import torch
from accelerate import Accelerator

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.checkpointing import load_optimizer_tensors, optimizer_tensors
from modeling_vit_scratch.training.finetuning import prepare_finetuning
from modeling_vit_scratch.training.optimization import (
    OPTIMIZERS,
    build_optimizer,
    optimizer_warning,
    parameter_groups,
    parameter_table,
)
from modeling_vit_scratch.training.recipe import FIELDS
from modeling_vit_scratch.training.recipes import RECIPES

TINY = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20, "image_size": 8}
RECIPE = RECIPES["digits"].replace(learning_rate=1e-2, weight_decay=0.05, layer_decay=0.7)


def tiny_model(**fields):
    torch.manual_seed(0)
    return ViTScratchForImageClassification(ViTScratchConfig(**{**TINY, "patch_size": 4, "num_labels": 3, **fields}))


def groups_of(model, name, recipe=RECIPE):
    return parameter_groups(model, recipe.weight_decay, recipe.layer_decay, split_hidden=name == "muon")


def names_of(groups):
    return [name for group in groups for name in group.names]


def backward(model, step, dtype=torch.float32):
    """Gradients of a batch that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(6, 3, 8, 8, generator=generator).to(dtype)
    loss = model(pixels, labels=torch.arange(6) % 3).loss
    loss.backward()
    return loss


def take_steps(model, optimizer, steps, dtype=torch.float32):
    """As the loop does: rates of the step, then the optimizer's."""
    for step in steps:
        backward(model, step, dtype)
        for settings in optimizer.param_groups:
            settings["lr"] = 1e-2 / (step + 1) * settings["rate_scale"]
        optimizer.step()
        optimizer.zero_grad()


def assert_same_weights(model, other):
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


# ---------------------------------------------------------------- groups


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
    assert (decayed.rate_scale, kept.rate_scale) == (1.0, 1.0)
    assert {"vit.embeddings.cls_token", "vit.embeddings.register_tokens", "vit.embeddings.position_embeddings"} < set(
        kept.names
    )


@pytest.mark.parametrize("fields", [{}, {"classifier": "mlp"}, {"num_register_tokens": 2, "embedding_norm": True}])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("split_hidden", [False, True])
def test_every_parameter_stands_in_exactly_one_group(fields, layer_decay, split_hidden):
    model = tiny_model(**fields)
    names = names_of(parameter_groups(model, 0.1, layer_decay, split_hidden))
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    model.vit.requires_grad_(False)
    names = names_of(parameter_groups(model, 0.1, layer_decay, split_hidden))
    assert sorted(names) == sorted(f"classifier.{name}" for name, _ in model.classifier.named_parameters())


def test_groups_keep_the_networks_order_and_hold_the_parameters_they_name():
    model = tiny_model(num_hidden_layers=2)
    named = dict(model.named_parameters())
    order = list(named)
    for groups in (parameter_groups(model, 0.1), parameter_groups(model, 0.1, 0.5, split_hidden=True)):
        for group in groups:
            assert group.names == sorted(group.names, key=order.index)
            assert all(named[name] is mine for name, mine in zip(group.names, group.parameters, strict=True))


def test_hidden_matrices_are_those_inside_the_layers():
    model = tiny_model(num_hidden_layers=2, layer_scale_init=0.1, qk_norm=True, classifier="mlp")
    groups = parameter_groups(model, 0.05, split_hidden=True)
    assert [(group.is_hidden_matrix, group.weight_decay) for group in groups] == [
        (True, 0.05),
        (False, 0.05),
        (False, 0.0),
    ]
    parts = [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")] + ["mlp.fc1", "mlp.fc2"]
    assert groups[0].names == [f"vit.layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts]
    assert groups[2].names == parameter_groups(model, 0.05)[1].names


def test_layer_decay_equals_timms_but_for_the_final_norm():
    """timm joins the final norm to the last layer, BEiT (which we follow) to the classifier."""
    theirs = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=5)
    scales = {id(p): g["lr_scale"] for g in timm.optim.param_groups_layer_decay(theirs, layer_decay=0.65)
              for p in g["params"]}  # fmt: skip
    expected = {name: scales[id(parameter)] for name, parameter in theirs.named_parameters()}
    model = tiny_model(num_hidden_layers=3, num_register_tokens=1)
    ours = {name: g.rate_scale for g in parameter_groups(model, 0.05, 0.65) for name in g.names}

    for mine, name in {"cls_token": "cls_token", "position_embeddings": "pos_embed"}.items():
        assert ours[f"vit.embeddings.{mine}"] == pytest.approx(expected[name])
    assert ours["vit.embeddings.register_tokens"] == ours["vit.embeddings.cls_token"]
    assert ours["vit.embeddings.patch_embeddings.projection.weight"] == pytest.approx(
        expected["patch_embed.proj.weight"]
    )
    for layer in range(3):
        mine = {scale for name, scale in ours.items() if name.startswith(f"vit.layers.{layer}.")}
        assert mine == {scale for name, scale in expected.items() if name.startswith(f"blocks.{layer}.")}
    assert ours["classifier.weight"] == expected["head.weight"] == 1.0
    assert ours["vit.layernorm.weight"] == 1.0
    assert expected["norm.weight"] == 0.65


def test_the_bare_encoder_has_the_rates_it_has_under_a_classifier():
    model = tiny_model(num_hidden_layers=2)
    whole = {name: g.rate_scale for g in parameter_groups(model, 0.05, 0.5) for name in g.names}
    bare = {name: g.rate_scale for g in parameter_groups(model.vit, 0.05, 0.5) for name in g.names}
    assert bare == {name.removeprefix("vit."): scale for name, scale in whole.items() if name.startswith("vit.")}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("split_hidden", [False, True])
def test_the_heads_rate_is_a_multiple_and_all_else_is_as_it_was(layer_decay, split_hidden):
    model = tiny_model(classifier="mlp")
    plain = parameter_groups(model, 0.05, layer_decay, split_hidden)
    scaled = parameter_groups(model, 0.05, layer_decay, split_hidden, head_rate_scale=10)
    old = {name: (g.rate_scale, g.weight_decay, g.is_hidden_matrix) for g in plain for name in g.names}
    new = {name: (g.rate_scale, g.weight_decay, g.is_hidden_matrix) for g in scaled for name in g.names}
    assert sorted(names_of(scaled)) == sorted(names_of(plain))
    for name, (rate, decay, is_hidden) in old.items():
        assert new[name] == (10.0 if name.startswith("classifier.") else rate, decay, is_hidden), name
    assert [g.names[0].partition(".")[0] for g in scaled[-2:]] == ["classifier", "classifier"]


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_loras_matrices_have_their_layers_rate_decay_and_are_no_hidden_matrices(targets):
    model = tiny_model(num_hidden_layers=2)
    prepare_finetuning(model, RECIPES["finetune"].replace(finetune="lora", lora_target_modules=targets))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = parameter_groups(model, 0.05, 0.5, split_hidden=True, head_rate_scale=10)
    assert sorted(names_of(groups)) == sorted(trained)
    of = {name: (group.rate_scale, group.weight_decay) for group in groups for name in group.names}
    for layer, rate in ((0, 0.25), (1, 0.5)):
        for factor in ("lora_A", "lora_B"):
            assert of[f"vit.layers.{layer}.attention.q_proj.{factor}.default.weight"] == (rate, 0.05)
    assert of["classifier.modules_to_save.default.weight"] == (10.0, 0.05)
    assert of["classifier.modules_to_save.default.bias"] == (10.0, 0.0)
    assert not any(group.is_hidden_matrix for group in groups)
    with pytest.raises(UserError, match="--optim muon needs matrices inside the layers, and none is trained here"):
        OPTIMIZERS["muon"](groups, RECIPE)


def test_the_table_names_every_parameter_with_its_rate_and_decay():
    model = tiny_model()
    groups = parameter_groups(model, 0.05, 0.5)
    header, *rows, totals = parameter_table(groups, 4e-3).splitlines()
    assert header.split() == ["name", "shape", "rate", "decay"]
    assert len({len(line) for line in (header, *rows)}) == 1  # aligned
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(cells) == names_of(groups)
    assert cells["vit.embeddings.cls_token"] == ["1x1x12", "0.001", "0"]
    assert cells["vit.layers.0.mlp.fc1.weight"] == ["20x12", "0.002", "0.05"]
    assert cells["classifier.bias"] == ["3", "0.004", "0"]
    total = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and "embeddings." not in name)
    matrices += model.vit.embeddings.patch_embeddings.projection.weight.numel()
    assert totals == f"total: {len(rows)} tensors, {total:,} weights, {matrices:,} of them decay"


# ---------------------------------------------------------------- optimizers


def test_every_optimizer_is_a_choice_of_its_flag_and_every_choice_an_optimizer():
    assert set(OPTIMIZERS) == set(FIELDS["optim"].metadata["choices"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_lowers_a_loss(name, dtype):
    model = tiny_model().to(dtype)
    recipe = RECIPE.replace(layer_decay=1.0)
    optimizer = OPTIMIZERS[name](groups_of(model, name, recipe), recipe)
    losses = []
    for _ in range(30):
        losses.append(backward(model, 0, dtype).item())
        optimizer.step()
        optimizer.zero_grad()
    # at the same rate far slower: SGD has no second moment to make up for small gradients, LAMB's are steps of 1 %
    assert losses[-1] < (0.99 if name in ("sgd", "lamb") else 0.5) * losses[0]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_group_of_an_optimizer_carries_its_rate_and_its_scale(name):
    groups = groups_of(tiny_model(), name)
    optimizer = OPTIMIZERS[name](groups, RECIPE)
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        assert settings["rate_scale"] == group.rate_scale
        assert settings["lr"] == 1e-2 * group.rate_scale
        assert settings["weight_decay"] == group.weight_decay
        assert all(mine is theirs for mine, theirs in zip(settings["params"], group.parameters, strict=True))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_layers_rate_is_its_share_of_the_highest(name):
    """The first step of any of these is proportional to the rate, so that halving a group's scale halves its step."""

    def first_step(layer_decay):
        model = tiny_model()
        before = model.vit.embeddings.position_embeddings.detach().clone()  # no decay
        recipe = RECIPE.replace(layer_decay=layer_decay)
        take_steps(model, OPTIMIZERS[name](groups_of(model, name, recipe), recipe), [0])
        return model.vit.embeddings.position_embeddings.detach() - before

    # two layers up from the embeddings: 0.5 ** 2; the tolerance is the rounding of weights near 0.02 in float32
    torch.testing.assert_close(first_step(0.5), first_step(1.0) / 4, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_resumed_optimizer_goes_on_as_the_uninterrupted_one_bit_for_bit(name, dtype):
    whole, broken = tiny_model().to(dtype), tiny_model().to(dtype)
    take_steps(whole, OPTIMIZERS[name](groups_of(whole, name), RECIPE), range(6), dtype)
    groups = groups_of(broken, name)
    first = OPTIMIZERS[name](groups, RECIPE)
    take_steps(broken, first, range(3), dtype)
    saved, weights = optimizer_tensors(first, names_of(groups)), broken.state_dict()

    resumed = tiny_model().to(dtype)
    resumed.load_state_dict(weights)
    groups = groups_of(resumed, name)
    second = OPTIMIZERS[name](groups, RECIPE)
    load_optimizer_tensors(second, names_of(groups), {key: saved[key] for key in sorted(saved)})
    take_steps(resumed, second, range(3, 6), dtype)
    assert_same_weights(resumed, whole)
    again = optimizer_tensors(second, names_of(groups))
    assert sorted(again) == sorted(saved) and len(saved) >= len(names_of(groups))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_accelerate_takes_every_optimizer_and_changes_nothing(name):
    plain, prepared = tiny_model(), tiny_model()
    take_steps(plain, OPTIMIZERS[name](groups_of(plain, name), RECIPE), range(4))
    optimizer = Accelerator(cpu=True).prepare(OPTIMIZERS[name](groups_of(prepared, name), RECIPE))
    take_steps(prepared, optimizer, range(4))
    assert_same_weights(prepared, plain)
    assert all(parameter.grad is None for parameter in prepared.parameters())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_skipped_first_step_leaves_no_trace(name):
    """fp16 starts so: the scaler's first scale is too high, its gradients overflow. torch's fused SGD fails here."""
    plain, scaled = tiny_model(), tiny_model()
    take_steps(plain, OPTIMIZERS[name](groups_of(plain, name), RECIPE), range(1, 4))
    optimizer = OPTIMIZERS[name](groups_of(scaled, name), RECIPE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # a power of two: scaling rounds nothing
    for step in range(4):
        backward(scaled, step)
        for parameter in scaled.parameters():
            parameter.grad = scaler.scale(parameter.grad) * (1 if step else torch.inf)
        for settings in optimizer.param_groups:
            settings["lr"] = 1e-2 / (step + 1) * settings["rate_scale"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert_same_weights(scaled, plain)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_cleared_state_is_that_of_a_new_optimizer(name):
    """A rehearsal at rate 0 leaves the weights alone, and clearing the state forgets it."""
    plain, rehearsed = tiny_model(), tiny_model()
    take_steps(plain, OPTIMIZERS[name](groups_of(plain, name), RECIPE), range(2))
    optimizer = OPTIMIZERS[name](groups_of(rehearsed, name), RECIPE)
    for settings in optimizer.param_groups:
        settings["lr"] = 0.0
    backward(rehearsed, 9)
    optimizer.step()
    optimizer.zero_grad()
    assert_same_weights(rehearsed, tiny_model())
    optimizer.state.clear()
    take_steps(rehearsed, optimizer, range(2))
    assert_same_weights(rehearsed, plain)


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
@pytest.mark.parametrize("momentum", [None, 0.8])
def test_muon_equals_torchs_muon_and_adamw_on_their_shares(layer_decay, momentum, monkeypatch):
    # torch iterates in bf16; in float32 they are equal
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    monkeypatch.setattr(torch, "bfloat16", torch.float32)  # which torch asks for from 2.15 on
    recipe = RECIPE.replace(optim="muon", layer_decay=layer_decay, momentum=momentum)
    mine, theirs = tiny_model(num_hidden_layers=2), tiny_model(num_hidden_layers=2)
    take_steps(mine, build_optimizer(groups_of(mine, "muon", recipe), recipe, "no"), range(5))

    def scale(name):
        depth = 0 if "embeddings" in name else int(name.split(".")[2]) + 1 if ".layers." in name else 3
        return layer_decay ** (3 - depth)

    hidden, others = [], []
    for name, parameter in theirs.named_parameters():
        decays = name.endswith("weight") and "norm" not in name
        is_hidden = decays and ".layers." in name
        (hidden if is_hidden else others).append(
            {"params": [parameter], "rate_scale": scale(name), "weight_decay": 0.05 if decays else 0.0}
        )
    assert len(hidden) == 12
    muon = torch.optim.Muon(hidden, momentum=momentum or 0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, fused=True)
    for step in range(5):
        backward(theirs, step)
        for optimizer in (muon, adamw):
            for settings in optimizer.param_groups:
                settings["lr"] = 1e-2 / (step + 1) * settings["rate_scale"]
            optimizer.step()
        theirs.zero_grad()
    start = dict(tiny_model(num_hidden_layers=2).named_parameters())
    for (name, found), expected in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        moved = (expected - start[name]).norm()
        assert (found - expected).norm() <= 1e-4 * moved, name


@pytest.mark.parametrize(
    "mixed_precision, expected",
    [("no", None), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8", torch.bfloat16)],
)
def test_muon_multiplies_in_the_runs_precision(mixed_precision, expected):
    """And in no other: bfloat16 takes thirty times as long as float32 where a processor has no units for it."""
    optimizer = build_optimizer(groups_of(tiny_model(), "muon"), RECIPE.replace(optim="muon"), mixed_precision)
    assert optimizer.parts[True].compute_dtype is expected


def test_muon_saves_one_momentum_a_hidden_matrix_and_adamws_moments_of_the_rest():
    model = tiny_model()
    groups = groups_of(model, "muon")
    optimizer = OPTIMIZERS["muon"](groups, RECIPE)
    assert isinstance(optimizer, torch.optim.Optimizer)
    take_steps(model, optimizer, range(2))
    saved = set(optimizer_tensors(optimizer, names_of(groups)))
    expected = {
        f"{name}/{entry}"
        for group in groups
        for name in group.names
        for entry in (["momentum_buffer"] if group.is_hidden_matrix else ["step", "exp_avg", "exp_avg_sq"])
    }
    assert saved == expected


def test_muon_trains_hidden_matrices_alone():
    model = tiny_model()
    model.requires_grad_(False)
    model.vit.layers[0].mlp.fc1.weight.requires_grad_(True)
    optimizer = OPTIMIZERS["muon"](groups_of(model, "muon"), RECIPE)
    before = model.vit.layers[0].mlp.fc1.weight.detach().clone()
    take_steps(model, optimizer, range(1))
    assert not torch.equal(model.vit.layers[0].mlp.fc1.weight, before)


def test_muon_without_a_hidden_matrix_is_an_error():
    model = tiny_model()
    model.vit.requires_grad_(False)
    with pytest.raises(UserError, match="--optim muon needs matrices inside the layers, and none is trained here"):
        OPTIMIZERS["muon"](groups_of(model, "muon"), RECIPE)


def test_adams_decay_is_a_penalty_on_the_gradient_and_adamws_is_not():
    """Without a gradient AdamW shrinks a weight by rate * decay; Adam moves it by the rate, whatever the decay."""
    moved = {}
    for name in ("adam", "adamw"):
        model = tiny_model()
        recipe = RECIPE.replace(layer_decay=1.0)
        optimizer = OPTIMIZERS[name](groups_of(model, name, recipe), recipe)
        torch.nn.init.ones_(model.classifier.weight)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moved[name] = (1 - model.classifier.weight).mean().item()
    assert moved == pytest.approx({"adam": 1e-2, "adamw": 1e-2 * 0.05}, rel=1e-3)  # 1 - weight, in float32


@pytest.mark.parametrize("given, used", [(None, 0.9), (0.0, 0.0), (0.5, 0.5)])
def test_sgds_momentum_is_the_recipes(given, used):
    recipe = RECIPE.replace(momentum=given)
    optimizer = OPTIMIZERS["sgd"](groups_of(tiny_model(), "sgd", recipe), recipe)
    assert {settings["momentum"] for settings in optimizer.param_groups} == {used}


def test_sgd_without_warmup_is_warned_of_and_nothing_else():
    warning = optimizer_warning(RECIPE.replace(optim="sgd", warmup_steps=0), 100)
    assert all(hint in warning for hint in ("--warmup_steps", "--optim adamw", "pooling=mean"))
    assert optimizer_warning(RECIPE.replace(optim="sgd", warmup_steps=0.05), 100) is None
    for name in sorted(set(OPTIMIZERS) - {"sgd"}):
        assert optimizer_warning(RECIPE.replace(optim=name, warmup_steps=0), 100) is None
