"""Bugs of real Vision Transformers, one a class, beside the compact network that has none of them.

Each is a subclass that overrides one method at the place of the bug, so that the two versions can be read side by side;
SPECIMENS says where it was met and which check of the doctor names it. Every one of them runs without an error.
"""

# B batch, C channels, H W image, P patch side, Gh Gw patch rows and columns, N tokens, D hidden, A heads,
# F width of a head, K labels

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

# ---------------------------------------------------------------- the healthy network


class Patchify(nn.Module):
    """Cuts an image into patches. (B, C, H, W) -> (B, Gh*Gw, C*P*P), in reading order."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = self.patch_size
        batch_size, num_channels, height, width = images.shape
        patches = images.reshape(batch_size, num_channels, height // side, side, width // side, side)
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, Gh*Gw, C*P*P)


class Attention(nn.Module):
    """Multi-head self-attention in the article's own steps. (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = (self.split(matrix(tokens)) for matrix in (self.query, self.key, self.value))
        weights = self.weights(query @ key.transpose(-2, -1) * self.scale(query))  # (B, A, N, N)
        return self.output(self.merge(self.attend(weights, value)))

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)  # (B, A, N, F)

    def scale(self, query: torch.Tensor) -> float:
        return query.shape[-1] ** -0.5

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(dim=-1)

    def attend(self, weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return weights @ value  # (B, A, N, F)

    def merge(self, heads: torch.Tensor) -> torch.Tensor:
        return heads.transpose(1, 2).flatten(2)  # (B, N, D)


class Layer(nn.Module):
    """A pre-norm encoder layer. (B, N, D) -> (B, N, D)."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_tokens: int, dropout: float, attention=Attention, norm=nn.LayerNorm
    ):
        super().__init__()
        self.norm_class = norm
        self.norm_attention = self.build_norm(hidden_size, num_tokens)
        self.attention = attention(hidden_size, num_heads)
        self.norm_mlp = self.build_norm(hidden_size, num_tokens)
        self.mlp = self.build_mlp(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def build_norm(self, hidden_size: int, num_tokens: int) -> nn.Module:
        return self.norm_class(hidden_size)

    def build_mlp(self, hidden_size: int) -> nn.Module:
        width = 2 * hidden_size
        return nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, hidden_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.dropout(self.attention(self.norm_attention(tokens)))
        return tokens + self.dropout(self.mlp(self.norm_mlp(tokens)))


class HealthyViT(nn.Module):
    """A plain ViT with a class token and learned positions, of the parts given. (B, C, H, W) -> logits (B, K)."""

    def __init__(
        self,
        image_size: int = 16,
        patch_size: int = 4,
        num_channels: int = 3,
        hidden_size: int = 32,
        num_layers: int = 3,
        num_heads: int = 4,
        num_labels: int = 10,
        dropout: float = 0.1,
        patchify: type[Patchify] = Patchify,
        layer: type[Layer] = Layer,
        **parts: type[nn.Module],  # attention, norm: the layer's
    ):
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.patchify = patchify(patch_size)
        self.projection = nn.Linear(num_channels * patch_size**2, hidden_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, hidden_size))
        self.positions = nn.Parameter(torch.randn(1, num_patches + 1, hidden_size))
        self.dropout = nn.Dropout(dropout)
        sizes = (hidden_size, num_heads, num_patches + 1, dropout)
        self.layers = nn.ModuleList(layer(*sizes, **parts) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, num_labels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images)  # (B, N, D)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(self.pool(tokens)))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.projection(self.patchify(images))
        tokens = torch.cat((self.class_token.expand(len(tokens), -1, -1), tokens), dim=1)
        return self.dropout(tokens + self.positions)

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0]


# ---------------------------------------------------------------- patches, tokens, positions


class ReshapedPatchify(Patchify):
    """Article 1: rows of pixels reshaped without the permutation that brings a patch's channels together."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = self.patch_size
        pieces = images.unfold(2, side, side).unfold(3, side, side)  # (B, C, Gh, Gw, P, P)
        return pieces.reshape(len(images), -1, side * side * images.shape[1])


class UnfoldedPatchify(Patchify):
    """Article 3: nn.Unfold leaves out the last rows and columns where patches do not fill the image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = self.patch_size
        return nn.functional.unfold(images, side, stride=side).transpose(1, 2)  # (B, Gh*Gw, C*P*P)


class PositionsForgotten(HealthyViT):
    """Article 3, its first run: nothing tells the patches apart."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.positions

    def embed(self, images):
        tokens = self.projection(self.patchify(images))
        return self.dropout(torch.cat((self.class_token.expand(len(tokens), -1, -1), tokens), dim=1))


class ClassTokenOfOneBatchSize(HealthyViT):
    """Article 2: the class token is made with the batch in its shape."""

    def __init__(self, batch_size: int = 32, **options):
        super().__init__(**options)
        self.class_token = nn.Parameter(torch.ones(batch_size, 1, self.class_token.shape[2]))

    def embed(self, images):
        tokens = self.projection(self.patchify(images))
        return self.dropout(torch.cat((self.class_token, tokens), dim=1) + self.positions)


class PositionsNotRegistered(HealthyViT):
    """A tensor instead of a parameter: neither trained nor saved, and it stays on its device."""

    def __init__(self, **options):
        super().__init__(**options)
        values = self.positions.detach().clone()
        del self.positions
        self.positions = values


class DetachedEmbeddings(HealthyViT):
    """Patches, tokens and positions are cut off from the gradient."""

    def embed(self, images):
        return super().embed(images).detach()


class HeadOnAPatch(HealthyViT):
    """No class token was put in front, and yet the head reads the token at 0: the first patch."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.class_token

    def embed(self, images):
        return self.dropout(self.projection(self.patchify(images)) + self.positions[:, 1:])


class HeadOnTheLastToken(HealthyViT):
    """The class token stands in front, the head reads the token at the end: the last patch."""

    def pool(self, tokens):
        return tokens[:, -1]


class SoftmaxBeforeTheLoss(HealthyViT):
    """Probabilities where cross-entropy, which has a softmax of its own, expects logits."""

    def forward(self, images):
        return super().forward(images).softmax(dim=-1)


class WeightsTooLarge(HealthyViT):
    """Matrices drawn by torch.randn, without the root of their inputs."""

    def __init__(self, **options):
        super().__init__(**options)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight)


class LayersInAList(HealthyViT):
    """A Python list instead of nn.ModuleList: the layers' parameters are nobody's."""

    def __init__(self, **options):
        super().__init__(**options)
        layers = list(self.layers)
        del self.layers
        self.layers = layers


class NoiseInEval(HealthyViT):
    """Augmentation inside the network that eval mode does not switch off."""

    def forward(self, images):
        return super().forward(images + 0.1 * torch.randn_like(images))


# ---------------------------------------------------------------- attention


class MergedWithoutTranspose(Attention):
    """Article 4: (B, A, N, F) is viewed as (B, N, D), so that a token gets pieces of other tokens and heads."""

    def merge(self, heads):
        batch_size, _, num_tokens, _ = heads.shape
        return heads.contiguous().view(batch_size, num_tokens, -1)


class SplitWithoutTranspose(MergedWithoutTranspose):
    """Article 0's repository: heads are made, and merged, by a view alone."""

    def split(self, tokens):
        batch_size, num_tokens, _ = tokens.shape
        return tokens.view(batch_size, self.num_heads, num_tokens, self.head_dim)


class DiagonalAttention(Attention):
    """Article 0's repository: of the weights (N, N) only the diagonal is multiplied with the values."""

    def attend(self, weights, value):
        return torch.einsum("bntt,bnth->bnth", weights, value)


class ScaledBySequenceLength(Attention):
    """Article 1: the root of the number of tokens, q.size(1), where the head's width belongs."""

    def scale(self, query):
        return query.shape[-2] ** -0.5


class ScaledByHiddenSize(Attention):
    """Article 0's repository and vit-cifar: the root of the hidden size, not of the head's width."""

    def scale(self, query):
        return (self.num_heads * self.head_dim) ** -0.5


class Unscaled(Attention):
    def scale(self, query):
        return 1.0


class SoftmaxOverQueries(Attention):
    """The weights of each key sum to one over the queries, not those of each query over the keys."""

    def weights(self, scores):
        return scores.softmax(dim=-2)


class CausalAttention(Attention):
    """The mask of a language model: a token sees those before it alone."""

    def weights(self, scores):
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -math.inf).softmax(dim=-1)


