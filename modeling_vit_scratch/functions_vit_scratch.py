"""What a CPU does otherwise than PyTorch would: float32 products by the faster library, attention in bf16 as products,
and an MLP that keeps less.

All give autograd's derivatives, twice too, and torch.func's grad and vmap. This file travels to the Hub beside a
checkpoint. What was measured is in benchmarks/NOTES.md.
"""

import functools
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_weight
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.activations import GELUActivation
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

# ---------------------------------------------------------------- products


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Whether autocast serves such devices: a constant, for torch 2.11's compiler cannot trace the question."""
    return torch.amp.is_autocast_available(device_type)


def in_autocast_dtype(states: torch.Tensor) -> torch.Tensor:
    """states in the precision that autocast gives a product's, where there is autocast."""
    device = states.device.type
    if has_autocast(device) and torch.is_autocast_enabled(device):
        return states.to(torch.get_autocast_dtype(device))
    return states


SMALLEST_PRODUCT = 2**21  # multiplications, below which oneDNN's start takes longer than it saves
SMALLEST_IMAGE = 20480  # numbers, up to which torch takes another library for the convolution of a single image


@functools.cache
def is_faster_by_onednn() -> bool:
    """Whether oneDNN multiplies in float32 faster than MKL, which PyTorch calls and which knows no AVX-512 of AMD's.

    With AVX2 MKL is the faster one on AMD's processors too.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        processor = platform.processor()
    has_both = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_both and "AuthenticAMD" in processor


def is_for_onednn(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies states by weight^T, (..., M) and (D, M): dense float32 on a CPU.

    Compilers, exporters and transforms have rules for PyTorch's own product alone, and so have other kinds of tensors.
    """
    return (
        not torch.compiler.is_compiling()  # first: neither can trace the rest
        and not torch.jit.is_tracing()
        and is_faster_by_onednn()
        and _is_dense_float32(states)
        and _is_dense_float32(weight)
        and states.numel() * weight.shape[0] >= SMALLEST_PRODUCT
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _is_dense_float32(tensor: torch.Tensor) -> bool:
    return is_dense(tensor) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is an array of numbers: no shard of one, nothing quantized or sparse."""
    return type(tensor) in (nn.Parameter, torch.Tensor) and tensor.layout == torch.strided


def linear_product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """states weight^T + bias, as nn.functional.linear: (..., M), (D, M) and (D,) -> (..., D)."""
    product = onednn_product if is_for_onednn(states, weight) else nn.functional.linear
    return product(states, weight, bias)


def onednn_product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same by oneDNN, where is_for_onednn allows it."""
    tensors = (states, weight) if bias is None else (states, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return LinearFunction.apply(states, weight, bias, False)
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def weight_gradient(grad_output: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """grad_output^T states, summed over all rows: (..., D) and (..., M) -> (D, M)."""
    grad_rows, rows = grad_output.reshape(-1, grad_output.shape[-1]), states.reshape(-1, states.shape[-1])
    if not is_for_convolution(grad_rows, rows):
        return grad_rows.t() @ rows
    # as the gradient of a 1 x 1 convolution, an image of one line whose pixels are the rows: oneDNN's matrix products
    # would transpose first. One pixel has nothing to dilate, but on one thread torch has only dilated ones from oneDNN
    images, grad_images = (matrix[None, None].permute(0, 3, 1, 2) for matrix in (rows, grad_rows))  # (1, M, 1, rows)
    shape = (grad_rows.shape[1], rows.shape[1], 1, 1)
    return conv2d_weight(images, shape, grad_images, dilation=(2, 1)).flatten(1)


def is_for_convolution(grad_rows: torch.Tensor, rows: torch.Tensor) -> bool:
    """Whether oneDNN's convolution gives a weight's gradient: where torch would call it."""
    mkldnn = torch.backends.mkldnn
    return (
        is_for_onednn(grad_rows.t(), rows.t())
        and rows.numel() > SMALLEST_IMAGE
        and mkldnn.conv.fp32_precision == mkldnn.matmul.fp32_precision  # nobody allows convolutions alone to round
    )


class LinearFunction(torch.autograd.Function):
    """linear_product of states, or of gelu(states) with `after_gelu`: (..., M), (D, M), (D,) or None -> (..., D).

    Its gradients are products of the same library. For the backward pass it keeps no activation, which is computed anew
    there, and nothing that no gradient needs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, after_gelu: bool):
        return linear_product(nn.functional.gelu(states) if after_gelu else states, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor):
        states, weight, _, ctx.after_gelu = inputs
        needs_states = ctx.needs_input_grad[1] or (ctx.after_gelu and ctx.needs_input_grad[0])
        ctx.save_for_backward(states if needs_states else None, weight if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple:
        states, weight = ctx.saved_tensors
        grad_states = grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(grad_output, nn.functional.gelu(states) if ctx.after_gelu else states)
        if ctx.needs_input_grad[0]:
            grad_states = linear_product(grad_output, weight.t())
            if ctx.after_gelu:
                grad_states = torch.ops.aten.gelu_backward(grad_states, states)
        return grad_states, grad_weight, grad_bias, None


def linear(states: torch.Tensor, module: nn.Linear) -> torch.Tensor:
    """module(states), (..., M) -> (..., D), by the faster library where nobody looks on."""
    is_plain = not torch.compiler.is_compiling() and is_untouched(module, nn.Linear) and not _has_any_global_hook()
    if is_plain and is_for_onednn(states, module.weight):
        return onednn_product(states, module.weight, module.bias)
    return module(states)


# ---------------------------------------------------------------- attention


def product_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, None]:
    """The same as two batched products, in the precision of its input; softmax sums in float32. No mask, no dropout.

    query, key, value (B, A, N, F) -> output (B, N, A, F).
    """
    batch_size, num_heads, num_queries, head_dim = query.shape
    with torch.autocast(query.device.type, enabled=False):  # which would turn softmax to float32
        query, key, value = (states.flatten(0, 1) for states in (query, key, value))
        scores = torch.baddbmm(query.new_zeros(1), query, key.transpose(1, 2), beta=0, alpha=scaling)  # (B*A, N, N)
        output = torch.bmm(scores.softmax(dim=-1), value)  # (B*A, N, F)
    return output.view(batch_size, num_heads, num_queries, head_dim).transpose(1, 2), None


def is_faster_as_products(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float
) -> bool:
    """Whether two products beat PyTorch's fused attention (B, A, N, F): see benchmarks/attention.py for the table."""
    is_plain = attention_mask is None and dropout == 0.0
    return is_plain and query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= 1025


def single_query_attention(
    query: torch.Tensor, states: torch.Tensor, k_proj: nn.Linear, v_proj: nn.Linear, scaling: float
) -> torch.Tensor:
    """The same of one query, (B, A, 1, F), on states (B, N, D), without a key or a value: (B, 1, A*F).

    q (W_k x + b_k) = (q W_k) x + q b_k, and sum_n p_n (W_v x_n + b_v) = W_v (sum_n p_n x_n) + b_v, as weights p sum to
    one: a product with W_k and one with W_v for each image, where keys and values need them for each token.
    """
    query = query[:, :, 0].transpose(0, 1) * scaling  # (A, B, F)
    heads = (query.shape[0], -1)
    asked = torch.bmm(query, k_proj.weight.unflatten(0, heads))  # (A, B, D)
    scores = torch.bmm(asked.transpose(0, 1), states.transpose(1, 2))  # (B, A, N)
    if k_proj.bias is not None:  # the same for all tokens, which no softmax sees: its gradient is zero, but there
        scores = scores + (query * k_proj.bias.unflatten(0, heads)[:, None]).sum(dim=2).t()[:, :, None]
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(states.dtype)
    mixed = torch.bmm(weights, states).transpose(0, 1)  # (A, B, D)
    output = torch.bmm(mixed, v_proj.weight.unflatten(0, heads).transpose(1, 2))  # (A, B, F)
    if v_proj.bias is not None:
        output = output + v_proj.bias.unflatten(0, heads)[:, None]
    return output.transpose(0, 1).flatten(1)[:, None]


def needs_no_keys(k_proj: nn.Module, k_norm: nn.Module, v_proj: nn.Module) -> bool:
    """Whether keys and values are products with a matrix and nothing else, so that single_query_attention is exact."""
    are_plain = is_untouched(k_norm, nn.Identity) and all(is_untouched(part, nn.Linear) for part in (k_proj, v_proj))
    is_array = is_whole_when_traced if torch.compiler.is_compiling() else is_dense
    return are_plain and is_array(k_proj.weight) and is_array(v_proj.weight)


def is_whole_when_traced(tensor: torch.Tensor) -> bool:
    """is_dense for compilers and exporters, where an array of numbers may be a fake one, of another type."""
    return tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


# ---------------------------------------------------------------- the MLP

HALVES = (torch.bfloat16, torch.float16)


def activated_linear(
    states: torch.Tensor, activation: nn.Module, dropout: nn.Dropout, module: nn.Linear
) -> torch.Tensor:
    """module(dropout(activation(states))), (..., M) -> (..., D); keeps no activation where that gives the same bits."""
    if not computes_activation_anew(states, activation, dropout, module):
        return linear(dropout(activation(states)), module)
    # as autocast would; inside, it would leave those kept for the backward pass in float32
    cast = (None if part is None else part.to(states.dtype) for part in (module.weight, module.bias))
    return LinearFunction.apply(states, *cast, True)


def computes_activation_anew(
    states: torch.Tensor, activation: nn.Module, dropout: nn.Dropout, module: nn.Linear
) -> bool:
    """Whether to train without keeping the activation, the widest tensor of a layer; benchmarks/NOTES.md has the price.

    On a CPU, where it was measured, but in float32 by MKL, where other libraries' networks would be faster; where a
    compiler does not choose itself what to keep; where nobody looks on; and where the states come in the precision that
    the product has.
    """
    autocast = torch.is_autocast_enabled("cpu")
    return (
        dropout.training
        and dropout.p == 0.0
        and torch.is_grad_enabled()
        and states.device.type == "cpu"
        and not torch.compiler.is_compiling()  # before the next one, which it cannot trace
        and (states.dtype in HALVES or is_faster_by_onednn())
        and states.dtype == (torch.get_autocast_dtype("cpu") if autocast else module.weight.dtype)
        and not _has_any_global_hook()
        and is_untouched(activation, GELUActivation)
        and activation.act is nn.functional.gelu
        and is_untouched(dropout, nn.Dropout)
        and is_untouched(module, nn.Linear)
        and is_dense(module.weight)
    )


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of its kind: no hook of it and no other library's forward would miss its call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)


def are_untouched(modules: Iterable[nn.Module]) -> bool:
    """Whether nobody looks on at any of them, by a hook or by a forward of another library."""
    if not torch.compiler.is_compiling() and _has_any_global_hook():
        return False
    return all(is_untouched(module, type(module)) for module in modules)
