"""Scores against three lines of numpy and against scikit-learn, without a network."""

import evaluate
import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score, top_k_accuracy_score

from modeling_vit_scratch.results.metrics import (
    Accuracy,
    ExpectedCalibrationError,
    MacroF1,
    Top5Accuracy,
    calibration,
    classification_scores,
    confusion,
    per_class_scores,
    wilson_interval,
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


@pytest.mark.parametrize("correct, total", [(0, 1), (1, 1), (0, 40), (40, 40), (1, 3), (9_843, 10_000), (17, 360)])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_intervals_are_scipys(correct, total, confidence):
    expected = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    assert wilson_interval(correct, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_images_say_nothing_of_a_share():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_calibration_counts_each_bin_with_its_upper_end():
    # (0.6, 0.8]: two at 0.7 and 0.8, one right: |0.5 - 0.75|; (0.8, 1]: three at 1, two right: |2/3 - 1|; 0: one wrong
    sure, right = np.array([0.8, 1.0, 0.7, 1.0, 1.0, 0.0]), np.array([1, 1, 0, 0, 1, 0])
    found = calibration(sure, right, num_bins=5)
    assert found["expected_calibration_error"] == pytest.approx((2 * 0.25 + 3 / 3 + 1 * 0) / 6)
    assert found["mean_confidence"] == pytest.approx(0.75)
    assert [row["count"] for row in found["bins"]] == [1, 0, 0, 2, 3]
    assert found["bins"][1] == {"above": 0.2, "up_to": 0.4, "count": 0, "confidence": None, "accuracy": None}
    assert found["bins"][3]["confidence"] == pytest.approx(0.75) and found["bins"][3]["accuracy"] == 0.5


def test_calibration_error_is_a_plain_loop_and_an_evaluate_metric():
    sure, right = RNG.random(500), RNG.integers(0, 2, 500)
    expected = 0.0
    for index in range(15):
        inside = [place for place in range(500) if index / 15 < sure[place] <= (index + 1) / 15]
        expected += abs(sum(right[inside]) - sum(sure[inside])) / 500
    metric = ExpectedCalibrationError()
    assert isinstance(metric, evaluate.Metric)
    for start in range(0, 500, 33):
        metric.add_batch(predictions=sure[start : start + 33], references=right[start : start + 33])
    assert metric.compute()["expected_calibration_error"] == pytest.approx(expected)


def test_answers_as_sure_as_they_are_right_are_calibrated():
    right = np.arange(1000) % 10 < 7
    assert calibration(np.full(1000, 0.7), right)["expected_calibration_error"] == pytest.approx(0)
    assert calibration(np.full(1000, 1.0), right)["expected_calibration_error"] == pytest.approx(0.3)
