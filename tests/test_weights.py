"""Checkpoints load completely or not at all, and the report says what happened."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vit import build, images
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessor
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.modeling_vit_scratch import interpolate_position_embeddings
from modeling_vit_scratch.weights import checkpoint_facts, load_pixel_facts, load_pretrained, load_processor

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


def test_what_is_not_whole_or_not_there_is_refused(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(UserError, match="is damaged"):
        load_pretrained(str(checkpoint), NAMES, 8, 3)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the folder has no model.safetensors"):
        load_pretrained(str(checkpoint), NAMES, 8, 3)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"the folder has no config.json"):
        load_pretrained(str(checkpoint), NAMES, 8, 3)
    with pytest.raises(UserError, match="there is no such folder or file"):
        load_pretrained(str(checkpoint / "other"), NAMES, 8, 3)


def test_what_is_not_asked_for_stays_the_checkpoints(checkpoint):
    model, report = load_pretrained(str(checkpoint))
    assert model.config.id2label == dict(enumerate(NAMES)) and model.config.label2id == {"cat": 0, "dog": 1, "newt": 2}
    assert model.config.image_size == 8 and model.config.num_channels == 3 and not model.training
    assert not (report.replaced or report.interpolated or report.unused or report.inferred)
    assert checkpoint_facts(str(checkpoint)).to_dict()["hidden_size"] == 12


@pytest.mark.parametrize("patch_embedding", ["conv", "linear"])
def test_a_grey_image_gets_the_response_of_its_rgb_copy(tmp_path, patch_embedding):
    rgb = build(patch_embedding=patch_embedding)
    rgb.save_pretrained(tmp_path / "rgb")
    grey, report = load_pretrained(str(tmp_path / "rgb"), num_channels=1)
    assert "summed over RGB for grey images" in str(report)
    pixels = images(2, 1, 32, 32)
    assert torch.allclose(grey(pixels).logits, rgb(pixels.repeat(1, 3, 1, 1)).logits, atol=1e-5)
    grey.save_pretrained(tmp_path / "grey")
    back, report = load_pretrained(str(tmp_path / "grey"), num_channels=3)
    assert "a third of the grey one for each of RGB" in str(report)
    assert torch.allclose(back(pixels.repeat(1, 3, 1, 1)).logits, grey(pixels).logits, atol=1e-5)
    with pytest.raises(UserError, match="takes 3 channels, the images have 4"):
        load_pretrained(str(tmp_path / "rgb"), num_channels=4)


def test_the_processor_is_the_checkpoints_and_grey_has_the_mean_of_its_colours(checkpoint):
    sides = {"height": 8, "width": 8}
    saved = ViTScratchImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3, size={"shortest_edge": 10},
        do_center_crop=True, crop_size=sides,
    )  # fmt: skip
    saved.save_pretrained(checkpoint)
    pixels = torch.randint(0, 256, (3, 13, 17), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loaded = load_processor(str(checkpoint))
    assert torch.equal(
        loaded(pixels, return_tensors="pt").pixel_values, saved(pixels, return_tensors="pt").pixel_values
    )
    facts = load_pixel_facts(str(checkpoint), 1)
    assert facts["image_mean"] == pytest.approx([0.2]) and facts["image_std"] == pytest.approx([0.5])
    assert facts["crop_pct"] == 0.8 and facts["resample"] == 3
    grey = load_processor(str(checkpoint), 1)
    assert grey.num_channels == 1 and list(grey.image_mean) == pytest.approx([0.2])


# ---------------------------------------------------------------- from_pretrained


def test_as_many_classes_as_there_are_keep_another_librarys_head_and_its_names(tmp_path):
    names = {"id2label": {0: "cat", 1: "dog", 2: "newt"}, "label2id": {"cat": 0, "dog": 1, "newt": 2}}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    theirs = ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8, **names))
    theirs.save_pretrained(tmp_path / "hf")
    ours = ViTScratchForImageClassification.from_pretrained(tmp_path / "hf", num_labels=3)
    assert torch.equal(ours.classifier.weight, theirs.classifier.weight)
    assert ours.config.id2label == names["id2label"] and ours.config.label2id == names["label2id"]
    other = ViTScratchForImageClassification.from_pretrained(tmp_path / "hf", num_labels=4)
    assert other.classifier.weight.shape == (4, 32) and other.config.id2label[3] == "LABEL_3"


def test_from_pretrained_never_leaves_a_weight_to_chance(checkpoint):
    model, info = ViTScratchForImageClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and model.dtype == torch.bfloat16
    larger = ViTScratchForImageClassification.from_pretrained(checkpoint, image_size=16)  # interpolates the positions
    expected, _ = load_pretrained(str(checkpoint), image_size=16)
    assert all(
        torch.equal(mine, theirs) for mine, theirs in zip(larger.parameters(), expected.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match=r"position_embeddings\) and would be random"):
        ViTScratchForImageClassification.from_pretrained(checkpoint, patch_size=2, ignore_mismatched_sizes=True)
    more = ViTScratchForImageClassification.from_pretrained(checkpoint, num_labels=5, ignore_mismatched_sizes=True)
    assert more.classifier.out.out_features == 5
    rewrite(checkpoint, lambda tensors: tensors.pop("vit.layers.1.mlp.fc1.bias"))
    with pytest.raises(ValueError, match=r"1 weights are missing or of another shape \(vit.layers.1.mlp.fc1.bias\)"):
        ViTScratchForImageClassification.from_pretrained(checkpoint)
    _, info = ViTScratchForImageClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert info["missing_keys"] == {"vit.layers.1.mlp.fc1.bias"}  # who asks for the report is told, not stopped
    with pytest.raises(ValueError, match="would be random"):
        AutoModelForImageClassification.from_pretrained(checkpoint)


def test_from_pretrained_takes_other_libraries_checkpoints_the_same_way(tmp_path, caplog):
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4,
        id2label=dict(enumerate(NAMES)),
    )  # fmt: skip
    theirs = ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = ViTScratchForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    pixels = images(2, 3, 8, 8)
    assert torch.allclose(ours(pixels).logits, theirs(pixels).logits, atol=1e-6)
    assert not info["missing_keys"] and ours.config.label2id == {"cat": 0, "dog": 1, "newt": 2}
    half = ViTScratchForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"
    other = ViTScratchForImageClassification.from_pretrained(tmp_path, num_labels=5, image_size=16, drop_path_rate=0.1)
    assert other.classifier.out_features == 5 and other.config.drop_path_rate == 0.1
    positions = theirs.vit.embeddings.position_embeddings
    assert torch.equal(
        other.vit.embeddings.position_embeddings, interpolate_position_embeddings(positions, (2, 2), (4, 4))
    )
    rewrite(tmp_path, lambda tensors: tensors.pop("vit.layernorm.bias"))
    with pytest.raises(UserError, match=r"missing \['vit.layernorm.bias'\]"):
        ViTScratchForImageClassification.from_pretrained(tmp_path)


def test_a_head_that_from_pretrained_draws_is_a_heads_right_size_and_not_zero(tmp_path):
    ViTModel(ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=20, image_size=8,
                       patch_size=4)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="has no classifier: give num_labels or id2label"):
        ViTScratchForImageClassification.from_pretrained(tmp_path)
    model = ViTScratchForImageClassification.from_pretrained(tmp_path, id2label={0: "cat", 1: "dog"})
    assert model.config.label2id == {"cat": 0, "dog": 1}
    assert 0.005 < model.classifier.weight.std() < 0.05 and not model.classifier.bias.any()
