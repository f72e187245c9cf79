"""Progressive resolution: the first steps of a run see smaller images, the others images of the full size.

At 24 pixels instead of 32 an image has 36 patches of 4 pixels instead of 64. FixRes (1906.06423) trains small and then
a little at the size that it is tested at; EfficientNetV2 (2104.00298, section 4) lets the size grow all along, and the
strength of its augmentation with it. Ours stays the same: an image is augmented at its full size, and shrunk before it
is mixed, so that the boxes of CutMix are whole pixels of what the network sees, and its shares of the labels exact.

Evaluation sees the full size. Photographs are decoded to it too: straight to the smaller one would be cheaper.
"""

from dataclasses import dataclass

import torch

from ..configuration_vit_scratch import ViTScratchConfig
from ..errors import UserError
from ..results.summary import training_flops
from .features import can_cache_features
from .recipes import FULL_SIZE_STEP, Recipe
from .schedules import in_steps, steps_text

# B batch, C channels, H W image


@dataclass(frozen=True)
class Resolution:
    """The size of the images that a run trains on.

    initial_size: the side in pixels before the step from which on they are full; None: they are from the first one.
    full_size_step: that step; under 1 a share of all steps. why_full: why a recipe's own initial size is left out.
    """

    initial_size: int | None = None
    full_size_step: float = FULL_SIZE_STEP
    why_full: str | None = None

    @property
    def is_progressive(self) -> bool:
        return self.initial_size is not None

    def num_initial_steps(self, total_steps: int) -> int:
        """The steps of a run of `total_steps` whose images are small, the first ones."""
        return min(in_steps(self.full_size_step, total_steps), total_steps) if self.is_progressive else 0

    def check_length(self, total_steps: int):
        """Raises UserError for a run that ends before its full size comes. A share may round to the end of a short run:
        recipes are shortened with --max_steps to try them."""
        if self.is_progressive and self.full_size_step >= total_steps:
            raise UserError(
                f"--full_size_step {self.full_size_step:g}: a run of {total_steps:,} steps ends before it. Lower it, "
                f"train longer, or give a share of all steps such as {FULL_SIZE_STEP:g}."
            )

    def shrink(self, images: torch.Tensor) -> torch.Tensor:
        """Floats (B, C, H, W) -> (B, C, initial, initial): bilinear, each new pixel a mean over all that it covers."""
        size = (self.initial_size, self.initial_size)
        return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)

    def work(self, steps: int, total_steps: int, config: ViTScratchConfig) -> float:
        """What the first `steps` of a run cost, in steps at full size: one on small images counts as its pixels do."""
        initial = min(steps, self.num_initial_steps(total_steps))
        if not initial:
            return float(steps)
        height, width = config.image_height_width
        return steps - initial * (1 - self.initial_size**2 / (height * width))

    def pflop(self, config: ViTScratchConfig, steps: int, total_steps: int, batch_size: int) -> float:
        """PFLOP of the first `steps` of a run that trains all of the network: see results/summary.training_flops."""
        initial = min(steps, self.num_initial_steps(total_steps))
        flops = (steps - initial) * training_flops(config)
        if initial:
            flops += initial * training_flops(config, (self.initial_size, self.initial_size))
        return flops * batch_size / 1e15

    def stages(self, total_steps: int) -> list[str]:
        """What is said of the two stages, a line; nothing of a single one."""
        if self.why_full is not None:
            return [f"note: all images have their full size: {self.why_full}"]
        if not self.is_progressive:
            return []
        initial = self.num_initial_steps(total_steps)
        return [f"{steps_text(initial)} at {self.initial_size} pixels, then {total_steps - initial:,} at full size"]


def resolution_of(recipe: Recipe, chosen: frozenset[str], config: ViTScratchConfig, num_samples: int) -> Resolution:
    """The recipe's sizes for this network and so many training images. chosen: the fields that a person set.

    Raises UserError for an initial size that is not smaller than the network's or that its patches do not fill, and
    for a run that sees its images once, as features, or that trains a specimen. Where the size is the named recipe's
    own, made for its network, all images are full instead, which the run says.
    """
    if recipe.initial_image_size is None:
        return Resolution()
    is_chosen = "initial_image_size" in chosen
    try:
        _check_size(recipe, config, num_samples)
    except UserError as error:
        if is_chosen:
            raise
        return Resolution(why_full=str(error))
    size, full = recipe.initial_image_size, config.image_height_width[0]
    if not is_chosen and 2 * size < full:
        return Resolution(why_full=f"--initial_image_size {size} is the recipe's, for smaller ones than {full} pixels.")
    return Resolution(size, FULL_SIZE_STEP if recipe.full_size_step is None else recipe.full_size_step)


def _check_size(recipe: Recipe, config: ViTScratchConfig, num_samples: int):
    size, (height, width) = recipe.initial_image_size, config.image_height_width
    if can_cache_features(recipe, num_samples, config.hidden_size):
        raise UserError("--initial_image_size has no effect here: the frozen backbone sees each image once.")
    if recipe.specimen is not None:
        raise UserError("--initial_image_size does not work with --specimen: a specimen is trained at one size.")
    if height != width:
        raise UserError(
            f"--initial_image_size {size} is the side of a square, the network sees {height} x {width} pixels: leave "
            "it out."
        )
    if size >= height:
        raise UserError(f"--initial_image_size {size} must be smaller than the image size, which is {height} pixels.")
    try:
        config.patch_grid_of(size, size)
    except ValueError as error:  # it names the nearest sizes
        raise UserError(f"--initial_image_size {size}: {str(error).removeprefix('image_size: ')}") from error
