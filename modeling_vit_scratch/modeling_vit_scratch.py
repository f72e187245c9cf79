"""The Vision Transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2010.11929), from equation 1 to 4.

    z_0  = [x_class; x_p^1 E; ...; x_p^N E] + E_pos      (1)  ViTScratchEmbeddings
    z'_l = MSA(LN(z_{l-1})) + z_{l-1}                     (2)  ViTScratchAttention in ViTScratchLayer
    z_l  = MLP(LN(z'_l)) + z'_l                           (3)  ViTScratchMLP in ViTScratchLayer
    y    = LN(z_L^0)                                      (4)  ViTScratchModel, then the classifier

Read from top to bottom. Parameter names are those of transformers' ViT. This file travels to the Hub beside a
checkpoint: it imports torch, transformers and two files like it, nothing else.
"""

# B batch, C channels, H W image, Ph Pw patch, Gh Gw patch rows and columns, N tokens (prefix + Gh*Gw),
# D hidden size, A heads, F width of a head, M width of the MLP, K labels

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_vit_scratch import ViTScratchConfig
from .functions_vit_scratch import (
    activated_linear,
    are_untouched,
    in_autocast_dtype,
    is_faster_as_products,
    linear,
    needs_no_keys,
    product_attention_forward,
    single_query_attention,
)

# ---------------------------------------------------------------- equation 1: patches, tokens, positions


class ViTScratchPatchEmbeddings(nn.Module):
    """Cuts an image into patches and projects each to a token: x_p E of equation 1.

    pixel_values (B, C, H, W) -> (B, Gh*Gw, D), patches in reading order. A convolution whose stride is the patch and a
    matrix on flattened patches are the same map: Conv2d weight (D, C, Ph, Pw) reshaped to (D, C*Ph*Pw) is the Linear's.
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_height_width
        self.stride = config.stride_height_width
        if config.patch_embedding == "conv":
            self.projection = nn.Conv2d(
                config.num_channels, config.hidden_size, self.patch_size, self.stride, bias=config.patch_bias
            )
        else:
            patch_dim = config.num_channels * self.patch_size[0] * self.patch_size[1]
            self.projection = nn.Linear(patch_dim, config.hidden_size, bias=config.patch_bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if isinstance(self.projection, nn.Conv2d):
            # a token's channels lie together in memory: the sums of the residual stream keep the layout it starts with
            return self.projection(pixel_values).flatten(2).transpose(1, 2).contiguous()  # (B, Gh*Gw, D)
        patches = nn.functional.unfold(pixel_values, self.patch_size, stride=self.stride)  # (B, C*Ph*Pw, Gh*Gw)
        return self.projection(patches.transpose(1, 2))  # (B, Gh*Gw, D)


def grid_coordinates(
    grid: tuple[int, int], trained_grid: tuple[int, int], device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each patch, in reading order, as two float32 vectors (Gh*Gw,).

    They are measured in patches of the grid the network was trained at, so that another image size covers the same
    range; at the trained size they are 0, 1, 2, ... exactly.
    """
    axes = []
    for length, trained in zip(grid, trained_grid, strict=True):
        centres = torch.arange(length, dtype=torch.float32, device=device) + 0.5
        axes.append(centres * (trained / length) - 0.5)
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return rows.flatten(), columns.flatten()


def sincos2d_positions(
    grid: tuple[int, int],
    hidden_size: int,
    trained_grid: tuple[int, int] | None = None,
    device: torch.device | None = None,
    temperature: float = 10_000.0,
) -> torch.Tensor:
    """The fixed 2-D sine-cosine table (1, Gh*Gw, D), float32, of 2205.01580 (big_vision's posemb_sincos_2d).

    D is four equal parts: sine and cosine of the column, then of the row.
    """
    rows, columns = grid_coordinates(grid, trained_grid or grid, device)
    quarter = hidden_size // 4
    frequencies = temperature ** -(torch.arange(quarter, dtype=torch.float32, device=device) / max(quarter - 1, 1))
    column_angles, row_angles = columns[:, None] * frequencies, rows[:, None] * frequencies  # (Gh*Gw, D/4)
    parts = (column_angles.sin(), column_angles.cos(), row_angles.sin(), row_angles.cos())
    return torch.cat(parts, dim=1)[None]


