"""The network by itself: shapes, symmetries, and the ways to run it."""

import numpy as np
import pytest
import torch
from small_vit import build, images
from torch import nn

from modeling_vit_scratch import (
    PRESETS,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchModel,
    modeling_vit_scratch,
)
from modeling_vit_scratch.functions_vit_scratch import product_attention_forward

# A different prime for every axis, so that two that are mixed up do not fit: patches overlap, nothing is square.
B, C, (H, W), (PH, PW), (SH, SW) = 3, 2, (23, 57), (5, 7), (3, 5)
(GH, GW), REGISTERS, D, A, F, M, P, K = (7, 11), 4, 13, 3, 17, 19, 29, 31
N = 1 + REGISTERS + GH * GW
PRIMES = {
    "num_channels": C,
    "image_size": (H, W),
    "patch_size": (PH, PW),
    "patch_stride": (SH, SW),
    "num_register_tokens": REGISTERS,
    "hidden_size": D,
    "num_attention_heads": A,
    "head_dim": F,
    "intermediate_size": M,
    "pooler_output_size": P,
    "num_labels": K,
    "num_hidden_layers": 2,
}


# ---------------------------------------------------------------- shapes


def output_shapes(model: nn.Module, pixel_values: torch.Tensor) -> dict[str, tuple[int, ...]]:
    """Name of every submodule that ran -> shape of its (first) output."""
    shapes = {}

    def record(name):
        def hook(module, inputs, output):
            first = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            shapes[name] = tuple(first.shape)

        return hook

    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            module.register_forward_hook(record(name))
    with torch.no_grad():
        model(pixel_values)
    return shapes


def layer_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}": (B, N, D),
        f"{name}.layernorm_before": (B, N, D),
        f"{name}.attention": (B, N, D),
        f"{name}.attention.q_proj": (B, N, A * F),
        f"{name}.attention.k_proj": (B, N, A * F),
        f"{name}.attention.v_proj": (B, N, A * F),
        f"{name}.attention.q_norm": (B, N, A, F),
        f"{name}.attention.k_norm": (B, N, A, F),
        f"{name}.attention.o_proj": (B, N, D),
        f"{name}.dropout": (B, N, D),
        f"{name}.layer_scale1": (B, N, D),
        f"{name}.layernorm_after": (B, N, D),
        f"{name}.mlp": (B, N, D),
        f"{name}.mlp.fc1": (B, N, M),
        f"{name}.mlp.activation_fn": (B, N, M),
        f"{name}.mlp.hidden_dropout": (B, N, M),
        f"{name}.mlp.fc2": (B, N, D),
        f"{name}.mlp.output_dropout": (B, N, D),
        f"{name}.layer_scale2": (B, N, D),
        f"{name}.drop_path": (B, N, D),
    }


SHAPES = {
    "vit": (B, N, D),
    "vit.embeddings": (B, N, D),
    "vit.embeddings.patch_embeddings": (B, GH * GW, D),
    "vit.embeddings.patch_embeddings.projection": (B, D, GH, GW),
    "vit.embeddings.layernorm": (B, N, D),
    "vit.embeddings.dropout": (B, N, D),
    "vit.patch_dropout": (B, N, D),
    **layer_shapes("vit.layers.0"),
    **layer_shapes("vit.layers.1"),
    "vit.layernorm": (B, N, D),
    "classifier": (B, K),
    "classifier.norm": (B, D),
    "classifier.dense": (B, P),
    "classifier.activation": (B, P),
    "classifier.out": (B, K),
}


def test_every_submodule_gives_the_shape_of_the_table():
    everything = {"embedding_norm": True, "qk_norm": True, "layer_scale_init": 0.5, "classifier": "mlp"}
    assert output_shapes(build(**PRIMES, **everything), images(B, C, H, W)) == SHAPES


def test_other_axes_give_their_shapes_too():
    changed = {"patch_embedding": "linear", "pooling": "mean", "final_norm": "after_pooling", "classifier": "tanh"}
    shapes = output_shapes(build(**PRIMES, **changed, position_embedding_type="none"), images(B, C, H, W))
    assert shapes["vit.embeddings.patch_embeddings.projection"] == (B, GH * GW, D)
    assert shapes["vit.layernorm"] == (B, D)
    assert {name: shapes[name] for name in shapes if name.startswith("classifier")} == {
        "classifier": (B, K),
        "classifier.dense": (B, P),
        "classifier.activation": (B, P),
        "classifier.out": (B, K),
    }


