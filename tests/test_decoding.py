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
from transformers.image_utils import load_image

from modeling_vit_scratch import ViTScratchImageProcessor
from modeling_vit_scratch.data import decoding
from modeling_vit_scratch.data.decoding import BadImageError, Decoder, open_for_crop, open_image, random_crop_box
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


# ---------------------------------------------------------------- crops of large JPEGs


def jpeg(height: int, width: int, orientation: int = 1) -> Example:
    upright = smooth(height, width)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    return encoded(stored, "JPEG", quality=95, exif=with_orientation(orientation))


@pytest.mark.parametrize("side, decoded_side", [(16, 103), (50, 206), (100, 411), (101, 821), (400, 821)])
def test_a_jpeg_is_shrunk_only_while_the_crop_keeps_twice_the_pixels(side, decoded_side):
    """A crop of 400 x 600 pixels of a picture of 821 x 1001, whose sides no divisor divides: 821 / 8 is 102.6."""
    image, box = open_for_crop(jpeg(1001, 821), lambda full: (100, 200, 500, 800), (side, side))
    assert image.width == decoded_side
    assert min(box[2] - box[0], box[3] - box[1]) >= min(2 * side, 400) - 1e-6
    shares = np.array(box).reshape(2, 2) / image.size
    np.testing.assert_allclose(shares, np.array([[100, 200], [500, 800]]) / [821, 1001])


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("height, width", [(600, 400), (403, 597)])
def test_a_crop_is_of_the_same_place_shrunk_or_not(monkeypatch, height, width, orientation):
    example = jpeg(height, width, orientation)
    sizes = []

    def box_of(full):
        sizes.append(full)
        return random_crop_box(full, (0.3, 0.6), random.Random(orientation))

    crops = []
    for margin in (2, 1e9):  # with the codec's shrinking, and without
        monkeypatch.setattr(decoding, "REDUCTION_MARGIN", margin)
        image, box = open_for_crop(example, box_of, (16, 24))
        crops.append(np.asarray(image.resize((24, 16), Image.Resampling.BILINEAR, box)).astype(int))
        assert (max(image.size) < max(height, width)) == (margin == 2)
    assert sizes == [(width, height)] * 2
    # measured: 0.1 to 0.2 in the mean where 8 divides the sides; else up to 2: the shrunk sides are rounded up, and the
    # box is off by less than a pixel of theirs. A box that is off by two such pixels differs by 6.
    limit = 1 if height % 8 == width % 8 == 0 else 3
    assert abs(crops[0] - crops[1]).mean() < limit


def test_other_formats_are_never_shrunk():
    image, box = open_for_crop(encoded(Image.fromarray(smooth(400, 300))), lambda full: (0, 0, 300, 400), (8, 8))
    assert image.size == (300, 400) and box == (0, 0, 300, 400)


def test_half_a_jpeg_is_found_shrunk_as_well():
    whole = jpeg(600, 400).image
    half = Example(whole[: len(whole) // 2], 0, "half.jpg")
    with pytest.raises(BadImageError, match="half.jpg cannot be read as an image: image file is truncated"):
        open_for_crop(half, lambda full: (0, 0, *full), (8, 8))


def test_evaluation_sees_large_jpegs_in_full_as_a_pipeline_does(tmp_path):
    example = jpeg(600, 400, orientation=6)
    (tmp_path / "large.jpg").write_bytes(example.image)
    processor = ViTScratchImageProcessor(**PHOTO)
    seen = processor(load_image(str(tmp_path / "large.jpg")), return_tensors="pt", do_normalize=False, do_rescale=False)
    assert torch.equal(Decoder(processor)(example), seen.pixel_values[0].to(torch.uint8))


def test_crops_of_small_images_are_those_of_the_whole_picture():
    (picture,) = make_images(1, (40, 30))
    decoder = Decoder(ViTScratchImageProcessor(**PHOTO), seed=1, crop_scale=(0.1, 1.0))
    rng = random.Random(decoding.derived_seed(1, "crop", 2, 3))
    box = random_crop_box(picture.size, (0.1, 1.0), rng)
    expected = picture.resize((16, 16), Image.Resampling.BILINEAR, box)
    np.testing.assert_array_equal(decoder(encoded(picture), 2, 3).permute(1, 2, 0), np.asarray(expected))
