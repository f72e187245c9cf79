"""Checkpoints load completely or not at all, and the report says what happened."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.modeling_vit_scratch import interpolate_position_embeddings
from modeling_vit_scratch.weights import load_pretrained

NAMES = ["cat", "dog", "newt"]


@pytest.fixture
def checkpoint(tmp_path):
    config = ViTScratchConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4,
        id2label=dict(enumerate(NAMES)), classifier="mlp",
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTScratchForImageClassification(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_same_classes_keep_the_head_in_float32(checkpoint):
    model, report = load_pretrained(str(checkpoint), NAMES, 8, 3)
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(value, saved[name].float()) for name, value in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not report.replaced and len(report.loaded) == len(saved)


@pytest.mark.parametrize("names", [["a", "b"], ["dog", "cat", "newt"], list("abcdefghijkl")])
def test_other_classes_replace_the_last_layer_alone(checkpoint, names):
    model, report = load_pretrained(str(checkpoint), names, 8, 3)
    assert report.replaced == ["classifier.out.weight", "classifier.out.bias"]
    assert model.classifier.out.weight.shape == (len(names), 12)
    saved = load_file(checkpoint / "model.safetensors")
    kept = {name: value for name, value in model.state_dict().items() if name not in report.replaced}
    assert all(torch.equal(value, saved[name].float()) for name, value in kept.items())
    assert model.config.id2label == dict(enumerate(names)) and model.config.label2id[names[1]] == 1
    assert "replaced: classifier.out.weight" in str(report)


def test_another_image_size_interpolates_the_positions(checkpoint):
    model, report = load_pretrained(str(checkpoint), NAMES, 16, 3)
    name = "vit.embeddings.position_embeddings"
    saved = load_file(checkpoint / "model.safetensors")[name]
    assert report.interpolated == [name]
    expected = interpolate_position_embeddings(saved, (2, 2), (4, 4)).float()
    assert torch.equal(model.state_dict()[name], expected)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("vit.layers.1.mlp.fc1.bias"), "missing ['vit.layers.1.mlp.fc1.bias']"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown ['extra']"),
        (lambda t: t.update({"vit.layernorm.bias": torch.zeros(5)}), "of another shape ['vit.layernorm.bias']"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_by_name(checkpoint, change, message):
    rewrite(checkpoint, change)
    with pytest.raises(UserError) as caught:
        load_pretrained(str(checkpoint), NAMES, 8, 3)
    assert message in str(caught.value)


def test_what_is_not_this_packages_or_not_whole_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="takes 3 channels, the images have 1"):
        load_pretrained(str(checkpoint), NAMES, 8, 1)
    (checkpoint / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(UserError, match="is damaged"):
        load_pretrained(str(checkpoint), NAMES, 8, 3)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the folder has no model.safetensors"):
        load_pretrained(str(checkpoint), NAMES, 8, 3)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "vit"}))
    save_file({"x": torch.zeros(1)}, other / "model.safetensors")
    with pytest.raises(UserError, match="has model_type 'vit'; expected 'vit_scratch'"):
        load_pretrained(str(other), NAMES, 8, 3)
