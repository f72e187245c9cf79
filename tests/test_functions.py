"""The MLP that keeps no activation gives autograd's derivatives, and steps aside where somebody looks on."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_vit import build as build_any
from small_vit import images
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vmap
from torch.nn.modules.module import register_module_forward_hook
from transformers.pytorch_utils import Conv1D

from modeling_vit_scratch.functions_vit_scratch import LinearFunction, computes_activation_anew, is_untouched

LABELS = torch.tensor([0, 1, 2])
PRECISIONS = pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
pytestmark = pytest.mark.usefixtures("library")


def build(**fields) -> nn.Module:
    """Mean pooling reads all tokens of the last layer, whether somebody looks on or not."""
    return build_any(**{"pooling": "mean", **fields})


def in_float64(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def loss_and_gradients(model: nn.Module, bf16: bool) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(images(), labels=LABELS).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad)]


def kept_bytes(model: nn.Module, bf16: bool) -> int:
    """Bytes of what the forward pass keeps for the backward pass, a memory that two tensors share counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that no address comes twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(images(), labels=LABELS).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def watched(model: nn.Module) -> nn.Module:
    """The same network, with somebody looking at its activations: it takes the plain path."""
    for layer in model.vit.layers:
        layer.mlp.activation_fn.register_forward_hook(lambda *arguments: None)
    return model


def is_anew(mlp: nn.Module, **options) -> bool:
    states = torch.zeros(1, 2, mlp.fc1.out_features, **options)
    return computes_activation_anew(states, mlp.activation_fn, mlp.hidden_dropout, mlp.fc2)


# ---------------------------------------------------------------- the derivatives


def activated(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return LinearFunction.apply(states, weight, bias, True)


@pytest.mark.parametrize("bias", [True, False])
def test_first_and_second_derivatives_of_gelu_and_matrix_are_finite_differences(bias):
    tensors = in_float64((2, 3, 4), (5, 4), (5,))
    for check in (gradcheck, gradgradcheck):
        assert check(activated, tensors if bias else [*tensors[:2], None])


@PRECISIONS
@pytest.mark.parametrize("fields", [{}, {"mlp_bias": False}, {"hidden_dropout_prob": 0.5}, {"layer_scale_init": 0.1}])
def test_training_without_the_kept_activation_changes_no_bit(bf16, fields):
    found = []
    for prepare in (lambda model: model, watched):
        model = prepare(build(**fields).train())
        torch.manual_seed(0)  # of dropout
        found.append(loss_and_gradients(model, bf16))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_frozen_halves_of_the_mlp_have_no_gradient():
    model, plain = build().train(), watched(build().train())
    for network in (model, plain):
        for name, parameter in network.named_parameters():
            parameter.requires_grad = "layers.1.mlp" in name and not name.endswith("fc2.weight")
    ours, theirs = loss_and_gradients(model, False), loss_and_gradients(plain, False)
    assert len(ours) == 4 and all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_gradients_of_each_sample_by_vmap():
    model = build(attn_implementation="eager").train()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, image, label):
        return functional_call(model, parameters, (image[None],), {"labels": label[None]}).loss

    found = vmap(grad(loss), (None, 0, 0))(parameters, images(), LABELS)
    for sample, (image, label) in enumerate(zip(images(), LABELS, strict=True)):
        for name, expected in grad(loss)(parameters, image, label).items():
            torch.testing.assert_close(found[name][sample], expected, rtol=1e-4, atol=1e-6)


