"""The head on cached features: the same steps as on images, no image lost over processes, ridge as scikit-learn's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from small_vit import build

from modeling_vit_scratch import ViTScratchImageProcessor
from modeling_vit_scratch.data.augmentation import Augmentation, Draws, normalise
from modeling_vit_scratch.data.decoding import Decoder, normalisation
from modeling_vit_scratch.data.loading import EvaluationData, TrainingData
from modeling_vit_scratch.data.sources import open_source
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.evaluation import evaluate
from modeling_vit_scratch.training.features import (
    PENALTIES,
    HeadOnFeatures,
    cache_features,
    can_cache_features,
    compute_features,
    fit_ridge,
    start_from_ridge,
)
from modeling_vit_scratch.training.finetuning import prepare_finetuning, set_train_mode
from modeling_vit_scratch.training.objectives import SingleLabel
from modeling_vit_scratch.training.recipes import RECIPES

CPU = torch.device("cpu")
SEED, BATCH = 3, 8
HEAD = RECIPES["finetune"].replace(finetune="head", random_resized_crop_scale=None)
DROPOUTS = {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.2}  # which a frozen backbone must not see


@pytest.fixture
def repo(parquet_repo):
    return parquet_repo(num_classes=5, size=(32, 32), train=[23, 14], test=[11])


def data_of(repo, rank=0, world_size=1, is_balanced=False):
    source = open_source(dataset_name=str(repo), train_val_split=0.0)
    processor = ViTScratchImageProcessor(size={"height": 32, "width": 32})
    decoder, common = Decoder(processor), (rank, world_size, 0, CPU)
    training = TrainingData(source, decoder, BATCH, SEED, *common, is_balanced=is_balanced)
    held = {"test": EvaluationData(source, source.splits["test"], decoder, BATCH, *common)}
    return training, held, normalisation(processor, CPU)


def frozen_network(**fields):
    model = build(**{**DROPOUTS, **fields})
    prepare_finetuning(model, HEAD)
    return model


def train_head(model, network, training, augment, pixels, steps=20):
    """The loop's step, on images or on features; the losses."""
    optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-2)
    set_train_mode(model)
    losses = []
    for step, batch in enumerate(training.batches(0, steps)):
        draws = Draws(SEED, step, BATCH, batch.positions)
        images = normalise(augment(batch.images, draws), *pixels)
        images = augment.erase(images, draws)
        loss = torch.nn.functional.cross_entropy(network(pixel_values=images).logits, batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- features in the place of images


@pytest.mark.parametrize("flip_prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("is_balanced", [False, True])
def test_the_head_on_features_takes_the_steps_of_the_head_on_images(repo, flip_prob, is_balanced):
    training, held, pixels = data_of(repo, is_balanced=is_balanced)
    on_images, on_features = frozen_network(), frozen_network()
    expected = train_head(on_images, on_images, training, Augmentation(horizontal_flip_prob=flip_prob), pixels)
    cached = cache_features(on_features, training, held, pixels, flip_prob, Accelerator(cpu=True))
    head = HeadOnFeatures(on_features)
    losses = train_head(on_features, head, cached.training, cached.augment, cached.pixels)
    # float32: an image's features in another batch differ by rounding, and AdamW divides by small gradients
    assert losses == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(on_features.classifier.weight, on_images.classifier.weight, rtol=0, atol=1e-5)

    objective, accelerator = SingleLabel(5), Accelerator(cpu=True)
    of_images = evaluate(on_images, held["test"], pixels, accelerator, objective)
    of_features = evaluate(HeadOnFeatures(on_features), cached.held["test"], cached.pixels, accelerator, objective)
    assert of_features.scores == pytest.approx(of_images.scores, abs=1e-5)
    assert np.array_equal(of_features.references, of_images.references)


def test_features_are_the_pooled_output_of_each_image_and_of_its_mirror_image(repo):
    training, _, pixels = data_of(repo)
    model = frozen_network()
    features, labels = compute_features(model, training, pixels, Accelerator(cpu=True), is_mirrored=True)
    images = normalise(training.resident.images, *pixels)
    with torch.no_grad():
        expected = [model.vit(view).pooler_output for view in (images, images.flip(-1))]
    torch.testing.assert_close(features, torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, training.resident.labels)
    assert (features[:, 0] - features[:, 1]).abs().max() > 0.1


def test_images_that_are_read_at_random_give_the_features_of_resident_ones(repo, monkeypatch):
    training, _, pixels = data_of(repo)
    monkeypatch.setattr("modeling_vit_scratch.data.loading.RESIDENT_BYTES", 0)
    read, held, _ = data_of(repo)
    assert training.resident is not None and read.resident is None
    model, accelerator = frozen_network(), Accelerator(cpu=True)
    expected, found = (compute_features(model, data, pixels, accelerator) for data in (training, read))
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    cached = cache_features(model, read, held, pixels, 0.5, accelerator)
    assert read.resident is None and cached.training.resident.images.shape == (37, 2, 32)


def test_the_head_registers_the_classifier_alone_and_it_is_the_models(repo):
    model = frozen_network(classifier="mlp")
    head = HeadOnFeatures(model)
    assert {name for name, _ in head.named_parameters()} == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert all(mine is theirs for mine, theirs in zip(head.parameters(), model.classifier.parameters(), strict=True))


def test_what_was_computed_is_said_once(repo, capsys):
    training, held, pixels = data_of(repo)
    cache_features(frozen_network(), training, held, pixels, 0.5, Accelerator(cpu=True))
    said = capsys.readouterr().out
    assert said.startswith("features of 48 images computed once in ") and "training images mirrored too" in said


@pytest.mark.parametrize(
    "changes, is_cached",
    [
        ({}, True),
        ({"horizontal_flip_prob": 0.0}, True),
        ({"finetune": "last:1"}, False),
        ({"streaming": True}, False),
        ({"crop_padding": 4}, False),
        ({"random_resized_crop_scale": 0.5}, False),
        ({"rotation_degrees": 5.0}, False),
        ({"translate_pixels": 1.0}, False),
        ({"scale_range": 0.1}, False),
        ({"auto_augment": "randaugment"}, False),
        ({"vertical_flip_prob": 0.5}, False),
        ({"color_jitter": 0.3}, False),
        ({"random_erasing_prob": 0.1}, False),
        ({"mixup_alpha": 0.2}, False),
        ({"cutmix_alpha": 1.0}, False),
    ],
)
def test_features_are_cached_only_where_no_more_than_mirroring_is_drawn(changes, is_cached):
    assert can_cache_features(HEAD.replace(**changes), 1000, 768) is is_cached


def test_features_that_would_not_fit_into_memory_are_not_cached():
    plain = HEAD.replace(horizontal_flip_prob=0.0)
    assert can_cache_features(plain, 600_000, 768) and not can_cache_features(plain, 1_281_167, 768)
    assert not can_cache_features(HEAD, 600_000, 768)  # two views


TWO_PROCESSES = """
import sys
import torch
from accelerate import Accelerator
from test_features import data_of, frozen_network
from modeling_vit_scratch.training.features import compute_features

accelerator = Accelerator(cpu=True)
training, held, pixels = data_of(sys.argv[1], accelerator.process_index, accelerator.num_processes)
found = [
    compute_features(frozen_network(), data, pixels, accelerator, mirrored)
    for data, mirrored in ((training, True), (held["test"], False))
]
assert accelerator.num_processes == 2
torch.save(found, f"{sys.argv[2]}/{accelerator.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_compute_the_features_of_one_each_image_once(repo, tmp_path):
    script = tmp_path / "compute.py"
    script.write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, str(script), str(repo), str(tmp_path)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    training, held, pixels = data_of(repo)
    model, accelerator = frozen_network(), Accelerator(cpu=True)
    for rank in range(2):
        of_training, of_test = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for found, data, is_mirrored in ((of_training, training, True), (of_test, held["test"], False)):
            features, labels = compute_features(model, data, pixels, accelerator, is_mirrored)
            torch.testing.assert_close(found[0], features, rtol=1e-5, atol=1e-5)
            assert torch.equal(found[1], labels)


# ---------------------------------------------------------------- ridge regression


def clouds(num=150, num_features=12, num_labels=4, seed=0):
    """Features around one centre a class, of very different scales, one of them constant; and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_labels, num)
    features = rng.normal(size=(num_labels, num_features))[labels] + rng.normal(size=(num, num_features))
    features = features * np.logspace(-3, 3, num_features) + 5
    features[:, 2] = 0.1
    return torch.from_numpy(features), torch.from_numpy(labels)


def standardised(features):
    spread = features.std(dim=0, correction=0)
    return ((features - features.mean(dim=0)) / torch.where(spread > 1e-9, spread, 1.0)).numpy()


@pytest.mark.parametrize("shape", [(150, 12), (20, 60)])  # more images than features, and fewer
def test_the_answers_are_scikit_learns(shape):
    features, labels = clouds(*shape)
    ridge = fit_ridge(features, labels, 4)
    theirs = RidgeClassifierCV(alphas=PENALTIES).fit(standardised(features), labels.numpy())
    targets = torch.nn.functional.one_hot(labels, 4).double().numpy()
    ours = features @ ridge.weight.T + ridge.bias
    expected = SklearnRidge(alpha=ridge.penalty).fit(standardised(features), targets).predict(standardised(features))
    torch.testing.assert_close(ours / ridge.scale, torch.from_numpy(expected))
    assert theirs.alpha_ == ridge.penalty
    assert np.array_equal(ours.argmax(dim=1).numpy(), theirs.predict(standardised(features)))


def test_errors_are_those_of_leaving_each_image_out_and_fitting_again():
    features, labels = clouds(40)
    ridge = fit_ridge(features, labels, 4)
    inputs, targets = standardised(features), torch.nn.functional.one_hot(labels, 4).double().numpy()
    answers = []
    for index in range(40):
        others = np.arange(40) != index
        fitted = SklearnRidge(alpha=ridge.penalty).fit(inputs[others], targets[others])
        answers.append(fitted.predict(inputs[index : index + 1])[0])
    assert ridge.errors[ridge.penalty] == pytest.approx(((np.stack(answers) - targets) ** 2).mean())
    assert ridge.accuracy == (np.stack(answers).argmax(axis=1) == labels.numpy()).mean()
    theirs = RidgeCV(alphas=PENALTIES, store_cv_results=True).fit(inputs, targets)
    assert list(ridge.errors.values()) == pytest.approx(theirs.cv_results_.mean(axis=(0, 1)))


def test_the_scale_is_the_one_of_least_cross_entropy_on_left_out_images():
    features, labels = clouds(40, seed=5)
    ridge = fit_ridge(features, labels, 4)
    inputs, targets = standardised(features), torch.nn.functional.one_hot(labels, 4).double().numpy()
    answers = np.stack([
        SklearnRidge(alpha=ridge.penalty).fit(np.delete(inputs, i, 0), np.delete(targets, i, 0)).predict(inputs[[i]])[0]
        for i in range(40)
    ])  # fmt: skip
    losses = {
        factor: torch.nn.functional.cross_entropy(factor * ridge.scale * torch.from_numpy(answers), labels).item()
        for factor in (0.9, 0.99, 1.0, 1.01, 1.1)
    }
    assert min(losses, key=losses.get) == 1.0


def test_a_class_without_images_and_answers_that_are_all_right_give_finite_weights():
    features = torch.eye(6).repeat(4, 1) * 3
    ridge = fit_ridge(features, torch.arange(6).repeat(4), 8)
    assert ridge.weight.isfinite().all() and ridge.bias.isfinite().all() and ridge.accuracy == 1.0
    assert not ridge.weight[6:].any() and 10 < ridge.scale <= 100
    logits = features.double() @ ridge.weight.T + ridge.bias
    assert torch.nn.functional.cross_entropy(logits, torch.arange(6).repeat(4)) < 1e-3


def test_one_image_is_too_few():
    with pytest.raises(UserError, match="at least two training images, got 1"):
        fit_ridge(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), 2)


