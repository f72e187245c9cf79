"""Batched augmentation on the device: uint8 images in, normalised floats out, drawn per sample from (seed, step).

The draws of a whole global batch are made at once and each rank takes the rows of its positions, so that one process
and many see the same images.
"""

import math
from dataclasses import dataclass

import torch

from .order import derived_seed

NUM_DRAWS = 8  # uniform numbers a sample: flip, crop (2), rotation, shift (2), scale (2 axes share one), one spare


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training batch.

    horizontal_flip_prob: share of images mirrored. crop_padding: pixels of black put around before a random crop of
    the old size. rotation_degrees, translate_pixels, scale_range: largest rotation, shift (pixels) and relative change
    of scale of a random affine map, each drawn uniformly from plus to minus it; bilinear, black outside.
    """

    horizontal_flip_prob: float = 0.0
    crop_padding: int = 0
    rotation_degrees: float = 0.0
    translate_pixels: float = 0.0
    scale_range: float = 0.0

    @property
    def is_affine(self) -> bool:
        return any((self.rotation_degrees, self.translate_pixels, self.scale_range))

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """images uint8 (B, C, H, W) and draws (B, NUM_DRAWS) in [0, 1) -> images of that shape, uint8 or float32."""
        if self.horizontal_flip_prob:
            images = flip(images, draws[:, 0] < self.horizontal_flip_prob)
        if self.crop_padding:
            images = pad_and_crop(images, self.crop_padding, draws[:, 1:3])
        if self.is_affine:
            angles = (2 * draws[:, 3] - 1) * math.radians(self.rotation_degrees)
            shifts = (2 * draws[:, 4:6] - 1) * self.translate_pixels
            scales = 1 + (2 * draws[:, 6] - 1) * self.scale_range
            images = affine(images.float(), angles, shifts, scales)
        return images


def batch_draws(seed: int, step: int, batch_size: int, positions: torch.Tensor) -> torch.Tensor:
    """Uniform numbers (len(positions), NUM_DRAWS) for these positions of the step's global batch, on their device."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "augmentation", step))
    draws = torch.rand(batch_size, NUM_DRAWS, generator=generator)
    return draws.to(positions.device)[positions]


def flip(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The images, those `chosen` (B,) mirrored left to right."""
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def pad_and_crop(images: torch.Tensor, padding: int, draws: torch.Tensor) -> torch.Tensor:
    """A crop of the old size out of each image with `padding` black pixels around it; draws (B, 2) place it."""
    batch_size, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    corners = (draws * (2 * padding + 1)).long()  # (B, 2): top, left
    rows = corners[:, :1] + torch.arange(height, device=images.device)  # (B, H)
    columns = corners[:, 1:] + torch.arange(width, device=images.device)  # (B, W)
    batch = torch.arange(batch_size, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # (B, C, H, W)


def affine(images: torch.Tensor, angles: torch.Tensor, shifts: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float images (B, C, H, W) turned by `angles` (radians, B), enlarged by `scales` (B), moved by `shifts` (pixels,
    (B, 2): right, down) about their centre."""
    height, width = images.shape[-2:]
    cos, sin = angles.cos() / scales, angles.sin() / scales
    # grid_sample asks where each output pixel comes from, in units of half an image
    matrices = torch.stack(
        (
            torch.stack((cos, sin * height / width, torch.zeros_like(cos)), dim=1),
            torch.stack((-sin * width / height, cos, torch.zeros_like(cos)), dim=1),
        ),
        dim=1,
    )  # (B, 2, 3)
    half_sizes = torch.tensor([width / 2, height / 2], dtype=images.dtype, device=images.device)
    matrices[:, :, 2] = -(matrices[:, :, :2] @ (shifts.to(images.dtype) / half_sizes)[:, :, None])[:, :, 0]
    grid = torch.nn.functional.affine_grid(matrices, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(images - mean) / std in float32: the arithmetic of the image processor's torchvision backend, bit for bit."""
    return images.to(torch.float32).sub(mean).div(std)
