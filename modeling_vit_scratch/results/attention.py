"""Where a network looks: its attention weights, their rollout through the layers, and both as maps over the patches."""

# B batch, C channels, H W image, Gh Gw patch rows and columns, N tokens (prefix + Gh*Gw), A heads

from collections.abc import Sequence

import torch

from ..configuration_vit_scratch import ViTScratchConfig
from ..errors import UserError, unknown
from ..modeling_vit_scratch import ViTScratchPreTrainedModel

METHODS = ("rollout", "last", "head-mean")


@torch.no_grad()
def attention_maps(model: ViTScratchPreTrainedModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The attention weights of each layer, (B, A, N, N): row i is how much token i takes of each token; it sums to 1.

    pixel_values: (B, C, H, W), as the image processor makes them. The model computes without dropout and with eager
    attention, the only kind that keeps its weights, and is then as it was.
    """
    implementation, was_training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        return list(model(pixel_values=pixel_values, output_attentions=True).attentions)
    finally:
        model.set_attn_implementation(implementation)
        model.train(was_training)


def rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """How much of each token of the input reaches each token after the last layer: (B, N, N), rows sum to 1.

    attentions: (B, A, N, N) of each layer, first to last. Heads are averaged, half of each layer is the residual
    connection, 0.5 A + 0.5 I, and the layers are multiplied (Abnar and Zuidema, 2005.00928, section 3).
    """
    identity = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)
    flow = identity.expand(len(attentions[0]), -1, -1)  # (B, N, N)
    for attention in attentions:
        flow = (0.5 * attention.mean(dim=1) + 0.5 * identity) @ flow
    return flow


def attention_between_tokens(
    attentions: Sequence[torch.Tensor], method: str = "rollout", layer: int | None = None
) -> torch.Tensor:
    """(B, N, N) of all layers: "rollout"; or the mean over the heads of the "last" layer, or, "head-mean", of `layer`.

    layer: counted from 1. Raises UserError for another method, and for a layer that is missing, idle or not there.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if method != "head-mean" and layer is not None:
        raise UserError(f"--layer has no effect with --method {method}: it goes with --method head-mean.")
    if method == "rollout":
        return rollout(attentions)
    if method == "last":
        return attentions[-1].mean(dim=1)
    if layer is None or not 1 <= layer <= len(attentions):
        came = "none came" if layer is None else f"got {layer}"
        raise UserError(f"--method head-mean needs --layer, from 1 to {len(attentions)}, the number of layers; {came}.")
    return attentions[layer - 1].mean(dim=1)


def patch_map(weights: torch.Tensor, config: ViTScratchConfig, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """What the pooled vector takes of each patch: weights (..., N, N) -> (..., Gh, Gw).

    The rows are those of what is pooled: the class token, or the mean of the patch tokens. What goes to class and
    register tokens is left out, so that a map may sum to less than 1. grid: of the patches, where the images are not of
    the configuration's size.
    """
    prefix = config.num_prefix_tokens
    rows = weights[..., 0, :] if config.pooling == "cls" else weights[..., prefix:, :].mean(dim=-2)  # (..., N)
    return rows[..., prefix:].unflatten(-1, grid or config.patch_grid)


def queries_of(config: ViTScratchConfig) -> str:
    """In words, whose attention `patch_map` shows."""
    return "the class token" if config.pooling == "cls" else "the patch tokens in the mean, as the network pools them"
