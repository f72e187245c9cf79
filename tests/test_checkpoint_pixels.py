"""A checkpoint's own pixels: whatever its image processor does, predict, training and converted files do it too."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import make_images
from PIL import Image
from safetensors.torch import save_file
from small_vit import build
from timm.data import create_transform, resolve_data_config
from torchvision.transforms.v2.functional import InterpolationMode, resize
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, pipeline

from modeling_vit_scratch import ViTScratchImageProcessor, cli
from modeling_vit_scratch.data.augmentation import normalise
from modeling_vit_scratch.data.decoding import Decoder, normalisation
from modeling_vit_scratch.data.examples import Example
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.image_processing_vit_scratch import pil_to_channels
from modeling_vit_scratch.results.prediction import open_model, predict
from modeling_vit_scratch.training.flags import parse_arguments
from modeling_vit_scratch.training.network import build_augmentation, build_network, source_of
from modeling_vit_scratch.weights.pixels import crop_share, with_other_pixels

SIDE = 128  # above the size up to which images are seen whole
SHAPE = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32, "patch_size": 32}
USUAL = {"size": {"height": SIDE, "width": SIDE}, "resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3}


@pytest.fixture
def checkpoint(tmp_path):
    """A maker of a folder with transformers' ViT and an image processor of these fields."""

    def make(**said):
        torch.manual_seed(0)
        labels = {"id2label": {i: f"class {i}" for i in range(4)}, "label2id": {f"class {i}": i for i in range(4)}}
        config = ViTConfig(**SHAPE, image_size=SIDE, initializer_range=0.3, **labels)
        ViTForImageClassification(config).save_pretrained(tmp_path / "hf")
        fields = {"image_processor_type": "ViTImageProcessor", **USUAL, **said}
        (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(fields))
        return tmp_path / "hf"

    return make


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    coarse = make_images(1, (9, 13))[0]
    coarse.resize((200, 150), Image.Resampling.BICUBIC).save(file)
    return file


OTHER_RANGES = [
    {"do_normalize": False},
    {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [60.0] * 3},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
]


