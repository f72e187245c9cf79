"""AutoAugment (1805.09501), RandAugment (1909.13719) and TrivialAugment (2103.10158): their tables, drawn per sample.

Beside them DeiT III's 3-Augment (2204.07118) and colour jitter, which draw from the same operations. Operations, ranges
and the 25 sub-policies are torchvision's, and so is their meaning (the tests compare them row by row). Outside a moved
image lies grey 128, as in AutoAugment's code; pixels are read at the nearest place.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from . import colour
from .draws import Draws, choose, send
from .geometry import nearest_affine

# B batch, C channels, H W image

# ---------------------------------------------------------------- operations


def _matrices(magnitudes: np.ndarray, a=1.0, b=0.0, x=0.0, c=0.0, d=1.0, y=0.0) -> np.ndarray:
    """(B, 2, 3) of the rows (a, b, x) and (c, d, y), each a number or one a sample."""
    matrices = np.empty((len(magnitudes), 6))
    for column, entry in enumerate((a, b, x, c, d, y)):
        matrices[:, column] = entry
    return matrices.reshape(-1, 2, 3)


def _turns(angles: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angles), np.sin(angles)
    return _matrices(angles, a=cos, b=-sin, c=sin, d=cos)


# operation: matrices (B, 2, 3) from magnitudes (B,), height and width; they lead from an output pixel to its source, in
# pixels from the centre. Shears hold the first row or column's edge where it is; positive rotations turn to the left.
GEOMETRY: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "shear_x": lambda m, height, width: _matrices(m, b=m, x=m * height / 2),
    "shear_y": lambda m, height, width: _matrices(m, c=m, y=m * width / 2),
    "translate_x": lambda m, height, width: _matrices(m, x=-np.trunc(m)),  # whole pixels
    "translate_y": lambda m, height, width: _matrices(m, y=-np.trunc(m)),
    "rotate": lambda m, height, width: _turns(np.radians(m)),
}
COLOUR: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "brightness": lambda images, m: colour.brightness(images, 1.0 + m),
    "color": lambda images, m: colour.saturation(images, 1.0 + m),
    "contrast": lambda images, m: colour.contrast(images, 1.0 + m),
    "sharpness": lambda images, m: colour.sharpness(images, 1.0 + m),
    "posterize": colour.posterize,
    "solarize": lambda images, m: colour.solarize(images, 255.0 * m),
    "autocontrast": lambda images, m: colour.autocontrast(images),
    "equalize": lambda images, m: colour.equalize(images),
    "invert": lambda images, m: colour.invert(images),
    "blur": colour.gaussian_blur,
}
OPERATIONS = ("identity", *GEOMETRY, *COLOUR)  # an operation's number is its place here


# ---------------------------------------------------------------- magnitudes


class Range(NamedTuple):
    """An operation's magnitudes from the first bin to the last.

    is_signed: the sign is drawn. side: the numbers are shares of this side of the image, 0 height, 1 width.
    """

    first: float = 0.0
    last: float = 0.0
    is_signed: bool = False
    side: int | None = None


RANGES: dict[str, dict[str, Range]] = {
    "standard": {
        "identity": Range(),
        "shear_x": Range(0.0, 0.3, is_signed=True),
        "shear_y": Range(0.0, 0.3, is_signed=True),
        "translate_x": Range(0.0, 150 / 331, is_signed=True, side=1),
        "translate_y": Range(0.0, 150 / 331, is_signed=True, side=0),
        "rotate": Range(0.0, 30.0, is_signed=True),  # degrees
        "brightness": Range(0.0, 0.9, is_signed=True),
        "color": Range(0.0, 0.9, is_signed=True),
        "contrast": Range(0.0, 0.9, is_signed=True),
        "sharpness": Range(0.0, 0.9, is_signed=True),
        "posterize": Range(8, 4),  # bits
        "solarize": Range(1.0, 0.0),  # share of the largest value
        "autocontrast": Range(),
        "equalize": Range(),
    },
    "wide": {
        "identity": Range(),
        "shear_x": Range(0.0, 0.99, is_signed=True),
        "shear_y": Range(0.0, 0.99, is_signed=True),
        "translate_x": Range(0.0, 32.0, is_signed=True),  # pixels, whatever the image's size
        "translate_y": Range(0.0, 32.0, is_signed=True),
        "rotate": Range(0.0, 135.0, is_signed=True),
        "brightness": Range(0.0, 0.99, is_signed=True),
        "color": Range(0.0, 0.99, is_signed=True),
        "contrast": Range(0.0, 0.99, is_signed=True),
        "sharpness": Range(0.0, 0.99, is_signed=True),
        "posterize": Range(8, 2),
        "solarize": Range(1.0, 0.0),
        "autocontrast": Range(),
        "equalize": Range(),
    },
}
RANGES["autoaugment"] = {
    **{name: item for name, item in RANGES["standard"].items() if name != "identity"},
    "invert": Range(),
}


@lru_cache(maxsize=32)
def magnitude_table(ranges: str, num_bins: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of RANGES[ranges]: its operations' numbers (n,), their magnitudes (n, num_bins), which are signed (n,)."""
    rows = []
    for name, item in RANGES[ranges].items():
        scale = 1 if item.side is None else (height, width)[item.side]
        # torch's linspace, as torchvision's: a last bit decides which whole pixel a shift is cut off to
        values = torch.linspace(item.first, item.last * scale, num_bins)
        rows.append((values.round() if name == "posterize" else values).double().numpy())
    numbers = np.array([OPERATIONS.index(name) for name in RANGES[ranges]])
    return numbers, np.stack(rows), np.array([item.is_signed for item in RANGES[ranges].values()])