def test_a_batch_of_gradients_goes_backward_at_once():
    """As torch.autograd.functional.jacobian(vectorize=True) asks for, which has no rule for `flatten` there."""
    tensors = states, weight, bias = in_float64((2, 3, 4), (5, 4), (5,))
    directions = torch.eye(30, dtype=torch.float64).view(30, 2, 3, 5)
    ours, plain = activated(*tensors), nn.functional.linear(nn.functional.gelu(states), weight, bias)
    found = torch.autograd.grad(ours, tensors, directions, is_grads_batched=True)
    expected = torch.autograd.grad(plain, tensors, directions, is_grads_batched=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@PRECISIONS
def test_states_of_another_precision_than_the_product_take_the_plain_path(bf16, library):
    """A first matrix that somebody keeps in float32, the second one under autocast or not."""
    found = []
    for prepare in (lambda model: model, watched):
        model = prepare(build().train())
        for layer in model.vit.layers:
            layer.mlp.fc1.register_forward_hook(lambda module, inputs, output: output.to(torch.float32))
        found.append(loss_and_gradients(model, bf16))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    mlp = build().train().vit.layers[0].mlp
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = [is_anew(mlp, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert found == [not bf16 and library == "oneDNN", bf16]


# ---------------------------------------------------------------- what is kept


@PRECISIONS
def test_the_activation_of_each_layer_is_not_kept_but_in_float32_by_mkl(bf16, library):
    model = build().train()
    saved = kept_bytes(watched(build().train()), bf16) - kept_bytes(model, bf16)
    batch_size, num_tokens = 3, 17
    activation = batch_size * num_tokens * model.config.intermediate_size * (2 if bf16 else 4)
    assert saved == (model.config.num_hidden_layers * activation if bf16 or library == "oneDNN" else 0)


@pytest.mark.parametrize(
    "fields",
    [{"mlp_dropout_prob": 0.1}, {"hidden_act": "gelu_new"}, {"hidden_act": "gelu_python"}, {"hidden_act": "relu"}],
    ids=str,
)
def test_dropout_and_other_activations_keep_what_they_need(fields):
    assert not is_anew(build(**fields).train().vit.layers[0].mlp)


def test_outside_of_training_nothing_is_computed_anew(library):
    mlp = build().vit.layers[0].mlp
    assert not is_anew(mlp)
    mlp.train()
    assert is_anew(mlp) is (library == "oneDNN")
    with torch.no_grad():
        assert not is_anew(mlp)
    assert not is_anew(mlp, device="meta")


# ---------------------------------------------------------------- who looks on


def test_a_hook_sees_every_step_of_the_mlp(library):
    mlp, seen = build().train().vit.layers[0].mlp, []
    for name in ("fc1", "activation_fn", "hidden_dropout", "fc2", "output_dropout"):
        module = getattr(mlp, name)
        handle = module.register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
        mlp(torch.randn(1, 2, 32))
        assert seen == [name]
        seen.clear()
        handle.remove()
    assert is_anew(mlp) is (library == "oneDNN")


def test_a_hook_of_all_modules_sees_every_step_of_the_mlp(library):
    """As torch's own FlopCounterMode registers it, which names what it counts by module."""
    mlp, seen = build().train().vit.layers[0].mlp, []
    handle = register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    mlp(torch.randn(1, 2, 32))
    handle.remove()
    assert seen == [mlp.fc1, mlp.activation_fn, mlp.hidden_dropout, mlp.fc2, mlp.output_dropout, mlp]
    assert is_anew(mlp) is (library == "oneDNN")


def test_lora_on_the_second_matrix_is_trained():
    model = build().train()
    adapted = get_peft_model(model, LoraConfig(target_modules=["fc2"], r=2, init_lora_weights=False))
    found = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(found) == 4
    loss_and_gradients(model, False)
    assert all(p.grad.abs().sum() > 0 for name, p in adapted.named_parameters() if name in found)


def test_only_a_plain_module_is_untouched():
    linear = nn.Linear(2, 2)
    assert is_untouched(linear, nn.Linear) and not is_untouched(linear, nn.Dropout)
    assert not is_untouched(Conv1D(2, 2), nn.Linear)
    nn.utils.parametrizations.weight_norm(parametrized := nn.Linear(2, 2))
    assert not is_untouched(parametrized, nn.Linear)
    linear.forward = lambda states: states  # as accelerate's hooks do it
    assert not is_untouched(linear, nn.Linear)
