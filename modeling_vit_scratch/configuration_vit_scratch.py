"""Every architecture fact of a plain Vision Transformer, typed and validated, and the presets by name.

This file travels to the Hub beside a checkpoint: it imports nothing of this package.
"""

# No `from __future__ import annotations` here: string annotations switch the type checks of `strict` off.
import difflib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

logger = logging.get_logger(__name__)

Size = int | list[int] | tuple[int, int]

CHOICES = {
    "patch_embedding": ("conv", "linear"),
    "position_embedding_type": ("learned", "sincos2d", "rope2d", "none"),
    "pooling": ("cls", "mean"),
    "final_norm": ("before_pooling", "after_pooling", "none"),
    "classifier": ("linear", "mlp", "tanh"),
    "weight_init": ("normal", "trunc_normal", "xavier_uniform", "torch"),
    "problem_type": (None, "single_label_classification", "multi_label_classification", "regression"),
}
TOKEN_INITS = ("trunc_normal", "normal", "uniform", "zeros")
POSITION_INITS = (*TOKEN_INITS, "sincos2d")
# what is left out at random, in training alone: another rate is the same network
RATES_OF_TRAINING = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout_prob", "mlp_dropout_prob",
    "drop_path_rate", "patch_drop_rate",
)  # fmt: skip


def pair(value: Size) -> tuple[int, int]:
    """(rows, columns) of a size given as one number or as two."""
    return (value, value) if isinstance(value, int) else tuple(value)


def nearest_image_sizes(size: int, patch: int, stride: int) -> tuple[int, int]:
    """The two sizes nearest to `size` (below, above) that patches of `patch` pixels every `stride` pixels fill."""
    below = max(patch, size - (size - patch) % stride) if size > patch else patch
    return below, below if below == size else below + stride


COUNTED_POSITIONS = ("sincos2d", "rope2d")  # kinds that are computed from rows and columns