@pytest.mark.parametrize("position_embedding_type", ["learned", "sincos2d", "rope2d", "none"])
@pytest.mark.parametrize(("prefix", "num_prefix"), [((True, 0), 1), ((True, 2), 3), ((False, 2), 2), ((False, 0), 0)])
@pytest.mark.parametrize("prefix_positions", [True, False])
def test_every_kind_of_positions_works_with_every_prefix(position_embedding_type, prefix, num_prefix, prefix_positions):
    use_cls_token, num_register_tokens = prefix
    outputs = build(
        ViTScratchModel,
        image_size=(16, 40),
        position_embedding_type=position_embedding_type,
        use_cls_token=use_cls_token,
        num_register_tokens=num_register_tokens,
        prefix_positions=prefix_positions,
        pooling="mean",
    )(images(3, 3, 16, 40))
    assert outputs.last_hidden_state.shape == (3, num_prefix + 10, 32)
    assert outputs.pooler_output.shape == (3, 32)
    assert torch.isfinite(outputs.last_hidden_state).all()


def test_no_labels_leave_the_pooled_vector():
    model = build(num_labels=0)
    assert torch.equal(model(images()).logits, model.vit(images(), pooled_only=True).pooler_output)


@pytest.mark.parametrize(
    ("pixel_values", "text"),
    [
        (torch.zeros(1, 1, 32, 32), "have 1 channels, the configuration has num_channels=3"),
        (torch.zeros(1, 3, 32, 40), "are 32 x 40, the network was built for 32 x 32; .*interpolate_pos_encoding=True"),
        (torch.zeros(3, 32, 32), r"must be .batch, channels, height, width., got \(3, 32, 32\)"),
        (None, "must be .batch, channels, height, width., got None"),
    ],
    ids=["channels", "size", "dimensions", "nothing"],
)
def test_pixels_that_do_not_fit_are_refused(pixel_values, text):
    with pytest.raises(ValueError, match=text):
        build()(pixel_values)


def test_another_size_has_to_be_filled_by_patches_too():
    with pytest.raises(ValueError, match="a width of 44 is not filled .*: 40 and 48"):
        build()(torch.zeros(1, 3, 32, 44), interpolate_pos_encoding=True)


# ---------------------------------------------------------------- patches, pooling and symmetries


@pytest.mark.parametrize("bias", [True, False])
def test_conv_and_linear_patch_embeddings_are_the_same_map(bias):
    conv = build(**PRIMES, patch_bias=bias)
    linear = build(**PRIMES, patch_bias=bias, patch_embedding="linear", seed=2)
    weights = conv.state_dict()
    kernel = "vit.embeddings.patch_embeddings.projection.weight"
    linear.load_state_dict({**weights, kernel: weights[kernel].flatten(1)})
    # the same sums of 70 products in another order
    torch.testing.assert_close(linear(images(B, C, H, W)).logits, conv(images(B, C, H, W)).logits, rtol=1e-5, atol=1e-6)


def test_patches_come_in_reading_order():
    embeddings = build(**PRIMES).vit.embeddings.patch_embeddings
    pixel_values = images(1, C, H, W)
    tokens = embeddings(pixel_values)
    for row, column in ((0, 0), (2, 3), (6, 10)):
        patch = pixel_values[:, :, row * SH : row * SH + PH, column * SW : column * SW + PW]
        expected = (embeddings.projection.weight * patch).sum((1, 2, 3)) + embeddings.projection.bias
        torch.testing.assert_close(tokens[0, row * GW + column], expected)


@pytest.mark.parametrize("prefix", [{}, {"use_cls_token": False, "pooling": "mean", "num_register_tokens": 0}])
def test_the_residual_stream_keeps_a_tokens_channels_together(prefix):
    # sums take the layout of their first operand; a transposed one costs every later sum and norm time
    model, contiguous = build(**{**PRIMES, **prefix}), []
    for layer in model.vit.layers:
        layer.register_forward_pre_hook(lambda _, inputs: contiguous.append(inputs[0].is_contiguous()))
    model(pixel_values=images(B, C, H, W))
    assert contiguous and all(contiguous)


def shuffle_patches(pixel_values, order, patch=8):
    """The images with their square patches put in another order."""
    batch, channels, height, width = pixel_values.shape
    columns = nn.functional.unfold(pixel_values, patch, stride=patch)[:, :, order]
    return nn.functional.fold(columns, (height, width), patch, stride=patch)