class AttentionOverTheBatch(nn.Module):
    """Article 3: without batch_first=True the first axis, here the batch, is the sequence."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_size, num_heads)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.attention(tokens, tokens, tokens)[0]


# ---------------------------------------------------------------- layers


class NormWithoutCentring(nn.Module):
    """Article 3's first LayerNorm: the mean stands where the centred value belongs."""

    def __init__(self, features: int):
        super().__init__()
        self.w = nn.Parameter(torch.ones(features))
        self.b = nn.Parameter(torch.zeros(features))

    def forward(self, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        return self.w * x.mean(-1, keepdim=True) / (x.std(-1, keepdim=True) + eps) + self.b


class NormWithMisplacedParentheses(NormWithoutCentring):
    """Article 3's second LayerNorm: only the mean is divided by the deviation."""

    def forward(self, x, eps=1e-6):
        return self.w * (x - x.mean(-1, keepdim=True) / (x.std(-1, keepdim=True) + eps)) + self.b


class LayerNormedOverTokens(Layer):
    """A norm over tokens and channels at once mixes the tokens."""

    def build_norm(self, hidden_size, num_tokens):
        return nn.LayerNorm((num_tokens, hidden_size))


class LayerWithoutActivation(Layer):
    """Article 3: two matrices with nothing between them are one matrix."""

    def build_mlp(self, hidden_size):
        return nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.Linear(2 * hidden_size, hidden_size))


