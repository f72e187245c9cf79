"""What is learned and how it is scored: one class an image, or any number of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.splits import Source
from ..results.metrics import (
    calibration,
    classification_scores,
    confusion,
    multi_label_per_class_scores,
    multi_label_scores,
    per_class_scores,
)
from .recipe import Recipe

# B batch, N images, K labels


@dataclass(frozen=True)
class SingleLabel:
    """One class an image: softmax cross-entropy. Targets: class ids (B,), or probabilities (B, K) of mixed images.

    is_binary: training lowers binary cross-entropy instead, a mean over the classes, as DeiT III's does (2204.07118).
    target_threshold: a class whose share of a mixed image is above it counts as wholly there, before smoothing (timm
    smooths before, which no threshold of 0 would survive); None: as its share says.
    """

    num_labels: int
    label_smoothing: float = 0.0
    class_weights: torch.Tensor | None = None  # (K,)
    is_binary: bool = False
    target_threshold: float | None = None

    problem_type = "single_label_classification"

    def loss_sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum over the images of what training lowers."""
        if self.is_binary:
            return self._binary_loss_sum(logits, targets)
        return torch.nn.functional.cross_entropy(
            logits, targets, self.class_weights, reduction="sum", label_smoothing=self.label_smoothing
        )

    def _binary_loss_sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        shares = torch.nn.functional.one_hot(targets, self.num_labels) if targets.ndim == 1 else targets
        shares = shares.to(logits.dtype)
        present = shares if self.target_threshold is None else (shares > self.target_threshold).to(logits.dtype)
        smooth = present * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(dim=1)
        return losses.sum() if self.class_weights is None else losses @ (shares @ self.class_weights)

    def num_correct(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """How many images have their class, or the greater share of a mixed one, as the most probable answer."""
        answers = targets if targets.ndim == 1 else targets.argmax(dim=1)
        return (logits.argmax(dim=1) == answers).sum()

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B,) cross-entropies as they are reported: neither smoothed nor weighted."""
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def kept(self, logits: torch.Tensor) -> torch.Tensor:
        """What is kept of the logits for the scores: the five most probable classes, best first, and the probability
        of the first (B, min(5, K) + 1). One tensor of floats, which hold the class ids of any network exactly."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best = logits.topk(min(5, self.num_labels), dim=1).indices.to(logits.dtype)
        return torch.cat([best, logits.softmax(dim=1).amax(dim=1, keepdim=True)], dim=1)

    def scores(self, kept: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return classification_scores(kept[:, :-1].astype(np.int64), references, self.num_labels)

    def details(self, kept: np.ndarray, references: np.ndarray, class_names: list[str]) -> dict[str, Any]:
        answers = kept[:, 0].astype(np.int64)
        return {
            "per_class": per_class_scores(answers, references, class_names),
            "confusion": confusion(answers, references, self.num_labels),
            "calibration": calibration(kept[:, -1], answers == references),
        }


@dataclass(frozen=True)
class MultiLabel:
    """Any number of classes an image: binary cross-entropy, a mean over the classes. Targets: (B, K) from 0 to 1.

    positive_weights: (K,), how many times as much an image with the class counts as one without it.
    """

    num_labels: int
    label_smoothing: float = 0.0  # towards a half
    positive_weights: torch.Tensor | None = None

    problem_type = "multi_label_classification"

    def loss_sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        smooth = targets.to(logits.dtype) * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, smooth, reduction="sum", pos_weight=self.positive_weights
        )
        return losses / self.num_labels

    def num_correct(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """How many images have all their classes, and no other, at a probability over a half."""
        return ((logits > 0) == (targets > 0.5)).all(dim=1).sum()

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = labels.to(logits.dtype)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)

    def kept(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def scores(self, kept: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return multi_label_scores(kept, references)

    def details(self, kept: np.ndarray, references: np.ndarray, class_names: list[str]) -> dict[str, Any]:
        return {"per_class": multi_label_per_class_scores(kept, references, class_names)}


Objective = SingleLabel | MultiLabel


def objective_kind(is_multi_label: bool) -> type[Objective]:
    """What is learned of images that have one class each, or any number of them."""
    return MultiLabel if is_multi_label else SingleLabel


# ---------------------------------------------------------------- of a run


def objective_of(recipe: Recipe, source: Source, device: torch.device, dtype: torch.dtype) -> Objective:
    """What a run on these images learns, its weights of classes on the device."""
    weights_of = positive_weights if source.is_multi_label else class_weights
    weights = weights_of(source).to(device, dtype) if recipe.class_weights else None
    num_labels, smoothing = len(source.class_names), recipe.label_smoothing_factor
    if source.is_multi_label:
        return MultiLabel(num_labels, smoothing, weights)
    return SingleLabel(num_labels, smoothing, weights, recipe.bce_loss, recipe.bce_target_thresh)


def class_weights(source: Source) -> torch.Tensor:
    """Weights (K,) of the classes in the loss: N / (K * N_k), so that their mean over the samples is 1."""
    counts = torch.from_numpy(source.label_ids_of("train")).bincount(minlength=len(source.class_names))
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)


def positive_weights(source: Source) -> torch.Tensor:
    """Weights (K,) of the images with a class: those without it over those with it, so that both weigh the same."""
    sets = source.label_sets_of("train")
    counts = torch.tensor([index for ids in sets for index in ids]).bincount(minlength=len(source.class_names))
    is_split = (counts > 0) & (counts < len(sets))  # else there is nothing to balance
    return torch.where(is_split, (len(sets) - counts) / counts.clamp(min=1), 1.0)
