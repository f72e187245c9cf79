"""Operations on the values of pixels: uint8 batches in and out, one factor a sample.

Each but the blur equals torchvision.transforms.v2.functional's of the same kind, image by image, to the last bit: where
torchvision rounds, ours rounds, and where it cuts off, ours does. Its operations take one factor a call; ours one a
sample, float64 on the CPU. Where theirs have no factor, theirs are called. Any number of channels works: channels are
treated alike, and only three of them are colours, with a grey of 0.2989 R + 0.587 G + 0.114 B.
"""

import math

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvF

from .draws import send

# B batch, C channels, H W image

GREEN, BLUE = (float(np.float32(share)) for share in (0.587, 0.114))  # of grey, as torchvision's kernels round them
LARGEST_SIGMA = 2.0  # of a blur, in pixels


def _spread(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """One value a sample, on the images' device as (B, 1, 1, 1)."""
    return send(values, images.device)[:, None, None, None]


def _multiply_add(values: torch.Tensor, others: torch.Tensor, factors: float | torch.Tensor) -> torch.Tensor:
    """values + factors * others as float32, rounded once.

    So torchvision's CPU kernels compute a blend; float64 gives the same number on any device and for any number of
    samples. A grey pixel's two shares add up so close to a whole number that another rounding would darken it by one.
    """
    wide = torch.float32 if values.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    product = others.to(wide) * (factors.to(wide) if isinstance(factors, torch.Tensor) else factors)
    return (product + values).float()


def _blend(images: torch.Tensor, others: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """factor * images + (1 - factor) * others, cut off to uint8; factors (B,) float64 on the CPU."""
    own = images * _spread(factors.float(), images)
    return _multiply_add(own, others, _spread((1.0 - factors).float(), images)).clamp_(0, 255).to(torch.uint8)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) float32 in whole numbers, cut off; (B, C, H, W), the images, where channels are not colours."""
    if images.shape[1] != 3:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    return _multiply_add(_multiply_add(red * 0.2989, green, GREEN), blue, BLUE).floor_()


def brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Times the factor: 0 black, 1 unchanged."""
    return (images * _spread(factors.float(), images)).clamp_(0, 255).to(torch.uint8)


def saturation(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Away from grey: 0 grey, 1 unchanged. Images that have not three channels stay as they are."""
    return _blend(images, _grey(images), factors) if images.shape[1] == 3 else images


def contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Away from the image's mean grey: 0 that grey, 1 unchanged."""
    grey = _grey(images)
    # whole numbers: the sum is exact in whatever order, in float32 up to 65,793 pixels, in int64 beyond
    sums = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int64).float()
    return _blend(images, sums / max(grey[0].numel() if len(grey) else 0, 1), factors)


def sharpness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Away from a blurred image: 0 blurred, 1 unchanged. The outermost pixels and sides of 2 or less stay."""
    height, width = images.shape[-2:]
    if height <= 2 or width <= 2:
        return images
    values = images.to(torch.int16)
    rows = values[..., :-2, :] + values[..., 1:-1, :] + values[..., 2:, :]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = values[..., 1:-1, 1:-1]
    # the kernel is 1 1 1 / 1 5 1 / 1 1 1 over 13: an odd number, so nothing lies halfway between two whole numbers
    blurred = (sums + 4 * inner + 6).div_(13, rounding_mode="floor")
    sharpened = images.clone()
    sharper = _multiply_add(inner, blurred - inner, _spread((1.0 - factors).float(), images))
    sharpened[..., 1:-1, 1:-1] = sharper.clamp_(0, 255).to(torch.uint8)
    return sharpened


def gaussian_blur(images: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Each image under a Gaussian of its own standard deviation, in pixels above 0; sides are mirrored.

    The kernel reaches three times LARGEST_SIGMA, or to the image's far side. One axis after the other: torchvision
    multiplies by both at once, and a pixel in some thousands comes out one apart.
    """
    radius = min(math.ceil(3 * LARGEST_SIGMA), *(side - 1 for side in images.shape[-2:]))
    distances = torch.arange(radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (distances / sigmas[:, None]) ** 2)  # (B, radius + 1)
    weights = weights / (weights.sum(dim=1, keepdim=True) + weights[:, 1:].sum(dim=1, keepdim=True))
    spread = [_spread(column, images) for column in weights.float().unbind(1)]
    values = torch.nn.functional.pad(images.float(), (radius,) * 4, mode="reflect")
    for axis in (-1, -2):
        side = images.shape[axis]
        blurred = values.narrow(axis, radius, side) * spread[0]
        for distance in range(1, radius + 1):
            pair = values.narrow(axis, radius - distance, side) + values.narrow(axis, radius + distance, side)
            blurred += pair.mul_(spread[distance])
        values = blurred
    return values.round_().clamp_(0, 255).to(torch.uint8)


def posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The `bits` highest bits of each value, 0 to 8; the others become 0."""
    return images & _spread((0xFF00 >> bits.long()).bitwise_and(0xFF).to(torch.uint8), images)


def solarize(images: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Values of `thresholds` (0 to 255) and more inverted."""
    is_bright = images >= _spread(thresholds.float().ceil().to(torch.uint8), images)
    return images ^ is_bright.to(torch.uint8).neg_()  # of 1 that is 255: all bits


def autocontrast(images: torch.Tensor) -> torch.Tensor:
    """Each channel stretched over 0 to 255."""
    return tvF.autocontrast(images.flatten(0, 1)[:, None]).view(images.shape)


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Each channel's values spread until all are about as frequent."""
    return tvF.equalize(images)


def invert(images: torch.Tensor) -> torch.Tensor:
    """255 minus each value."""
    return images.bitwise_not()