class LayerWithLateActivation(Layer):
    """vit-cifar: a second GELU after the MLP's second matrix: the branch can hardly subtract."""

    def build_mlp(self, hidden_size):
        return nn.Sequential(*super().build_mlp(hidden_size), nn.GELU())


class LayerWithoutResidual(Layer):
    def forward(self, tokens):
        tokens = self.dropout(self.attention(self.norm_attention(tokens)))
        return self.dropout(self.mlp(self.norm_mlp(tokens)))


class LayerWithDropoutAlwaysOn(Layer):
    """The functional form, whose default is training=True."""

    def forward(self, tokens):
        tokens = tokens + nn.functional.dropout(self.attention(self.norm_attention(tokens)), self.dropout.p)
        return tokens + nn.functional.dropout(self.mlp(self.norm_mlp(tokens)), self.dropout.p)


class LayerWithUnusedDropout(Layer):
    """Dropout that is built and never called."""

    def forward(self, tokens):
        tokens = tokens + self.attention(self.norm_attention(tokens))
        return tokens + self.mlp(self.norm_mlp(tokens))


def optimizer_without_tokens(model: nn.Module) -> torch.optim.Optimizer:
    """Article 1: parameters are sorted by the endings .weight and .bias, which tokens and positions do not have."""
    decay = [value for name, value in model.named_parameters() if name.endswith("weight") and "norm" not in name]
    no_decay = [value for name, value in model.named_parameters() if name.endswith("bias")]
    no_decay += [value for name, value in model.named_parameters() if name.endswith("weight") and "norm" in name]
    return torch.optim.AdamW([{"params": decay}, {"params": no_decay, "weight_decay": 0.0}], lr=1e-4)


# ---------------------------------------------------------------- the table


