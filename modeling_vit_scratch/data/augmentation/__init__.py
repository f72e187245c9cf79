"""Batched augmentation on the device, drawn per sample from (seed, step), the same for any number of processes.

draws.py makes the random numbers and the boxes, geometry.py and colour.py hold the single operations, policies.py the
tables of AutoAugment, RandAugment, TrivialAugment and 3-Augment, mixing.py mixup and CutMix, pipeline.py what a run
does in a row.

Written here because nothing at hand does it: kornia draws a policy's operation once a batch, torchvision works image by
image and from the global generator (benchmarks/augmentation.py measures both).
"""

from .colour import (
    autocontrast,
    brightness,
    contrast,
    equalize,
    gaussian_blur,
    invert,
    posterize,
    saturation,
    sharpness,
    solarize,
)
from .draws import Draws, send
from .geometry import affine, flip, nearest_affine, pad_and_crop, resized_crop
from .mixing import Mixing
from .pipeline import Augmentation, erase, normalise
from .policies import POLICIES, apply_stages

__all__ = [
    "POLICIES", "Augmentation", "Draws", "Mixing", "affine", "apply_stages", "autocontrast", "brightness", "contrast",
    "equalize", "erase", "flip", "gaussian_blur", "invert", "nearest_affine", "normalise", "pad_and_crop", "posterize",
    "resized_crop", "saturation", "send", "sharpness", "solarize",
]  # fmt: skip
