"""The numbers of transformers', timm's, torchvision's and PyTorch's own networks, with the same random weights."""

import re

import pytest
import torch
from small_vit import images
from torch import nn
from torchvision.models import vit_b_16
from torchvision.models.vision_transformer import VisionTransformer
from transformers import ViTConfig, ViTForImageClassification

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchLayer, interpolate_position_embeddings

SIZES = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}  # hidden size, heads; 12 layers, MLP of four times the width


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def randomised(make, seed=0) -> nn.Module:
    """The model that `make` gives, every parameter drawn anew: biases and norms count too, and nothing is zero."""
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.02, generator=generator)
            if parameter.ndim == 1 and name.endswith(".weight"):
                parameter.add_(1)  # a norm
    return model


def ours_with(weights: dict[str, torch.Tensor], **fields) -> ViTScratchForImageClassification:
    """Our network with exactly these weights: a name too many or too few raises."""
    with torch.device("meta"):
        model = ViTScratchForImageClassification(ViTScratchConfig(**fields))
    model.load_state_dict(weights, assign=True)
    return model.eval()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor):
    """Within 1e-5 of the largest number: float32 has 24 bits, and twelve layers add up some tens of roundings."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


# ---------------------------------------------------------------- other libraries' names


def rename(weights: dict[str, torch.Tensor], rules: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """The weights under our names; a fused matrix of queries, keys and values becomes three."""
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if "qkv" in name:
            for part, third in zip("qkv", value.chunk(3)):
                renamed[name.replace("qkv", f"{part}_proj")] = third
        else:
            renamed[name] = value
    return renamed


FROM_TIMM = [
    (r"^(cls_token)", r"vit.embeddings.\1"),
    (r"^reg_token", "vit.embeddings.register_tokens"),
    (r"^pos_embed", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
    (r"^norm_pre", "vit.embeddings.layernorm"),
    (r"^(fc_)?norm\.", "vit.layernorm."),
    (r"^head", "classifier"),
    (r"^blocks", "vit.layers"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"\.attn\.proj", ".attention.o_proj"),
    (r"\.attn\.", ".attention."),
    (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"),
]

FROM_TORCHVISION = [
    (r"^class_token", "vit.embeddings.cls_token"),
    (r"^encoder\.pos_embedding", "vit.embeddings.position_embeddings"),
    (r"^conv_proj", "vit.embeddings.patch_embeddings.projection"),
    (r"^encoder\.ln", "vit.layernorm"),
    (r"^heads\.head", "classifier"),
    (r"^encoder\.layers\.encoder_layer_", "vit.layers."),
    (r"ln_1", "layernorm_before"),
    (r"ln_2", "layernorm_after"),
    (r"self_attention\.in_proj_", "attention.qkv."),
    (r"self_attention\.out_proj", "attention.o_proj"),
    (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.3", "mlp.fc2"),
]

FROM_ENCODER_LAYER = [
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"self_attn\.in_proj_", "attention.qkv."),
    (r"self_attn\.out_proj", "attention.o_proj"),
    (r"linear(\d)", r"mlp.fc\1"),
]


# ---------------------------------------------------------------- logits at full size


def full_size(size: str, **fields) -> dict:
    width, heads = SIZES[size]
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return {**sizes, "num_labels": 1000, **fields}


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_logits_and_hidden_states_are_those_of_transformers_vit(size):
    fields = full_size(size)
    theirs = randomised(lambda: ViTForImageClassification(ViTConfig(**fields)))
    ours = ours_with(theirs.state_dict(), **fields)  # the names are the same
    pixel_values = images(2, 3, 224, 224)
    expected, got = (model(pixel_values, output_hidden_states=True) for model in (theirs, ours))
    assert_same(got.logits, expected.logits)
    assert len(got.hidden_states) == len(expected.hidden_states) == 13
    for state, reference in zip(got.hidden_states, expected.hidden_states):
        assert_same(state, reference)


@pytest.mark.parametrize(("size", "name"), list(zip(SIZES, ("tiny", "small", "base"))))
@torch.no_grad()
def test_logits_are_those_of_timm(timm, size, name):
    theirs = randomised(lambda: timm.create_model(f"vit_{name}_patch16_224", pretrained=False))
    ours = ours_with(rename(theirs.state_dict(), FROM_TIMM), **full_size(size, layer_norm_eps=1e-6))
    assert_same(ours(images(2, 3, 224, 224)).logits, theirs(images(2, 3, 224, 224)))


def torchvision_vit(size: str) -> nn.Module:
    if size == "b":
        return vit_b_16(weights=None)
    width, heads = SIZES[size]
    return VisionTransformer(224, 16, num_layers=12, num_heads=heads, hidden_dim=width, mlp_dim=4 * width)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_logits_are_those_of_torchvision(size):
    theirs = randomised(lambda: torchvision_vit(size))
    ours = ours_with(rename(theirs.state_dict(), FROM_TORCHVISION), **full_size(size, layer_norm_eps=1e-6))
    assert_same(ours(images(2, 3, 224, 224)).logits, theirs(images(2, 3, 224, 224)))


# ---------------------------------------------------------------- timm's variants, small

VARIANTS = {
    "layer scale": ({"init_values": 1e-5}, {"layer_scale_init": 1e-5}),
    "qk norm": ({"qk_norm": True}, {"qk_norm": True}),
    "registers": ({"reg_tokens": 3}, {"num_register_tokens": 3}),
    "registers without positions": (
        {"reg_tokens": 3, "no_embed_class": True},
        {"num_register_tokens": 3, "prefix_positions": False},
    ),
    "class token without position": ({"no_embed_class": True}, {"prefix_positions": False}),
    "no positions": ({"pos_embed": "none"}, {"position_embedding_type": "none"}),
    "mean, then norm": (
        {"global_pool": "avg", "class_token": False},
        {"pooling": "mean", "use_cls_token": False, "final_norm": "after_pooling"},
    ),
    "norm, then mean of patches": (
        {"global_pool": "avg", "fc_norm": False, "reg_tokens": 2},
        {"pooling": "mean", "num_register_tokens": 2},
    ),
    "class token, then norm": ({"fc_norm": True}, {"final_norm": "after_pooling"}),
    "no final norm": ({"final_norm": False}, {"final_norm": "none"}),
    "norm before the layers": ({"pre_norm": True}, {"embedding_norm": True, "patch_bias": False}),
    "no biases": ({"qkv_bias": False, "proj_bias": False}, {"qkv_bias": False, "proj_bias": False, "mlp_bias": False}),
    "oblong": ({"img_size": (24, 40), "patch_size": (4, 8)}, {"image_size": (24, 40), "patch_size": (4, 8)}),
    "most at once": (
        {
            "init_values": 0.1,
            "qk_norm": True,
            "reg_tokens": 3,
            "no_embed_class": True,
            "global_pool": "avg",
            "pre_norm": True,
        },
        {
            "layer_scale_init": 0.1,
            "qk_norm": True,
            "num_register_tokens": 3,
            "prefix_positions": False,
            "pooling": "mean",
            "final_norm": "after_pooling",
            "embedding_norm": True,
            "patch_bias": False,
        },
    ),
}


@pytest.mark.parametrize(("theirs", "ours"), VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_every_variant_that_timm_has_gives_timms_logits(timm, theirs, ours):
    sizes = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 2,
        "num_classes": 7,
    }
    make = timm.models.vision_transformer.VisionTransformer
    reference = randomised(lambda: make(**{**sizes, **theirs}))
    fields = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "num_labels": 7,
        "layer_norm_eps": 1e-6,
    }
    model = ours_with(rename(reference.state_dict(), FROM_TIMM), **{**fields, **ours})
    pixel_values = images(5, 3, *model.config.image_height_width)
    assert_same(model(pixel_values).logits, reference(pixel_values))


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
def test_a_layer_is_pytorchs_transformer_encoder_layer(pre_norm, activation):
    options = {"activation": activation, "layer_norm_eps": 1e-6, "batch_first": True, "norm_first": pre_norm}
    theirs = randomised(lambda: nn.TransformerEncoderLayer(48, 4, 96, **options))
    config = ViTScratchConfig(
        hidden_size=48,
        num_attention_heads=4,
        intermediate_size=96,
        hidden_act=activation,
        layer_norm_eps=1e-6,
        pre_norm=pre_norm,
        attn_implementation="sdpa",
    )
    ours = ViTScratchLayer(config, 0).eval()
    ours.load_state_dict(rename(theirs.state_dict(), FROM_ENCODER_LAYER))
    hidden_states = images(3, 11, 48)
    assert_same(ours(hidden_states), theirs(hidden_states))


# ---------------------------------------------------------------- gradients and other image sizes

FIELDS = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_labels": 7,
}


def both():
    theirs = randomised(lambda: ViTForImageClassification(ViTConfig(**FIELDS)))
    weights = {name: value.clone() for name, value in theirs.state_dict().items()}
    return theirs, ours_with(weights, **FIELDS)


def test_loss_and_gradients_are_those_of_transformers_vit():
    theirs, ours = both()
    labels = torch.tensor([0, 3, 6])
    losses = [model(images(3, 3, 32, 32), labels=labels).loss for model in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_same(parameter.grad, gradients[name].grad)


@pytest.mark.parametrize("image_size", [(48, 48), (64, 40), (24, 32)])
@torch.no_grad()
def test_logits_at_another_size_are_those_of_transformers_vit(image_size):
    theirs, ours = both()
    pixel_values = images(2, 3, *image_size)
    expected, got = (model(pixel_values, interpolate_pos_encoding=True).logits for model in (theirs, ours))
    assert_same(got, expected)


@pytest.mark.parametrize("grid", [(6, 6), (8, 5), (3, 4)])
def test_interpolated_positions_are_those_of_transformers_vit(grid):
    embeddings = both()[0].vit.embeddings
    expected = embeddings.interpolate_pos_encoding(torch.empty(1, 1 + grid[0] * grid[1], 48), 8 * grid[0], 8 * grid[1])
    got = interpolate_position_embeddings(embeddings.position_embeddings, (4, 4), grid)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("old_grid", "new_grid"), [((4, 4), (7, 7)), ((14, 14), (5, 9)), ((3, 5), (6, 4))])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_antialiased_positions_are_those_of_timm(timm, old_grid, new_grid, num_prefix):
    table = images(1, num_prefix + old_grid[0] * old_grid[1], 16)
    expected = timm.layers.resample_abs_pos_embed(table, list(new_grid), list(old_grid), num_prefix_tokens=num_prefix)
    assert torch.equal(interpolate_position_embeddings(table, old_grid, new_grid, antialias=True), expected)
