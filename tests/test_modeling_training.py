"""Training: gradients reach every parameter, the loss is the stated formula, and what is random is random as stated."""

import numpy as np
import pytest
import torch
from small_vit import build, images, threads
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchDropPath, image_classification_loss


@pytest.fixture(autouse=True)
def one_thread():
    """Steps of a millisecond: on a busy machine two threads wait for each other twenty times as long."""
    with threads(1):
        yield


# 5.23 has a new name for it, which 5.17 does not know
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*is deprecated:FutureWarning")

LABELS = torch.tensor([0, 4, 2])

# ---------------------------------------------------------------- gradients

VARIED = {
    "plain": {},
    "linear patches, no biases": {
        "patch_embedding": "linear",
        "patch_bias": False,
        "qkv_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
    },
    "overlapping patches": {"patch_stride": 4},
    "registers": {"num_register_tokens": 3},
    "registers without positions": {"num_register_tokens": 3, "prefix_positions": False},
    "registers, no class token": {"num_register_tokens": 3, "use_cls_token": False, "pooling": "mean"},
    "no positions": {"position_embedding_type": "none"},
    "fixed positions": {"position_embedding_type": "sincos2d", "use_cls_token": False, "pooling": "mean"},
    "rotary positions": {"position_embedding_type": "rope2d", "qk_norm": True},
    "learned from the fixed table": {"position_init": "sincos2d"},
    "mean of normed tokens": {"pooling": "mean"},
    "norm of the mean": {"pooling": "mean", "final_norm": "after_pooling"},
    "no final norm": {"final_norm": "none"},
    "post-norm": {"pre_norm": False, "final_norm": "none"},
    "norm before the layers": {"embedding_norm": True},
    "wide heads": {"head_dim": 20, "qk_norm": True},
    "layer scale": {"layer_scale_init": 1e-5},
    "mlp classifier": {"classifier": "mlp", "pooler_output_size": 11},
    "tanh classifier": {"classifier": "tanh", "pooler_output_size": 11},
    "xavier": {"weight_init": "xavier_uniform", "token_init": "zeros"},
    "pytorch's start": {"weight_init": "torch", "token_init": "uniform", "position_init": "uniform"},
    "dropout": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.1},
    "one layer": {"num_hidden_layers": 1, "drop_path_rate": 0.1},
}


@pytest.mark.parametrize("fields", VARIED.values(), ids=VARIED)
def test_every_parameter_gets_a_gradient(fields):
    model = build(**fields).train()
    model(images(), labels=LABELS).loss.backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_with_zero_init_residual_the_branches_wake_up_after_one_step():
    model = build(zero_init_residual=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    silent = []
    for _ in range(2):
        optimizer.zero_grad()
        model(images(), labels=LABELS).loss.backward()
        silent.append({name for name, parameter in model.named_parameters() if not parameter.grad.any()})
        optimizer.step()
    behind_a_zero = ("q_proj", "k_proj", "v_proj", "fc1", "layernorm_before", "layernorm_after", ".embeddings.")
    assert silent[0] and all(any(part in name for part in behind_a_zero) for name in silent[0])
    assert silent[1] == set()


def gradients(model, checkpointing: dict | None, bf16: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(images(), labels=LABELS).loss
    loss.backward()
    model.gradient_checkpointing_disable()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("position_embedding_type", ["learned", "rope2d"])
def test_gradient_checkpointing_changes_no_bit_of_the_gradients(position_embedding_type, use_reentrant, bf16):
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.5}
    model = build(position_embedding_type=position_embedding_type, **dropout).train()
    plain = gradients(model, None, bf16)
    checkpointed = gradients(model, {"use_reentrant": use_reentrant}, bf16)
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())


def test_gradient_checkpointing_runs_every_layer_again():
    model = build(num_hidden_layers=3).train()
    runs = []
    for index, layer in enumerate(model.vit.layers):
        layer.mlp.fc1.register_forward_hook(lambda *_, index=index: runs.append(index))
    gradients(model, {"use_reentrant": False})
    assert sorted(runs) == [0, 0, 1, 1, 2, 2]


def test_a_frozen_encoder_still_trains_its_classifier_under_checkpointing():
    model = build().train()
    model.vit.requires_grad_(False)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()  # what adapters ask for
    model(images(), labels=LABELS).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }


# ---------------------------------------------------------------- loss


def config_of(num_labels: int = 5, **fields) -> ViTScratchConfig:
    return ViTScratchConfig(num_labels=num_labels, **fields)


def log_softmax(logits: torch.Tensor) -> np.ndarray:
    logits = logits.double().numpy()
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


LOGITS = images(3, 5, seed=3) * 3
SOFT = torch.softmax(images(3, 5, seed=4), dim=1)
HOT = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])


def single(logits):
    return -log_softmax(logits)[np.arange(3), LABELS.numpy()].sum(), 3


def soft(logits):
    return -(SOFT.double().numpy() * log_softmax(logits)).sum(), 3


def multi(logits):
    probabilities = 1 / (1 + np.exp(-logits.double().numpy()))
    hot = HOT.double().numpy()
    return -(hot * np.log(probabilities) + (1 - hot) * np.log(1 - probabilities)).sum(), 15