@pytest.mark.parametrize("said", [{}, {"image_mean": 0.5, "image_std": 0.25}, *OTHER_RANGES])
def test_a_model_answers_as_a_pipeline_of_transformers_does(checkpoint, photo, said):
    folder = checkpoint(**said)
    expected = {row["label"]: row["score"] for row in pipeline("image-classification", str(folder))(str(photo))}
    model, processor, _ = open_model(str(folder))
    (found,) = predict(model, processor, [str(photo)])
    assert dict(zip(found.labels, found.probabilities, strict=True)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "said, other, size, crop",
    [
        ({}, {"image_size": 192}, {"height": 192, "width": 192}, None),
        ({}, {"image_size": (192, 96)}, {"height": 192, "width": 96}, None),
        ({"size": {"shortest_edge": 160}}, {"image_size": 192}, {"shortest_edge": 240}, 192),  # at the same share
        ({"size": {"shortest_edge": 160}}, {"image_size": 96, "crop_pct": 1.0}, {"shortest_edge": 96}, 96),
        ({"size": {"height": 160, "width": 160}}, {"image_size": 64}, {"height": 80, "width": 80}, 64),
        ({"size": {"shortest_edge": 160}}, {"crop_pct": 0.5}, {"shortest_edge": 256}, SIDE),
        ({}, {"crop_pct": 1.0}, {"shortest_edge": SIDE}, SIDE),
    ],
)
def test_other_pixels_are_those_of_transformers_at_that_size(checkpoint, photo, said, other, size, crop):
    if {"size": said.get("size", USUAL["size"])} != {"size": USUAL["size"]}:
        said = {**said, "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}}
    folder = checkpoint(**said)
    crops = {} if crop is None else {"do_center_crop": True, "crop_size": {"height": crop, "width": crop}}
    theirs = AutoImageProcessor.from_pretrained(folder, size=size, **crops)
    network = ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        pixels = theirs(Image.open(photo).convert("RGB"), return_tensors="pt").pixel_values
        probabilities = network(pixels, interpolate_pos_encoding=True).logits.softmax(-1)[0]
    expected = {f"class {index}": value for index, value in enumerate(probabilities.tolist())}
    model, processor, report = open_model(str(folder), **other)
    (found,) = predict(model, processor, [str(photo)])
    assert dict(zip(found.labels, found.probabilities, strict=True)) == pytest.approx(expected, abs=1e-5)
    assert bool(report.interpolated) == ("image_size" in other)


def trained_on(folder, images, *flags):
    """(image processor, decoder of training) of a run that begins with this checkpoint."""
    recipe, chosen = parse_arguments(["--train_dir", str(images), "--model_name_or_path", str(folder), *flags])
    _, processor, _ = build_network(recipe, chosen, source_of(recipe))
    return processor, build_augmentation(recipe, processor)[0]


@pytest.fixture
def photos(image_folder):
    return image_folder(size=(150, 210), cat=2, dog=2)


def seen(processor, file):
    """The pixels (C, H, W) that evaluation gives to a network."""
    images = Decoder(processor)(Example(str(file), 0, "photo"))[None]
    return normalise(images, *normalisation(processor, torch.device("cpu")), torch.float32)[0]


@pytest.mark.parametrize("said", [{}, *OTHER_RANGES])
def test_training_goes_on_with_the_pixels_of_the_checkpoint(checkpoint, photos, photo, said):
    folder = checkpoint(**said)
    processor, decoder = trained_on(folder, photos)
    expected = AutoImageProcessor.from_pretrained(folder)(Image.open(photo), return_tensors="pt").pixel_values[0]
    # the whole image, brought to a square, as google/vit-base-patch16-224 has it; uint8 in between
    assert (seen(processor, photo) - expected).abs().max() <= 1.01 * expected.abs().max() / 255
    assert decoder.crop_scale is not None  # training crops at random all the same
    theirs = processor.to_dict()
    assert theirs["do_rescale"] and theirs["do_normalize"] and theirs["rescale_factor"] == pytest.approx(1 / 255)


def test_a_crop_that_a_person_chooses_takes_the_place_of_the_squash(checkpoint, photos):
    processor, _ = trained_on(checkpoint(), photos, "--crop_pct", "0.8")
    assert processor.size["shortest_edge"] == 160 and processor.crop_size["height"] == SIDE


def test_a_checkpoint_of_small_images_says_nothing_of_photographs(tmp_path, photos):
    config = ViTConfig(**{**SHAPE, "patch_size": 8}, image_size=32, num_labels=2)
    ViTForImageClassification(config).save_pretrained(tmp_path / "small")
    said = {**USUAL, "size": {"height": 32, "width": 32}}
    (tmp_path / "small" / "preprocessor_config.json").write_text(json.dumps(said))
    processor, _ = trained_on(tmp_path / "small", photos)
    assert processor.size["shortest_edge"] == 37 and processor.crop_size["height"] == 32


def test_interpolation_is_the_checkpoints_unless_a_person_says_another(checkpoint, photos, photo):
    assert trained_on(checkpoint(resample=3), photos)[0].resample == 3
    assert trained_on(checkpoint(resample=3), photos, "--interpolation", "bilinear")[0].resample == 2
    processor, decoder = trained_on(checkpoint(), photos, "--interpolation", "bicubic")
    image = torch.from_numpy(np.array(Image.open(photo).convert("RGB"))).permute(2, 0, 1)
    expected = resize(image, [SIDE, SIDE], InterpolationMode.BICUBIC, antialias=True)  # the whole of it
    found = Decoder(processor)(Example(photo.read_bytes(), 0, photo.name))
    assert processor.resample == decoder.processor.resample == 3
    assert (found.float() - expected.float()).abs().max() <= 1


@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_timms_crop_is_that_of_timm(tmp_path, photos, photo, crop_mode, crop_pct):
    arguments = {"img_size": SIDE, "patch_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 1}
    cfg = {"input_size": [3, SIDE, SIDE], "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3, "interpolation": "bilinear",
           "crop_pct": crop_pct, "crop_mode": crop_mode}  # fmt: skip
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, **arguments)
    (tmp_path / "timm").mkdir()
    save_file(network.state_dict(), tmp_path / "timm" / "model.safetensors")
    facts = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": cfg}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(facts))
    transform = create_transform(**resolve_data_config(cfg))
    expected = transform(Image.open(photo))
    processor, _ = trained_on(tmp_path / "timm", photos)
    assert (seen(processor, photo) - expected).abs().max() < 3 / 255 / 0.2


@pytest.mark.parametrize("said", OTHER_RANGES)
def test_a_file_for_timm_says_the_pixels_that_the_checkpoint_has(checkpoint, photo, tmp_path, said):
    folder = checkpoint(**said)
    assert cli.main(["convert", str(folder), str(tmp_path / "timm"), "--to", "timm"]) == 0
    cfg = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    expected = AutoImageProcessor.from_pretrained(folder)(Image.open(photo), return_tensors="pt").pixel_values[0]
    found = create_transform(**resolve_data_config(cfg))(Image.open(photo))
    assert (found - expected).abs().max() <= 2.01 * expected.abs().max() / 255


# ---------------------------------------------------------------- what does not fit together


def test_an_image_processor_that_does_not_fit_its_network_is_said_in_one_line(checkpoint, photo):
    with pytest.raises(UserError, match="makes images of 64 x 64 pixels, the network takes 128 x 128"):
        open_model(str(checkpoint(size={"height": 64, "width": 64})))
    with pytest.raises(UserError, match="crops nothing: images would differ in size"):
        open_model(str(checkpoint(size={"shortest_edge": SIDE})))
    with pytest.raises(UserError, match="has do_center_crop and no crop_size"):
        open_model(str(checkpoint(do_center_crop=True)))
    model, processor, _ = open_model(str(checkpoint(do_resize=False)))
    (found,) = predict(model, processor, [str(photo)])
    small = checkpoint(do_resize=False, size={"height": 224, "width": 224})
    make_images(1, (SIDE, SIDE))[0].save(photo)
    model, processor, _ = open_model(str(small))
    assert next(predict(model, processor, [str(photo)])).error is None  # whatever size it does not resize to
    assert found.error == "it has 150 x 200 pixels, and a processor without resize takes 128 x 128"


def test_other_pixels_at_the_own_size_are_the_own_pixels(checkpoint):
    crop = {"do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}}
    for said in ({"size": {"shortest_edge": 160}, **crop}, {"do_resize": False, **crop}, {}):
        folder = str(checkpoint(**said))
        fields = [open_model(folder, image_size=size)[1].to_dict() for size in (None, SIDE)]
        assert fields[0] == fields[1]


def test_an_uncropped_size_takes_the_place_of_a_crop_without_a_resize(checkpoint):
    crop = {"do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}}
    model, processor, _ = open_model(str(checkpoint(do_resize=False, **crop)), image_size=96)
    assert (dict(processor.size), processor.do_center_crop) == ({"height": 96, "width": 96}, False)
    assert model.config.image_height_width == (96, 96)


def test_a_crop_that_is_no_square_keeps_its_share():
    wide = ViTScratchImageProcessor(size={"shortest_edge": 512}, do_center_crop=True,
                                    crop_size={"height": 224, "width": 448})  # fmt: skip
    assert crop_share(wide) == 0.875
    half = with_other_pixels(wide, (112, 224), None)
    assert dict(half.size) == {"shortest_edge": 256} and dict(half.crop_size) == {"height": 112, "width": 224}


def test_a_size_that_the_patches_do_not_divide_is_said_in_one_line(checkpoint, photo, capsys):
    folder = str(checkpoint())
    with pytest.raises(UserError, match="image_size: a height of 100 .* nearest sizes that are: 96 and 128"):
        open_model(folder, image_size=100)
    for command in (["predict", folder, str(photo)], ["attention", folder, str(photo)]):
        for flags, message in (
            (["--image_size", "0"], "--image_size must be at least 1"),
            (["--crop_pct", "1.5"], "--crop_pct must be above 0 and at most 1"),
            (["--image_size", "large"], "--image_size takes a whole number"),
        ):
            assert cli.main([*command, *flags]) == 2 and message in capsys.readouterr().err


def test_an_image_with_other_channels_than_the_network_is_named(tmp_path):
    model = build(num_channels=4)
    processor = ViTScratchImageProcessor(num_channels=4, size={"height": 32, "width": 32})
    make_images(1, (40, 40))[0].save(tmp_path / "rgb.png")
    make_images(1, (40, 40))[0].convert("RGBA").save(tmp_path / "rgba.png")
    three, four = predict(model, processor, [str(tmp_path / "rgb.png"), str(tmp_path / "rgba.png")])
    assert four.error is None and "An image has 3 channels, the image processor expects 4" in three.error


def test_a_grey_network_sees_cielab_as_transformers_opens_it(tmp_path):
    pixels = np.asarray(make_images(1, (16, 16))[0])
    Image.frombytes("LAB", (16, 16), pixels.tobytes()).save(tmp_path / "image.tif")
    image = Image.open(tmp_path / "image.tif")
    assert image.mode == "LAB"
    assert np.array_equal(pil_to_channels(image, 1), image.convert("RGB").convert("L"))
