"""What a run does to its batches, in a row: augmentation, normalisation, erasing."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ...errors import UserError, unknown
from .draws import NUM_BOX_DRAWS, Draws, draw_boxes, send
from .geometry import affine, central_boxes, flip, pad_and_crop, resized_crop
from .policies import POLICIES, apply_stages, color_jitter

# B batch, C channels, H W image

ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # shares of the image, height / width: 1708.04896, section 3.1


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training batch, in the order of this text; what is switched off costs nothing.

    random_resized_crop_scale: least share of the area that a crop keeps (Inception's crop, 1409.4842), with a width /
    height within random_resized_crop_ratio; None: no such crop. horizontal_flip_prob, vertical_flip_prob: shares of
    images mirrored left to right, top to bottom. crop_padding: pixels of black put around before a random crop of the
    old size. rotation_degrees, translate_pixels, scale_range: largest rotation, shift (pixels) and relative change of
    scale of a random affine map, each drawn uniformly from plus to minus it; bilinear, black outside. auto_augment: a
    key of POLICIES; RandAugment's number of operations and magnitude (0 to 30). color_jitter: largest relative change
    of brightness, contrast and saturation, 0 to 1. random_erasing_prob: share of images of which `erase` fills a
    rectangle.

    Raises UserError for a policy that there is not and for a range whose ends are swapped.
    """

    horizontal_flip_prob: float = 0.0
    vertical_flip_prob: float = 0.0
    crop_padding: int = 0
    rotation_degrees: float = 0.0
    translate_pixels: float = 0.0
    scale_range: float = 0.0
    random_resized_crop_scale: float | None = None
    random_resized_crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    auto_augment: str | None = None
    randaugment_num_ops: int = 2
    randaugment_magnitude: int = 9
    randaugment_magnitude_std: float = 0.0
    color_jitter: float = 0.0
    random_erasing_prob: float = 0.0

    def __post_init__(self):
        if self.auto_augment is not None and self.auto_augment not in POLICIES:
            raise unknown("auto_augment", self.auto_augment, POLICIES)
        ratio = self.random_resized_crop_ratio
        if len(ratio) != 2 or ratio[0] > ratio[1]:
            raise UserError(f"random_resized_crop_ratio must be its least and greatest width / height, got {ratio}.")

    @property
    def is_affine(self) -> bool:
        return any((self.rotation_degrees, self.translate_pixels, self.scale_range))

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """images uint8 (B, C, H, W), B the draws' positions -> images of that shape, uint8 or float32 in 0 to 255."""
        height, width = images.shape[-2:]
        if self.random_resized_crop_scale is not None:
            scale, ratio = (self.random_resized_crop_scale, 1.0), self.random_resized_crop_ratio
            boxes, has_fit = draw_boxes(draws.uniform("crop", NUM_BOX_DRAWS), scale, ratio, height, width)
            boxes[~has_fit] = central_boxes(ratio, height, width)
            images = resized_crop(images, boxes)
        if self.horizontal_flip_prob:
            images = flip(images, draws.uniform("flip", 1)[:, 0] < self.horizontal_flip_prob)
        if self.vertical_flip_prob:
            images = flip(images, draws.uniform("vertical flip", 1)[:, 0] < self.vertical_flip_prob, axis=-2)
        if self.crop_padding:
            images = pad_and_crop(images, self.crop_padding, draws.uniform("padded crop", 2))
        if self.is_affine:
            around = 2 * draws.uniform("affine", 4) - 1  # (B, 4): angle, shift (2), scale
            angles = around[:, 0] * math.radians(self.rotation_degrees)
            shifts, scales = around[:, 1:3] * self.translate_pixels, 1 + around[:, 3] * self.scale_range
            images = affine(images.float(), angles, shifts, scales)
        stages = []
        if self.auto_augment is not None:
            randaugment = (self.randaugment_num_ops, self.randaugment_magnitude, self.randaugment_magnitude_std)
            stages += POLICIES[self.auto_augment](draws, height, width, *randaugment)
        if self.color_jitter:
            stages += color_jitter(draws, self.color_jitter)
        if stages and images.dtype != torch.uint8:
            images = images.round().clamp_(0, 255).to(torch.uint8)
        return apply_stages(images, stages) if stages else images

    def erase(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Normalised floats (B, C, H, W): of `random_erasing_prob` of them a rectangle becomes noise (1708.04896)."""
        return erase(images, draws, self.random_erasing_prob) if self.random_erasing_prob else images


def erase(images: torch.Tensor, draws: Draws, prob: float) -> torch.Tensor:
    """Normalised floats (B, C, H, W), of a share `prob` of them a rectangle replaced by N(0, 1), a draw a value.

    Rectangles of 2 to 33 % of the area and a height / width of 0.3 to 3.3, drawn as torchvision's RandomErasing draws
    them: ten tries, and none that reaches from edge to edge. Noise instead of the paper's uniform values in 0 to 255:
    timm's mode "pixel", which DeiT trains with.
    """
    num_channels, height, width = images.shape[1:]
    chosen = draws.uniform("erasing", 1)[:, 0] < prob
    # height / width: rows and columns change places
    uniforms = draws.uniform("erased box", NUM_BOX_DRAWS)
    boxes, has_fit = draw_boxes(uniforms, ERASED_AREA, ERASED_RATIO, width, height, is_inside=True)
    erased = [index for index in chosen.nonzero()[:, 0].tolist() if has_fit[index]]
    if not erased:
        return images
    sizes = [num_channels * int(boxes[index, 2] * boxes[index, 3]) for index in erased]
    noise = torch.cat([draws.noise("erasing", index, size) for index, size in zip(erased, sizes, strict=True)])
    places = [_places_in_box(index, boxes[index], num_channels, height, width) for index in erased]
    images, noise = images.clone(memory_format=torch.contiguous_format), send(noise, images.device).to(images.dtype)
    # all rectangles in one: a kernel for each would keep a GPU waiting
    images.view(-1).index_copy_(0, send(torch.from_numpy(np.concatenate(places)), images.device), noise)
    return images


def _places_in_box(index: int, box: np.ndarray, num_channels: int, height: int, width: int) -> np.ndarray:
    """Where the values of image `index` within the box (left, top, width, height) lie in a batch (B, C, H, W)."""
    left, top, box_width, box_height = box.tolist()
    channels = (index * num_channels + np.arange(num_channels))[:, None, None]
    rows, columns = np.arange(top, top + box_height)[:, None], np.arange(left, left + box_width)
    return ((channels * height + rows) * width + columns).ravel()


def normalise(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(images - mean) / std in `dtype`; in float32 the image processor's torchvision backend, bit for bit."""
    return images.to(dtype).sub(mean).div(std)
