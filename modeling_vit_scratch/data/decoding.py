"""From an encoded example to uint8 pixels, the same for training, evaluation and prediction.

Any kind of picture comes out as it does in a pipeline of transformers: upright by its EXIF, the first of several frames
or pages, channels by `pil_to_channels`, which says what becomes of transparency and fractions, and of 16 bits, where
ours differs.
"""

import errno
import io
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from ..errors import UserError
from ..image_processing_vit_scratch import ViTScratchImageProcessor, ViTScratchImageProcessorPil, pil_to_channels
from .examples import Example
from .order import derived_seed

try:
    import simplejpeg  # PIL's pixels, bit for bit: 800 -> 1,043 imagenet crops a second and core (benchmarks/input.py)
except ImportError:
    simplejpeg = None

Processor = ViTScratchImageProcessor | ViTScratchImageProcessorPil

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")  # PIL would try EPS, WMF and others too
MAX_PIXELS = 80_000_000  # a file of 12 kB can claim more: a decompression bomb; PIL itself only warns at 89 million
# By what a JPEG's codec may shrink a training image, down to the size asked for. Crops of 25 % to 100 % of 1,000 pixels
# to 224: 167 -> 227 images/s on a core (benchmarks/input.py), and pixels that differ by 0.6 of 255 in the mean; crops
# of photographs of 256 pixels to 56: by 1.2. Down to twice that size it would be 0.4 and 0.6, for 3 % and not 34 %.
CODEC_DIVISORS = (8, 4, 2)
TORCH_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF's orientation -> what brings the image upright

Box = tuple[int, int, int, int]  # left, top, right, bottom


class BadImageError(UserError):
    """An image that cannot be read, by its file or row, and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"{name} cannot be read as an image: {reason}; mend or remove it, or leave such images out with "
            "--bad_images skip."
        )
        self.name, self.reason = name, reason

    def __reduce__(self):  # a worker hands it to the trainer
        return type(self), (self.name, self.reason)


@contextmanager
def opened(example: Example) -> Iterator[Image.Image]:
    """The example's image, its header read and no pixel yet; of several frames or pages the first.

    What goes wrong while it is open is a BadImageError naming the example, but for what is not the image's fault: no
    memory, or a disk that fails, which is a UserError.
    """
    raw = example.image
    if isinstance(raw, np.ndarray):
        yield Image.fromarray(raw)
        return
    try:
        if raw is None or len(raw) == 0:
            raise ValueError("there is no image" if raw is None else "it is empty")
        with Image.open(raw if isinstance(raw, str) else io.BytesIO(raw), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are over the limit of {MAX_PIXELS:,}")
            yield image
    except MemoryError:
        raise
    except Exception as error:
        is_its_own = not isinstance(error, OSError) or error.errno in (None, errno.ENOENT, errno.EACCES, errno.EISDIR)
        if not is_its_own:
            raise UserError(f"{example.name} cannot be read: {error.strerror}. See to the disk or system.") from error
        raise BadImageError(example.name, _reason(error, raw)) from error


def _reason(error: Exception, raw: bytes | str) -> str:
    if isinstance(error, UnidentifiedImageError):
        is_empty = isinstance(raw, str) and os.path.getsize(raw) == 0
        return "it is empty" if is_empty else f"it does not begin as {', '.join(FORMATS[:-1])} or {FORMATS[-1]} do"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def open_image(example: Example) -> Image.Image:
    """The example's image, upright (EXIF), decoded whole. Raises BadImageError naming it where that fails."""
    with opened(example) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """The image decoded, and turned as its EXIF says."""
    image.load()  # TIFF's turns itself
    orientation = orientation_of(image)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or EXIF that cannot be read: the pixels are whole."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as many as there are ways to break it
        return 1


