"""The image processors: both backends, any number of channels, any kind of picture."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor, ViTImageProcessorPil

from modeling_vit_scratch import ViTScratchImageProcessor, ViTScratchImageProcessorPil

BACKENDS = [ViTScratchImageProcessor, ViTScratchImageProcessorPil]
both_backends = pytest.mark.parametrize("processor_class", BACKENDS, ids=["torchvision", "pil"])

REPOSITORY = Path(__file__).resolve().parents[1]


def random_array(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photograph(height=47, width=61) -> Image.Image:
    """Smooth, as photographs are, with a sharp edge."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    channels = np.stack((rows, columns, (rows + columns > 1) * 0.8), axis=-1)
    return Image.fromarray((255 * channels).astype(np.uint8))


def untouched(processor_class, num_channels, **options):
    """A processor that changes nothing but the channels: what comes out is the picture, from 0 to 255."""
    return processor_class(num_channels=num_channels, do_resize=False, do_rescale=False, do_normalize=False, **options)


def pixels(processor, image, **options) -> torch.Tensor:
    return processor(image, return_tensors="pt", **options).pixel_values


# ---------------------------------------------------------------- as transformers' ViT

OPTIONS = {
    "defaults": {},
    "small": {"size": {"height": 18, "width": 24}},
    "bicubic": {"size": {"height": 18, "width": 24}, "resample": 3},
    "shortest edge and crop": {
        "size": {"shortest_edge": 30},
        "do_center_crop": True,
        "crop_size": {"height": 24, "width": 24},
    },
    "own mean and deviation": {"size": 32, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "not normalised": {"size": 32, "do_normalize": False},
    "not rescaled": {"size": 32, "do_rescale": False, "do_normalize": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ViTScratchImageProcessor, ViTImageProcessor), (ViTScratchImageProcessorPil, ViTImageProcessorPil)],
    ids=["torchvision", "pil"],
)
def test_pixels_of_rgb_pictures_are_those_of_transformers_vit(ours, theirs, options):
    pictures = [photograph(), photograph(33, 90), Image.fromarray(random_array(25, 25, 3))]
    assert torch.equal(pixels(ours(**options), pictures), pixels(theirs(**options), pictures))


def test_the_defaults_are_those_of_transformers_vit():
    theirs = ViTImageProcessor().to_dict()
    ours = ViTScratchImageProcessor().to_dict()
    assert ours.pop("num_channels") == 3
    del theirs["image_processor_type"], ours["image_processor_type"]
    names = {name for name, value in (*ours.items(), *theirs.items()) if value is not None and not name.startswith("_")}
    assert {name: ours.get(name) for name in names} == {name: theirs.get(name) for name in names}


# ---------------------------------------------------------------- the two backends


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [{"height": 18, "width": 24}, {"shortest_edge": 20}], ids=str)
def test_both_backends_give_the_same_pixels(num_channels, size):
    picture = np.asarray(photograph())
    channels = np.concatenate((picture, picture[::-1, ::-1]), axis=2)[..., :num_channels]
    torchvision, pil = (pixels(cls(num_channels=num_channels, size=size), channels) for cls in BACKENDS)
    assert torchvision.shape == pil.shape and torchvision.shape[1] == num_channels
    # both interpolate in fixed point and round to one of 256 levels, each in its own way: one level is 2/255 here
    assert (torchvision - pil).abs().max() <= 2 / 255 + 1e-6
    assert (torchvision - pil).abs().mean() < 0.002


@both_backends
def test_channels_are_resized_each_by_itself(processor_class):
    """PIL takes the last of two or four channels for transparency, and weighs the others by it."""
    channels = random_array(12, 10, 4)
    channels[..., 3] = 0
    options = {"size": {"height": 5, "width": 7}}
    together = pixels(processor_class(num_channels=4, **options), channels)
    alone = [pixels(processor_class(num_channels=1, **options), channels[..., [channel]]) for channel in range(4)]
    assert torch.equal(together, torch.cat(alone, dim=1))


