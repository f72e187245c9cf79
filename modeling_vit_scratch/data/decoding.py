"""From an encoded example to uint8 pixels, the same for training, evaluation and prediction."""

import io
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import UserError
from ..image_processing_vit_scratch import ViTScratchImageProcessor, ViTScratchImageProcessorPil, pil_to_channels
from .examples import Example
from .order import derived_seed

Processor = ViTScratchImageProcessor | ViTScratchImageProcessorPil

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")  # PIL would try EPS, WMF and others too
MAX_PIXELS = 80_000_000  # a file of 12 kB can claim more: a decompression bomb; PIL itself only warns at 89 million


class BadImageError(UserError):
    """An image that cannot be read, by its file or row."""


def open_image(example: Example) -> Image.Image:
    """The example's image, upright (EXIF), decoded whole. Raises BadImageError naming it where that fails."""
    raw = example.image
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    try:
        image = Image.open(raw if isinstance(raw, str) else io.BytesIO(raw), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are over the limit of {MAX_PIXELS:,}")
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise BadImageError(f"{example.name} cannot be read as an image: {error}. Mend or remove it.") from error


def random_resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    scale: Sequence[float],
    resample: int,
    rng: random.Random,
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A crop of `scale` (least, most) of the area and of a width / height within `ratio`, resized to (height, width).

    Inception's crop, drawn as torchvision's RandomResizedCrop draws it; PIL crops and resizes in one pass.
    """
    width, height = image.size
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
    return image.resize(size[::-1], resample, box=(left, top, left + crop_width, top + crop_height))


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
        image = pil_to_channels(open_image(example), self.processor.num_channels)
        if self.crop_scale is not None:
            rng = random.Random(derived_seed(self.seed, "crop", epoch, sample))
            resample = int(self.processor.resample)
            image = random_resized_crop(image, self.size, self.crop_scale, resample, rng, self.crop_ratio)
        elif image.size[::-1] != self.size or self.processor.do_center_crop:
            pixels = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
            return pixels[0].to(torch.uint8)
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
