"""From an encoded example to uint8 pixels, the same for training, evaluation and prediction.

Any kind of picture comes out as it does in a pipeline of transformers: upright by its EXIF, the first of several frames
or pages, channels by `pil_to_channels`, which says what becomes of transparency, 16 bits and fractions.
"""

import errno
import io
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import UserError
from ..image_processing_vit_scratch import ViTScratchImageProcessor, ViTScratchImageProcessorPil, pil_to_channels
from .examples import Example
from .order import derived_seed

Processor = ViTScratchImageProcessor | ViTScratchImageProcessorPil

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")  # PIL would try EPS, WMF and others too
MAX_PIXELS = 80_000_000  # a file of 12 kB can claim more: a decompression bomb; PIL itself only warns at 89 million
# A JPEG's codec may shrink a training image by 2, 4 or 8 while the crop keeps this many times the pixels asked for, a
# side. Milliseconds an image for crops of 5 % to 100 % to 224 pixels, one core, PIL 13: at 4000 pixels 62 -> 19, at
# 1000 pixels and below as before; crops of 25 % to 100 % to 64 pixels: at 4000 pixels 69 -> 11, at 1000 pixels
# 4.0 -> 1.9, at 320 pixels (imagenet-1k) as before. The pixels differ by 0.5 to 1.2 of 255 in the mean; with a margin
# of 1 by 0.6 to 2.4, for 62 -> 13 ms.
REDUCTION_MARGIN = 2
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF's orientation -> what brings the image upright

Box = tuple[float, float, float, float]  # left, top, right, bottom


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


def open_for_crop(
    example: Example, draw_box: Callable[[tuple[int, int]], Box], size: tuple[int, int]
) -> tuple[Image.Image, Box]:
    """(the example's image, upright, and the box to crop), for a crop that is resized to (height, width) `size`.

    draw_box: from the full (width, height) of the upright image, whatever it is decoded at: a JPEG is shrunk by its
    codec where the crop stays REDUCTION_MARGIN times as large as `size`. Raises BadImageError.
    """
    with opened(example) as image:
        if image.format not in ("JPEG", "MPO"):
            image = upright(image)
            return image, draw_box(image.size)
        width, height = image.size if orientation_of(image) < 5 else image.size[::-1]
        left, top, right, bottom = draw_box((width, height))
        reduction = min((right - left) / size[1], (bottom - top) / size[0]) / REDUCTION_MARGIN
        divisor = next((divisor for divisor in (8, 4, 2) if divisor <= reduction), 1)
        if divisor > 1:
            image.draft(None, (image.width // divisor, image.height // divisor))
        image = upright(image)
    x, y = image.width / width, image.height / height  # a side the divisor does not divide is rounded up: < 1 pixel off
    return image, (left * x, top * y, right * x, bottom * y)


def random_crop_box(
    size: tuple[int, int], scale: Sequence[float], rng: random.Random, ratio: Sequence[float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
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
            image, box = open_for_crop(
                example, lambda full: random_crop_box(full, self.crop_scale, rng, self.crop_ratio), self.size
            )
            image = pil_to_channels(image, num_channels)
            image = image.resize(self.size[::-1], int(self.processor.resample), box)  # crops and resizes in one pass
            return self._tensor(image)
        image = pil_to_channels(open_image(example), num_channels)
        if image.size[::-1] != self.size or self.processor.do_center_crop:
            pixels = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
            return pixels[0].to(torch.uint8)
        return self._tensor(image)

    def _tensor(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).reshape(*self.size, -1).permute(2, 0, 1)  # (C, H, W)


def output_size(processor: Processor) -> tuple[int, int]:
    """(height, width) of what the processor makes of an image."""
    size: Any = processor.crop_size if processor.do_center_crop else processor.size
    return size["height"], size["width"]


def normalisation(processor: Processor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) as tensors (C, 1, 1) for uint8 pixels: what the processor does after rescaling, in one pass."""
    scale = torch.tensor(1.0 / processor.rescale_factor, dtype=torch.float32)
    mean, std = (torch.tensor(v, dtype=torch.float32) * scale for v in (processor.image_mean, processor.image_std))
    return mean[:, None, None].to(device), std[:, None, None].to(device)


def probe(examples: Sequence[Example]) -> tuple[tuple[int, int] | None, int]:
    """((height, width) if these images share one, else None; number of channels: 1 if all are grey, else 3)."""
    images = [open_image(example) for example in examples]
    sizes = {image.size[::-1] for image in images}
    grey = all(image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I") for image in images)
    return sizes.pop() if len(sizes) == 1 else None, 1 if grey else 3