def rope2d_tables(
    config: ViTScratchConfig, grid: tuple[int, int], device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (N, F), float32, of axial rotary positions (2403.13298, section 3.2).

    Half of the channel pairs turn with the row, half with the column; prefix tokens do not turn.
    """
    rows, columns = grid_coordinates(grid, config.position_grid, device)
    quarter = config.attention_head_dim // 4
    frequencies = config.rope_theta ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    angles = torch.cat((rows[:, None] * frequencies, columns[:, None] * frequencies), dim=1)  # (Gh*Gw, F/2)
    angles = nn.functional.pad(angles, (0, 0, config.num_prefix_tokens, 0))  # (N, F/2)
    angles = torch.cat((angles, angles), dim=1)  # (N, F)
    return angles.cos(), angles.sin()


def interpolate_position_embeddings(
    position_embeddings: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], antialias: bool = False
) -> torch.Tensor:
    """Resamples learned positions (1, prefix + Gh*Gw, D) to another grid; prefix positions stay as they are.

    The same object comes back where the grids are equal. Bicubic as in transformers; with `antialias=True`, as in timm.
    2-D interpolation: 2010.11929, section 3.2. Raises ValueError if the tokens do not fill `old_grid`.
    """
    if old_grid == new_grid:
        return position_embeddings
    num_prefix = position_embeddings.shape[1] - old_grid[0] * old_grid[1]
    if num_prefix < 0:
        raise ValueError(
            f"{position_embeddings.shape[1]} positions do not fill a grid of {old_grid[0]} x {old_grid[1]} patches."
        )
    prefix, patches = position_embeddings[:, :num_prefix], position_embeddings[:, num_prefix:]
    patches = patches.unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, D, Gh, Gw)
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    resampled = nn.functional.interpolate(patches, new_grid, mode="bicubic", antialias=antialias)
    resampled = resampled.flatten(2).transpose(1, 2).to(prefix.dtype)  # (1, Gh*Gw, D)
    return torch.cat((prefix, resampled), dim=1)


class ViTScratchEmbeddings(nn.Module):
    """Equation 1: patch tokens, with class and register tokens before them, plus positions.

    pixel_values (B, C, H, W) -> (B, N, D). Positions are added here when they are learned or sincos2d; rotary
    ones act inside attention.
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.config = config
        hidden_size = config.hidden_size
        self.patch_embeddings = ViTScratchPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if config.use_cls_token else None
        registers = config.num_register_tokens
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, hidden_size)) if registers else None
        self.position_embeddings = None
        if config.position_embedding_type == "learned":
            num_positions = config.num_patches + (config.num_prefix_tokens if config.prefix_positions else 0)
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, hidden_size))
        self.layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps) if config.embedding_norm else None
        rate = config.embedding_dropout_prob
        self.dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> torch.Tensor:
        batch_size, num_channels, height, width = pixel_values.shape
        if num_channels != self.config.num_channels:
            raise ValueError(
                f"pixel_values have {num_channels} channels, the configuration has num_channels="
                f"{self.config.num_channels}; convert the images, or build the network for {num_channels}."
            )
        if not interpolate_pos_encoding and (height, width) != self.config.image_height_width:
            expected = " x ".join(map(str, self.config.image_height_width))
            raise ValueError(
                f"pixel_values are {height} x {width}, the network was built for {expected}; "
                "resize them, or pass interpolate_pos_encoding=True."
            )
        grid = self.config.patch_grid_of(height, width)
        embeddings = self.patch_embeddings(pixel_values)  # (B, Gh*Gw, D)

        positions = None
        if self.config.position_embedding_type == "sincos2d":
            trained_grid, device = self.config.position_grid, embeddings.device
            positions = sincos2d_positions(grid, self.config.hidden_size, trained_grid, device).to(embeddings.dtype)
        elif self.position_embeddings is not None:
            positions = interpolate_position_embeddings(self.position_embeddings, self.config.patch_grid, grid)
        on_patches_only = positions is not None and positions.shape[1] == embeddings.shape[1]
        if on_patches_only:
            embeddings = embeddings + positions
        prefix = [tokens for tokens in (self.cls_token, self.register_tokens) if tokens is not None]
        if prefix:
            prefix = [tokens.expand(batch_size, -1, -1).to(embeddings.dtype) for tokens in prefix]
            embeddings = torch.cat((*prefix, embeddings), dim=1)  # (B, N, D)
        if positions is not None and not on_patches_only:
            embeddings = embeddings + positions
        if self.layernorm is not None:
            embeddings = self.layernorm(embeddings)
        return self.dropout(embeddings)