def read_crop(
    example: Example, draw_box: Callable[[tuple[int, int]], Box], size: tuple[int, int], num_channels: int
) -> torch.Tensor:
    """The pixels, uint8 (H, W, C), of a crop of the upright image, which is to be resized to (height, width) `size`.

    draw_box: from the full (width, height) of the upright image to the crop's box. Where a JPEG's codec can shrink the
    image by 2, 4 or 8 and leave the crop no smaller than `size`, it does, and the box is rounded to the shrunk pixels.
    Raises BadImageError.
    """
    with opened(example) as image:
        if image.format not in ("JPEG", "MPO"):
            image = upright(image)
            return _pixels(image.crop(draw_box(image.size)), num_channels)
        width, height = image.size if orientation_of(image) < 5 else image.size[::-1]
        left, top, right, bottom = draw_box((width, height))
        reduction = min((right - left) / size[1], (bottom - top) / size[0])
        divisor = next((divisor for divisor in CODEC_DIVISORS if divisor <= reduction), 1)
        whole = _plain_jpeg(image, divisor, num_channels)
        if whole is None:
            if divisor > 1:
                image.draft(None, (image.width // divisor, image.height // divisor))
            image = upright(image)
        # a turned image begins with the codec's last pixels, made of less than `divisor`: less than one of them off
        left, top, right, bottom = (round(edge / divisor) for edge in (left, top, right, bottom))
        if whole is not None:
            return torch.from_numpy(whole[top:bottom, left:right])
        return _pixels(image.crop((left, top, right, bottom)), num_channels)


def _plain_jpeg(image: Image.Image, divisor: int, num_channels: int) -> np.ndarray | None:
    """The JPEG shrunk by the divisor, uint8 (H, W, C), by simplejpeg; None where it is absent or PIL has to do more."""
    is_plain = image.mode == "L" or (image.mode == "RGB" and num_channels == 3)
    if simplejpeg is None or not is_plain or num_channels not in (1, 3) or orientation_of(image) in UPRIGHT:
        return None
    image.fp.seek(0)
    least = {"min_height": -(-image.height // divisor), "min_width": -(-image.width // divisor)} if divisor > 1 else {}
    try:
        return simplejpeg.decode_jpeg(image.fp.read(), "GRAY" if num_channels == 1 else "RGB", **least)
    except ValueError:  # cut off or damaged: PIL says what is wrong, or reads it all the same
        return None


def _pixels(image: Image.Image, num_channels: int) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(pil_to_channels(image, num_channels)))
    return pixels.reshape(image.height, image.width, -1)  # (H, W, C)


def resized(pixels: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """uint8 (H, W, C) as (C, height, width) of `size`: by torch, as torchvision's image processor does in evaluation.

    resample: PIL's number; PIL, which takes twice the time, does those that torch has not.
    """
    if resample in TORCH_MODES:
        images = pixels.permute(2, 0, 1)[None]  # (1, C, H, W)
        return interpolate(images, size, mode=TORCH_MODES[resample], antialias=True)[0]
    image = Image.fromarray(pixels.squeeze(2).numpy()).resize(size[::-1], resample)
    return torch.from_numpy(np.array(image)).reshape(*size, -1).permute(2, 0, 1)


def random_crop_box(
    size: tuple[int, int], scale: Sequence[float], rng: random.Random, ratio: Sequence[float] = (3 / 4, 4 / 3)
) -> Box:
    """The box of a crop of `scale` (least, most) of the area of (width, height) and of a width / height in `ratio`.

    Inception's crop, drawn as torchvision's RandomResizedCrop draws it.
    """
    width, height = size
    area = width * height
    for _ in range(10):
        target = area * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.randint(0, width - crop_width), rng.randint(0, height - crop_height)
            break
    else:  # a central crop whose shape is as close to the allowed ones as the image admits
        shape = min(max(width / height, ratio[0]), ratio[1])
        crop_width, crop_height = min(width, round(height * shape)), min(height, round(width / shape))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


class Decoder:
    """Examples to uint8 tensors (C, H, W) of one size.

    In evaluation by the image processor's resize and crop; in training likewise, or by a random resized crop where
    `crop_scale` is given, drawn from (seed, epoch, sample) alone.
    """

    def __init__(
        self,
        processor: Processor,
        seed: int = 0,
        crop_scale: Sequence[float] | None = None,
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    ):
        self.processor, self.seed, self.crop_scale, self.crop_ratio = processor, seed, crop_scale, crop_ratio
        self.size = output_size(processor)

    def __call__(self, example: Example, epoch: int = 0, sample: int = 0) -> torch.Tensor:
        num_channels = self.processor.num_channels
        if self.crop_scale is not None:
            rng = random.Random(derived_seed(self.seed, "crop", epoch, sample))
            crop = read_crop(example, partial(self._draw_box, rng), self.size, num_channels)
            return resized(crop, self.size, int(self.processor.resample))
        image = open_image(example)
        try:
            return self._evaluated(image)
        except ValueError as error:  # channels that the network has not, or pixels of another kind
            raise BadImageError(example.name, _reason(error, example.image)) from error

    def _evaluated(self, image: Image.Image) -> torch.Tensor:
        num_channels = self.processor.num_channels
        image = pil_to_channels(image, num_channels)
        if image.size[::-1] == self.size and not self.processor.do_center_crop:
            return _pixels(image, num_channels).permute(2, 0, 1)  # (C, H, W)
        pixels = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        if pixels.shape[1:] != self.size:
            (height, width), (tall, wide) = pixels.shape[1:], self.size
            raise ValueError(f"it has {height} x {width} pixels, and a processor without resize takes {tall} x {wide}")
        return pixels.to(torch.uint8)

    def _draw_box(self, rng: random.Random, full: tuple[int, int]) -> Box:
        return random_crop_box(full, self.crop_scale, rng, self.crop_ratio)


def output_size(processor: Processor) -> tuple[int, int]:
    """(height, width) of what the processor makes of an image. Raises UserError where images differ in it."""
    size: Any = processor.crop_size if processor.do_center_crop else processor.size
    if "height" not in size:
        raise UserError("The image processor resizes the shorter side and crops nothing: images would differ in size.")
    return size["height"], size["width"]


def normalisation(processor: Processor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) as tensors (C, 1, 1) for uint8 pixels: how the processor rescales and normalises, in one pass."""
    scale = torch.tensor(1.0 / processor.rescale_factor if processor.do_rescale else 1.0, dtype=torch.float32)
    values = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = (torch.tensor(v, dtype=torch.float32).expand(processor.num_channels) * scale for v in values)
    return mean[:, None, None].to(device), std[:, None, None].to(device)


def probe(examples: Sequence[Example]) -> tuple[tuple[int, int] | None, int]:
    """((height, width) if these images share one, else None; number of channels: 1 if all are grey, else 3)."""
    images = [open_image(example) for example in examples]
    sizes = {image.size[::-1] for image in images}
    grey = all(image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I") for image in images)
    return sizes.pop() if len(sizes) == 1 else None, 1 if grey else 3
