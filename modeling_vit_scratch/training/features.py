"""The head alone, trained on what the frozen backbone makes of each image, computed once.

Batches keep their order, their draws and their way through the loop; only, where images were, there are features.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from ..data.augmentation import Draws, normalise
from ..data.augmentation.draws import send
from ..data.loading import RESIDENT_BYTES, Batch, EvaluationData, ResidentImages, TrainingData, chunk_of
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification
from .machine import in_sample_order
from .recipe import Recipe

# B batch, N images, V views (as it is; mirrored too, where images are mirrored at random), D hidden size, K labels,
# P penalties

Data = TypeVar("Data", TrainingData, EvaluationData)
PENALTIES = tuple(10.0**exponent for exponent in range(-4, 7))
LARGEST_SCALE = 100.0  # where every left-out image is answered right, cross-entropy would have no end


class HeadOnFeatures(nn.Module):
    """The model's classifier, without the backbone: features (B, D) -> logits (B, K)."""

    def __init__(self, model: ViTScratchForImageClassification):
        super().__init__()
        self.classifier = model.classifier

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.classifier(pixel_values))


class MirroredViews:
    """Stands for the augmentation that mirrors images: takes the view that it would have made.

    Features (B, V, D) -> (B, D), by the same draw for each image as Augmentation's.
    """

    def __init__(self, horizontal_flip_prob: float):
        self.horizontal_flip_prob = horizontal_flip_prob

    def __call__(self, features: torch.Tensor, draws: Draws) -> torch.Tensor:
        if features.shape[1] == 1:
            return features[:, 0]
        view = (draws.uniform("flip", 1)[:, 0] < self.horizontal_flip_prob).long()
        return features[torch.arange(len(view), device=features.device), send(view, features.device)]

    def erase(self, features: torch.Tensor, draws: Draws) -> torch.Tensor:
        return features


@dataclass
class FeatureData:
    """What the loop takes in the place of its images: training and held-out data, the augmentation, mean and std."""

    training: TrainingData
    held: dict[str, EvaluationData]
    augment: MirroredViews
    pixels: tuple[torch.Tensor, torch.Tensor]


def drawn_of_images(recipe: Recipe) -> tuple[Any, ...]:
    """What is drawn for each training image besides mirroring; nothing of it is switched on where all are false."""
    return (
        recipe.crop_padding, recipe.random_resized_crop_scale, recipe.rotation_degrees, recipe.translate_pixels,
        recipe.scale_range, recipe.auto_augment, recipe.random_erasing_prob, recipe.mixup_alpha, recipe.cutmix_alpha,
        recipe.vertical_flip_prob, recipe.color_jitter,
    )  # fmt: skip


def is_for_features(recipe: Recipe) -> bool:
    """Whether nothing but a head is trained, on features alone: a teacher wants to see images."""
    return recipe.finetune == "head" and recipe.teacher_name_or_path is None


def can_cache_features(recipe: Recipe, num_samples: int, hidden_size: int) -> bool:
    """Whether the backbone sees no more than two views of each training image, and their features fit into memory."""
    drawn = drawn_of_images(recipe)
    num_bytes = num_samples * (1 + (recipe.horizontal_flip_prob > 0)) * hidden_size * 4
    return is_for_features(recipe) and not recipe.streaming and not any(drawn) and num_bytes <= RESIDENT_BYTES


