"""The last layer computes what the class token needs, where nothing else of it is read: same logits, same gradients."""

import sys
from pathlib import Path

import pytest
import torch
from small_vit import build, images
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from modeling_vit_scratch import ViTScratchModel
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchAttention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from train_step import MadeProducts

LABELS = torch.tensor([0, 1, 2])
NETWORKS = {
    "plain": {},
    "rotary": {"position_embedding_type": "rope2d", "qk_norm": True, "num_register_tokens": 2},
    "post-norm": {"pre_norm": False, "final_norm": "none", "classifier": "tanh"},
    "fc-norm": {"final_norm": "after_pooling", "layer_scale_init": 0.5, "mlp_bias": False, "qkv_bias": False},
    "one layer": {"num_hidden_layers": 1},
    "patches left out": {"position_embedding_type": "rope2d", "patch_drop_rate": 0.5},
}


def flops(model: nn.Module, **inputs) -> int:
    with torch.no_grad(), MadeProducts() as made:
        model(images(), **inputs)
    return made.flops


def of_all_tokens(model: nn.Module, **inputs) -> torch.Tensor:
    """The same logits by way of all of the last layer."""
    outputs = model.vit(images().double(), **inputs)
    assert outputs.last_hidden_state.shape[1] > 1
    return model.classifier(outputs.pooler_output)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)
def test_logits_and_gradients_are_those_of_all_tokens(fields, attention):
    model = build(**fields, attn_implementation=attention).double().train()
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for call in (lambda: model(images().double(), noise=noise).logits, lambda: of_all_tokens(model, noise=noise)):
        model.zero_grad()
        logits = call()
        nn.functional.cross_entropy(logits, LABELS).backward()
        found.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_products_are_those_of_the_paper_but_for_what_no_class_token_needs(layers):
    """Of the last layer's tokens the class token alone has a query, an output of attention and an MLP."""
    batch, tokens, width, mlp, labels = 3, 17, 32, 48, 5
    patches = 2 * 16 * width * 3 * 8 * 8
    layer = 2 * tokens * (4 * width * width + 2 * tokens * width + 2 * width * mlp)
    last = 2 * (2 * tokens * width * width + 2 * width * width + 2 * tokens * width + 2 * width * mlp)
    expected = batch * (patches + (layers - 1) * layer + last + 2 * width * labels)
    assert flops(build(num_hidden_layers=layers, attn_implementation="eager")) == expected


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("heads", [2, 4])
def test_a_single_query_needs_a_product_with_each_matrix_for_each_image_alone(layers, heads):
    """No token has a key or a value: W_k turns the query of each head, W_v the mean of the tokens that it weighs."""
    tokens, width, mlp = 17, 32, 48
    patches, classifier = 2 * 16 * width * 3 * 8 * 8, 2 * width * 5
    layer = 2 * tokens * (4 * width * width + 2 * tokens * width + 2 * width * mlp)
    last = 2 * (4 * width * width + 2 * heads * tokens * width + 2 * width * mlp)
    model = build(num_hidden_layers=layers, num_attention_heads=heads, attn_implementation="sdpa").bfloat16()
    with torch.no_grad(), MadeProducts() as made:  # in bf16 attention is two products, which are counted
        model(images().bfloat16())
    assert made.flops == 3 * (patches + (layers - 1) * layer + last + classifier)


