"""Progressive training: the first steps of a run see less of their images, the others all of them.

Less is smaller images: at 24 pixels instead of 32 an image has 36 patches of 4 pixels instead of 64. FixRes
(1906.06423) trains small and then a little at the size that it is tested at; EfficientNetV2 (2104.00298, section 4)
lets the size grow all along, and the strength of its augmentation with it. Ours stays the same: an image is augmented
at its full size, and shrunk before it is mixed, so that the boxes of CutMix are whole pixels of what the network sees,
and its shares of the labels exact. Or less is a share of the patches (PatchDropout, 2208.07220; FLIP, 2212.00794, ends
with all of them). Both may go together.

Evaluation sees all. Photographs are decoded to the full size too: straight to the smaller one would be cheaper.
"""

import dataclasses
from dataclasses import dataclass

import torch

from ..configuration_vit_scratch import ViTScratchConfig
from ..data.augmentation import Draws
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification, num_kept_patches
from ..results.summary import training_flops
from .features import can_cache_features
from .overrides import has_own_patch_drop_rate
from .recipe import FULL_SIZE_STEP, Recipe, full_size_step_of
from .schedules import in_steps, steps_text

LEAST_PATCHES = 8  # that a recipe's own rate must leave of an image

# B batch, C channels, H W image


@dataclass(frozen=True)
class Resolution:
    """How much of its images a run trains on.

    initial_size: the side in pixels before the step from which on they are full; None: the full one.
    full_size_step: that step; under 1 a share of all steps; None: all steps are alike. patch_drop_rate: the share of
    patches that is left out before that step, or where there is none, always. notes: why nothing comes of what the
    recipe would leave out.
    """

    initial_size: int | None = None
    full_size_step: float | None = None
    patch_drop_rate: float = 0.0
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        assert self.initial_size is None or self.full_size_step is not None, "small images end at a step"

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

    def rate(self, is_initial: bool) -> float:
        """The share of patches that is left out in one of the first steps, or in one of the others."""
        return self.patch_drop_rate if is_initial or not self.is_progressive else 0.0

    def patches(self, config: ViTScratchConfig, is_initial: bool) -> tuple[int, int]:
        """(patches that the network sees of an image in such a step, all patches of that image)."""
        is_small = is_initial and self.initial_size is not None
        grid = config.patch_grid_of(self.initial_size, self.initial_size) if is_small else config.patch_grid
        number = grid[0] * grid[1]
        return num_kept_patches(number, self.rate(is_initial)), number

    def set_patch_dropout(self, model: ViTScratchForImageClassification, is_initial: bool):
        """Makes the network leave out what such a step does."""
        model.vit.patch_dropout.rate = self.rate(is_initial)

    def noise(self, draws: Draws, config: ViTScratchConfig, is_initial: bool) -> torch.Tensor | None:
        """(B, patches) int64 on the CPU: ranks of each image's patches, on whatever process it is, the first of which
        stay; None: all do. Ranks, because FSDP casts what is floating, and bf16 has ties."""
        if not self.rate(is_initial):
            return None
        return draws.uniform("patches", self.patches(config, is_initial)[1]).argsort(dim=1).argsort(dim=1)

    def published_rate(self, step: int, total_steps: int) -> float:
        """patch_drop_rate of the weights after this step, which is that of the step: 0 where they have come to see all,
        so that who trains them on does not begin by leaving patches out."""
        return self.rate(is_initial=step <= self.num_initial_steps(total_steps))

    def shrink(self, images: torch.Tensor) -> torch.Tensor:
        """Floats (B, C, H, W) -> (B, C, initial, initial): bilinear, each new pixel a mean over all that it covers."""
        size = (self.initial_size, self.initial_size)
        return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)

    def work(self, steps: int, total_steps: int, config: ViTScratchConfig) -> float:
        """What the first `steps` of a run cost, in steps of the last kind: a first one counts as its patches do."""
        initial = min(steps, self.num_initial_steps(total_steps))
        (first, _), (other, _) = self.patches(config, True), self.patches(config, False)
        return steps - initial * (1 - first / other)

    def pflop(self, config: ViTScratchConfig, steps: int, total_steps: int, batch_size: int) -> float:
        """PFLOP of the first `steps` of a run that trains all of the network: see results/summary.training_flops."""
        initial = min(steps, self.num_initial_steps(total_steps))
        flops = (steps - initial) * self.flops(config, is_initial=False)
        if initial:
            flops += initial * self.flops(config, is_initial=True)
        return flops * batch_size / 1e15

    def flops(self, config: ViTScratchConfig, is_initial: bool) -> int:
        """FLOP of one image in such a step, where it trains all of the network."""
        is_small = is_initial and self.initial_size is not None
        return training_flops(config, (self.initial_size,) * 2 if is_small else None, self.rate(is_initial))

    def stages(self, total_steps: int, config: ViTScratchConfig) -> list[str]:
        """What is said of what is left out, a line or two; nothing where nothing is."""
        lines = [f"note: {note}" for note in self.notes]
        parts = [] if self.initial_size is None else [f"at {self.initial_size} pixels"]
        if self.patch_drop_rate:
            kept, number = self.patches(config, is_initial=True)
            parts.append(f"with {kept} of {number} patches, drawn anew for each image")
        if self.is_progressive:
            initial = self.num_initial_steps(total_steps)
            rest = "with all" if self.initial_size is None else "at full size"
            lines.append(f"{steps_text(initial)} {' '.join(parts)}, then {total_steps - initial:,} {rest}")
        elif parts:
            lines.append(f"every step {parts[0]}")
        return lines


