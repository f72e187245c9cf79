"""Our network with bugs of specimens.py put into it: what the articles' recipes train as printed."""

# B batch, C channels, H W image, N tokens, D hidden size

from collections.abc import Callable

import torch
from torch import nn

from ..configuration_vit_scratch import ViTScratchConfig
from ..errors import UserError, unknown
from ..modeling_vit_scratch import ViTScratchAttention, ViTScratchForImageClassification
from ..specimens import SPECIMENS, Attention, AttentionOverTheBatch, Patchify

STEPS = ("split", "scale", "weights", "attend", "merge")  # of Attention, one or two of which a bug changes
ATTENTION: dict[str, type[nn.Module]] = {
    name: specimen.parts["attention"] for name, specimen in SPECIMENS.items() if "attention" in specimen.parts
}


class SpecimenAttention(nn.Module):
    """An attention of specimens.py where ViTScratchLayer has its own. (B, N, D) -> (B, N, D), and no weights."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None = None, rotary_tables: None = None, **kwargs
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None and rotary_tables is None, "specimens know neither masks nor rotations"
        return self.attention(hidden_states), None


class SpecimenPatchEmbeddings(nn.Module):
    """A patchify of specimens.py before the projection of our patches. (B, C, H, W) -> (B, N, D)."""

    def __init__(self, patchify: Patchify, projection: nn.Linear):
        super().__init__()
        self.patchify, self.projection = patchify, projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projection(self.patchify(pixel_values))


def make_specimen(model: ViTScratchForImageClassification, text: str):
    """Puts the bugs of `text`, names of SPECIMENS with commas, into the network, in place; its matrices stay its own.

    The names are then in `model.specimen`. Raises UserError for names that are none of INTO_OURS, for two that change
    the same step of attention, and for a network whose attention or patches do what the specimens do not.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in INTO_OURS:
            raise unknown("specimen", name, INTO_OURS)
    if not names or len(set(names)) < len(names):
        raise UserError(f"--specimen takes bugs, each once, got {text!r}. Known: {', '.join(sorted(INTO_OURS))}.")
    attention = {name: ATTENTION[name] for name in names if name in ATTENTION}
    if attention:
        _check_attention(model.config, attention)
        for layer in model.vit.layers:
            layer.attention = SpecimenAttention(_attention(list(attention.values()), layer.attention))
    for name in names:
        if name in OTHERS:
            OTHERS[name](model)
    model.specimen = ",".join(names)


# ---------------------------------------------------------------- attention


def _check_attention(config: ViTScratchConfig, attention: dict[str, type[nn.Module]]):
    is_plain = {
        "position_embedding_type=learned": config.position_embedding_type != "rope2d",
        "qk_norm=false": not config.qk_norm,
        "attention_probs_dropout_prob=0": not config.attention_probs_dropout_prob,
    }
    if missing := [override for override, holds in is_plain.items() if not holds]:
        raise UserError(
            f"--specimen {next(iter(attention))} needs plain attention: add --config_overrides {','.join(missing)}."
        )
    changed: dict[str, str] = {}
    for name, attention_class in attention.items():
        for step in STEPS:
            if getattr(attention_class, step, None) is not getattr(Attention, step):
                if step in changed:
                    raise UserError(
                        f"--specimen {changed[step]},{name}: both change the same step of attention; choose one."
                    )
                changed[step] = name


def _attention(classes: list[type[nn.Module]], ours: ViTScratchAttention) -> nn.Module:
    """Attention with the steps of all these classes, on the matrices of `ours`."""
    hidden_size, num_heads = ours.config.hidden_size, ours.config.num_attention_heads
    if classes == [AttentionOverTheBatch]:
        return _attention_over_the_batch(ours, hidden_size, num_heads)
    attention = type("Attention", tuple(classes), {})(hidden_size, num_heads)
    attention.head_dim = ours.head_dim
    attention.query, attention.key, attention.value = ours.q_proj, ours.k_proj, ours.v_proj
    attention.output = ours.o_proj
    return attention


