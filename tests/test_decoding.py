"""Pictures of every kind come out right: arrays are written to files, decoded, and compared with the arrays."""

import io
import pickle
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import make_images
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import load_image

from modeling_vit_scratch import ViTScratchImageProcessor
from modeling_vit_scratch.data import decoding
from modeling_vit_scratch.data.decoding import BadImageError, Decoder, open_image, random_crop_box, read_crop
from modeling_vit_scratch.data.examples import Example
from modeling_vit_scratch.errors import UserError
from modeling_vit_scratch.image_processing_vit_scratch import pil_to_channels

NOISE = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
PHOTO = {"size": {"shortest_edge": 18}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> Example:
    """The image as a file's bytes, under a name whose ending says nothing of its format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Example(buffer.getvalue(), 0, "picture.dat")


def decoded(example: Example, num_channels: int = 3) -> np.ndarray:
    """The pixels that training and evaluation see, before any resize: (H, W, C), or (H, W) for one channel."""
    return np.asarray(pil_to_channels(open_image(example), num_channels))


def evaluated(example: Example, height: int = 9, width: int = 11) -> np.ndarray:
    """What a Decoder makes of an image that has its size already: (H, W, C)."""
    decoder = Decoder(ViTScratchImageProcessor(size={"height": height, "width": width}))
    return decoder(example).permute(1, 2, 0).numpy()


def smooth(height: int, width: int) -> np.ndarray:
    """A picture of slow waves, which JPEG keeps to within a few levels."""
    rows, columns = np.mgrid[0 : 3 : height * 1j, 0 : 4 : width * 1j]
    waves = np.stack((np.sin(rows + columns), np.cos(2 * rows), np.sin(columns) * np.cos(rows)), axis=-1)
    return np.round(127 + 120 * waves).astype(np.uint8)


# ---------------------------------------------------------------- upright

# EXIF's orientation -> how a camera stored what stood upright (TIFF 6.0: where row 0 and column 0 of the stored lie)
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[:, ::-1],
}


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", STORED)
def test_photographs_are_upright_however_the_camera_was_held(orientation, kind):
    upright = smooth(40, 56)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    got = decoded(encoded(stored, kind, exif=with_orientation(orientation), **options)).astype(int)
    assert got.shape == upright.shape
    assert abs(got - upright).max() <= (12 if kind == "JPEG" else 0)  # what JPEG loses at quality 95


@pytest.mark.parametrize("exif", [b"Exif\0\0not a header", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_exif_that_is_broken_does_not_make_the_picture_so(exif):
    example = encoded(Image.fromarray(NOISE), "PNG", exif=exif)
    np.testing.assert_array_equal(decoded(example), NOISE)


def test_an_orientation_that_there_is_not_turns_nothing():
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(NOISE), exif=with_orientation(9))), NOISE)


# ---------------------------------------------------------------- kinds of pictures


def png16(values: np.ndarray, colour_type: int) -> Example:
    """A 16-bit PNG, which PIL cannot write in colour. values: (H, W, channels)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return Example(b"\x89PNG\r\n\x1a\n" + chunks, 0, "deep.png")


@pytest.mark.parametrize("colour_type, channels", [(0, [0, 0, 0]), (4, [0, 0, 0]), (2, [0, 1, 2]), (6, [0, 1, 2])])
def test_sixteen_bits_a_channel_keep_their_high_byte(colour_type, channels):
    count = {0: 1, 4: 2, 2: 3, 6: 4}[colour_type]  # grey, grey and alpha, colour, colour and alpha
    values = np.random.default_rng(1).integers(0, 2**16, (9, 11, count))
    np.testing.assert_array_equal(evaluated(png16(values, colour_type)), (values >> 8)[..., channels])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_files_keep_their_high_byte(kind):
    values = np.random.default_rng(1).integers(0, 2**16, (9, 11), dtype=np.uint16)
    example = encoded(Image.fromarray(values), kind)
    np.testing.assert_array_equal(decoded(example, 1), values >> 8)


def test_a_grey_map_of_ten_bits_is_spread_over_all_levels():
    values = np.random.default_rng(1).integers(0, 1024, (9, 11))
    example = Example(b"P5 11 9 1023\n" + values.astype(">u2").tobytes(), 0, "medical.pgm")
    assert abs(decoded(example, 1) - values / 1023 * 255).max() <= 1


def test_whole_numbers_of_32_bits_are_white_above_65535():
    values = np.array([[-5, 0, 255, 256], [65_535, 65_536, 70_000, 2**31 - 1]], dtype=np.int32)
    example = encoded(Image.fromarray(values), "TIFF")
    assert decoded(example, 1).tolist() == [[0, 0, 0, 1], [255, 255, 255, 255]]


def test_fractions_count_from_0_to_255_and_are_cut_off_there():
    values = np.array([[-1.0, 0.0, 0.9], [100.0, 255.0, 1e6]], dtype=np.float32)
    example = encoded(Image.fromarray(values), "TIFF")
    assert decoded(example, 1).tolist() == [[0, 0, 0], [100, 255, 255]]
    assert decoded(example, 3).tolist() == [[[v] * 3 for v in row] for row in [[0, 0, 0], [100, 255, 255]]]


@pytest.mark.parametrize("bits", ["1", "L"])
def test_grey_and_black_and_white_files_fill_all_three_channels(bits):
    grey = NOISE[..., 0] if bits == "L" else np.where(NOISE[..., 0] > 127, 255, 0).astype(np.uint8)
    picture = Image.fromarray(grey) if bits == "L" else Image.fromarray(grey > 0)
    assert picture.mode == bits
    np.testing.assert_array_equal(evaluated(encoded(picture)), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(decoded(encoded(picture), 1), grey)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_colour_below_transparency_shows_as_in_transformers(kind, tmp_path):
    alpha = np.random.default_rng(2).integers(0, 256, (9, 11, 1), dtype=np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    example = encoded(Image.fromarray(np.concatenate((NOISE, alpha), axis=2)), kind, **options)
    np.testing.assert_array_equal(evaluated(example), NOISE)
    (tmp_path / "picture.png").write_bytes(example.image)
    np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / "picture.png"))), NOISE)


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 128, *[255] * 6])], ids=["none", "one", "table"])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_become_their_colours_transparent_or_not(kind, transparency, recwarn):
    if kind == "GIF" and isinstance(transparency, bytes):
        pytest.skip("a GIF has one transparent colour")
    palette = np.random.default_rng(3).integers(0, 256, (8, 3), dtype=np.uint8)
    indices = np.random.default_rng(4).integers(0, 8, (9, 11), dtype=np.uint8)
    picture = Image.fromarray(indices).convert("L")
    picture.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    example = encoded(picture, kind, **options)
    assert open_image(example).mode == "P"
    np.testing.assert_array_equal(evaluated(example), palette[indices])
    assert not recwarn.list  # PIL's own conversion warns of the table