WITH_KEYS = {
    "a table turns them": {"position_embedding_type": "rope2d"},
    "a norm is between": {"qk_norm": True},
    "weights are dropped": {"attention_probs_dropout_prob": 0.5},
    "eager shows each step": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("fields", WITH_KEYS.values(), ids=WITH_KEYS)
def test_keys_and_values_are_made_where_more_than_a_matrix_makes_them(fields):
    model = build(**fields).train()
    keys = 2 * 2 * 3 * 17 * 32 * 32
    assert flops(build().train()) < flops(model.train()) - keys / 2


def made_keys(attention: ViTScratchAttention, **inputs) -> list[tuple[int, ...]]:
    seen, inner = [], attention.k_proj.forward
    attention.k_proj.forward = lambda states: seen.append(tuple(states.shape)) or inner(states)
    attention(torch.randn(3, 17, 32), **inputs)
    del attention.k_proj.forward
    return seen


def test_a_key_that_another_library_makes_is_made():
    """As PEFT's and accelerate's layers do; a mask, which a caller of the layer alone may give, is obeyed."""
    attention = build().vit.layers[-1].attention
    assert made_keys(attention, num_queries=1) == [(3, 17, 32)]
    states, mask = torch.randn(3, 17, 32), torch.zeros(3, 1, 1, 17)
    mask[..., 5:] = -torch.inf
    output = attention(states, num_queries=1, attention_mask=mask)[0]
    torch.testing.assert_close(output, attention(states[:, :5], num_queries=1)[0])


class Doubled(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


@pytest.mark.parametrize("name", ["k_proj", "v_proj", "k_norm"])
def test_a_projection_of_ones_own_is_called(name):
    model = build().double()
    attention, before = model.vit.layers[-1].attention, model(images().double()).logits
    if name == "k_norm":
        attention.k_norm = nn.Hardtanh(-0.1, 0.1)
    else:
        getattr(attention, name).__class__ = Doubled
    logits = model(images().double()).logits
    assert not torch.allclose(logits, before)
    torch.testing.assert_close(logits, of_all_tokens(model))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_query_is_as_exact_as_all_tokens(precision):
    """Against float64: no further off than the way that makes keys and values, in the same precision."""
    attention = build(num_attention_heads=2).vit.layers[-1].attention
    states = torch.randn(8, 65, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = attention.double()(states.double())[0][:, :1]
        attention, states = attention.to(precision), states.to(precision)
        off = [(attention(states, num_queries=n)[0][:, :1].double() - exact).norm() for n in (1, None)]
    assert off[0] <= 1.25 * off[1]


@pytest.mark.parametrize("fields", [{"pooling": "mean"}, {"pooling": "mean", "use_cls_token": False}], ids=str)
def test_mean_pooling_reads_all_tokens(fields):
    model = build(**fields)
    assert (
        model.vit(images(), pooled_only=True).last_hidden_state.shape[1] == model.config.num_patches + len(fields) % 2
    )
    assert flops(model) == flops(model.vit) + 3 * 2 * 32 * 5


def test_the_encoder_alone_gives_all_tokens_unless_they_are_not_asked_for():
    model = build(ViTScratchModel)
    assert model(images()).last_hidden_state.shape == (3, 17, 32)
    pooled = model(images(), pooled_only=True)
    assert pooled.last_hidden_state is None
    torch.testing.assert_close(pooled.pooler_output, model(images()).pooler_output)


@pytest.mark.parametrize("name", ["vit", "vit.layernorm", "vit.layers.1", "vit.layers.1.attention.o_proj"])
def test_a_hook_sees_all_tokens(name):
    model, seen = build(), []

    def look(module, inputs, output):
        output = output.last_hidden_state if module is model.vit else output
        seen.append(tuple(output.shape))

    least, handle = flops(model), model.get_submodule(name).register_forward_hook(look)
    assert flops(model) > least
    assert seen == [(3, 17, 32)]
    handle.remove()
    assert flops(model) == least
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    assert flops(model) > least
    handle.remove()


def test_a_forward_of_another_library_sees_all_tokens():
    model, seen = build(), []
    inner = (mlp := model.vit.layers[-1].mlp).forward
    mlp.forward = lambda states: seen.append(tuple(states.shape)) or inner(states)  # as accelerate's hooks do it
    model(images())
    assert seen == [(3, 17, 32)]


class OwnAttention(ViTScratchAttention):
    """As somebody wrote it who knows of no queries but all tokens'."""

    def forward(self, hidden_states, attention_mask=None, rotary_tables=None):
        return super().forward(hidden_states, attention_mask, rotary_tables)


def test_an_attention_of_ones_own_is_called_with_all_tokens():
    model = build()
    expected = model(images()).logits
    for layer in model.vit.layers:
        layer.attention.__class__ = OwnAttention
    assert not model.vit.pools_class_token_alone()
    torch.testing.assert_close(model(images()).logits, expected)


def test_recorded_states_and_weights_are_those_of_all_tokens():
    model = build(attn_implementation="eager")
    outputs = model(images(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(3, 17, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(3, 4, 17, 17)] * 2


def test_a_mask_and_an_attention_that_was_not_tried_compute_all_tokens():
    model = build()
    assert flops(model, attention_mask=(torch.arange(17) > 3).expand(3, -1)) > flops(model)
    model.config._attn_implementation = "flex_attention"
    assert not model.vit.pools_class_token_alone()


def test_an_exported_network_computes_no_more():
    model = build()
    program = torch.export.export(model, (images(),))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images())["logits"], model(images()).logits)
    assert flops(program.module()) == flops(model)
