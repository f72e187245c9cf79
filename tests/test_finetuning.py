"""What is trained of a network: names listed by hand, peft as the oracle for LoRA, algebra for the merge."""

import copy
import json
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vit import build, images

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.training.averaging import AveragedWeights
from modeling_vit_scratch.training.checkpointing import load_optimizer_tensors, optimizer_tensors
from modeling_vit_scratch.training.finetuning import (
    Finetuning,
    has_adapter,
    head_rate_scale,
    load_adapter,
    merged,
    parse_finetune,
    prepare_finetuning,
    save_adapter,
    set_train_mode,
)
from modeling_vit_scratch.training.optimization import OPTIMIZERS, parameter_groups
from modeling_vit_scratch.training.recipes import RECIPES
from modeling_vit_scratch.weights import LoadingReport

DROPOUTS = {
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.2, "mlp_dropout_prob": 0.1,
}  # fmt: skip


def recipe(finetune, **fields):
    return RECIPES["finetune"].replace(finetune=finetune, **fields)


def lora_network(**fields):
    """A network with LoRA whose matrices have moved away from zero."""
    model = build()
    prepare_finetuning(model, recipe("lora", **{"lora_r": 3, "lora_alpha": 5, **fields}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_under(model, *prefixes):
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def take_steps(model, optimizer, steps):
    for step in steps:
        model(images(seed=step), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def build_optimizer(model):
    groups = parameter_groups(model, 0.05, layer_decay=0.7, head_rate_scale=10)
    return OPTIMIZERS["adamw"](groups, recipe("full")), [name for group in groups for name in group.names]


# ---------------------------------------------------------------- the modes


@pytest.mark.parametrize("text, parsed", [("full", ("full", None)), ("last:3", ("last", 3)), ("lora", ("lora", None))])
def test_a_mode_is_read_with_its_number_of_layers(text, parsed):
    assert parse_finetune(text) == parsed


@pytest.mark.parametrize(
    "text, message",
    [
        ("last:0", "--finetune last:K takes a number of layers from 1 up, got 'last:0'; last:2 works."),
        ("last", "takes a number of layers from 1 up, got 'last'"),
        ("last:-1", "from 1 up"),
        ("last:two", "from 1 up"),
        ("heads", "No finetune 'heads'. Did you mean 'head'? Known: attention, full, head, last:K, lora."),
        ("head:1", "No finetune 'head:1'"),
    ],
)
def test_what_is_no_mode_is_said_in_one_line(text, message):
    with pytest.raises(UserError) as caught:
        parse_finetune(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_more_layers_than_there_are_is_said_with_their_number():
    with pytest.raises(UserError, match="--finetune last:99: the network has 2 layers; use at most that many."):
        prepare_finetuning(build(), recipe("last:99"))


def test_each_mode_trains_what_it_says():
    expected = {
        "full": [""],
        "head": ["classifier."],
        "last:1": ["vit.layers.1.", "vit.layernorm.", "classifier."],
        "last:2": ["vit.layers.", "vit.layernorm.", "classifier."],
        "attention": [
            "vit.embeddings.position_embeddings", "vit.layers.0.attention.", "vit.layers.1.attention.", "classifier.",
        ],
    }  # fmt: skip
    for mode, prefixes in expected.items():
        model = build(qk_norm=True, classifier="mlp", layer_scale_init=0.1)
        finetuning = prepare_finetuning(model, recipe(mode))
        assert trained_names(model) == names_under(model, *prefixes), mode
        assert finetuning.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert finetuning.num_parameters == model.num_parameters()
        assert not has_adapter(model) and merged(model) is model


def test_attention_is_trained_where_there_are_no_learned_positions():
    model = build(position_embedding_type="rope2d")
    prepare_finetuning(model, recipe("attention"))
    assert trained_names(model) == names_under(
        model, "vit.layers.0.attention.", "vit.layers.1.attention.", "classifier."
    )


def test_what_is_trained_is_said_with_its_share_and_size():
    model = build()
    text = str(prepare_finetuning(model, recipe("head")))
    total = model.num_parameters()
    assert text == f"finetune head: 165 of {total:,} parameters are trained ({165 / total:.2%}, 0.7 kB)"  # 32 x 5 + 5
    assert str(Finetuning("lora", 302_602, 86_101_258, 1_210_408)).endswith("(0.35%, 1.2 MB)")


@pytest.mark.parametrize(
    "fields, replaced, scale",
    [
        ({}, ["classifier.weight", "classifier.bias"], 10.0),
        ({}, [], 1.0),
        ({}, None, 1.0),
        ({"head_learning_rate_scale": 3.0}, ["classifier.weight"], 3.0),
        ({"head_learning_rate_scale": 3.0}, [], 3.0),
        ({"finetune": "head"}, ["classifier.weight"], 1.0),
    ],
)
def test_a_checkpoints_new_head_has_ten_times_the_rate_unless_a_person_says_another(fields, replaced, scale):
    report = None if replaced is None else LoadingReport(replaced=replaced)
    assert head_rate_scale(recipe("full").replace(**fields), report) == scale


# ---------------------------------------------------------------- train mode


def training_names(model):
    return {name for name, module in model.named_modules() if module.training}


def test_with_everything_trained_the_mode_is_that_of_train():
    model = build(**DROPOUTS)
    prepare_finetuning(model, recipe("full"))
    set_train_mode(model)
    assert training_names(model) == training_names(build(**DROPOUTS).train())


def test_a_frozen_backbone_has_no_dropout():
    model = build(**DROPOUTS)
    prepare_finetuning(model, recipe("head"))
    set_train_mode(model.train())
    assert training_names(model) == {"", "classifier"}
    first, second = model(images()).logits, model(images()).logits
    assert torch.equal(first, second)


def test_frozen_layers_stay_in_eval_mode_below_the_trained_ones():
    model = build(**DROPOUTS)
    prepare_finetuning(model, recipe("last:1"))
    set_train_mode(model)
    assert not any(name.startswith(("vit.embeddings", "vit.layers.0")) for name in training_names(model))
    under = {name for name, _ in model.named_modules() if name.startswith("vit.layers.1")}
    assert under and under <= training_names(model)


def test_with_lora_the_dropouts_of_the_mlp_and_the_embeddings_are_off_and_those_of_attention_on():
    model = build(**DROPOUTS)
    prepare_finetuning(model, recipe("lora", lora_dropout=0.1))
    set_train_mode(model)
    names = training_names(model)
    layer = "vit.layers.1."
    on = {f"{layer}attention", f"{layer}dropout", f"{layer}drop_path", f"{layer}attention.q_proj.lora_dropout.default"}
    assert on < names
    assert not any(".mlp" in name or ".embeddings" in name or "k_proj" in name for name in names)
    assert "classifier.modules_to_save.default" in names and "classifier.original_module" not in names


# ---------------------------------------------------------------- LoRA in the network


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("attention, fc1", {"q_proj", "k_proj", "v_proj", "o_proj", "fc1"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}),
    ],
)
def test_lora_goes_beside_the_matrices_that_are_named_and_the_classifier_is_trained_whole(targets, expected):
    model = build()
    before = model(images()).logits
    finetuning = prepare_finetuning(model, recipe("lora", lora_r=4, lora_target_modules=targets))
    assert type(model) is ViTScratchForImageClassification
    trained = trained_names(model)
    factors = {name for name in trained if ".lora_" in name}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in factors} == expected
    assert len(factors) == 2 * 2 * len(expected)  # A and B, in two layers
    assert {name for name in trained if name.startswith("classifier.modules_to_save.default.")} == trained - factors
    torch.testing.assert_close(model(images()).logits, before, rtol=1e-5, atol=1e-5)  # B starts at zero
    plain = build().num_parameters()
    assert finetuning.num_parameters == plain + finetuning.num_trained - 165
    assert finetuning.num_bytes == 4 * finetuning.num_trained


def test_the_logits_are_those_of_pefts_own_model():
    theirs = build()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    theirs = peft.get_peft_model(theirs, config).eval()
    ours = lora_network()
    theirs.base_model.model.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images()).logits, theirs(images()).logits)