def squares(logits):
    return ((logits.double().numpy() - SOFT.double().numpy()) ** 2).sum(), 15


LOSSES = {
    "single label": (None, LABELS, single),
    "single label, said so": ("single_label_classification", LABELS, single),
    "single label as a column": (None, LABELS[:, None], single),
    "mixed labels": (None, SOFT, soft),
    "mixed labels, said so": ("single_label_classification", SOFT, soft),
    "several labels": ("multi_label_classification", HOT, multi),
    "regression": ("regression", SOFT, squares),
}


@pytest.mark.parametrize(("problem_type", "labels", "formula"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("num_items_in_batch", [None, 7, torch.tensor(7)], ids=["mean", "7", "tensor of 7"])
def test_the_loss_is_its_formula(problem_type, labels, formula, num_items_in_batch):
    total, count = formula(LOGITS)
    given = 7 if formula is not soft else 7 / 5  # Trainer counts numbers, of which an image has five
    loss = image_classification_loss(labels, LOGITS, config_of(problem_type=problem_type), num_items_in_batch)
    # double precision against float32: seven digits
    assert loss.item() == pytest.approx(total / (count if num_items_in_batch is None else given), rel=1e-6)


@pytest.mark.parametrize("name", ["single label", "mixed labels", "several labels"])
def test_trainer_logs_the_mean_over_all_images_of_a_step(name, tmp_path):
    problem_type, labels, _ = LOSSES[name]
    model = build(problem_type=problem_type, num_labels=5)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images(), labels, strict=True)]
    with torch.no_grad():
        expected = model(images(), labels=labels).loss.item()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "max_steps": 1, "logging_steps": 1}
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True, save_strategy="no", **settings)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-3)


def test_one_label_means_regression():
    logits, labels = LOGITS[:, :1], torch.tensor([0.5, -1.0, 2.0])
    expected = ((logits[:, 0] - labels) ** 2).mean()
    torch.testing.assert_close(image_classification_loss(labels, logits, config_of(1)), expected)


def test_a_hard_label_and_its_one_hot_row_have_the_same_loss():
    hard, one_hot = LABELS, nn.functional.one_hot(LABELS, 5).float()
    losses = [image_classification_loss(labels, LOGITS, config_of()) for labels in (hard, one_hot)]
    torch.testing.assert_close(losses[0], losses[1])