@strict
class ViTScratchConfig(PreTrainedConfig):
    """Architecture of a plain Vision Transformer (Dosovitskiy et al., 2010.11929), as declared facts.

    A field that `transformers.ViTConfig` has keeps its name, meaning and default. Impossible values raise
    `ValueError` (wrong types: `StrictDataclassFieldValidationError`) on construction, and say what would work.
    Sizes are in pixels, (height, width) or one number for both; probabilities and rates lie in [0, 1).
    """

    model_type = "vit_scratch"

    # --- the fields of transformers.ViTConfig
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072  # width of the MLP's hidden layer
    hidden_act: str = "gelu"  # of the MLP; any name in transformers.activations.ACT2FN
    hidden_dropout_prob: float | int = 0.0  # after the embeddings, the attention output and the MLP output
    attention_probs_dropout_prob: float | int = 0.0  # on the attention weights
    initializer_range: float | int = 0.02  # std of weight_init "normal" and "trunc_normal"
    layer_norm_eps: float | int = 1e-12  # the paper's code, DeiT, timm and torchvision use 1e-6
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: int = 3
    qkv_bias: bool = True

    # --- patches (equation 1)
    patch_embedding: str = "conv"  # "conv": strided convolution; "linear": flatten, then a matrix (same numbers)
    patch_stride: Size | None = None  # None: patch_size; smaller: overlapping patches
    patch_bias: bool = True

    # --- tokens and positions (equation 1)
    use_cls_token: bool = True
    num_register_tokens: int = 0  # 2309.16588; they stand between the class token and the patches
    position_embedding_type: str = "learned"  # "sincos2d": fixed, 2205.01580; "rope2d": axial, 2403.13298; "none"
    prefix_positions: bool = True  # False: learned positions for patches only (DeiT III, timm's no_embed_class)
    rope_theta: float | int = 100.0  # base of the rotary frequencies; 2403.13298, section 3.2
    position_image_size: Size | None = None  # what "sincos2d" and "rope2d" span: the trained size; None: image_size
    token_init: str | float | int = "trunc_normal"  # class and register tokens; a number is a constant
    position_init: str | float | int = "trunc_normal"  # learned positions; "sincos2d" starts them at the fixed table
    embedding_norm: bool = False  # a LayerNorm between the embeddings and the first layer (CLIP, timm's pre_norm)

    # --- layers (equations 2 and 3)
    pre_norm: bool = True  # False: post-norm, as in 1706.03762
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qk_norm: bool = False  # a LayerNorm over each head's queries and keys, 2302.05442
    proj_bias: bool = True  # of the attention's output projection
    mlp_bias: bool = True
    layer_scale_init: float | int | None = None  # None: no LayerScale; 2103.17239 uses 1e-5 at 24 layers
    drop_path_rate: float | int = 0.0  # stochastic depth, 1603.09382: grows linearly to this at the last layer
    patch_drop_rate: float | int = 0.0  # share of each image's patches left out at random, 2208.07220
    embedding_dropout_prob: float | int | None = None  # None: hidden_dropout_prob
    mlp_dropout_prob: float | int | None = None  # after activation and MLP; None: hidden_dropout_prob, after

    # --- pooling and classifier (equation 4)
    final_norm: str = "before_pooling"  # "after_pooling": on the pooled vector; "none"
    pooling: str = "cls"  # "mean": over the patch tokens
    classifier: str = "linear"  # "mlp": norm, linear, GELU, linear; "tanh": linear, tanh, linear (section 3.1)
    pooler_output_size: int | None = None  # width of the classifier's hidden layer; None: hidden_size

    # --- initialisation of matrices
    # "normal": transformers; "trunc_normal": timm, DeiT; "xavier_uniform": our presets; "torch": PyTorch's own defaults
    weight_init: str = "normal"
    zero_init_residual: bool = False  # attention output and second MLP matrix start at zero: each layer is the identity

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)  # sets id2label, and keeps whatever else there is
        for name in kwargs:
            if near := difflib.get_close_matches(name, architecture_fields(), n=1, cutoff=0.85):
                logger.warning(f"{type(self).__name__} has no field {name!r}, it changes nothing: {near[0]!r} is one.")
        self.validate_architecture()  # here too, so that people see a plain ValueError

    def __setattr__(self, name: str, value: Any):
        super().__setattr__(name, value)
        if name == "id2label" and value is not None:
            # transformers leaves label2id as it was where only id2label is given (5.17 to 5.23)
            self.label2id = {label: int(index) for index, label in value.items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As transformers' own, but the fields that `kwargs` put over the saved ones are validated too, and positions
        that are computed go on to span the saved size where `kwargs` has another."""
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if "image_size" in kwargs and "position_image_size" not in kwargs:
            saved = config_dict.get("image_size", cls.image_size)
            config.position_image_size = config.spanned_at(config.image_size, saved)
        config.validate_architecture()
        return loaded

    def spanned_at(self, image_size: Size, trained: Size) -> Size | None:
        """The `position_image_size` for images of `image_size` of a network trained at `trained`, or at the size that
        it spans already. None where that is the same one, or where positions are a table or none."""
        if self.position_embedding_type not in COUNTED_POSITIONS:
            return None
        spanned = trained if self.position_image_size is None else self.position_image_size
        return None if pair(spanned) == pair(image_size) else spanned

    # --- derived values: properties, never second fields

    @property
    def image_height_width(self) -> tuple[int, int]:
        return pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        return pair(self.patch_size)

    @property
    def stride_height_width(self) -> tuple[int, int]:
        return pair(self.patch_size if self.patch_stride is None else self.patch_stride)

    @property
    def attention_head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at `image_size`."""
        return self.patch_grid_of(*self.image_height_width)

    @property
    def position_grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches that sine-cosine and rotary positions count, at any image size."""
        size = self.image_size if self.position_image_size is None else self.position_image_size
        return self.patch_grid_of(*pair(size))

    @property
    def num_patches(self) -> int:
        return self.patch_grid[0] * self.patch_grid[1]

    def patch_grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of an image of `height` x `width` pixels.

        Raises ValueError, naming both nearest sizes, if the patches leave a rest.
        """
        for side, size, patch, stride in zip(
            ("height", "width"), (height, width), self.patch_height_width, self.stride_height_width, strict=True
        ):
            below, above = nearest_image_sizes(size, patch, stride)
            if size != below:
                fitting = f"{below} and {above}" if size > patch else f"{patch} and {patch + stride}"
                raise ValueError(
                    f"image_size: a {side} of {size} is not filled by patches of {patch} every {stride} pixels; "
                    f"the nearest sizes that are: {fitting}."
                )
        (patch_rows, patch_columns), (row_stride, column_stride) = self.patch_height_width, self.stride_height_width
        return (height - patch_rows) // row_stride + 1, (width - patch_columns) // column_stride + 1

    # --- validation: on construction, and again before saving

    def validate_architecture(self):
        self._check_sizes()
        self._check_heads()
        self._check_choices()
        self._check_rates()

    def _check_sizes(self):
        counts = {"hidden_size", "num_attention_heads", "intermediate_size", "num_channels"}
        for name in sorted(counts):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; ViT-B: 768, 12, 3072 and 3.")
        for name in ("num_hidden_layers", "num_register_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("head_dim", "pooler_output_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {getattr(self, name)}.")
        for name in ("image_size", "patch_size", "patch_stride", "position_image_size"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or (not isinstance(value, int) and len(value) != 2) or min(pair(value)) < 1:
                raise ValueError(f"{name} must be one positive number or (height, width), got {value!r}; 16 works.")
        for side, patch, stride in zip(
            ("height", "width"), self.patch_height_width, self.stride_height_width, strict=True
        ):
            if stride > patch:
                raise ValueError(
                    f"patch_stride {stride} is larger than patch_size {patch} ({side}): pixels between patches would "
                    f"never be seen; use at most {patch}."
                )
        self.patch_grid_of(*self.image_height_width)
        if self.position_image_size is not None:
            if self.position_embedding_type not in COUNTED_POSITIONS:
                raise ValueError(
                    f"position_image_size has no effect with position_embedding_type {self.position_embedding_type!r}; "
                    f"it goes with {' and '.join(COUNTED_POSITIONS)}."
                )
            try:
                self.position_grid  # noqa: B018
            except ValueError as error:
                raise ValueError(f"position_{error}") from None

    def _check_heads(self):
        heads, hidden = self.num_attention_heads, self.hidden_size
        if self.head_dim is None and hidden % heads:
            fitting = next(h for h in range(heads, 0, -1) if hidden % h == 0)
            raise ValueError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; {fitting} heads would do, "
                f"or hidden_size {-(-hidden // heads) * heads}, or set head_dim."
            )
        if self.position_embedding_type == "rope2d" and self.attention_head_dim % 4:
            raise ValueError(
                f"rope2d turns pairs of channels along two axes: the head width must be a multiple of 4, got "
                f"{self.attention_head_dim}; head_dim={-(-self.attention_head_dim // 4) * 4} works."
            )
        needs_table = "sincos2d" in (self.position_embedding_type, self.position_init)
        if needs_table and hidden % 4:
            raise ValueError(f"sincos2d needs a hidden_size that 4 divides, got {hidden}; {-(-hidden // 4) * 4} works.")

    def _check_choices(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(str(choice) for choice in choices)
                raise ValueError(f"No {name} {getattr(self, name)!r}. Known: {known}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"No hidden_act {self.hidden_act!r}. Known: {', '.join(sorted(ACT2FN))}.")
        for name, choices in (("token_init", TOKEN_INITS), ("position_init", POSITION_INITS)):
            value = getattr(self, name)
            if isinstance(value, str) and value not in choices:
                raise ValueError(f"No {name} {value!r}. Known: {', '.join(choices)}, or a number.")
        if self.pooling == "cls" and not self.use_cls_token:
            raise ValueError("pooling='cls' needs use_cls_token=True; without a class token use pooling='mean'.")

    def _check_rates(self):
        for name in RATES_OF_TRAINING:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:  # NaN fails too
                raise ValueError(f"{name} must lie in [0, 1), got {value}; 0.1 is common.")
        for name in ("initializer_range", "layer_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        for name in ("layer_scale_init", "token_init", "position_init"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not abs(value) < float("inf"):  # NaN fails too
                raise ValueError(f"{name} must be a finite number, got {value}.")

    # --- presets

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ViTScratchConfig":
        """The configuration of the preset `name`, with `overrides` put over its fields.

        Raises ValueError listing the presets if there is none of that name, and for an override that is no field.
        """
        if name not in PRESETS:
            raise ValueError(f"No preset {name!r}. Known: {', '.join(sorted(PRESETS))}.")
        unknown = sorted(set(overrides) - set(cls.__dataclass_fields__) - {"num_labels"})
        if unknown:
            raise ValueError(f"No field {unknown[0]!r} in ViTScratchConfig. Known: {', '.join(architecture_fields())}.")
        preset = dict(PRESETS[name])
        if overrides.get("id2label") is not None:
            preset.pop("num_labels", None)  # transformers would drop the names where the numbers differ
        return cls(**{**preset, **overrides})


def architecture_fields() -> list[str]:
    """Names of the fields that ViTScratchConfig itself declares, in order."""
    return [name for name in ViTScratchConfig.__annotations__ if name != "model_type"]


def _size(hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, **fields):
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": intermediate_size,
        "layer_norm_eps": 1e-6,
        **fields,
    }


def _small(hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio, patch_size, **fields):
    """A network for 32-pixel images trained from nothing: mean pooling, no class token (2205.01580 finds it better)."""
    small = {"image_size": 32, "patch_size": patch_size, "pooling": "mean", "use_cls_token": False}
    widths = (hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio * hidden_size)
    return _size(*widths, **{**small, "weight_init": "xavier_uniform", **fields})


_TI, _S = (192, 12, 3, 768), (384, 12, 6, 1536)  # 2012.12877, table 1 (Ti, S)
_B, _L, _H = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1280, 32, 16, 5120)  # 2010.11929, table 1
_DEIT = {"patch_size": 16, "weight_init": "trunc_normal", "drop_path_rate": 0.1}  # 2012.12877, table 9
_VIT_LITE = {"image_size": 32, "patch_size": 4, "weight_init": "trunc_normal", "token_init": "zeros"}  # 2104.05704

PRESETS: dict[str, dict[str, Any]] = {
    "vit_ti_16": _size(*_TI, patch_size=16),
    "vit_s_16": _size(*_S, patch_size=16),
    "vit_s_32": _size(*_S, patch_size=32),
    "vit_b_16": _size(*_B, patch_size=16),
    "vit_b_32": _size(*_B, patch_size=32),
    "vit_l_16": _size(*_L, patch_size=16),
    "vit_l_32": _size(*_L, patch_size=32),
    "vit_h_14": _size(*_H, patch_size=14),
    "deit_ti_16": _size(*_TI, **_DEIT),
    "deit_s_16": _size(*_S, **_DEIT),
    "deit_b_16": _size(*_B, **_DEIT),
    # 32-pixel images: Compact Transformers' plain ViTs, 2104.05704 (4 heads)
    "vit_lite_6_4": _size(256, 6, 4, 512, **_VIT_LITE),
    "vit_lite_7_4": _size(256, 7, 4, 512, **_VIT_LITE),
    # 32-pixel images, ours: hidden size, layers, heads, MLP ratio, patch
    "nano": _small(96, 6, 3, 3, 4),
    "micro": _small(128, 6, 4, 2, 4),
    "micro_plus": _small(128, 8, 4, 3, 4),
    "tiny6": _small(192, 6, 3, 3, 4),
    "tiny9": _small(192, 9, 3, 2, 4),
    "vit_ti_4": _small(192, 12, 3, 4, 4),
    "vit_m_4": _small(256, 8, 4, 4, 4),
    "vit_s8_4": _small(384, 8, 6, 4, 4),
    "vit_s_4": _small(384, 12, 6, 4, 4),
    "micro_8": _small(128, 6, 4, 2, 8, image_size=64),
    "vit_m_2": _small(256, 8, 4, 4, 2),
    "vit_s_2": _small(384, 12, 6, 4, 2),
    # smaller images, ours: 28-pixel digits (16 tokens) and scikit-learn's 8-pixel digits (16 tokens)
    "mnist": _small(128, 4, 4, 2, 7, image_size=28, num_channels=1),
    "digits": _small(64, 4, 4, 2, 2, image_size=8, num_channels=1, position_embedding_type="rope2d"),
    # the articles' networks, mended (docs/articles.md); parameter counts are the articles' own
    "article_0_small": _size(
        64, 6, 16, 256, image_size=32, patch_size=16, patch_embedding="linear", patch_bias=False, num_labels=10,
        layer_norm_eps=1e-5, token_init=0.1, position_init="normal", final_norm="none", classifier="mlp",
        weight_init="torch",
    ),  # 354,378
    "article_0": _size(
        192, 6, 12, 768, image_size=32, patch_size=16, patch_embedding="linear", patch_bias=False, num_labels=10,
        layer_norm_eps=1e-5, token_init=0.1, position_init="normal", final_norm="none", classifier="mlp",
        weight_init="torch",
    ),  # 2,857,162
    "article_1": _size(
        512, 6, 8, 2048, head_dim=512, image_size=32, patch_size=4, patch_embedding="linear", num_labels=10,
        layer_norm_eps=1e-5, token_init="uniform", position_init="uniform", final_norm="none", weight_init="torch",
        embedding_dropout_prob=0.1, mlp_dropout_prob=0.1,
    ),  # 63,083,018: eight heads of the full width
    "article_1_cpu": _size(
        512, 4, 8, 2048, head_dim=512, image_size=32, patch_size=4, patch_embedding="linear", num_labels=10,
        layer_norm_eps=1e-5, token_init="uniform", position_init="uniform", final_norm="none", weight_init="torch",
        embedding_dropout_prob=0.16, mlp_dropout_prob=0.1,
    ),  # 42,076,682
    "article_2": _size(
        *_B, patch_size=16, num_labels=1000, layer_norm_eps=1e-5, token_init="normal", position_init="normal",
        embedding_dropout_prob=0.1, mlp_dropout_prob=0.1, weight_init="torch",
    ),  # 86,567,656
    "article_3": _size(
        128, 4, 4, 512, hidden_act="relu", image_size=32, patch_size=8, num_channels=1, num_labels=10,
        patch_embedding="linear", layer_norm_eps=1e-6, token_init="normal", position_init="normal",
        final_norm="after_pooling", classifier="tanh", weight_init="xavier_uniform", hidden_dropout_prob=0.1,
    ),  # the article prints no depth or width of its runs: these are ours
    "article_4": _size(
        256, 6, 8, 512, image_size=32, patch_size=4, patch_embedding="linear", qkv_bias=False, proj_bias=False,
        num_labels=10, layer_norm_eps=1e-5, token_init="normal", position_init="normal", final_norm="after_pooling",
        embedding_dropout_prob=0.2, mlp_dropout_prob=0.2, weight_init="torch",
    ),  # 3,189,002
}  # fmt: skip

__all__ = ["PRESETS", "ViTScratchConfig"]