def test_an_unknown_target_is_said_with_the_known_ones():
    with pytest.raises(UserError, match="No lora_target_modules 'query'. .*Known: all-linear, attention, fc1, fc2, k_"):
        prepare_finetuning(build(), recipe("lora", lora_target_modules="query,v_proj"))


def test_without_peft_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="^--finetune lora needs peft: pip install peft.$"):
        prepare_finetuning(build(), recipe("lora"))


def test_lora_lowers_the_loss_and_leaves_the_frozen_weights_alone():
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_finetuning(model, recipe("lora"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(images(), labels=torch.tensor([0, 1, 2])).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.2 * losses[0]
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    backbone = [name for name in before if name.startswith("vit.")]
    assert all(torch.equal(after[name], before[name]) for name in backbone)


def test_gradient_checkpointing_gives_lora_the_same_gradients():
    plain, checkpointed = lora_network().train(), lora_network().train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    pairs = zip(plain.named_parameters(), checkpointed.parameters(), strict=True)
    for (name, mine), theirs in pairs:
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("mode", ["head", "last:1", "attention", "lora"])
def test_a_resumed_finetuning_goes_on_as_the_uninterrupted_one(mode):
    whole = build()
    prepare_finetuning(whole, recipe(mode))
    broken = copy.deepcopy(whole)
    take_steps(whole, build_optimizer(whole)[0], range(4))
    first, names = build_optimizer(broken)
    take_steps(broken, first, range(2))
    saved, weights = optimizer_tensors(first, names), broken.state_dict()
    assert {key.rpartition("/")[0] for key in saved} == trained_names(broken)

    resumed = build(seed=1)  # other weights: what is not loaded would show
    prepare_finetuning(resumed, recipe(mode))
    resumed.load_state_dict(weights)
    second, names = build_optimizer(resumed)
    load_optimizer_tensors(second, names, saved)
    take_steps(resumed, second, range(2, 4))
    for (name, tensor), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


# ---------------------------------------------------------------- adapters on disk, and merged


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_a_merged_network_is_plain_has_the_same_logits_and_loads_anywhere(tmp_path, targets):
    model = lora_network(lora_target_modules=targets)
    plain = merged(model)
    assert list(plain.state_dict()) == list(build().state_dict())
    assert plain.config.to_dict() == model.config.to_dict() and not has_adapter(plain)
    # float32: W x + B A x and (W + B A) x differ by rounding; the adapter itself changes logits by more than 1
    torch.testing.assert_close(plain(images()).logits, model(images()).logits, rtol=1e-4, atol=1e-4)
    assert (plain(images()).logits - build()(images()).logits).abs().max() > 1
    assert has_adapter(model) and any(".lora_" in name for name in model.state_dict())  # it is a copy
    plain.save_pretrained(tmp_path)
    loaded, info = ViTScratchForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(images()).logits, plain(images()).logits)


def test_a_merged_matrix_is_the_sum_of_the_equation():
    model = lora_network()
    matrix = model.vit.layers[1].attention.q_proj
    update = matrix.lora_B["default"].weight @ matrix.lora_A["default"].weight * (5 / 3)
    expected = matrix.base_layer.weight + update
    torch.testing.assert_close(merged(model).vit.layers[1].attention.q_proj.weight, expected)


def test_averaged_weights_of_a_network_with_lora_are_merged_and_saved(tmp_path):
    model = lora_network()
    averaged = AveragedWeights(model, 0.9)
    averaged.update(model)
    take_steps(model, build_optimizer(model)[0], range(2))
    averaged.update(model)
    expected = averaged.model(images()).logits
    torch.testing.assert_close(merged(averaged.model)(images()).logits, expected, rtol=1e-4, atol=1e-4)
    save_adapter(averaged.model, tmp_path / "adapter", "base")
    assert torch.equal(load_adapter(build(), tmp_path / "adapter")(images()).logits, expected)
    assert not torch.equal(model(images()).logits, expected)


def test_an_adapter_holds_the_head_and_no_more_than_what_was_trained(tmp_path):
    model = lora_network()
    save_adapter(model, tmp_path / "adapter", "owner/base", "v2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} < set(tensors)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base" and config["revision"] == "v2" and config["inference_mode"]
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (3, 5, ["classifier"])


def test_a_saved_adapter_gives_the_same_logits_through_ours_and_through_peft(tmp_path):
    model = lora_network(lora_dropout=0.1)
    expected = model.eval()(images()).logits
    save_adapter(model, tmp_path / "adapter", "base")
    save_adapter(model, tmp_path / "adapter", "base")  # over an older one
    loaded = load_adapter(build(), tmp_path / "adapter")
    assert torch.equal(loaded(images()).logits, expected)
    assert not trained_names(loaded) and not loaded.training
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter")
    assert torch.equal(theirs(images()).logits, expected)
    torch.testing.assert_close(merged(loaded)(images()).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_does_not_fit_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "adapter"
    with pytest.raises(UserError, match="adapter is no adapter: it has no adapter_config.json"):
        load_adapter(build(), folder)
    save_adapter(lora_network(), folder, "base")
    with pytest.raises(UserError, match="does not fit this network's, of 7 classes: give the base a classifier for"):
        load_adapter(build(num_labels=7), folder)
    with pytest.raises(UserError, match="is of another network: vit.layers.2.attention.q_proj.lora_A.weight"):
        load_adapter(build(num_hidden_layers=3), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop("base_model.model.vit.layers.0.attention.v_proj.lora_B.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is of another network: vit.layers.0.attention.v_proj.lora_B.weight do"):
        load_adapter(build(), folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="adapter is damaged"):
        load_adapter(build(), folder)
    peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="of the kind IA3, expected LORA"):
        load_adapter(build(), folder)
