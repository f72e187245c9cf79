"""`vit-scratch convert` writes what the other library itself loads, class names and pixels too, or refuses by field."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from small_vit import SMALL, images
from torchvision.models import VisionTransformer as TorchvisionViT
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTModel

from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchImageProcessor,
    ViTScratchImageProcessorPil,
)
from modeling_vit_scratch.cli import main
from modeling_vit_scratch.results.model_folder import save_model_folder
from modeling_vit_scratch.weights import load_pretrained, load_processor

NAMES = ["cat", "dog", "newt", "owl", "pig"]
CROPPED = {
    "size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "resample": 3,
    "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
}  # fmt: skip
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture
def own(tmp_path):
    """A maker of this package's model folders, every parameter at random: fields -> (network, folder)."""

    def make(processor=None, **fields):
        labels = {"id2label": dict(enumerate(NAMES)), "layer_norm_eps": 1e-6}
        config = {name: value for name, value in SMALL.items() if name != "num_labels"}
        torch.manual_seed(0)
        model = ViTScratchForImageClassification(ViTScratchConfig(**{**config, **labels, **fields})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        processor = ViTScratchImageProcessor(**(processor or CROPPED))
        save_model_folder(tmp_path / "own", model, model.state_dict(), processor)
        return model, tmp_path / "own"

    return make


def in_transformers(folder):
    model = ViTForImageClassification.from_pretrained(folder)
    return lambda pixels: model(pixels).logits


def in_timm(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def in_torchvision(folder):
    model = TorchvisionViT(**json.loads((folder / "config.json").read_text())["model_args"]).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


LOADERS = {"transformers": in_transformers, "timm": in_timm, "torchvision": in_torchvision}
TIMM_ONLY = {
    "registers, mean": {"num_register_tokens": 3, "pooling": "mean", "final_norm": "after_pooling"},
    "no class token, LayerScale": {"pooling": "mean", "use_cls_token": False, "layer_scale_init": 0.1},
    "positions for patches alone": {"prefix_positions": False, "num_register_tokens": 2},
    "no positions, no norm at the end": {"position_embedding_type": "none", "final_norm": "none"},
    "an oblong grey image": {"image_size": (16, 48), "patch_size": (8, 4), "num_channels": 1},
    "CLIP's": {"embedding_norm": True, "patch_bias": False, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "no biases, norms in attention": {"qkv_bias": False, "proj_bias": False, "mlp_bias": False, "qk_norm": True},
    "a width that no ratio meets": {"intermediate_size": 47},
}


@torch.no_grad()
def assert_converted(model, folder, to, target):
    """The other library's logits are ours, and so are the tensors after the way back."""
    assert main(["convert", str(folder), str(target), "--to", to]) == 0
    pixels = images(2, model.config.num_channels, *model.config.image_height_width)
    expected = model(pixels).logits
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    assert (LOADERS[to](target)(pixels) - expected).abs().max() <= tolerance
    back, _ = load_pretrained(str(target))
    assert (back(pixels).logits - expected).abs().max() <= tolerance
    assert back.config.id2label == model.config.id2label and back.config.label2id == model.config.label2id
    return back


@pytest.mark.parametrize("to", LOADERS)
def test_each_library_loads_what_is_written_for_it(own, tmp_path, to):
    model, folder = own()
    back = assert_converted(model, folder, to, tmp_path / "there")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("case", TIMM_ONLY)
def test_timm_loads_what_others_cannot_be(own, tmp_path, case):
    pixels = {"image_mean": [0.5], "image_std": [0.5], "num_channels": 1} if "grey" in case else CROPPED
    model, folder = own(pixels, **TIMM_ONLY[case])
    back = assert_converted(model, folder, "timm", tmp_path / "there")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())


def test_torchvision_has_the_tanh_head(own, tmp_path):
    model, folder = own(classifier="tanh", pooler_output_size=13)
    assert_converted(model, folder, "torchvision", tmp_path / "there")


@pytest.mark.parametrize("to", LOADERS)
@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_type": "sincos2d", "patch_embedding": "linear"},
        {"prefix_positions": False, "final_norm": "after_pooling"},
    ],
)
def test_what_is_the_same_in_other_words_is_written_in_them(own, tmp_path, to, fields):
    model, folder = own(**fields)
    assert_converted(model, folder, to, tmp_path / "there")