def test_cmyk_and_the_inverted_cmyk_of_photoshop_have_the_same_colours():
    """PIL writes JPEGs as Photoshop does: inverted, with Adobe's marker. Black ink is left out: it has two ways."""
    upright = smooth(40, 56)
    inks = np.concatenate((255 - upright, np.zeros((40, 56, 1), np.uint8)), axis=2)
    picture = Image.frombytes("CMYK", (56, 40), inks.tobytes())
    tiff, jpeg = encoded(picture, "TIFF"), encoded(picture, "JPEG", quality=95)
    assert b"Adobe" in jpeg.image and open_image(jpeg).mode == open_image(tiff).mode == "CMYK"
    np.testing.assert_array_equal(decoded(tiff), upright)
    assert abs(decoded(jpeg).astype(int) - upright).max() <= 12  # what JPEG loses at quality 95


def test_ycbcr_files_become_rgb():
    upright = smooth(40, 56)
    example = encoded(Image.fromarray(upright).convert("YCbCr"), "TIFF")
    assert open_image(example).mode == "YCbCr"
    assert abs(decoded(example).astype(int) - upright).max() <= 3  # the round trip of 8-bit YCbCr


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_or_page_counts(kind):
    first, second = smooth(40, 56), 255 - smooth(40, 56)
    pictures = [Image.fromarray(values) for values in (first, second)]
    if kind == "GIF":
        pictures = [picture.quantize(256) for picture in pictures]
    expected = np.asarray(pictures[0].convert("RGB")).astype(int)
    options = {"WEBP": {"lossless": True}, "MPO": {"quality": 95}}.get(kind, {})
    example = encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)
    with Image.open(io.BytesIO(example.image)) as file:
        assert file.n_frames == 2
    assert abs(evaluated(example, 40, 56) - expected).max() <= (12 if kind == "MPO" else 0)


def test_an_ending_that_lies_does_not_matter(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(Image.fromarray(NOISE), "PNG").image)
    np.testing.assert_array_equal(evaluated(Example(str(path), 0, str(path))), NOISE)


# ---------------------------------------------------------------- what cannot be read


