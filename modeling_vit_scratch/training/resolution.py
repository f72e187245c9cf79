"""Progressive training: the first steps of a run see less of their images, the others all of them.

Less is smaller images: at 24 pixels instead of 32 an image has 36 patches of 4 pixels instead of 64. FixRes
(1906.06423) trains small and then a little at the size that it is tested at; EfficientNetV2 (2104.00298, section 4)
lets the size grow all along, and the strength of its augmentation with it. Ours stays the same: an image is augmented
at its full size, and shrunk before it is mixed, so that the boxes of CutMix are whole pixels of what the network sees,
and its shares of the labels exact. Or less is a share of the patches (PatchDropout, 2208.07220; FLIP, 2212.00794, ends
with all of them). Both may go together.

Evaluation sees all. Photographs are decoded to the full size too: straight to the smaller one would be cheaper.
"""

from dataclasses import dataclass

import torch

from ..configuration_vit_scratch import ViTScratchConfig
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..results.summary import training_flops
from .features import can_cache_features
from .recipes import FULL_SIZE_STEP, Recipe
from .schedules import in_steps, steps_text

# B batch, C channels, H W image


@dataclass(frozen=True)
class Resolution:
    """How much of its images a run trains on.

    initial_size: the side in pixels before the step from which on they are full; None: the full one.
    full_size_step: that step; under 1 a share of all steps; None: all steps are alike. patch_drop_rate: the share of
    patches that is left out before that step, or where there is none, always. why_full: why a recipe's own initial
    size is left out.
    """

    initial_size: int | None = None
    full_size_step: float | None = None
    patch_drop_rate: float = 0.0
    why_full: str | None = None

    @property
    def is_progressive(self) -> bool:
        return self.full_size_step is not None

    def num_initial_steps(self, total_steps: int) -> int:
        """The steps of a run of `total_steps` before all of an image is seen, the first ones; 0 where all are alike."""
        return 0 if self.full_size_step is None else min(in_steps(self.full_size_step, total_steps), total_steps)

    def check_length(self, total_steps: int):
        """Raises UserError for a run that ends before its full size comes. A share may round to the end of a short run:
        recipes are shortened with --max_steps to try them."""
        if self.full_size_step is not None and self.full_size_step >= total_steps:
            raise UserError(
                f"--full_size_step {self.full_size_step:g}: a run of {total_steps:,} steps ends before it. Lower it, "
                f"train longer, or give a share of all steps such as {FULL_SIZE_STEP:g}."
            )

    def start(self, model: ViTScratchForImageClassification, is_initial: bool):
        """Makes the network leave out what a step of this kind does."""
        is_on = is_initial or not self.is_progressive
        model.vit.patch_dropout.rate = self.patch_drop_rate if is_on else 0.0

    def shrink(self, images: torch.Tensor) -> torch.Tensor:
        """Floats (B, C, H, W) -> (B, C, initial, initial): bilinear, each new pixel a mean over all that it covers."""
        size = (self.initial_size, self.initial_size)
        return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)

    def work(self, steps: int, total_steps: int, config: ViTScratchConfig) -> float:
        """What the first `steps` of a run cost, in steps of the last kind: a first one counts as its patches do."""
        initial = min(steps, self.num_initial_steps(total_steps))
        height, width = config.image_height_width
        pixels = 1.0 if self.initial_size is None else self.initial_size**2 / (height * width)
        return steps - initial * (1 - pixels * (1 - self.patch_drop_rate))

    def pflop(self, config: ViTScratchConfig, steps: int, total_steps: int, batch_size: int) -> float:
        """PFLOP of the first `steps` of a run that trains all of the network: see results/summary.training_flops."""
        initial = min(steps, self.num_initial_steps(total_steps))
        always = 0.0 if self.is_progressive else self.patch_drop_rate
        flops = (steps - initial) * training_flops(config, patch_drop_rate=always)
        if initial:
            size = None if self.initial_size is None else (self.initial_size, self.initial_size)
            flops += initial * training_flops(config, size, self.patch_drop_rate)
        return flops * batch_size / 1e15

    def stages(self, total_steps: int) -> list[str]:
        """What is said of what is left out, a line or two; nothing where nothing is."""
        lines = [] if self.why_full is None else [f"note: all images have their full size: {self.why_full}"]
        size = [] if self.initial_size is None else [f"at {self.initial_size} pixels"]
        left_out = [f"without {self.patch_drop_rate:.4g} of the patches"] if self.patch_drop_rate else []
        if self.is_progressive:
            initial = self.num_initial_steps(total_steps)
            first = f"{steps_text(initial)} {' and '.join(size + left_out)}"
            rest = "at full size" if size else "with all"
            lines.append(f"{first}, then {total_steps - initial:,} {rest}")
        elif left_out:
            lines.append(f"every step {left_out[0]} of each image")
        return lines


def resolution_of(recipe: Recipe, chosen: frozenset[str], config: ViTScratchConfig, num_samples: int) -> Resolution:
    """What this network sees of the recipe's images, of so many. chosen: the fields that a person set.

    Raises UserError for an initial size that is not smaller than the network's or that its patches do not fill, and
    for a run that sees its images once, as features, or that trains a specimen. Where the size is the named recipe's
    own, made for its network, all images are full instead, which the run says.
    """
    why_full = _why_full(recipe, chosen, config, num_samples)
    size = recipe.initial_image_size if why_full is None else None
    rate = config.patch_drop_rate if recipe.finetune != "head" else 0.0  # a frozen backbone sees every patch
    if recipe.initial_image_size is None and not rate and "full_size_step" in chosen:
        raise UserError(
            "--full_size_step has no effect here: it goes with --initial_image_size or with the network's "
            "patch_drop_rate."
        )
    step = recipe.full_size_step
    if size is None:
        return Resolution(None, step if rate else None, rate, why_full)
    return Resolution(size, FULL_SIZE_STEP if step is None else step, rate)


def _why_full(recipe: Recipe, chosen: frozenset[str], config: ViTScratchConfig, num_samples: int) -> str | None:
    """Why the recipe's initial size is left out; None: it is not, or there is none. A chosen one is an error then."""
    if recipe.initial_image_size is None:
        return None
    is_chosen = "initial_image_size" in chosen
    try:
        _check_size(recipe, config, num_samples)
    except UserError as error:
        if is_chosen:
            raise
        return str(error)
    size, full = recipe.initial_image_size, config.image_height_width[0]
    if not is_chosen and 2 * size < full:
        return f"--initial_image_size {size} is the recipe's, for smaller ones than {full} pixels."
    return None


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
