"""Scores as `evaluate.Metric`s that need no network, computed from counts, never averaged over batches."""

from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

_CITATION = ""


class _ImageMetric(evaluate.Metric):
    """An evaluate.Metric kept in memory: no lock files."""

    def __init__(self, **kwargs: Any):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        predictions = datasets.Value("int64")
        if self.takes_rankings:
            predictions = datasets.Sequence(predictions)
        features = datasets.Features({"predictions": predictions, "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation=_CITATION, inputs_description="class ids", features=features
        )

    takes_rankings = False


class Accuracy(_ImageMetric):
    """Share of predictions (N,) that equal the references (N,)."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class Top5Accuracy(_ImageMetric):
    """Share of references (N,) among the five most probable classes; predictions (N, 5), most probable first."""

    takes_rankings = True

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions)[:, :5] == np.asarray(references)[:, None]
        return {"accuracy_top5": float(hits.any(axis=1).mean())}


class MacroF1(_ImageMetric):
    """Mean over classes of F1 = 2PR/(P+R); a class that is neither predicted nor present counts 0, as scikit-learn's
    zero_division=0. `num_labels` names all classes, so that absent ones count too."""

    def __init__(self, num_labels: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_labels = num_labels

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        labels = range(self.num_labels)
        score = f1_score(references, predictions, labels=labels, average="macro", zero_division=0)
        return {"f1_macro": float(score)}


def classification_scores(rankings: np.ndarray, references: np.ndarray, num_labels: int) -> dict[str, float]:
    """accuracy, f1_macro and, with more than five classes, accuracy_top5.

    rankings int64 (N, k): class ids, most probable first, k = min(5, num_labels); references int64 (N,).
    """
    best = rankings[:, 0]
    scores = {
        **Accuracy().compute(predictions=best, references=references),
        **MacroF1(num_labels).compute(predictions=best, references=references),
    }
    if num_labels > 5:
        scores |= Top5Accuracy().compute(predictions=rankings, references=references)
    return scores


def confusion(predictions: np.ndarray, references: np.ndarray, num_labels: int) -> list[list[int]]:
    """Counts (K, K): row = true class, column = predicted class."""
    return confusion_matrix(references, predictions, labels=range(num_labels)).tolist()


def per_class_scores(predictions: np.ndarray, references: np.ndarray, class_names: list[str]) -> list[dict[str, Any]]:
    """One row a class: class, precision, recall, f1, support (its number of images)."""
    columns = precision_recall_fscore_support(references, predictions, labels=range(len(class_names)), zero_division=0)
    return [
        {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for name, p, r, f, n in zip(class_names, *columns, strict=True)
    ]