def test_several_labels_an_image_are_answered_around_a_logit_of_zero():
    features, labels = clouds(num_labels=4)
    rows = torch.nn.functional.one_hot(labels, 4).float()
    rows[:, 3] = (labels % 2 == 0).float()
    ridge = fit_ridge(features, rows, 4)
    fitted = SklearnRidge(alpha=ridge.penalty).fit(standardised(features), rows.numpy())
    expected = torch.from_numpy(fitted.predict(standardised(features))) - 0.5
    torch.testing.assert_close((features @ ridge.weight.T + ridge.bias) / ridge.scale, expected)
    assert 0.5 < ridge.accuracy <= 1


def test_before_binary_training_the_scale_is_that_of_the_sigmoids():
    features, labels = clouds(num_labels=4)
    binary, plain = (fit_ridge(features, labels, 4, is_binary=is_binary) for is_binary in (True, False))
    as_rows = fit_ridge(features, torch.nn.functional.one_hot(labels, 4).float(), 4)
    assert torch.equal(binary.weight, as_rows.weight) and torch.equal(binary.bias, as_rows.bias)
    assert binary.accuracy == plain.accuracy and binary.errors == plain.errors  # by the greatest answer, still
    losses = [SingleLabel(4, is_binary=True).loss_sum(features @ r.weight.T + r.bias, labels) for r in (binary, plain)]
    assert losses[0] < 0.5 * losses[1]


def test_the_classifier_starts_as_the_ridge_regression(repo):
    training, held, pixels = data_of(repo)
    model = frozen_network()
    cached = cache_features(model, training, held, pixels, 0.5, Accelerator(cpu=True))
    before = model.classifier.weight.clone()
    ridge = start_from_ridge(model, cached.training)
    assert not torch.equal(model.classifier.weight, before)
    logits = cached.training.resident.images[:, 0].double() @ ridge.weight.T + ridge.bias
    torch.testing.assert_close(model(normalise(training.resident.images, *pixels)).logits.double(), logits,
                               rtol=1e-3, atol=1e-4)  # fmt: skip
    model = frozen_network(classifier="mlp")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert start_from_ridge(model, cached.training) is None
    assert start_from_ridge(frozen_network(), cached.training, is_binary=True).scale != ridge.scale
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