@pytest.mark.parametrize("head", [{}, {"pooling": "mean", "final_norm": "after_pooling"}], ids=["cls", "mean"])
def test_without_positions_tokens_follow_their_patches(head):
    """Heads merged in a wrong order, attention over the wrong axis or a diagonal of it would all break this."""
    model = build(position_embedding_type="none", num_register_tokens=2, **head)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    straight, shuffled = (model.vit(x) for x in (images(), shuffle_patches(images(), order)))
    prefix = torch.arange(3)
    expected = straight.last_hidden_state[:, torch.cat((prefix, 3 + order))]
    # sums over tokens in another order: rounding only
    torch.testing.assert_close(shuffled.last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled.pooler_output, straight.pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position_embedding_type", ["learned", "sincos2d", "rope2d"])
def test_with_positions_the_order_of_patches_matters(position_embedding_type):
    model = build(position_embedding_type=position_embedding_type)
    order = torch.arange(16).flip(0)
    assert (model(images()).logits - model(shuffle_patches(images(), order)).logits).abs().max() > 1e-3


def test_every_patch_is_attended_to():
    pixel_values = images(1, 3, 32, 32).requires_grad_()
    build()(pixel_values).logits[0, 0].backward()
    assert (pixel_values.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("pre_norm", [True, False])
def test_an_image_does_not_see_its_neighbours_in_the_batch(pre_norm):
    model = build(pre_norm=pre_norm)
    together = model(images(5, 3, 32, 32)).logits
    alone = torch.cat([model(image[None]).logits for image in images(5, 3, 32, 32)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)  # other matrix sizes, other order of sums


def test_mean_pooling_leaves_out_prefix_tokens():
    outputs = build(pooling="mean", num_register_tokens=2).vit(images())
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 3:].mean(1))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_final_norm_acts_where_the_configuration_says(pooling):
    models = {place: build(pooling=pooling, final_norm=place) for place in ("before_pooling", "after_pooling", "none")}
    weights = {
        name: value for name, value in models["before_pooling"].state_dict().items() if "vit.layernorm" not in name
    }
    for model in models.values():
        model.load_state_dict(weights, strict=False)
    outputs = {place: model.vit(images()) for place, model in models.items()}
    raw = outputs["none"].last_hidden_state
    pooled = raw[:, 0] if pooling == "cls" else raw[:, 1:].mean(1)
    norm = models["before_pooling"].vit.layernorm
    torch.testing.assert_close(outputs["none"].pooler_output, pooled)
    torch.testing.assert_close(outputs["before_pooling"].last_hidden_state, norm(raw))
    torch.testing.assert_close(outputs["after_pooling"].last_hidden_state, raw)
    torch.testing.assert_close(outputs["after_pooling"].pooler_output, norm(pooled))


def test_masked_tokens_change_nothing_for_the_others():
    model = build(position_embedding_type="none")
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[:, 5] = 0
    changed = images()
    changed[:, :, 8:16, 0:8] = 7.0  # patch 4, token 5
    before, after = (model.vit(x, attention_mask=mask).last_hidden_state for x in (images(), changed))
    others = [token for token in range(17) if token != 5]
    torch.testing.assert_close(after[:, others], before[:, others])
    assert (after[:, 5] - before[:, 5]).abs().max() > 0.1


# ---------------------------------------------------------------- ways to run it

RUNS = {
    "plain": {},
    "rotary": {"position_embedding_type": "rope2d", "qk_norm": True, "num_register_tokens": 2},
    "fixed": {"position_embedding_type": "sincos2d", "pooling": "mean", "layer_scale_init": 0.5, "classifier": "mlp"},
    "post-norm": {"pre_norm": False, "final_norm": "none", "patch_embedding": "linear", "classifier": "tanh"},
}


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_eager_and_sdpa_attention_agree(fields):
    model = build(**fields)
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(images()).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-5, atol=1e-5)  # two orders of the same sums


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_attention_as_two_products_is_pytorchs_with_its_gradients(dtype, tolerance):
    torch.manual_seed(0)
    heads = [torch.randn(2, 3, 17, 8, dtype=torch.float64) for _ in range(3)]
    results = []
    for attend, states in (
        (lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2), heads),
        (lambda q, k, v: product_attention_forward(None, q, k, v, None, 0.3)[0], [h.to(dtype) for h in heads]),
    ):
        states = [part.detach().requires_grad_() for part in states]
        output = attend(*states)
        output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype))
        results.append([output, *(part.grad for part in states)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_sdpa_takes_two_products_in_half_precision_on_a_cpu_and_nowhere_else(monkeypatch):
    taken = []

    def spy(*arguments, **options):
        taken.append(arguments[1].dtype)
        return product_attention_forward(*arguments, **options)

    monkeypatch.setattr(modeling_vit_scratch, "product_attention_forward", spy)
    model = build(num_hidden_layers=1, pooling="mean").train()  # all tokens ask
    model(images())
    with torch.autocast("cpu", torch.bfloat16):
        model.set_attn_implementation("eager")
        by_eager = model(images()).logits
        assert not taken
        model.set_attn_implementation("sdpa")
        by_products = model(images()).logits
        assert taken == [torch.bfloat16]
        model(images(), attention_mask=(torch.arange(model.config.num_patches + 1) > 3).expand(len(images()), -1))
        model.vit.layers[0].attention.attention_dropout = 0.5
        model(images())
    assert len(taken) == 1
    torch.testing.assert_close(by_products.float(), by_eager.float(), rtol=2e-2, atol=2e-2)


def test_sdpa_is_the_default_and_flash_attention_is_declared():
    model = build()
    assert model.config._attn_implementation == "sdpa"
    assert model._supports_flash_attn and model._supports_sdpa and model._supports_flex_attn
    assert not any(layer.attention.is_causal for layer in model.vit.layers)


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_the_compiled_network_agrees_in_one_graph(fields):
    torch.compiler.reset()
    model = build(**fields)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the graphs, without minutes of C++
    torch.testing.assert_close(compiled(images()).logits, model(images()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_network_compiled_by_inductor_agrees():
    torch.compiler.reset()
    model = build(position_embedding_type="rope2d", drop_path_rate=0.1)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images()).logits, model(images()).logits, rtol=1e-4, atol=1e-4)  # fused sums


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_the_exported_network_agrees(fields):
    model = build(**fields)
    exported = torch.export.export(model, (images(),), strict=False).module()
    torch.testing.assert_close(exported(images()).logits, model(images()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_stays_near_float32(fields, autocast):
    model = build(**fields, initializer_range=0.02)
    expected = model(images()).logits
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = (model if autocast else model.to(torch.bfloat16))(images()).logits
    assert logits.dtype is torch.bfloat16
    # eight bits of mantissa: 0.4 % at each of some twenty roundings, beside the largest logit
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_hidden_states_are_the_embeddings_and_every_layers_output():
    model = build(num_hidden_layers=3).vit
    outputs = model(images(), output_hidden_states=True)
    expected = [model.embeddings(images())]
    for layer in model.layers:
        expected.append(layer(expected[-1]))
    assert len(outputs.hidden_states) == 4
    for state, reference in zip(outputs.hidden_states, expected, strict=True):
        assert torch.equal(state, reference)
    assert torch.equal(outputs.last_hidden_state, model.layernorm(expected[-1]))


def test_attentions_are_probabilities():
    model = build(num_register_tokens=2, num_hidden_layers=3)
    model.set_attn_implementation("eager")
    attentions = model(images(), output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(3, 4, 19, 19)] * 3
    for weights in attentions:
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 19))


def test_attention_weights_are_the_softmax_of_scaled_scores():
    model = build(num_hidden_layers=1)
    model.set_attn_implementation("eager")
    weights = model(images(), output_attentions=True).attentions[0][1].detach().numpy()
    layer = model.vit.layers[0]
    states = layer.layernorm_before(model.vit.embeddings(images()))[1]
    query, key = (
        projection(states).detach().numpy() for projection in (layer.attention.q_proj, layer.attention.k_proj)
    )
    for head in range(4):
        channels = slice(head * 8, head * 8 + 8)
        scores = np.exp(query[:, channels] @ key[:, channels].T / np.sqrt(8))
        np.testing.assert_allclose(weights[head], scores / scores.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_a_tuple_comes_back_on_request():
    model = build()
    logits, hidden_states = model(images(), output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, model(images()).logits) and len(hidden_states) == 3


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_on_meta(name):
    """Shapes only, so that the largest costs nothing: every preset's classifier gives one logit a label."""
    config = ViTScratchConfig.from_preset(name)
    with torch.device("meta"):
        model = ViTScratchForImageClassification(config)
        logits = model(torch.empty(2, config.num_channels, *config.image_height_width)).logits
    assert logits.shape == (2, config.num_labels)