def test_an_ignored_label_is_left_out():
    labels = torch.tensor([0, -100, 2])
    expected = nn.functional.cross_entropy(LOGITS[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(image_classification_loss(labels, LOGITS, config_of()), expected)


def test_the_loss_of_half_precision_logits_is_float32():
    loss = image_classification_loss(LABELS, LOGITS.to(torch.bfloat16), config_of())
    assert loss.dtype is torch.float32


@pytest.mark.parametrize("labels", [LABELS, SOFT], ids=["single", "mixed"])
def test_the_model_returns_that_loss_and_leaves_the_configuration_alone(labels):
    model = build()
    before = model.config.to_dict()
    outputs = model(images(), labels=labels, num_items_in_batch=7)
    expected = image_classification_loss(labels, outputs.logits, model.config, 7)
    assert torch.equal(outputs.loss, expected)
    assert model.config.problem_type is None and model.config.to_dict() == before
    assert model(images()).loss is None


@pytest.mark.parametrize(
    ("problem_type", "labels", "text"),
    [
        (
            None,
            LABELS[:2],
            r"integers of shape \(3,\), or probabilities of shape \(3, 5\); got torch.int64 of shape \(2,\)",
        ),
        (None, SOFT[:, :4], r"got torch.float32 of shape \(3, 4\)"),
        (None, LABELS.float(), r"got torch.float32 of shape \(3,\)"),
        ("multi_label_classification", HOT.long(), r"takes float labels of shape \(3, 5\).*; got torch.int64"),
        ("multi_label_classification", LABELS.float(), r"takes float labels .*; got torch.float32 of shape \(3,\)"),
        ("regression", LABELS.float(), r"one number for each of the logits of shape \(3, 5\); got .*\(3,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(problem_type, labels, text):
    with pytest.raises(ValueError, match=text):
        image_classification_loss(labels, LOGITS, config_of(problem_type=problem_type))


# ---------------------------------------------------------------- stochastic depth and dropout


def test_drop_path_leaves_out_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    drop_path = ViTScratchDropPath(0.3).train()
    dropped = drop_path(torch.ones(20_000, 2, 3))
    rows = dropped.flatten(1)
    assert ((rows == rows[:, :1]).all(1)).all()  # a sample is kept or left out whole
    torch.testing.assert_close(rows[:, 0].unique(), torch.tensor([0, 1 / 0.7]))
    # the mean of 20,000 such numbers has a deviation of 0.0046; five times that
    assert abs(dropped.mean().item() - 1) < 0.023


def test_drop_path_does_nothing_in_evaluation_or_at_rate_zero():
    hidden_states = images(4, 2, 3)
    assert ViTScratchDropPath(0.3).eval()(hidden_states) is hidden_states
    assert ViTScratchDropPath(0.0).train()(hidden_states) is hidden_states


@pytest.mark.parametrize(("layers", "rates"), [(4, [0, 0.1, 0.2, 0.3]), (2, [0, 0.3]), (1, [0])])
def test_drop_path_rates_grow_linearly_to_the_last_layer(layers, rates):
    model = build(num_hidden_layers=layers, drop_path_rate=0.3)
    assert [layer.drop_path.rate for layer in model.vit.layers] == pytest.approx(rates)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_layer_whose_branches_are_left_out_passes_its_input_on(pre_norm):
    layer = build(drop_path_rate=0.9, pre_norm=pre_norm).vit.layers[1].train()
    torch.manual_seed(0)
    hidden_states = images(50, 3, 32)
    expected = hidden_states
    if not pre_norm:
        expected = layer.layernorm_after(layer.layernorm_before(hidden_states))
    same = (layer(hidden_states) == expected).all(dim=(1, 2))
    assert 30 < same.sum() < 50  # both branches left out: 0.81 of 50, give or take four deviations of 2.8
    assert torch.equal(layer.eval()(hidden_states) == expected, torch.zeros_like(expected, dtype=torch.bool))


EMBEDDINGS, ATTENDED, HIDDEN, OUTPUT = "vit.embeddings.dropout", "dropout", "mlp.hidden_dropout", "mlp.output_dropout"
DROPOUT = {
    "none": ({}, {}),
    "hidden": ({"hidden_dropout_prob": 0.2}, {EMBEDDINGS: 0.2, ATTENDED: 0.2, OUTPUT: 0.2}),
    "embedding": ({"embedding_dropout_prob": 0.3}, {EMBEDDINGS: 0.3}),
    "hidden, not embedding": (
        {"hidden_dropout_prob": 0.2, "embedding_dropout_prob": 0.0},
        {ATTENDED: 0.2, OUTPUT: 0.2},
    ),
    "mlp": ({"mlp_dropout_prob": 0.4}, {HIDDEN: 0.4, OUTPUT: 0.4}),
    "hidden, not mlp": ({"hidden_dropout_prob": 0.2, "mlp_dropout_prob": 0.0}, {EMBEDDINGS: 0.2, ATTENDED: 0.2}),
}


@pytest.mark.parametrize(("fields", "expected"), DROPOUT.values(), ids=DROPOUT)
def test_every_dropout_field_acts_where_it_is_documented_to_act(fields, expected):
    model = build(**fields)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p}
    in_layers = {f"vit.layers.{layer}.{name}": rate for layer in (0, 1) for name, rate in expected.items()}
    wanted = {name: rate for name, rate in in_layers.items() if EMBEDDINGS not in name}
    wanted |= {name: rate for name, rate in expected.items() if name == EMBEDDINGS}
    assert rates == wanted


@pytest.mark.parametrize(
    "field",
    [
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "embedding_dropout_prob",
        "mlp_dropout_prob",
        "drop_path_rate",
        "patch_drop_rate",
    ],
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_rate_acts_in_training_and_never_in_evaluation(field, implementation):
    model = build(**{field: 0.5})
    model.set_attn_implementation(implementation)
    sure = build()
    assert torch.equal(sure.train()(images()).logits, sure.eval()(images()).logits)
    sure.set_attn_implementation(implementation)
    assert torch.equal(model(images()).logits, sure(images()).logits)
    torch.manual_seed(0)
    first, second = (model.train()(images()).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_attention_dropout_drops_weights_and_keeps_their_expectation():
    model = build(ViTScratchModel, attention_probs_dropout_prob=0.25, num_hidden_layers=1).train()
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    weights = model(images(64, 3, 32, 32), output_attentions=True).attentions[0]
    kept = model.eval()(images(64, 3, 32, 32), output_attentions=True).attentions[0]
    dropped = weights == 0
    torch.testing.assert_close(weights[~dropped], kept[~dropped] / 0.75)
    # a share of 74,000 weights has a deviation of 0.0016; five times that
    assert abs(dropped.float().mean().item() - 0.25) < 0.008


# ---------------------------------------------------------------- it learns


@pytest.mark.parametrize(
    "fields",
    [{}, {"position_embedding_type": "rope2d", "pooling": "mean", "layer_scale_init": 0.1}, {"pre_norm": False}],
    ids=["plain", "rotary, mean, layer scale", "post-norm"],
)
def test_a_small_network_memorises_sixteen_random_images(fields):
    model = build(**fields, initializer_range=0.02).train()
    pixel_values, labels = images(16, 3, 32, 32), torch.arange(16) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(pixel_values, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert torch.equal(model.eval()(pixel_values).logits.argmax(1), labels)


def test_the_first_loss_is_that_of_a_guess():
    """ln K: a network at its start knows nothing, and says so."""
    model = ViTScratchForImageClassification(
        ViTScratchConfig(
            hidden_size=32, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8, num_labels=5
        )
    )
    assert model(images(), labels=LABELS).loss.item() == pytest.approx(np.log(5), abs=0.1)
