"""The steps with a backward pass of their own give autograd's derivatives, and step aside where somebody looks on."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_vit import build, images
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from modeling_vit_scratch import functions_vit_scratch as functions
from modeling_vit_scratch.functions_vit_scratch import (
    LinearFunction,
    computes_activation_anew,
    is_for_onednn,
    is_untouched,
    linear,
    linear_product,
    weight_gradient,
)

LABELS = torch.tensor([0, 1, 2])
PRECISIONS = pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
PROCESSORS = {  # what /proc/cpuinfo says, or platform.processor() where there is none; whether it is AMD's
    "Linux, AMD": ("vendor_id\t: AuthenticAMD\n", "", True),
    "Linux, Intel": ("vendor_id\t: GenuineIntel\n", "", False),
    "Windows, AMD": (None, "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", True),
    "Windows, Intel": (None, "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel", False),
    "macOS": (None, "arm", False),
}


@pytest.fixture(params=["pytorch", "oneDNN"], autouse=True)
def library(request, monkeypatch) -> str:
    """The library of float32 products: what holds for one holds for the other, whatever processor this is."""
    if request.param == "oneDNN" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(functions, "is_faster_by_onednn", lambda: request.param == "oneDNN")
    monkeypatch.setattr(functions, "SMALLEST_PRODUCT", 1)
    return request.param


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
def test_states_of_another_precision_than_the_product_take_the_plain_path(bf16):
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
        assert [is_anew(mlp, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)] == [not bf16, bf16]


# ---------------------------------------------------------------- products


def derivatives(product, tensors: list[torch.Tensor], direction: torch.Tensor) -> list[torch.Tensor]:
    """A product's value, its first derivatives, and those of their squares' sum."""
    output = product(*tensors)
    first = torch.autograd.grad((output * direction).sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum((gradient**2).sum() for gradient in first), tensors[:2])  # a bias has none
    return [output, *first, *second]


class Recorder(TorchDispatchMode):
    """Names of the operations that are called, one after the other."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        self.names.append(operation.name())
        return operation(*arguments, **(named or {}))

    @property
    def num_products(self) -> int:
        return self.names.count("mkldnn::_linear_pointwise")


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8), (8,), (1, 1, 8), (3, 3500, 8)], ids=str)
def test_a_product_and_its_derivatives_are_those_of_float64(monkeypatch, capability, bias, shape):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    exact = in_float64(shape, (6, 8), (6,))[: 3 if bias else 2]
    rounded = [tensor.detach().float().requires_grad_() for tensor in exact]
    direction = torch.linspace(-1, 1, 6, dtype=torch.float64)
    found = derivatives(linear_product, rounded, direction.float())
    for one, other in zip(found, derivatives(nn.functional.linear, exact, direction), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_a_gradient_that_is_one_number_for_all(library):
    """As a sum has it: a tensor without strides."""
    module, states = nn.Linear(8, 6), torch.randn(2, 3, 8, requires_grad=True)
    with Recorder() as recorder:
        linear(states, module).sum().backward()
    assert recorder.num_products == (2 if library == "oneDNN" else 0)
    torch.testing.assert_close(states.grad, module.weight.sum(dim=0).expand(2, 3, 8))
    torch.testing.assert_close(module.weight.grad, states.detach().sum((0, 1)).expand(6, 8))
    assert module.bias.grad.tolist() == [6.0] * 6


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [96, 20])  # more numbers than SMALLEST_IMAGE, and fewer
def test_the_gradient_of_a_weight_sums_over_all_rows(monkeypatch, library, capability, threads, width):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    grad_output, states = (tensor.detach().float() for tensor in in_float64((7, 33, 12), (7, 33, width)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Recorder() as recorder:
            found = weight_gradient(grad_output, states)
    finally:
        torch.set_num_threads(before)
    is_convolution = "aten::convolution_backward" in recorder.names
    assert is_convolution is (library == "oneDNN" and capability == "AVX512" and width == 96)
    expected = torch.einsum("bnd,bnm->dm", grad_output.double(), states.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_has_the_gradient_of_such_a_convolution_from_onednn(threads):
    """The condition is torch's own: in its older versions no binding tells what it chose."""
    rows, before = functions.SMALLEST_IMAGE // 8 + 1, torch.get_num_threads()
    images, kernel = torch.zeros(1, rows, 1, 8).permute(0, 3, 1, 2).transpose(2, 3), torch.zeros(6, 8, 1, 1)
    torch.set_num_threads(threads)
    try:
        backend = torch._C._select_conv_backend(images, kernel, None, [1, 1], [0, 0], [2, 1], False, [0, 0], 1)
    finally:
        torch.set_num_threads(before)
    assert backend == torch._C._ConvBackend.Mkldnn


def test_convolutions_that_may_round_are_not_asked(library, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    rows = [torch.zeros(functions.SMALLEST_IMAGE, width) for width in (6, 8)]
    assert functions.is_for_convolution(*rows) is (library == "oneDNN")
    settings, before = torch.backends.mkldnn.conv, torch.backends.mkldnn.conv.fp32_precision
    settings.fp32_precision = "bf16"  # has no attribute that monkeypatch could delete
    try:
        assert not functions.is_for_convolution(*rows)
    finally:
        settings.fp32_precision = before


def test_the_networks_products_are_those_of_the_library(library):
    model = build()
    with Recorder() as recorder, torch.no_grad():
        model(images())
    matrices = 6 * model.config.num_hidden_layers
    assert recorder.num_products == (matrices if library == "oneDNN" else 0)
    loss = model.train()(images(), labels=LABELS).loss
    with Recorder() as recorder:
        loss.backward()
    assert recorder.num_products == (matrices if library == "oneDNN" else 0)


@pytest.mark.parametrize("library", ["oneDNN"], indirect=True)
def test_the_network_is_the_same_by_either_library(library, monkeypatch):
    found = []
    for is_onednn in (True, False):
        monkeypatch.setattr(functions, "is_faster_by_onednn", lambda is_onednn=is_onednn: is_onednn)
        model = build().train()
        gradients = loss_and_gradients(model, False)
        with torch.no_grad():
            found.append([*gradients, model.eval()(images()).logits])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_product_of_no_rows_is_empty():
    assert linear(torch.zeros(0, 3, 4), nn.Linear(4, 5)).shape == (0, 3, 5)


@pytest.mark.parametrize("library", ["pytorch"], indirect=True)
@pytest.mark.parametrize(("lines", "name", "is_faster"), PROCESSORS.values(), ids=PROCESSORS)
def test_onednn_multiplies_on_processors_whose_avx512_mkl_does_not_use(monkeypatch, library, lines, name, is_faster):
    monkeypatch.undo()

    def read_text(path):
        if lines is None:
            raise FileNotFoundError(path)
        return lines

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(functions.platform, "processor", lambda: name)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    asked = functions.is_faster_by_onednn.__wrapped__
    assert asked() is (is_faster and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert asked() is False


class Quantized(torch.Tensor):
    """Another kind of tensor, as torchao's are, which knows how to be multiplied by and nothing else."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if function is nn.functional.linear:
            states, weight, bias = arguments
            return nn.functional.linear(states, weight.as_subclass(torch.Tensor), bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(named or {}))


def test_onednn_multiplies_dense_float32_on_a_cpu_and_nothing_else(library, monkeypatch):
    states, weight, is_onednn = torch.ones(2, 4), torch.ones(8, 4), library == "oneDNN"
    assert is_for_onednn(states, weight) is is_for_onednn(states, torch.ones(4, 8).t()) is is_onednn
    others = [
        (states[:0], weight), (states, torch.ones(8, 5)[:, :4]), (states, weight.as_subclass(Quantized)),
    ]  # fmt: skip
    for change in (torch.Tensor.double, torch.Tensor.bfloat16, lambda tensor: tensor.to("meta")):
        others += [(change(states), weight), (states, change(weight)), (change(states), change(weight))]
    assert not any(is_for_onednn(*pair) for pair in [*others, (states, weight.to_sparse())])
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_for_onednn(states, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_for_onednn(states, weight)
    monkeypatch.setattr(functions, "SMALLEST_PRODUCT", 64)
    assert [is_for_onednn(states, weight[:rows]) for rows in (7, 8)] == [False, is_onednn]


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_a_weight_of_another_kind_is_multiplied_as_it_wants(name):
    found = []
    for kind in (torch.Tensor, Quantized):
        mlp = build().train().vit.layers[0].mlp
        module = getattr(mlp, name)
        weight = module.weight.detach()
        del module.weight
        module.weight = weight.as_subclass(kind)
        assert type(module.weight) is kind
        assert is_anew(mlp) is (module is not mlp.fc2 or kind is torch.Tensor)
        found.append(mlp(torch.linspace(-1, 1, 64).view(1, 2, 32)).detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_frozen_matrix_keeps_no_input_and_the_first_trained_one_no_weight():
    for frozen, expected in (("weight", {(5, 4)}), ("states", {(2, 3, 4)}), ("neither", {(5, 4), (2, 3, 4)})):
        module, kept = nn.Linear(4, 5), []
        module.weight.requires_grad = frozen != "weight"
        states = torch.randn(2, 3, 4, requires_grad=frozen != "states")
        with saved_tensors_hooks(kept.append, lambda nothing: nothing):
            LinearFunction.apply(states, module.weight, module.bias, False)
        assert {tuple(tensor.shape) for tensor in kept} == expected


def test_transforms_and_exporters_find_products_that_they_know():
    module, states = nn.Linear(4, 5).requires_grad_(False), torch.randn(3, 4)  # a trace takes no other constants
    expected = module(states)
    functions_of = {name: str(torch.jit.trace(call, states, check_trace=False).graph) for name, call in (
        ("ours", lambda states: linear(states, module)), ("torch's", module.forward))}  # fmt: skip
    assert all("aten::linear" in graph and "mkldnn" not in graph for graph in functions_of.values())
    _, tangent = torch.func.jvp(lambda states: linear(states, module), (states,), (torch.ones_like(states),))
    torch.testing.assert_close(tangent, module.weight.sum(dim=1).expand(3, 5))
    with torch.autograd.forward_ad.dual_level():
        dual = linear(torch.autograd.forward_ad.make_dual(states, torch.ones_like(states)), module)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    each = vmap(lambda row: linear(row, module))(states)
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.functional.jacobian(lambda states: linear(states, module), states, vectorize=True)
    torch.testing.assert_close(found[1, :, 1], module.weight.detach(), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what is kept


@PRECISIONS
def test_the_activation_of_each_layer_is_not_kept(bf16):
    model = build().train()
    saved = kept_bytes(watched(build().train()), bf16) - kept_bytes(model, bf16)
    batch_size, num_tokens = 3, 17
    activation = batch_size * num_tokens * model.config.intermediate_size * (2 if bf16 else 4)
    assert saved == model.config.num_hidden_layers * activation


@pytest.mark.parametrize(
    "fields",
    [{"mlp_dropout_prob": 0.1}, {"hidden_act": "gelu_new"}, {"hidden_act": "gelu_python"}, {"hidden_act": "relu"}],
    ids=str,
)
def test_dropout_and_other_activations_keep_what_they_need(fields):
    assert not is_anew(build(**fields).train().vit.layers[0].mlp)


def test_outside_of_training_nothing_is_computed_anew():
    mlp = build().vit.layers[0].mlp
    assert not is_anew(mlp)
    mlp.train()
    assert is_anew(mlp)
    with torch.no_grad():
        assert not is_anew(mlp)
    assert not is_anew(mlp, device="meta")


# ---------------------------------------------------------------- who looks on


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_hook_sees_every_matrix_of_attention(name):
    attention, seen = build().vit.layers[0].attention, []
    handle = getattr(attention, name).register_forward_hook(lambda module, inputs, output: seen.append(name))
    attention(torch.randn(1, 2, 32))
    assert seen == [name]
    handle.remove()
    attention(torch.randn(1, 2, 32))
    assert seen == [name]


def test_a_hook_sees_every_step_of_the_mlp():
    mlp, seen = build().train().vit.layers[0].mlp, []
    for name in ("fc1", "activation_fn", "hidden_dropout", "fc2", "output_dropout"):
        module = getattr(mlp, name)
        handle = module.register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
        mlp(torch.randn(1, 2, 32))
        assert seen == [name]
        seen.clear()
        handle.remove()
    assert is_anew(mlp)


def test_a_hook_of_all_modules_sees_every_step_of_the_mlp():
    """As torch's own FlopCounterMode registers it, which names what it counts by module."""
    mlp, seen = build().train().vit.layers[0].mlp, []
    handle = register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    mlp(torch.randn(1, 2, 32))
    handle.remove()
    assert seen == [mlp.fc1, mlp.activation_fn, mlp.hidden_dropout, mlp.fc2, mlp.output_dropout, mlp]
    assert is_anew(mlp)


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