@pytest.mark.parametrize(
    "to, fields, message",
    [
        ("transformers", {"position_embedding_type": "rope2d"}, "position_embedding_type='rope2d' (it has 'learned')"),
        ("timm", {"pre_norm": False}, "timm's VisionTransformer cannot be this network: pre_norm=False (it has True)."),
        ("timm", {"classifier": "tanh"}, "classifier='tanh' (it has 'linear')"),
        ("timm", {"layer_norm_eps": 1e-3}, "layer_norm_eps=0.001 (it has 1e-06 or 1e-05)"),
        ("timm", {"patch_stride": 4}, "patch_stride=4 (its patches do not overlap)"),
        ("timm", {"head_dim": 16}, "head_dim=16 (it has 8)"),
        ("torchvision", {"image_size": (32, 40)}, "image_size=(32, 40) (it has squares)"),
        ("torchvision", {"pooling": "mean"}, "pooling='mean' (it has 'cls'). --to timm can."),
        ("transformers", {"position_embedding_type": "none", "pre_norm": False}, "type='none' (it has 'learned').\n"),
        (
            "transformers",
            {"num_register_tokens": 2, "layer_scale_init": 1e-5},
            "num_register_tokens=2 (it has 0), layer_scale_init=1e-05 (it has None)",
        ),
    ],
)
def test_what_the_other_library_cannot_be_is_refused_by_field(own, tmp_path, capsys, to, fields, message):
    _, folder = own(**fields)
    assert main(["convert", str(folder), str(tmp_path / "there"), "--to", to]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not list(tmp_path.glob("*there*"))


def test_an_epsilon_that_timm_cannot_say_is_said(own, tmp_path, capsys):
    _, folder = own(layer_norm_eps=1e-12, drop_path_rate=0.1)
    assert main(["convert", str(folder), str(tmp_path / "there"), "--to", "timm"]) == 0
    said = capsys.readouterr().out
    assert "note: layer_norm_eps is 1e-06 there, not 1e-12" in said
    assert "note: left behind, as it acts in training alone: drop_path_rate=0.1" in said


# ---------------------------------------------------------------- pixels and class names


def test_the_image_processor_comes_along_to_transformers_and_back(own, tmp_path):
    _, folder = own()
    assert main(["convert", str(folder), str(tmp_path / "there"), "--to", "transformers"]) == 0
    expected = load_processor(str(folder))(PHOTO, return_tensors="pt").pixel_values
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "there")
    assert type(theirs).__name__ == "ViTImageProcessor"
    assert torch.equal(theirs(PHOTO, return_tensors="pt").pixel_values, expected)
    assert ViTForImageClassification.from_pretrained(tmp_path / "there").config.id2label[2] == "newt"
    back = load_processor(str(tmp_path / "there"))
    assert torch.equal(back(PHOTO, return_tensors="pt").pixel_values, expected)


def test_the_image_processor_comes_along_to_timm_and_from_it(own, tmp_path):
    _, folder = own()
    there = tmp_path / "there"
    assert main(["convert", str(folder), str(there), "--to", "timm"]) == 0
    model = in_timm(there)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    fields = {name: value for name, value in load_processor(str(folder)).to_dict().items() if "type" not in name}
    ours = ViTScratchImageProcessorPil(**fields)(PHOTO, return_tensors="pt").pixel_values[0]  # timm resizes with PIL
    assert torch.allclose(transform(PHOTO), ours, atol=1e-6)
    (there / "preprocessor_config.json").unlink()  # as timm's own folders are
    back = load_processor(str(there))
    assert (back.size["shortest_edge"], back.crop_size["height"], back.resample) == (36, 32, 3)
    assert list(back.image_mean) == [0.1, 0.2, 0.3] and list(back.image_std) == [0.4, 0.5, 0.6]
    assert load_pretrained(str(there))[0].config.id2label == dict(enumerate(NAMES))


def test_ours_is_a_complete_repository(tmp_path):
    config = ViTConfig(**SMALL | {"num_labels": 5})
    theirs = ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "vit_scratch"]) == 0
    script = (
        "import sys, torch; sys.modules['modeling_vit_scratch'] = None\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'ours')!r}, trust_remote_code=True)\n"
        "pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)\n"
        "print(model(pixels).logits.tolist())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    found = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    assert torch.allclose(found, theirs(pixels).logits, atol=1e-5)


def test_an_encoder_without_a_head_stays_without(tmp_path):
    theirs = ViTModel(ViTConfig(**SMALL)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "timm"), "--to", "timm"]) == 0
    model = in_timm(tmp_path / "timm")
    expected = theirs(images(2, 3, 32, 32)).last_hidden_state[:, 0]
    assert torch.allclose(model(images(2, 3, 32, 32)), expected, atol=1e-4)  # epsilon is 1e-6 there, 1e-12 here


# ---------------------------------------------------------------- folders


def test_a_full_folder_is_kept_unless_it_may_go(own, tmp_path, capsys):
    _, folder = own()
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    command = ["convert", str(folder), str(there), "--to", "timm"]
    assert main(command) == 2
    assert "is not empty: name another folder, or give --overwrite_output_dir" in capsys.readouterr().err
    assert [file.name for file in there.iterdir()] == ["notes.txt"]
    assert main([*command, "--overwrite_output_dir"]) == 0
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {file.name for file in there.iterdir()} == names
    assert main(["convert", str(folder), str(folder), "--to", "timm", "--overwrite_output_dir"]) == 2
    assert "holds the checkpoint that is to be read" in capsys.readouterr().err


def test_heads_that_a_file_does_not_say_are_given(tmp_path, capsys):
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=60, depth=1, num_heads=3, num_classes=5)
    torch.save(model.eval().state_dict(), tmp_path / "vit.pth")
    command = ["convert", str(tmp_path / "vit.pth"), str(tmp_path / "there"), "--to", "timm"]
    assert main(command) == 2
    assert "convert --num_attention_heads N" in capsys.readouterr().err
    assert main([*command, "--num_attention_heads", "3"]) == 0
    assert torch.allclose(in_timm(tmp_path / "there")(images(2, 3, 32, 32)), model(images(2, 3, 32, 32)), atol=1e-5)
    assert "no file says image_mean and image_std" in capsys.readouterr().out
