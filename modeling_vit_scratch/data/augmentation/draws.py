"""The random numbers of a step: made on the CPU for the whole global batch; each rank takes its positions' rows."""

import math

import numpy as np
import torch

from ..order import derived_rng, derived_seed

# B samples of this rank


class Draws:
    """The random numbers of one step for some positions of its global batch.

    positions: where each of this rank's B samples stands in the global batch of `batch_size`, on the CPU.
    is_interleaved: each rank's positions are one residue class modulo `world_size`. Not so where a stream's epoch ends
    within the batch: its lanes start anew there. It must be the same on all ranks: it decides whether they exchange
    images.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        batch_size: int,
        positions: np.ndarray | torch.Tensor,
        world_size: int = 1,
        is_interleaved: bool = True,
    ):
        self.seed, self.step, self.batch_size, self.world_size = seed, step, batch_size, world_size
        self.positions = torch.as_tensor(positions, dtype=torch.int64)
        self.is_interleaved = is_interleaved

    def uniform(self, purpose: str, num: int) -> torch.Tensor:
        """(B, num) float32 in [0, 1) on the CPU: another purpose or step gives other numbers."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "augmentation", purpose, self.step))
        return torch.rand(self.batch_size, num, generator=generator)[self.positions]

    def beta(self, purpose: str, alpha: float) -> torch.Tensor:
        """(B,) float32 from Beta(alpha, alpha) on the CPU."""
        rng = derived_rng(self.seed, "augmentation", purpose, self.step)
        return torch.from_numpy(rng.beta(alpha, alpha, self.batch_size)).float()[self.positions]

    def noise(self, purpose: str, index: int, num: int) -> torch.Tensor:
        """(num,) standard normal float32 for this rank's sample `index` alone: nobody draws noise for others."""
        position = int(self.positions[index])
        generator = torch.Generator().manual_seed(derived_seed(self.seed, purpose, self.step, position))
        return torch.randn(num, generator=generator)


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """CPU values on the device, without waiting for it."""
    if device.type == "cuda":  # a copy from memory that is not pinned waits for all work before it
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def choose(uniforms: np.ndarray, num_choices: int | np.ndarray) -> np.ndarray:
    """Integers in 0..num_choices - 1, each as likely, from numbers in [0, 1)."""
    return (uniforms.astype(np.float64) * num_choices).astype(np.int64)


# ---------------------------------------------------------------- boxes

NUM_BOX_DRAWS = 22  # ten tries of an area and a ratio, and the corner
BOX_TRIES = 10


def draw_boxes(
    uniforms: torch.Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    height: int,
    width: int,
    is_inside: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of a share `scale` of the area and a width / height within `ratio`, by at most ten tries a sample.

    uniforms (B, NUM_BOX_DRAWS); is_inside: a box is smaller than the image in both directions. Returns the boxes
    (B, 4: top, left, height, width) and which of them fit (B,). Areas are uniform, ratios uniform in their logarithm,
    corners uniform: as torchvision's RandomResizedCrop draws them.
    """
    values = uniforms.numpy().astype(np.float64)
    areas = height * width * (scale[0] + values[:, :BOX_TRIES] * (scale[1] - scale[0]))  # (B, tries)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shapes = np.exp(low + values[:, BOX_TRIES : 2 * BOX_TRIES] * (high - low))
    widths, heights = np.rint(np.sqrt(areas * shapes)), np.rint(np.sqrt(areas / shapes))
    fits = (widths > 0) & (widths <= width - is_inside) & (heights > 0) & (heights <= height - is_inside)
    first = fits.argmax(axis=1)
    rows = np.arange(len(values))
    box_heights, box_widths = heights[rows, first].astype(np.int64), widths[rows, first].astype(np.int64)
    has_fit = fits[rows, first]
    tops = choose(values[:, -2], np.where(has_fit, height - box_heights + 1, 1))
    lefts = choose(values[:, -1], np.where(has_fit, width - box_widths + 1, 1))
    return np.stack((tops, lefts, box_heights, box_widths), axis=1), has_fit