def cache_features(
    model: ViTScratchForImageClassification,
    training: TrainingData,
    held: dict[str, EvaluationData],
    pixels: tuple[torch.Tensor, torch.Tensor],
    horizontal_flip_prob: float,
    accelerator: Accelerator,
) -> FeatureData:
    """The data with features in the place of images, computed by all processes together, each its share.

    pixels: mean and std of the images. Features are what the backbone pools in eval mode, of training images mirrored
    too where some will be.
    """
    started = time.perf_counter()
    model.vit.eval()
    is_mirrored = horizontal_flip_prob > 0
    features, labels = compute_features(model, training, pixels, accelerator, is_mirrored)
    cached = {}
    for name, data in held.items():
        views, its_labels = compute_features(model, data, pixels, accelerator)
        cached[name] = _with_features(data, views[:, 0], its_labels)
    num_images = sum(len(data.reader.split) for data in (training, *held.values()))
    seconds = time.perf_counter() - started
    twice = ", training images mirrored too" if is_mirrored else ""
    accelerator.print(f"features of {num_images:,} images computed once in {seconds:.1f} s{twice}", flush=True)
    zero = torch.zeros((), device=accelerator.device)
    return FeatureData(
        _with_features(training, features, labels), cached, MirroredViews(horizontal_flip_prob), (zero, zero + 1)
    )


def _with_features(data: Data, features: torch.Tensor, labels: torch.Tensor) -> Data:
    """The same data in the same order, but where images were gathered there are features."""
    cached = copy.copy(data)
    cached.resident = ResidentImages(features, labels, features.device)
    return cached


@torch.no_grad()
def compute_features(
    model: ViTScratchForImageClassification,
    data: TrainingData | EvaluationData,
    pixels: tuple[torch.Tensor, torch.Tensor],
    accelerator: Accelerator,
    is_mirrored: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, V, D) of a split's images in its own order, and their labels, on every process."""
    device, source = accelerator.device, data.reader.source
    num_views, shape = 1 + is_mirrored, (len(source.class_names),) if source.is_multi_label else ()
    parts = [  # a rank may have no image of a small split: an empty start gives the columns their shapes all the same
        [
            torch.empty(0, dtype=torch.int64, device=device),
            torch.empty(0, num_views, model.config.hidden_size, dtype=model.dtype, device=device),
            torch.empty(0, *shape, dtype=torch.float32 if source.is_multi_label else torch.int64, device=device),
        ]
    ]
    for batch in _in_split_order(data, device):
        batch = batch.to(device)
        views = [batch.images, batch.images.flip(-1)][:num_views]
        with accelerator.autocast():
            views = (normalise(view, *pixels, model.dtype) for view in views)
            pooled = [model.vit(view, pooled_only=True).pooler_output for view in views]
        parts.append([batch.positions.to(device), torch.stack(pooled, dim=1).to(model.dtype), batch.labels])
    columns = in_sample_order(accelerator, [torch.cat(column) for column in zip(*parts, strict=True)])
    samples, features, labels = columns
    every_sample = torch.arange(len(data.reader.split), device=device)
    assert torch.equal(samples, every_sample), "an image was lost or computed twice"
    return features, labels