def resolution_of(recipe: Recipe, chosen: frozenset[str], config: ViTScratchConfig, num_samples: int) -> Resolution:
    """What this network sees of the recipe's images, of so many. chosen: the fields that a person set.

    Raises UserError for an initial size that is not smaller than the network's or that its patches do not fill, for
    a run that sees its images once, as features, or that trains a specimen, and for a chosen full_size_step where
    nothing is left out. Where the size or the share of patches is the named recipe's own, made for its network, all is
    seen instead, which the run says.
    """
    why_full = _why_full(recipe, chosen, config, num_samples)
    seen = Resolution(
        initial_size=recipe.initial_image_size if why_full is None else None,
        full_size_step=full_size_step_of(recipe.full_size_step, recipe.initial_image_size),
        patch_drop_rate=0.0 if recipe.finetune == "head" else config.patch_drop_rate,  # a frozen backbone sees all
    )
    notes = [] if why_full is None else [f"all images have their full size: {why_full}"]
    if (why_all := _why_all_patches(recipe, config, seen)) is not None:
        notes.append(f"no patches are left out: {why_all}")
        seen = dataclasses.replace(seen, patch_drop_rate=0.0)
    if seen.initial_size is None and not seen.patch_drop_rate:
        if recipe.full_size_step is not None and "full_size_step" in chosen:
            reason = " ".join(f"Here {note}" for note in notes)
            raise UserError(
                "--full_size_step has no effect here: it goes with --initial_image_size, or with the patch_drop_rate "
                f"of a network that is trained. {reason}".rstrip()
            )
        return Resolution(notes=tuple(notes))
    return dataclasses.replace(seen, notes=tuple(notes))


def _why_all_patches(recipe: Recipe, config: ViTScratchConfig, seen: Resolution) -> str | None:
    """Why the patches that would not be seen are not left out; None: they are, or there are none."""
    if not seen.patch_drop_rate:
        return None
    if recipe.specimen is not None:
        return "a specimen sees them all."
    kept, number = seen.patches(config, is_initial=True)
    if kept >= LEAST_PATCHES or recipe.model_name_or_path is not None or not has_own_patch_drop_rate(recipe):
        return None
    return f"the recipe's patch_drop_rate {seen.patch_drop_rate:g} would leave {kept} of {number}."


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