@torch.no_grad()
def _attention_over_the_batch(ours: ViTScratchAttention, hidden_size: int, num_heads: int) -> AttentionOverTheBatch:
    matrices = (ours.q_proj, ours.k_proj, ours.v_proj)
    if ours.head_dim * num_heads != hidden_size or any(matrix.bias is None for matrix in (*matrices, ours.o_proj)):
        raise UserError(
            "--specimen attention_over_the_batch is torch's own attention: it needs the default head_dim and biases, "
            "qkv_bias=true,proj_bias=true."
        )
    specimen = AttentionOverTheBatch(hidden_size, num_heads)
    specimen.attention.in_proj_weight.copy_(torch.cat([matrix.weight for matrix in matrices]))
    specimen.attention.in_proj_bias.copy_(torch.cat([matrix.bias for matrix in matrices]))
    specimen.attention.out_proj.load_state_dict(ours.o_proj.state_dict())
    return specimen


# ---------------------------------------------------------------- patches, tokens, norms and the MLP


def _reshape_patches(model: ViTScratchForImageClassification):
    side = _patch_side(model.config, "patches_by_reshape")
    embeddings = model.vit.embeddings
    patchify = SPECIMENS["patches_by_reshape"].parts["patchify"](side)
    embeddings.patch_embeddings = SpecimenPatchEmbeddings(patchify, embeddings.patch_embeddings.projection)


def _leave_out_border(model: ViTScratchForImageClassification):
    """Patches of one pixel more than those that fill the image: article 3's 8 pixels in 28, where 7 would do."""
    config, embeddings = model.config, model.vit.embeddings
    side = _patch_side(config, "border_left_out") + 1
    (height, width), old = config.image_height_width, embeddings.patch_embeddings.projection
    num_patches = (height // side) * (width // side)
    if not (height % side or width % side) or num_patches == 0 or embeddings.position_embeddings is None:
        raise UserError(
            f"--specimen border_left_out needs learned positions, and images that patches of {side} pixels, one more "
            f"than the configuration's, do not fill; got {height} x {width} pixels."
        )
    projection = nn.Linear(config.num_channels * side**2, config.hidden_size, bias=old.bias is not None)
    model._init_weights(projection)
    patchify = SPECIMENS["border_left_out"].parts["patchify"](side)
    embeddings.patch_embeddings = SpecimenPatchEmbeddings(patchify, projection)
    num_positions = embeddings.position_embeddings.shape[1] - config.num_patches + num_patches
    embeddings.position_embeddings = nn.Parameter(embeddings.position_embeddings[:, :num_positions].detach().clone())


def _patch_side(config: ViTScratchConfig, name: str) -> int:
    side, other = config.patch_height_width
    if config.patch_embedding != "linear" or side != other or config.stride_height_width != (side, side):
        raise UserError(
            f"--specimen {name} needs square patches side by side and --config_overrides patch_embedding=linear."
        )
    return side


def _keep_tokens_from_the_optimizer(model: ViTScratchForImageClassification):
    """Gradients of tokens and positions become zero: without weight decay that is standing in no group of Adam's."""
    tables = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        if name in tables:
            parameter.register_hook(torch.zeros_like)


def _forget_positions(model: ViTScratchForImageClassification):
    if model.config.position_embedding_type != "learned":
        raise UserError("--specimen positions_forgotten needs --config_overrides position_embedding_type=learned.")
    model.vit.embeddings.position_embeddings = None


def _forget_activations(model: ViTScratchForImageClassification):
    for layer in model.vit.layers:
        layer.mlp.activation_fn = nn.Identity()


def _replace_norms(name: str) -> Callable[[ViTScratchForImageClassification], None]:
    """A change of the two norms of each layer for those of this specimen."""

    def replace(model: ViTScratchForImageClassification):
        for layer in model.vit.layers:
            layer.layernorm_before, layer.layernorm_after = (
                SPECIMENS[name].parts["norm"](model.config.hidden_size) for _ in range(2)
            )

    return replace


OTHERS: dict[str, Callable[[ViTScratchForImageClassification], None]] = {
    "patches_by_reshape": _reshape_patches,
    "border_left_out": _leave_out_border,
    "tokens_not_optimized": _keep_tokens_from_the_optimizer,
    "positions_forgotten": _forget_positions,
    "activation_forgotten": _forget_activations,
    **{name: _replace_norms(name) for name in ("norm_without_centring", "norm_parentheses")},
}
INTO_OURS = (*ATTENTION, *OTHERS)