def test_what_cannot_be_read_is_one_line_with_name_reason_and_remedy(tmp_path):
    whole = encoded(Image.fromarray(smooth(256, 256)), "JPEG").image
    path = tmp_path / "cat.jpg"
    contents = {
        b"": "it is empty",
        b"<html>404</html>": "it does not begin as JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM or JPEG2000 do",
        whole[: len(whole) // 2]: "image file is truncated",
    }
    for content, reason in contents.items():
        path.write_bytes(content)
        for image, name in ((str(path), str(path)), (content, "shard.parquet row 7")):
            with pytest.raises(BadImageError) as caught:
                open_image(Example(image, 0, name))
            text = str(caught.value)
            assert text.startswith(f"{name} cannot be read as an image: {reason}")
            assert text.endswith("; mend or remove it, or leave such images out with --bad_images skip.")
            assert "\n" not in text and "object at 0x" not in text and text.count(name) == 1
    with pytest.raises(BadImageError, match="nowhere.jpg cannot be read as an image: No such file or directory; mend"):
        open_image(Example(str(tmp_path / "nowhere.jpg"), 0, "nowhere.jpg"))
    with pytest.raises(BadImageError, match="row 3 cannot be read as an image: there is no image; mend"):
        open_image(Example(None, 0, "row 3"))


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    example = encoded(Image.new("1", (8_500, 10_000)))
    assert len(example.image) < 50_000

    def explode(*arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", explode)
    with pytest.raises(BadImageError, match=r"8500 x 10000 pixels are over the limit of 80,000,000; mend"):
        open_image(example)


def test_a_failing_disk_is_not_a_bad_image(monkeypatch):
    def fail(*arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(decoding.Image, "open", fail)
    with pytest.raises(UserError, match="a.jpg cannot be read: Input/output error. See to the disk") as caught:
        open_image(Example("a.jpg", 0, "a.jpg"))
    assert not isinstance(caught.value, BadImageError)


def test_the_error_travels_from_a_worker():
    error = pickle.loads(pickle.dumps(BadImageError("a.jpg", "it is empty")))
    assert (error.name, error.reason) == ("a.jpg", "it is empty")
    assert str(error) == str(BadImageError("a.jpg", "it is empty"))


# ---------------------------------------------------------------- crops


@pytest.fixture(params=["simplejpeg", "PIL"])
def codec(request, monkeypatch):
    """Both ways to decode a JPEG: by simplejpeg, and by PIL where that is not installed."""
    if request.param == "PIL":
        monkeypatch.setattr(decoding, "simplejpeg", None)
    elif decoding.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")


def jpeg(height: int, width: int, orientation: int = 1) -> Example:
    upright = smooth(height, width)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    return encoded(stored, "JPEG", quality=95, exif=with_orientation(orientation))


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize("side, divisor", [(16, 8), (50, 8), (51, 4), (100, 4), (101, 2), (200, 2), (201, 1), (400, 1)])
def test_a_jpeg_is_shrunk_only_while_the_crop_is_no_smaller_than_asked(side, divisor):
    """A crop of 400 x 600 pixels of a picture of 821 x 1001, whose sides no divisor divides: 821 / 8 is 102.6."""
    crop = read_crop(jpeg(1001, 821), lambda full: (100, 200, 500, 800), (side, side), 3)
    assert crop.shape == (round(800 / divisor) - round(200 / divisor), round(500 / divisor) - round(100 / divisor), 3)
    assert min(crop.shape[:2]) >= side and crop.dtype == torch.uint8


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("height, width", [(600, 400), (403, 597)])
def test_a_crop_is_of_the_same_place_shrunk_or_not(monkeypatch, height, width, orientation):
    example = jpeg(height, width, orientation)
    sizes = []

    def box_of(full):  # on the grid of the shrunk pixels, else the box is rounded to it
        sizes.append(full)
        return tuple(edge // 8 * 8 for edge in random_crop_box(full, (0.3, 0.6), random.Random(orientation)))

    crops = []
    for divisors in ((8, 4, 2), ()):
        monkeypatch.setattr(decoding, "CODEC_DIVISORS", divisors)
        crop = read_crop(example, box_of, (16, 24), 3)
        crops.append(decoding.resized(crop, (16, 24), Image.Resampling.BILINEAR).numpy().astype(int))
        assert (max(crop.shape) < max(height, width) / 4) == bool(divisors)
    assert sizes == [(width, height)] * 2
    # measured: up to 0.4 in the mean where 8 divides the sides or nothing is turned; else up to 5, where the box is off
    # by 5/8 of a shrunk pixel
    limit = 1 if orientation == 1 or height % 8 == width % 8 == 0 else 6
    assert abs(crops[0] - crops[1]).mean() < limit


def test_other_formats_are_never_shrunk():
    picture = smooth(400, 300)
    crop = read_crop(encoded(Image.fromarray(picture)), lambda full: (10, 20, 290, 400), (8, 8), 3)
    np.testing.assert_array_equal(crop, picture[20:400, 10:290])


@pytest.mark.usefixtures("codec")
@pytest.mark.parametrize("side", [8, 400])
def test_half_a_jpeg_is_found_shrunk_as_well(side, tmp_path):
    whole = jpeg(600, 400).image
    path = tmp_path / "half.jpg"
    path.write_bytes(whole[: len(whole) // 2])
    for image in (path.read_bytes(), str(path)):
        with pytest.raises(BadImageError, match="half.jpg cannot be read as an image: image file is truncated"):
            read_crop(Example(image, 0, "half.jpg"), lambda full: (0, 0, *full), (side, side), 3)


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode, num_channels", [("RGB", 3), ("L", 3), ("L", 1), ("RGB", 1), ("CMYK", 3)])
def test_simplejpeg_gives_the_pixels_of_pil(monkeypatch, mode, num_channels, options):
    """So a run does not depend on whether it is installed."""
    pytest.importorskip("simplejpeg")
    noise = np.random.default_rng(5).integers(0, 256, (203, 149, 3), dtype=np.uint8)
    picture = Image.blend(Image.fromarray(noise), Image.fromarray(smooth(203, 149)), 0.6).convert(mode)
    example = encoded(picture, "JPEG", **options)
    for side in (120, 60, 30, 15):  # shrunk by 1, 2, 4 and 8
        crops = []
        for module in (decoding.simplejpeg, None):
            monkeypatch.setattr(decoding, "simplejpeg", module)
            crops.append(read_crop(example, lambda full: (4, 9, 139, 201), (side, side), num_channels))
            monkeypatch.undo()
        assert crops[0].shape[2] == num_channels and torch.equal(*crops)


def test_plain_jpegs_are_left_to_simplejpeg_and_the_others_to_pil(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    taken = []

    def decode(raw, *arguments, **options):
        taken.append(raw)
        return simplejpeg.decode_jpeg(raw, *arguments, **options)

    monkeypatch.setattr(decoding, "simplejpeg", type("Watched", (), {"decode_jpeg": staticmethod(decode)}))
    plain, turned = jpeg(64, 48), jpeg(64, 48, orientation=6)
    frames = [Image.fromarray(smooth(64, 48)) for _ in range(2)]
    stereo = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    inks = encoded(frames[0].convert("CMYK"), "JPEG")
    for example in (plain, turned, stereo, inks):
        assert read_crop(example, lambda full: (0, 0, *full), (64, 48), 3).shape == (64, 48, 3)
    assert taken == [plain.image, stereo.image]


def test_evaluation_sees_large_jpegs_in_full_as_a_pipeline_does(tmp_path):
    example = jpeg(600, 400, orientation=6)
    (tmp_path / "large.jpg").write_bytes(example.image)
    processor = ViTScratchImageProcessor(**PHOTO)
    seen = processor(load_image(str(tmp_path / "large.jpg")), return_tensors="pt", do_normalize=False, do_rescale=False)
    assert torch.equal(Decoder(processor)(example), seen.pixel_values[0].to(torch.uint8))


RESAMPLINGS = {"BILINEAR": 2, "BICUBIC": 20, "LANCZOS": 0}  # -> the most that torch's kernel differs from PIL's, of 255


@pytest.mark.parametrize("name", RESAMPLINGS)
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("size", [(40, 30), (13, 11)])  # to be shrunk and to be enlarged
def test_a_crop_is_resized_as_pil_and_torchvision_resize_it(name, num_channels, size):
    (picture,) = make_images(1, size)
    processor = ViTScratchImageProcessor(**PHOTO, resample=Image.Resampling[name], num_channels=num_channels)
    rng = random.Random(decoding.derived_seed(1, "crop", 2, 3))
    left, top, right, bottom = random_crop_box(picture.size, (0.1, 1.0), rng)
    ours = Decoder(processor, seed=1, crop_scale=(0.1, 1.0))(encoded(picture), 2, 3)
    assert ours.shape == (num_channels, 16, 16) and ours.dtype == torch.uint8

    cropped = pil_to_channels(picture, num_channels).crop((left, top, right, bottom))
    theirs = np.asarray(cropped.resize((16, 16), Image.Resampling[name])).reshape(16, 16, num_channels)
    assert abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).max() <= RESAMPLINGS[name]
    if name != "LANCZOS":  # which torchvision has for PIL images alone
        mode = InterpolationMode[name]
        assert torch.equal(ours, tvF.resize(tvF.pil_to_tensor(cropped), [16, 16], mode, antialias=True))
