"""What parameters start at, and that loading leaves nothing at its start."""

import pytest
import torch
from small_vit import SMALL, build, images
from torch import nn

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.modeling_vit_scratch import sincos2d_positions
from modeling_vit_scratch.results.model_folder import MODEL_CODE

# ---------------------------------------------------------------- initialisation

WIDE = {**SMALL, "hidden_size": 128, "intermediate_size": 256, "num_register_tokens": 8, "initializer_range": 1.0}


def fresh(**fields):
    torch.manual_seed(0)
    return ViTScratchForImageClassification(ViTScratchConfig(**{**WIDE, **fields}))


def materialised(**fields):
    """The same network from meta tensors with no weights to load: every parameter goes through _init_weights."""
    torch.manual_seed(0)
    config = ViTScratchConfig(**{**WIDE, **fields})
    return ViTScratchForImageClassification.from_pretrained(None, config=config, state_dict={})


def bound_of(kind: str, weight: torch.Tensor) -> tuple[float, float]:
    """(standard deviation, largest absolute value) of a matrix or kernel under `weight_init`, initializer_range 1."""
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight.flatten(1))  # a kernel as the matrix that it is
    uniform = {"xavier_uniform": (6 / (fan_in + fan_out)) ** 0.5, "torch": fan_in**-0.5}
    if kind in uniform:
        return uniform[kind] / 3**0.5, uniform[kind]
    return {"normal": (1.0, infinity), "trunc_normal": (0.8796, 2.0)}[kind]  # a normal cut off at two deviations


infinity = float("inf")


@pytest.mark.parametrize("start", [fresh, materialised], ids=lambda function: function.__name__)
@pytest.mark.parametrize("kind", ["normal", "trunc_normal", "xavier_uniform", "torch"])
def test_matrices_start_as_weight_init_says(kind, start):
    model = start(weight_init=kind)
    matrices = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert len(matrices) == 1 + 2 * 6 + 1
    for module in matrices[:-1]:  # the classifier, 5 x 128, is too small to measure
        std, largest = bound_of(kind, module.weight)
        # the deviation of 16,384 numbers or more is known to 0.6 %; six times that
        assert abs(module.weight.std().item() / std - 1) < 0.035
        assert module.weight.abs().max() <= largest
        if kind == "normal":
            assert module.weight.abs().max() > 2
        if kind != "torch":
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
        else:
            assert 0.7 * largest < module.bias.abs().max() <= largest


def test_weight_init_torch_is_pytorchs_own_default():
    ours = fresh(weight_init="torch").vit.layers[0].mlp.fc1
    theirs = nn.Linear(128, 256)
    for parameter in ("weight", "bias"):
        mine, default = getattr(ours, parameter).flatten(), getattr(theirs, parameter).flatten()
        # two samples of one distribution: Kolmogorov's distance, at the one-in-a-million level
        grid = torch.linspace(-0.09, 0.09, 181)
        distance = max(abs((mine < x).float().mean() - (default < x).float().mean()) for x in grid)
        assert distance < 2.7 * (2 / len(mine)) ** 0.5


@pytest.mark.parametrize("start", [fresh, materialised], ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("how", "mean", "std", "low", "high"),
    [
        ("trunc_normal", 0, 0.8796, -2, 2),
        ("normal", 0, 1, -9, 9),
        ("uniform", 0.5, 12**-0.5, 0, 1),
        ("zeros", 0, 0, 0, 0),
        (0.1, 0.1, 0, 0.1, 0.1),
        (2, 2, 0, 2, 2),
    ],
)
def test_tokens_and_positions_start_as_their_fields_say(how, mean, std, low, high, start):
    embeddings = start(token_init=how, position_init=how).vit.embeddings
    for table in (embeddings.cls_token, embeddings.register_tokens, embeddings.position_embeddings):
        size = table.numel()
        # six deviations of the mean and of the deviation of `size` numbers; 1e-6 for float32 constants
        assert abs(table.mean().item() - mean) < 6 * std / size**0.5 + 1e-6
        assert abs(table.std().item() - std) < 6 * std / (2 * size) ** 0.5 + 1e-6
        assert low - 1e-6 <= table.min() and table.max() <= high + 1e-6


