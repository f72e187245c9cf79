"""Scores against three lines of numpy and against scikit-learn, without a network."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import f1_score, top_k_accuracy_score

from modeling_vit_scratch.results.metrics import (
    Accuracy,
    MacroF1,
    Top5Accuracy,
    classification_scores,
    confusion,
    per_class_scores,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(137, 7))
REFERENCES = RNG.integers(0, 6, 137)  # class 6 never occurs
RANKINGS = np.argsort(-LOGITS, axis=1)[:, :5]


def test_scores_equal_numpy_and_scikit_learn():
    scores = classification_scores(RANKINGS, REFERENCES, 7)
    best = LOGITS.argmax(1)
    assert scores["accuracy"] == (best == REFERENCES).mean()
    assert scores["accuracy_top5"] == pytest.approx(top_k_accuracy_score(REFERENCES, LOGITS, k=5, labels=range(7)))
    assert scores["f1_macro"] == pytest.approx(
        f1_score(REFERENCES, best, average="macro", labels=range(7), zero_division=0)
    )


def test_top5_is_left_out_where_it_says_nothing():
    assert "accuracy_top5" not in classification_scores(RANKINGS[:, :5] % 5, REFERENCES % 5, 5)


def test_metrics_are_evaluates_and_add_up_over_batches():
    metric = Accuracy()
    assert isinstance(metric, evaluate.Metric)
    for start in range(0, 137, 10):
        chunk = slice(start, start + 10)
        metric.add_batch(predictions=RANKINGS[chunk, 0], references=REFERENCES[chunk])
    assert metric.compute()["accuracy"] == (RANKINGS[:, 0] == REFERENCES).mean()
    combined = evaluate.combine([Accuracy(), MacroF1(7)])
    assert set(combined.compute(predictions=RANKINGS[:, 0], references=REFERENCES)) == {"accuracy", "f1_macro"}
    assert Top5Accuracy().compute(predictions=RANKINGS, references=RANKINGS[:, 4])["accuracy_top5"] == 1.0


def test_confusion_rows_are_true_classes():
    table = confusion(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), 3)
    assert table == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_per_class_scores_name_each_class_absent_ones_too():
    rows = per_class_scores(np.array([0, 1, 1]), np.array([0, 0, 1]), ["cat", "dog", "newt"])
    assert [row["class"] for row in rows] == ["cat", "dog", "newt"]
    assert rows[0] == {"class": "cat", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert rows[2]["support"] == 0 and rows[2]["f1"] == 0.0
