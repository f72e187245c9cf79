"""Scores as `evaluate.Metric`s that need no network, computed from counts, never averaged over batches."""

import math
from statistics import NormalDist
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

_CITATION = ""


class _ImageMetric(evaluate.Metric):
    """An evaluate.Metric kept in memory: no lock files."""

    def __init__(self, **kwargs: Any):
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": self.predictions, "references": self.references})
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation=_CITATION, inputs_description="class ids", features=features
        )

    predictions: Any = datasets.Value("int64")
    references: Any = datasets.Value("int64")


class Accuracy(_ImageMetric):
    """Share of predictions (N,) that equal the references (N,)."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class Top5Accuracy(_ImageMetric):
    """Share of references (N,) among the five most probable classes; predictions (N, 5), most probable first."""

    predictions = datasets.Sequence(datasets.Value("int64"))

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


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of the share that `correct` of `total` images stand for; (0, 1) where there are none.

    Wilson's score interval (1927), which covers as often as it says for few images and for shares near 0 and 1 too,
    where the usual one does not (Brown, Cai, DasGupta: Interval Estimation for a Binomial Proportion, 2001).
    """
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = correct / total, 1 + z**2 / total
    middle = share + z**2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return (0.0 if correct == 0 else low), (1.0 if correct == total else high)  # there exact but for rounding


# ---------------------------------------------------------------- how sure the answers are, and how often right


class ExpectedCalibrationError(_ImageMetric):
    """Mean over the images of how far a bin's mean confidence is from its share of right answers.

    predictions (N,): the probability of each answer; references (N,): 1 where it is right, else 0. Bins of equal width,
    15 by default, each with its upper end (Guo et al., 1706.04599, section 2).
    """

    predictions = datasets.Value("float64")

    def __init__(self, num_bins: int = 15, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_bins = num_bins

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        bins = calibration_bins(np.asarray(predictions), np.asarray(references), self.num_bins)
        gaps = [row["count"] * abs(row["accuracy"] - row["confidence"]) for row in bins if row["count"]]
        return {"expected_calibration_error": sum(gaps) / len(predictions)}


def calibration_bins(confidences: np.ndarray, is_right: np.ndarray, num_bins: int) -> list[dict[str, Any]]:
    """One row a bin (above, up_to] of [0, 1]: its count of images, their mean confidence and share of right answers.

    The means are None in a bin without images. confidences, is_right: (N,).
    """
    edges = np.linspace(0, 1, num_bins + 1)
    places = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, num_bins - 1)
    rows = []
    for place in range(num_bins):
        inside = places == place
        means = (float(values[inside].mean()) if inside.any() else None for values in (confidences, is_right))
        above, up_to = edges[place : place + 2].tolist()
        rows.append(
            {"above": above, "up_to": up_to, "count": int(inside.sum()), **dict(zip(("confidence", "accuracy"), means))}
        )
    return rows


def calibration(confidences: np.ndarray, is_right: np.ndarray, num_bins: int = 15) -> dict[str, Any]:
    """expected_calibration_error, mean_confidence and bins. confidences, is_right: (N,), at least one image."""
    confidences = confidences.astype(np.float64)
    error = ExpectedCalibrationError(num_bins).compute(predictions=confidences, references=is_right.astype(np.int64))
    bins = calibration_bins(confidences, is_right, num_bins)
    return {**error, "mean_confidence": float(confidences.mean()), "bins": bins}


# ---------------------------------------------------------------- several labels an image


class _MultiLabelMetric(_ImageMetric):
    """Rows of one number a class: logits (N, K) as predictions, 0 or 1 (N, K) as references."""

    predictions = datasets.Sequence(datasets.Value("float32"))
    references = datasets.Sequence(datasets.Value("int64"))


class ExactMatch(_MultiLabelMetric):
    """Share of images whose classes of a probability over a half are exactly their own."""

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, float]:
        return {"accuracy": float(((np.asarray(predictions) > 0) == np.asarray(references)).all(axis=1).mean())}


class MultiLabelF1(_MultiLabelMetric):
    """F1 at a probability of a half: the mean over classes, and over all answers counted together."""

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, float]:
        answers, truth = np.asarray(predictions) > 0, np.asarray(references)
        return {
            f"f1_{average}": float(f1_score(truth, answers, average=average, zero_division=0))
            for average in ("macro", "micro")
        }


class MeanAveragePrecision(_MultiLabelMetric):
    """Mean over the classes that are there of the average precision, at no threshold; 0 where no class is there."""

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, float]:
        logits, truth = np.asarray(predictions), np.asarray(references)
        present = truth.any(axis=0)
        if not present.any():
            return {"mean_average_precision": 0.0}
        score = average_precision_score(truth[:, present], logits[:, present], average="macro")
        return {"mean_average_precision": float(score)}


def multi_label_scores(logits: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """accuracy (exact match), f1_macro, f1_micro and mean_average_precision of logits (N, K) for 0 or 1 (N, K)."""
    truth = references.astype(np.int64)
    scores: dict[str, float] = {}
    for metric in (ExactMatch(), MultiLabelF1(), MeanAveragePrecision()):
        scores |= metric.compute(predictions=logits.astype(np.float32), references=truth)
    return scores


def multi_label_per_class_scores(
    logits: np.ndarray, references: np.ndarray, class_names: list[str]
) -> list[dict[str, Any]]:
    """One row a class: class, precision, recall, f1, support, at a probability of a half."""
    columns = precision_recall_fscore_support(references.astype(np.int64), logits > 0, average=None, zero_division=0)
    return _rows(class_names, columns)


# ---------------------------------------------------------------- one label an image, class by class


def confusion(predictions: np.ndarray, references: np.ndarray, num_labels: int) -> list[list[int]]:
    """Counts (K, K): row = true class, column = predicted class."""
    return confusion_matrix(references, predictions, labels=range(num_labels)).tolist()


def per_class_scores(predictions: np.ndarray, references: np.ndarray, class_names: list[str]) -> list[dict[str, Any]]:
    """One row a class: class, precision, recall, f1, support (its number of images)."""
    columns = precision_recall_fscore_support(references, predictions, labels=range(len(class_names)), zero_division=0)
    return _rows(class_names, columns)


def _rows(class_names: list[str], columns: Any) -> list[dict[str, Any]]:
    return [
        {"class": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for name, p, r, f, n in zip(class_names, *columns, strict=True)
    ]