@pytest.mark.parametrize("start", [fresh, materialised], ids=lambda function: function.__name__)
@pytest.mark.parametrize("prefix_positions", [True, False])
def test_positions_can_start_at_the_fixed_table(prefix_positions, start):
    table = start(position_init="sincos2d", prefix_positions=prefix_positions).vit.embeddings.position_embeddings
    prefix = 9 if prefix_positions else 0
    assert torch.equal(table[:, :prefix], torch.zeros(1, prefix, 128))
    torch.testing.assert_close(table[:, prefix:].detach(), sincos2d_positions((4, 4), 128))
    assert table.requires_grad


@pytest.mark.parametrize("start", [fresh, materialised], ids=lambda function: function.__name__)
def test_norms_and_layer_scale_start_as_documented(start):
    model = start(layer_scale_init=1e-5, qk_norm=True, embedding_norm=True)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
    for layer in model.vit.layers:
        for scale in (layer.layer_scale1, layer.layer_scale2):
            assert torch.equal(scale.lambda1, torch.full((128,), 1e-5))


@pytest.mark.parametrize("start", [fresh, materialised], ids=lambda function: function.__name__)
@pytest.mark.parametrize("weight_init", ["normal", "torch"])
def test_zero_init_residual_makes_every_layer_the_identity(weight_init, start):
    model = start(zero_init_residual=True, weight_init=weight_init).eval()
    hidden_states = images(2, 5, 128)
    for layer in model.vit.layers:
        assert torch.equal(layer(hidden_states), hidden_states)


def test_no_weight_decay_names_the_tables():
    expected = {f"vit.embeddings.{name}" for name in ("cls_token", "register_tokens", "position_embeddings")}
    assert fresh().no_weight_decay() == expected
    assert (
        fresh(
            use_cls_token=False, pooling="mean", num_register_tokens=0, position_embedding_type="none"
        ).no_weight_decay()
        == set()
    )


# ---------------------------------------------------------------- saving and loading

VARIED = {
    "plain": {},
    "started otherwise": {
        "weight_init": "torch",
        "zero_init_residual": True,
        "token_init": 0.1,
        "layer_scale_init": 0.1,
    },
    "everything else": {
        "image_size": (23, 57),
        "patch_size": (5, 7),
        "patch_stride": (3, 5),
        "num_channels": 2,
        "head_dim": 17,
        "qk_norm": True,
        "embedding_norm": True,
        "classifier": "tanh",
        "position_init": "normal",
        "num_register_tokens": 4,
    },
    "no positions": {"position_embedding_type": "none", "use_cls_token": False, "pooling": "mean"},
}


@pytest.mark.parametrize("fields", VARIED.values(), ids=VARIED)
def test_a_saved_model_comes_back_bit_for_bit(fields, tmp_path):
    model = build(**fields)
    with torch.no_grad():
        for parameter in model.parameters():  # away from every start, so that one that is not loaded shows
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded, report = ViTScratchForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = {**model.config.to_dict(), "_name_or_path": "", "auto_map": MODEL_CODE}  # which lies beside it
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == expected
    weights = loaded.state_dict()
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    pixel_values = images(2, model.config.num_channels, *model.config.image_height_width)
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_the_encoder_of_a_classifier_loads_by_itself(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    encoder = ViTScratchModel.from_pretrained(tmp_path)
    assert torch.equal(encoder(images()).pooler_output, model.vit(images()).pooler_output)


def test_a_model_built_on_meta_has_no_numbers_until_it_is_loaded(tmp_path):
    build(drop_path_rate=0.3).save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = ViTScratchForImageClassification(ViTScratchConfig.from_pretrained(tmp_path))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    loaded = ViTScratchForImageClassification.from_pretrained(tmp_path)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
