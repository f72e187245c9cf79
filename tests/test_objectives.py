"""Losses and scores of one class an image and of several, against torch, transformers and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from small_vit import build, images
from timm.loss import BinaryCrossEntropy

from modeling_vit_scratch.training.objectives import MultiLabel, SingleLabel

LOGITS = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(40) % 7
ROWS = (torch.rand(40, 7, generator=torch.Generator().manual_seed(1)) < 0.3).float()


def test_single_label_training_lowers_torchs_cross_entropy():
    weights = torch.linspace(0.5, 2, 7)
    objective = SingleLabel(7, label_smoothing=0.1, class_weights=weights)
    expected = torch.nn.functional.cross_entropy(LOGITS, IDS, weights, reduction="sum", label_smoothing=0.1)
    assert torch.equal(objective.loss_sum(LOGITS, IDS), expected)
    # probabilities that say the same give the same, up to the order of the sums
    as_rows = torch.nn.functional.one_hot(IDS, 7).float()
    assert objective.loss_sum(LOGITS, as_rows).item() == pytest.approx(expected.item(), rel=1e-5)
    assert (
        objective.num_correct(LOGITS, IDS) == objective.num_correct(LOGITS, as_rows) == (LOGITS.argmax(1) == IDS).sum()
    )


def test_classes_weigh_as_much_where_they_are_as_where_they_are_not():
    targets = torch.nn.functional.one_hot(IDS, 7).float()
    weights = (40 - targets.sum(0)) / targets.sum(0)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(LOGITS, targets, reduction="none")
    expected = (losses * torch.where(targets > 0, weights, 1.0)).sum() / 7
    assert MultiLabel(7, positive_weights=weights).loss_sum(LOGITS, targets).item() == pytest.approx(expected.item())


MIXED = (0.7 * torch.nn.functional.one_hot(IDS, 7) + 0.3 * torch.nn.functional.one_hot(IDS.flip(0), 7)).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_training_lowers_timms_binary_cross_entropy(smoothing):
    objective = SingleLabel(7, smoothing, is_binary=True)
    expected = BinaryCrossEntropy(smoothing)(LOGITS, IDS)
    assert (objective.loss_sum(LOGITS, IDS) / 40).item() == pytest.approx(expected.item(), rel=1e-6)
    smooth = MIXED * (1 - smoothing) + smoothing / 7  # as timm's mixup smooths
    expected = BinaryCrossEntropy()(LOGITS, smooth)
    assert (objective.loss_sum(LOGITS, MIXED) / 40).item() == pytest.approx(expected.item(), rel=1e-6)
    # what is reported stays softmax's
    assert torch.equal(objective.losses(LOGITS, IDS), SingleLabel(7).losses(LOGITS, IDS))


def test_classes_above_the_threshold_are_wholly_there_as_deit_3_trains():
    objective = SingleLabel(7, is_binary=True, target_threshold=0.0)
    expected = torch.nn.BCEWithLogitsLoss()(LOGITS, (MIXED > 0).float())
    assert (objective.loss_sum(LOGITS, MIXED) / 40).item() == pytest.approx(expected.item(), rel=1e-6)
    one = SingleLabel(7, is_binary=True, target_threshold=0.5).loss_sum(LOGITS, MIXED)
    expected = SingleLabel(7, is_binary=True).loss_sum(LOGITS, MIXED.argmax(dim=1))
    assert one.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_of_classes_weigh_images_in_binary_training():
    weights = torch.linspace(0.5, 2, 7)
    plain, weighted = (SingleLabel(7, 0.1, found, is_binary=True) for found in (None, weights))
    singly = torch.stack([plain.loss_sum(LOGITS[i : i + 1], IDS[i : i + 1]) for i in range(40)])
    assert weighted.loss_sum(LOGITS, IDS).item() == pytest.approx((singly * weights[IDS]).sum().item(), rel=1e-6)
    as_rows = torch.nn.functional.one_hot(IDS, 7).float()
    assert weighted.loss_sum(LOGITS, as_rows).item() == pytest.approx(weighted.loss_sum(LOGITS, IDS).item())


@pytest.mark.parametrize("kind, labels", [(SingleLabel, IDS[:3] % 5), (MultiLabel, ROWS[:3, :5])])
def test_the_loss_is_that_of_the_network_itself(kind, labels):
    objective = kind(5)
    model = build(problem_type=objective.problem_type)
    output = model(images(), labels=labels)
    assert (objective.loss_sum(output.logits, labels) / 3).item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert objective.losses(output.logits, labels).mean().item() == pytest.approx(output.loss.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_kept_holds_class_ids_exactly_and_the_probability_of_the_answer(dtype):
    logits = torch.randn(30, 3001, generator=torch.Generator().manual_seed(2)).to(dtype)
    kept = SingleLabel(3001).kept(logits).numpy()  # bfloat16 itself has no 3,000
    assert np.array_equal(kept[:, :-1].astype(int), logits.topk(5, dim=1).indices.numpy())
    expected = torch.nn.functional.softmax(logits.double(), dim=1).amax(dim=1)
    assert kept[:, -1] == pytest.approx(expected.numpy(), rel=1e-5)


def test_single_label_scores_and_calibration_come_from_what_is_kept():
    objective, truth = SingleLabel(7), IDS.numpy()
    kept = objective.kept(LOGITS).numpy()
    best = LOGITS.argmax(1).numpy()
    scores = objective.scores(kept, truth)
    assert scores["accuracy"] == sklearn.accuracy_score(truth, best)
    assert scores["accuracy_top5"] == pytest.approx(sklearn.top_k_accuracy_score(truth, LOGITS.numpy(), k=5))
    details = objective.details(kept, truth, list("abcdefg"))
    assert details["confusion"] == sklearn.confusion_matrix(truth, best).tolist()
    sure = LOGITS.softmax(1).amax(1).double().mean().item()
    assert details["calibration"]["mean_confidence"] == pytest.approx(sure, rel=1e-6)
    assert sum(row["count"] for row in details["calibration"]["bins"]) == 40


def test_multi_label_smoothing_moves_targets_towards_a_half():
    smooth = torch.where(ROWS > 0, 0.9, 0.1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(LOGITS, smooth, reduction="sum") / 7
    assert MultiLabel(7, 0.2).loss_sum(LOGITS, ROWS).item() == pytest.approx(expected.item(), rel=1e-6)


def test_multi_label_scores_are_scikit_learns():
    kept, truth = MultiLabel(7).kept(LOGITS).numpy(), ROWS.numpy()
    scores = MultiLabel(7).scores(kept, truth)
    answers = LOGITS.numpy() > 0
    assert scores == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(truth, answers),
            "f1_macro": sklearn.f1_score(truth, answers, average="macro"),
            "f1_micro": sklearn.f1_score(truth, answers, average="micro"),
            "mean_average_precision": sklearn.average_precision_score(truth, LOGITS.numpy(), average="macro"),
        }
    )
    assert MultiLabel(7).num_correct(LOGITS, ROWS) == (answers == truth).all(axis=1).sum()
    rows = MultiLabel(7).details(kept, truth, list("abcdefg"))["per_class"]
    assert [row["support"] for row in rows] == truth.sum(axis=0).tolist()
    assert rows[2]["recall"] == pytest.approx(sklearn.recall_score(truth[:, 2], answers[:, 2]))


def test_a_class_that_no_image_has_leaves_the_mean_average_precision_alone():
    truth = ROWS.numpy().copy()
    truth[:, 3] = 0
    scores = MultiLabel(7).scores(LOGITS.numpy(), truth)
    others = np.delete(np.arange(7), 3)
    expected = sklearn.average_precision_score(truth[:, others], LOGITS.numpy()[:, others])
    assert scores["mean_average_precision"] == pytest.approx(expected)
    assert MultiLabel(7).scores(LOGITS.numpy(), truth * 0)["mean_average_precision"] == 0.0