def _in_split_order(data: TrainingData | EvaluationData, device: torch.device) -> Iterator[Batch]:
    """This rank's share of the images, each once, in the order of the split."""
    common = (data.batch_size, data.rank, data.world_size)
    if isinstance(data, EvaluationData):
        yield from data.batches()
    elif data.resident is None:
        reader = data.reader
        yield from EvaluationData(
            reader.source, reader.split, reader.decoder, *common, data.num_workers, device
        ).batches()
    else:
        batch_size, *rank_of = common
        for index in range(-(-len(data.split) // batch_size)):
            samples = chunk_of(index, batch_size, len(data.split), *rank_of)
            if len(samples):
                yield data.resident.gather(samples, samples)


# ---------------------------------------------------------------- ridge regression: the head in closed form


@dataclass(frozen=True)
class Ridge:
    """A linear classifier on features: logits = weight @ features + bias.

    weight (K, D), bias (K,); the penalty on the squared weights of standardised features; what the least-squares
    answers were multiplied by to become logits; and, leaving each image out in turn, the mean squared error by penalty
    and the accuracy (several labels an image: all of them right).
    """

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float
    scale: float
    errors: dict[float, float]
    accuracy: float


def fit_ridge(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    penalties: Sequence[float] = PENALTIES,
    is_binary: bool = False,
) -> Ridge:
    """Least squares from features (N, D) to one-hot labels (N,), or to rows of 0 and 1 (N, K), in float64 on the CPU.

    Features are standardised, the intercept is not penalised. The penalty is the one with the least squared error where
    each image is answered by a fit to all others, which the eigenvalues of the Gram matrix give without fitting again
    (Golub, Heath and Wahba 1979). The answers to left-out images also give the scale: as logits times it they have the
    least cross-entropy, so that training by cross-entropy may start from here: softmax's, or with several labels an
    image or `is_binary` the sigmoids'. Raises UserError for fewer than two images.
    """
    num_images, is_multi_label = len(features), labels.ndim == 2
    if num_images < 2:
        raise UserError(f"Ridge regression needs at least two training images, got {num_images}.")
    labels = labels.cpu()
    targets = (labels if is_multi_label else nn.functional.one_hot(labels, num_labels)).double()  # (N, K)
    features = features.double().cpu()
    mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
    std = torch.where(std > 1e-9 * mean.abs(), std, 1.0)  # a constant feature differs from its mean by rounding
    standard, target_mean = (features - mean) / std, targets.mean(dim=0)
    centred = targets - target_mean
    eigenvalues, vectors = torch.linalg.eigh(standard.T @ standard)  # (D,), (D, D)
    rotated = standard @ vectors  # (N, D)
    projected = rotated.T @ centred  # (D, K)
    shrunk = eigenvalues.clamp(min=0)[:, None] + torch.tensor(penalties, dtype=torch.float64)  # (D, P)
    leverages = 1 / num_images + rotated.square() @ (1 / shrunk)  # (N, P)

    def left_out_errors(index: int) -> torch.Tensor:  # (N, K)
        residuals = centred - rotated @ (projected / shrunk[:, index, None])
        return residuals / (1 - leverages[:, index, None])

    errors = {penalty: left_out_errors(index).square().mean().item() for index, penalty in enumerate(penalties)}
    best = min(range(len(penalties)), key=lambda index: errors[penalties[index]])
    is_binary |= is_multi_label
    middle = 0.5 if is_binary else 0.0  # the answer whose logit is 0; softmax does not ask for one
    answers = targets - left_out_errors(best) - middle
    scale = _fit_scale(answers, targets, is_binary)
    is_right = ((answers > 0) == targets.bool()).all(dim=1) if is_multi_label else answers.argmax(dim=1) == labels
    weight = scale * (vectors @ (projected / shrunk[:, best, None]) / std[:, None]).T  # (K, D)
    bias = scale * (target_mean - middle) - weight @ mean
    return Ridge(weight, bias, penalties[best], scale, errors, is_right.double().mean().item())


def _fit_scale(answers: torch.Tensor, targets: torch.Tensor, is_binary: bool) -> float:
    """The factor of (N, K) answers with the least cross-entropy, up to LARGEST_SCALE, by bisection of its slope."""
    low, high = 0.0, LARGEST_SCALE
    for _ in range(40):
        logits = (low + high) / 2 * answers
        probabilities = logits.sigmoid() if is_binary else logits.softmax(dim=1)
        slope = ((probabilities - targets) * answers).sum()  # rises with the factor: the loss is convex in it
        low, high = ((low + high) / 2, high) if slope < 0 else (low, (low + high) / 2)
    return low


@torch.no_grad()
def start_from_ridge(
    model: ViTScratchForImageClassification, training: TrainingData, is_binary: bool = False
) -> Ridge | None:
    """The ridge regression on the cached training features as they are not mirrored, which the classifier then holds.

    is_binary: binary cross-entropy follows. None for a classifier that is more than one matrix, which stays as it is.
    """
    classifier = model.classifier
    if not isinstance(classifier, nn.Linear):
        return None
    features, labels = training.resident.images[:, 0], training.resident.labels
    ridge = fit_ridge(features, labels, model.num_labels, is_binary=is_binary)
    classifier.weight.copy_(ridge.weight)
    classifier.bias.copy_(ridge.bias)
    return ridge
