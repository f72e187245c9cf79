"""Products by either library are the same, and PyTorch's own is left to whoever has rules for it alone."""

from pathlib import Path

import pytest
import torch
from small_vit import build, images, threads
from test_functions import LABELS, in_float64, is_anew, loss_and_gradients
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_vit_scratch import functions_vit_scratch as functions
from modeling_vit_scratch.functions_vit_scratch import (
    LinearFunction,
    is_for_onednn,
    linear,
    linear_product,
    weight_gradient,
)

pytestmark = pytest.mark.usefixtures("library")
PROCESSORS = {  # what /proc/cpuinfo says, or platform.processor() where there is none; torch's word for its vectors
    "Linux, AMD": ("vendor_id\t: AuthenticAMD\n", "", "AVX512", True),
    "Linux, AMD without AVX-512": ("vendor_id\t: AuthenticAMD\n", "", "AVX2", False),
    "Linux, Intel": ("vendor_id\t: GenuineIntel\n", "", "AVX512", False),
    "Windows, AMD": (None, "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "AVX512", True),
    "Windows, AMD without AVX-512": (None, "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", "AVX2", False),
    "Windows, Intel": (None, "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel", "AVX512", False),
    "macOS": (None, "arm", "DEFAULT", False),
}


@pytest.fixture(params=[1, 2])
def num_threads(request):
    with threads(request.param):
        yield request.param


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8), (8,), (1, 1, 8), (3, 3500, 8)], ids=str)
def test_a_product_and_its_derivatives_are_those_of_float64(bias, shape):
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


@pytest.mark.parametrize("width", [96, 20])  # more numbers than SMALLEST_IMAGE, and fewer
def test_the_gradient_of_a_weight_sums_over_all_rows(library, num_threads, width):
    grad_output, states = (tensor.detach().float() for tensor in in_float64((7, 33, 12), (7, 33, width)))
    with Recorder() as recorder:
        found = weight_gradient(grad_output, states)
    is_convolution = "aten::convolution_backward" in recorder.names
    assert is_convolution is (library == "oneDNN" and width == 96)
    expected = torch.einsum("bnd,bnm->dm", grad_output.double(), states.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("library", ["oneDNN"], indirect=True)
def test_torch_has_the_gradient_of_such_a_convolution_from_onednn(library, num_threads):
    """SMALLEST_IMAGE and the dilation stand for torch's own conditions."""
    images, kernel = (
        torch.zeros(1, 1, functions.SMALLEST_IMAGE // 8 + 1, 8).permute(0, 3, 1, 2),
        torch.zeros(6, 8, 1, 1),
    )
    backend = torch._C._select_conv_backend(images, kernel, None, [1, 1], [0, 0], [2, 1], False, [0, 0], 1)
    assert backend == torch._C._ConvBackend.Mkldnn


def test_convolutions_that_may_round_are_not_asked(library):
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
    matrices = 6 * model.config.num_hidden_layers - 2  # the last layer has neither keys nor values
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
@pytest.mark.parametrize(("lines", "name", "vectors", "is_faster"), PROCESSORS.values(), ids=PROCESSORS)
def test_onednn_multiplies_on_processors_whose_avx512_mkl_does_not_use(
    monkeypatch, library, lines, name, vectors, is_faster
):
    monkeypatch.undo()

    def read_text(path):
        if lines is None:
            raise FileNotFoundError(path)
        return lines

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(functions.platform, "processor", lambda: name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
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
def test_a_weight_of_another_kind_is_multiplied_as_it_wants(name, library):
    found = []
    for kind in (torch.Tensor, Quantized):
        mlp = build().train().vit.layers[0].mlp
        module = getattr(mlp, name)
        weight = module.weight.detach()
        del module.weight
        module.weight = weight.as_subclass(kind)
        assert type(module.weight) is kind
        assert is_anew(mlp) is (library == "oneDNN" and (module is not mlp.fc2 or kind is torch.Tensor))
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
    for call in (lambda states: linear(states, module), module.forward):
        graph = str(torch.jit.trace(call, states, check_trace=False).graph)
        assert "aten::linear" in graph and "mkldnn" not in graph
    _, tangent = torch.func.jvp(lambda states: linear(states, module), (states,), (torch.ones_like(states),))
    torch.testing.assert_close(tangent, module.weight.sum(dim=1).expand(3, 5))
    with torch.autograd.forward_ad.dual_level():
        dual = linear(torch.autograd.forward_ad.make_dual(states, torch.ones_like(states)), module)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    each = vmap(lambda row: linear(row, module))(states)
    torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.functional.jacobian(lambda states: linear(states, module), states, vectorize=True)
    torch.testing.assert_close(found[1, :, 1], module.weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_hook_sees_every_matrix_of_attention(name):
    attention, seen = build().vit.layers[0].attention, []
    handle = getattr(attention, name).register_forward_hook(lambda module, inputs, output: seen.append(name))
    attention(torch.randn(1, 2, 32))
    assert seen == [name]
    handle.remove()
    attention(torch.randn(1, 2, 32))
    assert seen == [name]