def num_kept_patches(num_patches: int, patch_drop_rate: float) -> int:
    """How many patches of an image stay, at least one."""
    return max(1, int(num_patches * (1 - patch_drop_rate)))


class ViTScratchPatchDropout(nn.Module):
    """PatchDropout (2208.07220): leaves patches out, others for each image, when training; prefix tokens stay.

    (B, prefix + Gh*Gw, D), noise (B, Gh*Gw) or None to draw it -> (B, N, D), patches in another order, and their
    indices (B, N), or None where all stay. Raises ValueError for noise of another shape.
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.rate = config.patch_drop_rate
        self.num_prefix_tokens = config.num_prefix_tokens

    def forward(
        self, embeddings: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.training or self.rate == 0.0:
            return embeddings, None
        batch_size, num_tokens, width = embeddings.shape
        num_patches, device = num_tokens - self.num_prefix_tokens, embeddings.device
        if noise is None:
            noise = torch.randn(batch_size, num_patches, device=device)
        elif noise.shape != (batch_size, num_patches):
            raise ValueError(f"noise must be of shape {(batch_size, num_patches)}, got {tuple(noise.shape)}.")
        kept = noise.argsort(dim=1)[:, : num_kept_patches(num_patches, self.rate)]
        prefix = torch.arange(self.num_prefix_tokens, device=device).expand(batch_size, -1)
        kept = torch.cat((prefix, kept + self.num_prefix_tokens), dim=1)  # (B, N)
        return embeddings.gather(1, kept[:, :, None].expand(-1, -1, width)), kept

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


# ---------------------------------------------------------------- equation 2: multi-head self-attention


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T / sqrt(F)) v: equation 7 of the paper's appendix A, with the weights returned.

    query, key, value (B, A, N, F) -> output (B, N, A, F) and weights (B, A, N, N).
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, A, N, N)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights  # (B, N, A, F)


def rotate(states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns each pair (i, i + F/2) of the channels of (B, A, N, F) by its token's angle; tables: rope2d_tables."""
    cos, sin = (table.to(states.dtype) for table in tables)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class ViTScratchAttention(nn.Module):
    """MSA of equation 2. hidden_states (B, N, D) -> (B, N, D) and the weights (B, A, N, N), or None but for "eager".

    With num_queries, the first tokens alone ask, all others only answer: (B, num_queries, D).
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.attention_head_dim
        self.scaling = self.head_dim**-0.5  # of the head's width, not of the sequence's length
        self.is_causal = False
        self.attention_dropout = config.attention_probs_dropout_prob
        width = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.proj_bias)
        self.o_proj.ends_branch = True  # for zero_init_residual

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        num_queries: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_states = in_autocast_dtype(hidden_states)  # one cast, where the three products would each have their own
        asking, heads = hidden_states[:, :num_queries], (-1, self.head_dim)
        query = self.q_norm(linear(asking, self.q_proj).unflatten(2, heads)).transpose(1, 2)  # (B, A, N, F)
        dropout, implementation = self.attention_dropout if self.training else 0.0, self.config._attn_implementation
        is_plain = implementation == "sdpa" and attention_mask is None and rotary_tables is None and dropout == 0.0
        if num_queries == 1 and is_plain and needs_no_keys(self.k_proj, self.k_norm, self.v_proj):
            output = single_query_attention(query, hidden_states, self.k_proj, self.v_proj, self.scaling)
            return linear(output, self.o_proj), None
        key = self.k_norm(linear(hidden_states, self.k_proj).unflatten(2, heads)).transpose(1, 2)  # (B, A, N, F)
        value = linear(hidden_states, self.v_proj).unflatten(2, heads).transpose(1, 2)  # (B, A, N, F)
        if rotary_tables is not None:
            query = rotate(query, tuple(table[..., :num_queries, :] for table in rotary_tables))
            key = rotate(key, rotary_tables)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if implementation == "sdpa" and is_faster_as_products(query, key, attention_mask, dropout):
            attention = product_attention_forward
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return linear(output.flatten(2), self.o_proj), weights


# ---------------------------------------------------------------- equation 3: the MLP


class ViTScratchMLP(nn.Module):
    """MLP of equation 3: two matrices with a GELU between. (B, N, D) -> (B, N, M) -> (B, N, D)."""

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.fc2.ends_branch = True  # for zero_init_residual
        rate = config.mlp_dropout_prob
        self.hidden_dropout = nn.Dropout(rate or 0.0)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob if rate is None else rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = linear(hidden_states, self.fc1)  # (B, N, M)
        # fc2(hidden_dropout(activation_fn(hidden_states))), (B, N, D)
        hidden_states = activated_linear(hidden_states, self.activation_fn, self.hidden_dropout, self.fc2)
        return self.output_dropout(hidden_states)


# ---------------------------------------------------------------- equations 2 and 3: one layer


class ViTScratchLayerScale(nn.Module):
    """Multiplies a branch by a learned vector that starts small (2103.17239). (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ViTScratchConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(config.layer_scale_init * torch.ones(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class ViTScratchDropPath(nn.Module):
    """Stochastic depth (1603.09382): leaves a branch out for whole samples, when training. (B, N, D) -> same."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return hidden_states
        kept = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) >= self.rate
        return hidden_states * (kept / (1 - self.rate)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class ViTScratchLayer(GradientCheckpointingLayer):
    """One encoder layer, equations 2 and 3. (B, N, D) -> (B, N, D). With pre_norm=False, the layer of 1706.03762.

    With num_queries, the first tokens alone go on, all are attended to: (B, N, D) -> (B, num_queries, D).
    """

    def __init__(self, config: ViTScratchConfig, layer_index: int):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ViTScratchAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTScratchMLP(config)
        scaled = config.layer_scale_init is not None
        self.layer_scale1 = ViTScratchLayerScale(config) if scaled else nn.Identity()
        self.layer_scale2 = ViTScratchLayerScale(config) if scaled else nn.Identity()
        # plain Python numbers: models are built on the meta device, where a tensor has no value to read
        self.drop_path = ViTScratchDropPath(config.drop_path_rate * layer_index / max(config.num_hidden_layers - 1, 1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended = self.layernorm_before(hidden_states) if self.pre_norm else hidden_states
        attended, _ = self.attention(attended, attention_mask, rotary_tables, **kwargs)
        hidden_states = hidden_states[:, : kwargs.get("num_queries")]
        hidden_states = hidden_states + self.drop_path(self.layer_scale1(self.dropout(attended)))  # equation 2
        if not self.pre_norm:
            hidden_states = self.layernorm_before(hidden_states)
        transformed = self.mlp(self.layernorm_after(hidden_states) if self.pre_norm else hidden_states)
        hidden_states = hidden_states + self.drop_path(self.layer_scale2(transformed))  # equation 3
        return hidden_states if self.pre_norm else self.layernorm_after(hidden_states)


# ---------------------------------------------------------------- the whole encoder, and equation 4


class ViTScratchPreTrainedModel(PreTrainedModel):
    """What every model of this file shares: loading, saving and initialisation of weights."""

    config: ViTScratchConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTScratchEmbeddings", "ViTScratchLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ViTScratchLayer, "attentions": ViTScratchAttention}
    _input_embed_layer = "patch_embeddings"
    # The installed package's reader of other libraries' checkpoints: (class, name, arguments) -> (name, arguments).
    checkpoint_translator: Callable | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | None, *model_args, **kwargs):
        """As transformers', also of other libraries' checkpoints where the package is installed.

        Raises ValueError where a weight outside the classifier would be random, unless output_loading_info tells it.
        """
        source, wants_loading_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if cls.checkpoint_translator is not None:
            source, kwargs = cls.checkpoint_translator(cls, source, kwargs)
        model, info = super().from_pretrained(source, *model_args, output_loading_info=True, **kwargs)
        drawn = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
        drawn = sorted(name for name in drawn if not name.startswith("classifier"))
        if source is not None and kwargs.get("state_dict") is None and drawn and not wants_loading_info:
            raise ValueError(
                f"{source} does not fill the network: {len(drawn)} weights are missing or of another shape "
                f"({', '.join(drawn[:3])}) and would be random. Another image_size needs the package installed."
            )
        return (model, info) if wants_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """| parameter | start |
        |---|---|
        | matrices, patch kernel | `weight_init`: (truncated) normal of `initializer_range`, Xavier, or PyTorch's |
        | biases | zero ("torch": PyTorch's uniform) |
        | norms | one and zero |
        | class and register tokens, positions | `token_init`, `position_init` |
        | LayerScale | `layer_scale_init` |
        | attention output, second MLP matrix | zero, with their biases, with `zero_init_residual` |
        """
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            self._init_matrix(module)
        elif isinstance(module, ViTScratchEmbeddings):
            for tokens in (module.cls_token, module.register_tokens):
                self._init_table(tokens, self.config.token_init)
            self._init_table(module.position_embeddings, self.config.position_init)
        elif isinstance(module, ViTScratchLayerScale):
            init.constant_(module.lambda1, self.config.layer_scale_init)

    def _init_matrix(self, module: nn.Linear | nn.Conv2d):
        if self.config.zero_init_residual and getattr(module, "ends_branch", False):
            # not at the layer: transformers asks no third-party module without parameters of its own (5.17 to 5.23)
            init.zeros_(module.weight)
        elif self.config.weight_init == "trunc_normal":
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
        elif self.config.weight_init == "xavier_uniform":
            # the patch kernel as the matrix that it is: torch would count each pixel of a patch as an output
            bound = (6 / (module.weight[0].numel() + module.weight.shape[0])) ** 0.5
            init.uniform_(module.weight, -bound, bound)
        elif self.config.weight_init == "torch":
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)

    def _init_table(self, table: torch.Tensor | None, how: str | float):
        if table is None:
            return
        if isinstance(how, (int, float)):
            init.constant_(table, how)
        elif how == "trunc_normal":
            init.trunc_normal_(table, std=self.config.initializer_range)
        elif how == "normal":
            init.normal_(table)
        elif how == "uniform":
            init.uniform_(table)
        elif how == "zeros":
            init.zeros_(table)
        elif how == "sincos2d":
            patches = sincos2d_positions(self.config.patch_grid, self.config.hidden_size, device=table.device)
            prefix = table.shape[1] - patches.shape[1]
            init.copy_(table, nn.functional.pad(patches, (0, 0, prefix, 0)).to(table.dtype))

    def no_weight_decay(self) -> set[str]:
        """Names of the tables that no optimizer should decay: class token, register tokens and positions."""
        tables = {"cls_token", "register_tokens", "position_embeddings"}
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in tables}


class ViTScratchModel(ViTScratchPreTrainedModel):
    """The encoder alone: pixel_values (B, C, H, W) -> last_hidden_state (B, N, D) and pooler_output (B, D).

    In training with patch_drop_rate, N are the tokens that stay, the patches among them in another order.
    """

    def __init__(self, config: ViTScratchConfig):
        super().__init__(config)
        self.embeddings = ViTScratchEmbeddings(config)
        self.patch_dropout = ViTScratchPatchDropout(config)
        self.layers = nn.ModuleList(ViTScratchLayer(config, index) for index in range(config.num_hidden_layers))
        has_norm = config.final_norm != "none"
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes images.

        pixel_values: (B, C, H, W), normalised as the image processor does. interpolate_pos_encoding: True admits
        another image size than the configuration's. attention_mask: (B, N) of all tokens, 1 for those to attend to;
        it hides tokens from each other, not from mean pooling. noise: (B, patches), those with the least of it stay
        in training with patch_drop_rate, as in ViTMAE; else it is drawn. pooled_only: last_hidden_state may be None, so
        that the last layer computes what the pooled vector needs. Raises ValueError for a shape that cannot be.
        """
        if pixel_values is None or pixel_values.ndim != 4:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must be (batch, channels, height, width), got {shape}.")
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states, kept = self.patch_dropout(self.embeddings(pixel_values, interpolate_pos_encoding), noise)

        rotary_tables = None
        if self.config.position_embedding_type == "rope2d":
            grid = self.config.patch_grid_of(*pixel_values.shape[-2:])
            rotary_tables = rope2d_tables(self.config, grid, hidden_states.device)
            if kept is not None:
                rotary_tables = tuple(table[kept][:, None] for table in rotary_tables)  # (B, 1, N, F), for all heads
        if attention_mask is not None:
            if kept is not None:
                if attention_mask.ndim != 2:
                    shape = tuple(attention_mask.shape)
                    raise ValueError(f"attention_mask must be (B, N) where patches are left out, got {shape}.")
                attention_mask = attention_mask.expand(len(kept), -1).gather(1, kept)
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        by_class_token = pooled_only and attention_mask is None and self.pools_class_token_alone()
        for index, layer in enumerate(self.layers, start=1):
            if by_class_token and index == len(self.layers):
                kwargs["num_queries"] = 1
            hidden_states = layer(hidden_states, attention_mask, rotary_tables, **kwargs)

        if self.config.final_norm == "before_pooling":
            hidden_states = self.layernorm(hidden_states)
        if self.config.pooling == "cls":
            pooled = hidden_states[:, 0]  # (B, D)
        else:
            pooled = hidden_states[:, self.config.num_prefix_tokens :].mean(dim=1)  # (B, D)
        if self.config.final_norm == "after_pooling":
            pooled = self.layernorm(pooled)
        return BaseModelOutputWithPooling(None if by_class_token else hidden_states, pooled)

    def pools_class_token_alone(self) -> bool:
        """Whether all that is read of the last layer is its class token: where nobody looks on, by a hook or so."""
        last = self.layers[-1]
        is_ours = type(last) is ViTScratchLayer and type(last.attention) is ViTScratchAttention
        is_known = is_ours and self.config._attn_implementation in ("eager", "sdpa")
        return is_known and self.config.pooling == "cls" and are_untouched((self, self.layernorm, *last.modules()))


def image_classification_loss(
    labels: torch.Tensor,
    logits: torch.Tensor,
    config: ViTScratchConfig,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> torch.Tensor:
    """Mean loss of a batch, in float32; with `num_items_in_batch`, Trainer's count of the numbers in all `labels` of an
    optimizer step, this batch's part of that step's mean.

    labels (B,), integers: cross-entropy; -100 is left out. labels (B, K), floats: probabilities of each class (mixup,
    cutmix), cross-entropy again. `config.problem_type` "multi_label_classification" takes (B, K) of 0 and 1 and binary
    cross-entropy; "regression", or a single label, the mean squared error. Unlike transformers' own loss, this one
    never writes `problem_type`. Raises ValueError for labels that do not fit.
    """
    labels = labels.to(logits.device)
    logits = logits.float()
    reduction = "mean" if num_items_in_batch is None else "sum"
    soft = labels.is_floating_point()
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        if labels.numel() != logits.numel():
            raise ValueError(
                f"regression takes one number for each of the logits of shape {tuple(logits.shape)}; got labels of "
                f"shape {tuple(labels.shape)}."
            )
        loss = nn.functional.mse_loss(logits, labels.float().view_as(logits), reduction=reduction)
    elif config.problem_type == "multi_label_classification":
        if not soft or labels.shape != logits.shape:
            raise ValueError(
                f"multi_label_classification takes float labels of shape {tuple(logits.shape)}, one 0 or 1 a class; "
                f"got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction=reduction)
    else:
        if (soft and labels.shape != logits.shape) or (not soft and labels.numel() != len(logits)):
            raise ValueError(
                f"labels must be integers of shape ({len(logits)},), or probabilities of shape {tuple(logits.shape)}; "
                f"got {labels.dtype} of shape {tuple(labels.shape)}."
            )
        labels = labels.float() if soft else labels.view(-1)
        if soft and num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch / logits.shape[1]  # images
        loss = nn.functional.cross_entropy(logits, labels, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def build_classifier(config: ViTScratchConfig) -> nn.Module:
    """The head on the pooled vector: (B, D) -> (B, K); the identity with no labels."""
    if config.num_labels == 0:
        return nn.Identity()
    if config.classifier == "linear":
        return nn.Linear(config.hidden_size, config.num_labels)
    width = config.pooler_output_size or config.hidden_size
    layers = OrderedDict(
        dense=nn.Linear(config.hidden_size, width),
        activation=nn.GELU() if config.classifier == "mlp" else nn.Tanh(),
        out=nn.Linear(width, config.num_labels),
    )
    if config.classifier == "mlp":
        layers["norm"] = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers.move_to_end("norm", last=False)
    return nn.Sequential(layers)


class ViTScratchForImageClassification(ViTScratchPreTrainedModel):
    """The encoder with a classifier on the pooled vector: pixel_values (B, C, H, W) -> logits (B, K)."""

    def __init__(self, config: ViTScratchConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTScratchModel(config)
        self.classifier = build_classifier(config)
        self.loss_function = image_classification_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classifies images; with labels (see image_classification_loss), gives the loss too.

        pixel_values, interpolate_pos_encoding, attention_mask, noise: as ViTScratchModel's.
        """
        outputs = self.vit(pixel_values, interpolate_pos_encoding, attention_mask, noise, pooled_only=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)  # (B, K)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["ViTScratchForImageClassification", "ViTScratchModel", "ViTScratchPreTrainedModel"]