@both_backends
def test_a_picture_an_array_and_a_tensor_of_it_give_the_same_pixels(processor_class):
    picture = photograph()
    array = np.array(picture)
    processor = processor_class(size=16)
    expected = pixels(processor, picture)
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(pixels(processor, same), expected)
    assert torch.equal(pixels(processor, np.stack([array, array])), torch.cat([expected, expected]))
    assert torch.equal(pixels(processor, [picture, array]), torch.cat([expected, expected]))


# ---------------------------------------------------------------- kinds of pictures


def picture_of_mode(mode: str) -> Image.Image:
    picture = Image.fromarray(random_array(9, 11, 3))
    return picture.convert("P").convert(mode) if mode == "PA" else picture.convert(mode)


@both_backends
@pytest.mark.parametrize(("num_channels", "converted"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_kind_of_picture_is_converted_as_pil_does_it(mode, num_channels, converted, processor_class):
    picture = picture_of_mode(mode)
    expected = np.asarray(picture.convert(converted)).reshape(9, 11, num_channels).transpose(2, 0, 1)
    got = pixels(untouched(processor_class, num_channels), picture)
    np.testing.assert_array_equal(got[0].numpy(), expected)


@both_backends
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_grey_keeps_its_high_byte(mode, num_channels, processor_class):
    """PIL's own conversion would turn all above 255 white."""
    values = np.random.default_rng(0).integers(0, 2**16, (9, 11))
    values[0, :4] = (0, 255, 256, 65_535)
    stored = values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    picture = Image.frombytes(mode, (11, 9), stored.tobytes())
    got = pixels(untouched(processor_class, num_channels), picture)
    np.testing.assert_array_equal(got[0].numpy(), np.broadcast_to(values // 256, (num_channels, 9, 11)))


@both_backends
@pytest.mark.parametrize("as_tensor", [True, False])
def test_grey_arrays_become_rgb_and_rgb_arrays_become_grey_as_in_pil(processor_class, as_tensor):
    rgb = random_array(9, 11, 3)
    to_input = torch.from_numpy if as_tensor else np.asarray
    grey = pixels(untouched(processor_class, 1), to_input(rgb))[0, 0]
    expected = np.asarray(Image.fromarray(rgb).convert("L")).astype(int)
    # PIL's weights have 16 bits: half way between two levels it may take the other
    assert abs(grey.numpy().astype(int) - expected).max() <= 1
    assert (grey.numpy() == expected).mean() > 0.9
    repeated = pixels(untouched(processor_class, 3), to_input(rgb[..., :1]))
    np.testing.assert_array_equal(repeated[0].numpy(), np.repeat(rgb[..., :1], 3, axis=2).transpose(2, 0, 1))


@both_backends
@pytest.mark.parametrize("as_tensor", [True, False])
def test_fractions_are_not_rounded_when_rgb_becomes_grey(processor_class, as_tensor):
    rgb = random_array(9, 11, 3).astype(np.float32) / 255
    grey = pixels(untouched(processor_class, 1), torch.from_numpy(rgb) if as_tensor else rgb)[0, 0]
    np.testing.assert_allclose(grey.numpy(), rgb @ np.float32([0.299, 0.587, 0.114]), rtol=1e-6)


@both_backends
@pytest.mark.parametrize("num_channels", [2, 4, 5, 7])
@pytest.mark.parametrize("first", [True, False], ids=["channels first", "channels last"])
def test_arrays_of_any_number_of_channels_are_read_either_way_round(num_channels, first, processor_class):
    array = random_array(9, 11, num_channels)
    got = pixels(untouched(processor_class, num_channels), array.transpose(2, 0, 1) if first else array)
    np.testing.assert_array_equal(got[0].numpy(), array.transpose(2, 0, 1))


@both_backends
@pytest.mark.parametrize(("mode", "num_channels"), [("LA", 2), ("RGBA", 4), ("CMYK", 4)])
def test_pictures_with_two_or_four_channels_are_taken_as_they_are(mode, num_channels, processor_class):
    picture = picture_of_mode(mode)
    got = pixels(untouched(processor_class, num_channels), picture)
    np.testing.assert_array_equal(got[0].numpy(), np.asarray(picture).transpose(2, 0, 1))


# ---------------------------------------------------------------- errors


@both_backends
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_a_mean_or_deviation_of_another_length_is_refused(name, processor_class):
    with pytest.raises(ValueError, match=f"{name} has 3 values for num_channels=1; give one each"):
        processor_class(num_channels=1, **{name: [0.5, 0.5, 0.5]})


@both_backends
def test_an_image_of_other_channels_is_refused(processor_class):
    with pytest.raises(ValueError, match="An image has 3 channels, the image processor expects 5; .*num_channels=3"):
        processor_class(num_channels=5, size=8)(photograph())


@both_backends
def test_a_mean_given_with_an_image_has_to_fit_it(processor_class):
    with pytest.raises(ValueError, match="An image has 3 channels, the image processor expects 2"):
        processor_class(size=8)(photograph(), image_mean=[0.5, 0.5], image_std=[0.5, 0.5])


# ---------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("saved_by", BACKENDS)
@pytest.mark.parametrize("loaded_by", BACKENDS)
@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_a_saved_processor_comes_back_in_either_backend(saved_by, loaded_by, num_channels, tmp_path):
    mean = [0.1 * (channel + 1) for channel in range(num_channels)]
    saved = saved_by(num_channels=num_channels, image_mean=mean, size={"height": 8, "width": 12})
    saved.save_pretrained(tmp_path)
    loaded = loaded_by.from_pretrained(tmp_path)
    assert loaded.num_channels == num_channels
    assert list(loaded.image_mean) == mean
    image = random_array(8, 12, num_channels)  # of the right size, so that the backends do not differ by resizing
    torch.testing.assert_close(pixels(loaded, image), pixels(saved, image), rtol=0, atol=1e-6)


@both_backends
def test_another_number_of_channels_while_loading_needs_its_mean(processor_class, tmp_path):
    processor_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_mean has 3 values for num_channels=1"):
        processor_class.from_pretrained(tmp_path, num_channels=1)
    loaded = processor_class.from_pretrained(tmp_path, num_channels=1, image_mean=[0.5], image_std=[0.5])
    assert pixels(loaded, photograph()).shape == (1, 1, 224, 224)


@both_backends
def test_processors_do_not_share_their_lists(processor_class):
    first, second = processor_class(), processor_class()
    assert first.image_mean == second.image_mean == (0.5, 0.5, 0.5)
    first.size.height = 7
    assert second.size.height == processor_class().size.height == 224


# ---------------------------------------------------------------- without torchvision

WITHOUT_TORCHVISION = """
import sys

class Hidden:
    '''The finder it wraps, but torchvision is not installed.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        return None if name.partition(".")[0] == "torchvision" else self.finder.find_spec(name, *arguments)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
try:
    import torchvision
    raise SystemExit("torchvision can still be imported")
except ImportError:
    pass

import numpy, torch, transformers
from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchImageProcessorPil

folder, image_file, pixels_file = sys.argv[1:]
image = numpy.load(image_file)
processor = ViTScratchImageProcessorPil.from_pretrained(folder)
pixel_values = processor(image, return_tensors="pt").pixel_values
try:
    automatic = transformers.AutoImageProcessor.from_pretrained(folder)
except ImportError:  # 5.17's auto class itself asks for torchvision
    assert transformers.__version__ < "5.23", transformers.__version__
else:
    assert type(automatic) is ViTScratchImageProcessorPil, type(automatic)
    assert torch.equal(automatic(image, return_tensors="pt").pixel_values, pixel_values)
config = ViTScratchConfig(
    hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, image_size=16, patch_size=8
)
ViTScratchForImageClassification(config)(pixel_values)
numpy.save(pixels_file, pixel_values.numpy())
"""


def test_the_package_and_the_pil_processor_work_without_torchvision(tmp_path):
    processor = ViTScratchImageProcessorPil(size=16)
    processor.save_pretrained(tmp_path)
    image = np.array(photograph())
    np.save(tmp_path / "image.npy", image)
    command = [sys.executable, "-c", WITHOUT_TORCHVISION, tmp_path, tmp_path / "image.npy", tmp_path / "pixels.npy"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "pixels.npy"), pixels(processor, image).numpy())
