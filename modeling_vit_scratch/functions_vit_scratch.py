"""A step of the MLP with a backward pass of its own: autograd's derivatives, in less memory.

It can be differentiated twice, and under torch.func's grad and vmap. This file travels to the Hub beside a checkpoint.
"""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation


class ActivatedLinear(torch.autograd.Function):
    """linear(gelu(states), weight, bias): states (..., M), weight (D, M), bias (D,) or None -> (..., D).

    It keeps `states` alone for the backward pass, which computes the activation anew.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.linear(nn.functional.gelu(states), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor) -> tuple:
        states, weight = ctx.saved_tensors
        rows = grad_output.reshape(-1, weight.shape[0])
        grad_states = grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(dim=0)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ nn.functional.gelu(states).reshape(-1, weight.shape[1])
        if ctx.needs_input_grad[0]:
            grad_states = torch.ops.aten.gelu_backward(grad_output @ weight, states)
        return grad_states, grad_weight, grad_bias


def activated_linear(
    states: torch.Tensor, activation: nn.Module, dropout: nn.Dropout, linear: nn.Linear
) -> torch.Tensor:
    """linear(dropout(activation(states))), (..., M) -> (..., D), by ActivatedLinear where that gives the same bits."""
    if not computes_activation_anew(states, activation, dropout, linear):
        return linear(dropout(activation(states)))
    # as autocast would; inside, it would leave those kept for the backward pass in float32
    cast = (None if part is None else part.to(states.dtype) for part in (linear.weight, linear.bias))
    return ActivatedLinear.apply(states, *cast)


def computes_activation_anew(
    states: torch.Tensor, activation: nn.Module, dropout: nn.Dropout, linear: nn.Linear
) -> bool:
    """Whether to train without keeping the activation, the widest tensor of a layer; benchmarks/NOTES.md has the price.

    On a CPU, where it was measured; where a compiler does not choose itself what to keep; where nobody looks on; and
    where the states come in the precision that the product has.
    """
    autocast = torch.is_autocast_enabled("cpu")
    return (
        dropout.training
        and dropout.p == 0.0
        and torch.is_grad_enabled()
        and states.device.type == "cpu"
        and states.dtype == (torch.get_autocast_dtype("cpu") if autocast else linear.weight.dtype)
        and not torch.compiler.is_compiling()
        and not _has_any_global_hook()
        and is_untouched(activation, GELUActivation)
        and activation.act is nn.functional.gelu
        and is_untouched(dropout, nn.Dropout)
        and is_untouched(linear, nn.Linear)
    )


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of its kind: no hook of it and no other library's forward would miss its call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and "forward" not in vars(module) and not any(hooks)