# ---------------------------------------------------------------- policies

# 25 sub-policies, each two of (operation, probability, magnitude of 10 bins; None: it has none)
SUB_POLICIES: dict[str, tuple[tuple[tuple[str, float, int | None], ...], ...]] = {
    "autoaugment_cifar10": (
        (("invert", 0.1, None), ("contrast", 0.2, 6)),
        (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
        (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
        (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
        (("autocontrast", 0.5, None), ("equalize", 0.9, None)),
        (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
        (("color", 0.4, 3), ("brightness", 0.6, 7)),
        (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
        (("equalize", 0.6, None), ("equalize", 0.5, None)),
        (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
        (("color", 0.7, 7), ("translate_x", 0.5, 8)),
        (("equalize", 0.3, None), ("autocontrast", 0.4, None)),
        (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
        (("brightness", 0.9, 6), ("color", 0.2, 8)),
        (("solarize", 0.5, 2), ("invert", 0.0, None)),
        (("equalize", 0.2, None), ("autocontrast", 0.6, None)),
        (("equalize", 0.2, None), ("equalize", 0.6, None)),
        (("color", 0.9, 9), ("equalize", 0.6, None)),
        (("autocontrast", 0.8, None), ("solarize", 0.2, 8)),
        (("brightness", 0.1, 3), ("color", 0.7, 0)),
        (("solarize", 0.4, 5), ("autocontrast", 0.9, None)),
        (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
        (("autocontrast", 0.9, None), ("solarize", 0.8, 3)),
        (("equalize", 0.8, None), ("invert", 0.1, None)),
        (("translate_y", 0.7, 9), ("autocontrast", 0.9, None)),
    ),
    "autoaugment_imagenet": (
        (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, None)),
        (("equalize", 0.8, None), ("equalize", 0.6, None)),
        (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
        (("equalize", 0.4, None), ("solarize", 0.2, 4)),
        (("equalize", 0.4, None), ("rotate", 0.8, 8)),
        (("solarize", 0.6, 3), ("equalize", 0.6, None)),
        (("posterize", 0.8, 5), ("equalize", 1.0, None)),
        (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
        (("equalize", 0.6, None), ("posterize", 0.4, 6)),
        (("rotate", 0.8, 8), ("color", 0.4, 0)),
        (("rotate", 0.4, 9), ("equalize", 0.6, None)),
        (("equalize", 0.0, None), ("equalize", 0.8, None)),
        (("invert", 0.6, None), ("equalize", 1.0, None)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("rotate", 0.8, 8), ("color", 1.0, 2)),
        (("color", 0.8, 8), ("solarize", 0.8, 7)),
        (("sharpness", 0.4, 7), ("invert", 0.6, None)),
        (("shear_x", 0.6, 5), ("equalize", 1.0, None)),
        (("color", 0.4, 0), ("equalize", 0.6, None)),
        (("equalize", 0.4, None), ("solarize", 0.2, 4)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, None)),
        (("invert", 0.6, None), ("equalize", 1.0, None)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("equalize", 0.8, None), ("equalize", 0.6, None)),
    ),
}


class Stage(NamedTuple):
    """One operation a sample: its numbers in OPERATIONS and its magnitudes with their signs, both (B,)."""

    operations: np.ndarray
    magnitudes: np.ndarray


def _with_sign(magnitudes: np.ndarray, is_signed: np.ndarray, draws: np.ndarray) -> np.ndarray:
    return np.where(is_signed & (draws < 0.5), -magnitudes, magnitudes)


def auto_augment(draws: Draws, name: str, height: int, width: int) -> list[Stage]:
    """A sub-policy a sample, drawn evenly; each of its two operations happens with its own probability."""
    policy = SUB_POLICIES[name]
    numbers, table, is_signed = magnitude_table("autoaugment", 10, height, width)
    uniforms = draws.uniform(name, 5).numpy()  # the sub-policy; for each operation whether and the sign
    chosen = choose(uniforms[:, 0], len(policy))
    names = list(RANGES["autoaugment"])
    stages = []
    for place in range(2):
        rows = [sub_policy[place] for sub_policy in policy]
        kinds = np.array([names.index(operation) for operation, _, _ in rows])[chosen]
        happens = uniforms[:, 1 + place] < np.array([probability for _, probability, _ in rows])[chosen]
        magnitudes = table[kinds, np.array([magnitude or 0 for _, _, magnitude in rows])[chosen]]
        magnitudes = _with_sign(magnitudes, is_signed[kinds], uniforms[:, 3 + place])
        stages.append(Stage(np.where(happens, numbers[kinds], 0), magnitudes))
    return stages


def rand_augment(
    draws: Draws, num_ops: int, magnitude: int, height: int, width: int, magnitude_std: float = 0.0
) -> list[Stage]:
    """`num_ops` operations a sample, each drawn evenly and with replacement; magnitude 0 to 30.

    magnitude_std: each operation's magnitude is drawn from a normal distribution of this standard deviation around
    `magnitude`, cut off at 0 and 30 (timm's mstd, with which DeiT trains: 2012.12877, table 9).
    """
    numbers, table, is_signed = magnitude_table("standard", 31, height, width)
    uniforms = draws.uniform("randaugment", 2 * num_ops).numpy()
    bins = np.full((len(uniforms), num_ops), magnitude, dtype=np.float64)
    if magnitude_std:
        normal = torch.special.ndtri(draws.uniform("randaugment magnitudes", num_ops).double()).numpy()
        bins = np.clip(magnitude + magnitude_std * normal, 0, 30)
    stages = []
    for place in range(num_ops):
        kinds = choose(uniforms[:, 2 * place], len(numbers))
        magnitudes = _with_sign(_at(table, kinds, bins[:, place]), is_signed[kinds], uniforms[:, 2 * place + 1])
        stages.append(Stage(numbers[kinds], magnitudes))
    return stages


def _at(table: np.ndarray, kinds: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """(B,) each sample's magnitude, between two bins in proportion; bits of posterize are whole."""
    low = np.floor(bins).astype(np.int64)
    share = bins - low
    values = table[kinds, low]
    between = values + share * (table[kinds, np.minimum(low + 1, table.shape[1] - 1)] - values)
    is_bits = kinds == list(RANGES["standard"]).index("posterize")
    return np.where(share == 0, values, np.where(is_bits, np.rint(between), between))


def trivial_augment(draws: Draws, height: int, width: int) -> list[Stage]:
    """One operation a sample, it and its magnitude (31 bins of the wide ranges) drawn evenly."""
    numbers, table, is_signed = magnitude_table("wide", 31, height, width)
    uniforms = draws.uniform("trivialaugment", 3).numpy()
    kinds = choose(uniforms[:, 0], len(numbers))
    magnitudes = table[kinds, choose(uniforms[:, 1], 31)]
    return [Stage(numbers[kinds], _with_sign(magnitudes, is_signed[kinds], uniforms[:, 2]))]


SIGMAS = (0.1, colour.LARGEST_SIGMA)  # of 3-Augment's blur, in pixels
SOLARIZED_FROM = 128 / 255  # share of the largest value


def three_augment(draws: Draws) -> list[Stage]:
    """Grey, solarized from 128 on, or blurred by a Gaussian: one of them a sample, each as likely.

    2204.07118, section 3. There colour jitter of 0.3 follows, which is a flag of its own here.
    """
    uniforms = draws.uniform("three_augment", 2).numpy().astype(np.float64)
    kinds = choose(uniforms[:, 0], 3)
    numbers = np.array([OPERATIONS.index(name) for name in ("color", "solarize", "blur")])[kinds]
    sigmas = SIGMAS[0] + uniforms[:, 1] * (SIGMAS[1] - SIGMAS[0])
    return [Stage(numbers, np.choose(kinds, (-1.0, SOLARIZED_FROM, sigmas)))]  # a colour of 1 - 1 is none


def color_jitter(draws: Draws, strength: float) -> list[Stage]:
    """Brightness, contrast and saturation, in an order drawn for each sample, times factors drawn evenly from
    1 - strength (not below 0) to 1 + strength: torchvision's ColorJitter without its hue."""
    uniforms = draws.uniform("color_jitter", 6).numpy().astype(np.float64)  # three factors; three ranks
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    factors = low + uniforms[:, :3] * (high - low)
    numbers = np.array([OPERATIONS.index(name) for name in ("brightness", "contrast", "color")])
    order = uniforms[:, 3:].argsort(axis=1)
    return [Stage(numbers[kinds], factors[np.arange(len(factors)), kinds] - 1.0) for kinds in order.T]


# name: the stages from the draws, the image's height and width, and RandAugment's number, magnitude and its deviation
POLICIES: dict[str, Callable[[Draws, int, int, int, int, float], list[Stage]]] = {
    "randaugment": lambda draws, height, width, num_ops, m, std: rand_augment(draws, num_ops, m, height, width, std),
    "autoaugment_cifar10": lambda draws, height, width, *_: auto_augment(draws, "autoaugment_cifar10", height, width),
    "autoaugment_imagenet": lambda draws, height, width, *_: auto_augment(draws, "autoaugment_imagenet", height, width),
    "trivialaugment": lambda draws, height, width, *_: trivial_augment(draws, height, width),
    "three_augment": lambda draws, *_: three_augment(draws),
}


def apply_stages(images: torch.Tensor, stages: list[Stage]) -> torch.Tensor:
    """uint8 images (B, C, H, W) after one operation a sample for each stage.

    A stage sorts the batch by operation, so that each runs once, on the samples that drew it and no other; all that
    move pixels are one. Which samples those are is known on the CPU: the device is asked nothing.
    """
    order = np.arange(len(images))  # the sample at each place of the sorted batch
    for operations, magnitudes in stages:
        wanted = np.argsort(operations, kind="stable")
        images = _reorder(images, order, wanted)
        order = wanted
        _apply_sorted(images, operations[wanted], magnitudes[wanted])
    return _reorder(images, order, np.arange(len(images)))


def _reorder(images: torch.Tensor, order: np.ndarray, wanted: np.ndarray) -> torch.Tensor:
    """A copy of images that stand in `order`, in the order `wanted`."""
    rows = torch.from_numpy(np.argsort(order)[wanted])
    return images.index_select(0, send(rows, images.device))


def _apply_sorted(images: torch.Tensor, kinds: np.ndarray, magnitudes: np.ndarray):
    """Applies to images sorted by the number of their operation that operation, in place."""
    height, width = images.shape[-2:]
    bounds = np.searchsorted(kinds, np.arange(len(OPERATIONS) + 1))  # operation k: bounds[k] to before bounds[k + 1]
    start, stop = bounds[1], bounds[len(GEOMETRY) + 1]
    if start < stop:
        matrices = [
            matrix(magnitudes[bounds[kind] : bounds[kind + 1]], height, width)
            for kind, matrix in enumerate(GEOMETRY.values(), start=1)
        ]
        images[start:stop] = nearest_affine(images[start:stop], torch.from_numpy(np.concatenate(matrices)))
    for kind, apply in enumerate(COLOUR.values(), start=len(GEOMETRY) + 1):
        start, stop = bounds[kind], bounds[kind + 1]
        if start < stop:
            images[start:stop] = apply(images[start:stop], torch.from_numpy(magnitudes[start:stop]))