class Specimen(NamedTuple):
    """A bug: where it was met, the check that must name it, and what is put into HealthyViT, or in its place."""

    origin: str
    check: str
    parts: dict[str, type[nn.Module]] = {}
    network: type[HealthyViT] = HealthyViT
    image_size: int = 16
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None

    def build(self, **sizes: int | float) -> HealthyViT:
        """The network with the bug, small unless `sizes`, options of HealthyViT, say otherwise."""
        return self.network(**{"image_size": self.image_size, **self.parts, **sizes})


SPECIMENS: dict[str, Specimen] = {
    # the articles' own
    "split_without_transpose": Specimen("article 0", "layer_equivariance", {"attention": SplitWithoutTranspose}),
    "diagonal_attention": Specimen("article 0", "attention_weights", {"attention": DiagonalAttention}),
    "scaled_by_hidden_size": Specimen("article 0", "attention_scale", {"attention": ScaledByHiddenSize}),
    "patches_by_reshape": Specimen("article 1", "true_patches", {"patchify": ReshapedPatchify}),
    "scaled_by_sequence_length": Specimen("article 1", "attention_scale", {"attention": ScaledBySequenceLength}),
    "tokens_not_optimized": Specimen("article 1", "one_optimizer_group_each", optimizer=optimizer_without_tokens),
    "class_token_of_one_batch_size": Specimen("article 2", "output_shape", network=ClassTokenOfOneBatchSize),
    "border_left_out": Specimen("article 3", "every_patch_counts", {"patchify": UnfoldedPatchify}, image_size=18),
    "positions_forgotten": Specimen("article 3", "patch_order_matters", network=PositionsForgotten),
    "activation_forgotten": Specimen("article 3", "nonlinearities", {"layer": LayerWithoutActivation}),
    "norm_without_centring": Specimen("article 3", "normalisation", {"norm": NormWithoutCentring}),
    "norm_parentheses": Specimen("article 3", "normalisation", {"norm": NormWithMisplacedParentheses}),
    "attention_over_the_batch": Specimen("article 3", "batch_independence", {"attention": AttentionOverTheBatch}),
    "merged_without_transpose": Specimen("article 4", "layer_equivariance", {"attention": MergedWithoutTranspose}),
    "late_activation": Specimen("vit-cifar", "nonlinearities", {"layer": LayerWithLateActivation}),
    # common elsewhere
    "unscaled_attention": Specimen("common", "attention_scale", {"attention": Unscaled}),
    "softmax_over_queries": Specimen("common", "attention_weights", {"attention": SoftmaxOverQueries}),
    "causal_attention": Specimen("common", "layer_equivariance", {"attention": CausalAttention}),
    "softmax_before_the_loss": Specimen("common", "outputs_are_logits", network=SoftmaxBeforeTheLoss),
    "positions_not_registered": Specimen("common", "registered_parameters", network=PositionsNotRegistered),
    "layers_in_a_list": Specimen("common", "registered_parameters", network=LayersInAList),
    "detached_embeddings": Specimen("common", "gradients_reach_all_parameters", network=DetachedEmbeddings),
    "head_on_a_patch": Specimen("common", "pooling", network=HeadOnAPatch),
    "head_on_the_last_token": Specimen("common", "pooling", network=HeadOnTheLastToken),
    "norm_over_tokens": Specimen("common", "normalisation", {"layer": LayerNormedOverTokens}),
    "residual_forgotten": Specimen("common", "residual_connections", {"layer": LayerWithoutResidual}),
    "dropout_always_on": Specimen("common", "dropout_modes", {"layer": LayerWithDropoutAlwaysOn}),
    "dropout_never_called": Specimen("common", "dropout_modes", {"layer": LayerWithUnusedDropout}),
    "noise_in_eval": Specimen("common", "deterministic_eval", network=NoiseInEval),
    "weights_too_large": Specimen("common", "first_loss", network=WeightsTooLarge),
    "weights_too_large_without_norms": Specimen("common", "activation_growth", {"norm": nn.Identity}, WeightsTooLarge),
}
