"""Distillation: a trained network's answers for the very images of a step are learned, beside the labels.

Hinton et al., "Distilling the knowledge in a neural network" (1503.02531), section 2; soft and hard as in DeiT
(2012.12877), section 4, on the classifier itself instead of a token of their own. The teacher sees the images as they
were augmented and mixed for the student: "Knowledge distillation: a good teacher is patient and consistent"
(2106.05237), section 3.1.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    interpolate,
    kl_div,
    log_softmax,
)
from transformers import AutoImageProcessor, AutoModelForImageClassification, TimmWrapperImageProcessor
from transformers.utils import logging

from ..configuration_vit_scratch import ViTScratchConfig
from ..data.listing import some
from ..data.splits import Source
from ..errors import UserError, quiet_hub
from ..weights import load_pixel_facts, load_pretrained
from ..weights.files import open_checkpoint
from .recipe import Recipe

# B batch, C channels of the teacher, H and W its images' height and width, K labels

MULTI_LABEL, SINGLE_LABEL = "multi_label_classification", "single_label_classification"
OWN = ViTScratchConfig.model_type
PLAIN = ("vit_", "deit", "torchvision.")  # what timm and torchvision call networks that may be read here
SAME = 1e-5  # less is rounding, between numbers that a network takes for pixels
PROBED_SIDE = 64  # pixels of the images of one colour that a processor is asked about


@dataclass(frozen=True)
class Pixels:
    """What becomes of an image before a network sees it: its colours, and its size.

    matrix (C, C), offset (C,): from the numbers of a pixel to those that the network takes. size: (H, W).
    """

    matrix: torch.Tensor
    offset: torch.Tensor
    size: tuple[int, int]

    def of_normalised(self, mean: torch.Tensor, std: torch.Tensor) -> "Pixels":
        """The same for pixels of which (mean, std) were taken before, (C or 1, 1, 1) each."""
        mean, std = (values.cpu().double().flatten().expand(len(self.offset)) for values in (mean, std))
        return Pixels(self.matrix * std, self.offset + self.matrix @ mean, self.size)


class View:
    """Images (B, C or 1, height, width) to what a network sees of them (B, C, H, W); a grey one in all its channels."""

    def __init__(self, pixels: Pixels, device: torch.device, dtype: torch.dtype):
        self.num_channels, self.size = len(pixels.offset), pixels.size
        diagonal = pixels.matrix.diag()
        self.is_diagonal = torch.equal(pixels.matrix, diagonal.diag())  # else channels change places
        self.is_as_it_was = self.is_diagonal and bool(
            (diagonal - 1).abs().max() < SAME and pixels.offset.abs().max() < SAME
        )
        self.matrix = (diagonal[:, None, None] if self.is_diagonal else pixels.matrix).to(device, dtype)
        self.offset = pixels.offset[:, None, None].to(device, dtype)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] < self.num_channels:
            images = images.expand(-1, self.num_channels, -1, -1)
        if not self.is_as_it_was:
            turned = images * self.matrix if self.is_diagonal else torch.einsum("dc,bchw->bdhw", self.matrix, images)
            images = turned + self.offset
        if images.shape[-2:] != self.size:
            images = interpolate(images, self.size, mode="bilinear", antialias=True)
        return images


@dataclass(frozen=True)
class Teacher:
    """A frozen network with the run's classes, and what it sees of a student's images.

    class_ids: (K,) where the run's classes stand among the teacher's; None: in the same order. told: what it is, for
    people.
    """

    network: torch.nn.Module
    view: Callable[[torch.Tensor], torch.Tensor]
    class_ids: torch.Tensor | None = None
    autocast: Callable[[], AbstractContextManager] = field(default=nullcontext)
    told: str = ""

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(B, K) in the images' precision, of images as the student sees them."""
        seen = self.view(images)
        with self.autocast():
            logits = self.network(pixel_values=seen).logits.to(images.dtype)
        return logits if self.class_ids is None else logits[:, self.class_ids]


@dataclass(frozen=True)
class Distillation:
    """What a step learns from the teacher.

    alpha: the teacher's share of the loss, labels have the rest. temperature: what both networks' logits are divided
    by; its square is a factor, which keeps gradients in size (1503.02531, section 2). is_hard: the teacher's answers
    alone are learned, as if they were labels.
    """

    teacher: Teacher
    alpha: float
    temperature: float = 1.0
    is_hard: bool = False
    is_multi_label: bool = False

    def joined(self, loss_sum: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The sum over the images of the loss with labels `loss_sum` and of the teacher's, each with its share."""
        answers = self.teacher.logits(images)
        return (1 - self.alpha) * loss_sum + self.alpha * self.loss_sum(logits, answers)

    def loss_sum(self, logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """The sum over the images of what is learned of the teacher's logits `answers` (B, K).

        One class an image: the Kullback-Leibler divergence from the teacher, or hard, cross-entropy. Several: the same
        of each class's Bernoulli distribution, a mean over the classes.
        """
        if self.is_hard:
            if self.is_multi_label:
                taken = (answers > 0).to(logits.dtype)
                return binary_cross_entropy_with_logits(logits, taken, reduction="sum") / logits.shape[1]
            return cross_entropy(logits, answers.argmax(dim=1), reduction="sum")
        logits, answers = logits / self.temperature, answers / self.temperature
        if self.is_multi_label:
            shares = answers.sigmoid()
            crossed = binary_cross_entropy_with_logits(logits, shares, reduction="sum")
            entropy = binary_cross_entropy_with_logits(answers, shares, reduction="sum")
            divergence = (crossed - entropy) / logits.shape[1]
        else:
            of_both = (log_softmax(logits, dim=1), log_softmax(answers, dim=1))
            divergence = kl_div(*of_both, reduction="sum", log_target=True)
        return self.temperature**2 * divergence

    def __str__(self) -> str:
        kind = "hard" if self.is_hard else f"soft at temperature {self.temperature:g}"
        return f"taught by {self.teacher.told}: {kind}, {self.alpha:g} of the loss"


# ---------------------------------------------------------------- of a run


def distillation_of(
    recipe: Recipe,
    source: Source,
    pixels: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager],
) -> Distillation | None:
    """What a run on these images learns from its teacher, on the device of `pixels`; None: it has none.

    Raises UserError where the teacher cannot be read, does not know the run's classes, takes other channels, or gives
    no finite answer.
    """
    if recipe.teacher_name_or_path is None:
        return None
    name, device = recipe.teacher_name_or_path, pixels[0].device
    try:
        network, own, note = open_teacher(name, recipe.teacher_revision)
        config, num_channels = network.config, len(own.offset)
        if len(pixels[0]) not in (1, num_channels):
            raise UserError(f"{name} takes {num_channels} channel(s), the images have {len(pixels[0])}.")
        kind = MULTI_LABEL if source.is_multi_label else SINGLE_LABEL
        if config.problem_type not in (None, kind):
            raise UserError(f"{name} is for {config.problem_type}, these images for {kind}.")
        ids = _class_ids(name, config, source.class_names)
        network.requires_grad_(False).eval().to(device=device, dtype=dtype)
        _try(name, network, own, dtype)
    except UserError as error:
        raise UserError(f"--teacher_name_or_path {error}") from error
    if recipe.finetune == "head":
        note += ", which sees images: features are not computed once"
    size = sum(parameter.numel() for parameter in network.parameters())
    told = f"{name} ({type(network).__name__}, {size:,} parameters, {own.size[0]} x {own.size[1]} pixels{note})"
    if recipe.torch_compile:
        network.compile()
    view = View(own.of_normalised(*pixels), device, dtype)
    teacher = Teacher(network, view, None if ids is None else ids.to(device), autocast, told)
    return Distillation(
        teacher, recipe.distillation_alpha, recipe.distillation_temperature,
        recipe.distillation_type == "hard", source.is_multi_label,
    )  # fmt: skip


@torch.no_grad()
def _try(name: str, network: torch.nn.Module, pixels: Pixels, dtype: torch.dtype):
    """Raises UserError where the network does not take an image of its size, or answers with no numbers."""
    black = pixels.offset[:, None, None].expand(-1, *pixels.size)[None]
    device = next(network.parameters()).device
    try:
        logits = network(pixel_values=black.to(device, dtype)).logits
    except Exception as error:  # whatever the network's own code raises
        raise UserError(f"{name} does not take the images that its own files ask for: {_said(error)}") from error
    if logits.shape != (1, network.config.num_labels) or not logits.isfinite().all():
        raise UserError(f"{name} answers a black image with {tuple(logits.shape)} numbers that are not all finite.")


def open_teacher(name: str, revision: str | None = None) -> tuple[torch.nn.Module, Pixels, str]:
    """A network with its head, how it wants its images, and what to say of that.

    What this package does not read is built by transformers, any image classifier that it knows, timm's others among
    them where timm is installed. No code of a repository is run. Raises UserError where there is no such classifier,
    where a tensor of it would be drawn anew, and where nothing says how its images look.
    """
    config = open_checkpoint(name, {"revision": revision}).config
    kind, architecture = config.get("model_type", OWN), str(config.get("architecture", PLAIN[0]))
    refused: UserError | None = None
    if kind in (OWN, "vit", "deit") and architecture.startswith(PLAIN):
        try:
            return _read_here(name, revision)
        except UserError as error:
            if kind == OWN and "architecture" not in config:
                raise
            refused = error  # a network of such a name that is no plain ViT: transformers may build it
    try:
        return _built_by_transformers(name, revision)
    except UserError as error:
        raise (refused or error) from error


def _read_here(name: str, revision: str | None) -> tuple[torch.nn.Module, Pixels, str]:
    network, _ = load_pretrained(name, revision=revision)
    channels, size = network.config.num_channels, network.config.image_height_width
    facts = load_pixel_facts(name, channels, revision)
    note = "" if "image_mean" in facts else ", mean and std 0.5 as no file says others"
    mean, std = (torch.tensor(facts.get(key, [0.5] * channels)).double() for key in ("image_mean", "image_std"))
    return network, Pixels((1 / (255 * std)).diag(), -mean / std, size), note


def _built_by_transformers(name: str, revision: str | None) -> tuple[torch.nn.Module, Pixels, str]:
    path = Path(name).expanduser()
    place = str(path.parent if path.is_file() else path) if path.exists() else name
    options: dict[str, Any] = {"trust_remote_code": False}
    safe = {}
    if not path.exists():
        options["revision"], safe = revision, {"use_safetensors": True}
    logging.disable_progress_bar()
    try:
        with quiet_hub():
            network, report = AutoModelForImageClassification.from_pretrained(
                place, output_loading_info=True, **options, **safe
            )
    except Exception as error:  # whatever the network's own code raises
        raise UserError(f"{name} is no image classifier that transformers can build: {_said(error)}") from error
    if lacking := sorted(report["missing_keys"]):
        raise UserError(f"{name} has no trained head: {some(lacking, 3)} would be drawn at random.")
    try:
        with quiet_hub():
            trained = getattr(network.config, "pretrained_cfg", None)  # of timm's networks, in their config.json
            from_files = partial(AutoImageProcessor.from_pretrained, place, **options)
            processor = from_files() if not trained else TimmWrapperImageProcessor(pretrained_cfg=trained)
    except Exception as error:
        raise UserError(f"{name} has no image processor: nothing says how its images look: {_said(error)}") from error
    try:
        pixels = pixels_of(processor, _num_channels(network.config))
    except Exception as error:
        raise UserError(f"{name}: what its image processor does cannot be done here: {_said(error)}") from error
    return network, pixels, ""


def _num_channels(config: Any) -> int:
    trained = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")  # of timm
    return getattr(config, "num_channels", None) or (trained[0] if trained else 3)


def pixels_of(processor: Any, num_channels: int) -> Pixels:
    """What an image processor of transformers does to a colour, found by asking it: it is shown images of one colour.

    num_channels: 1 or 3. Raises ValueError for one that does not map colours linearly, or gives anything but an image.
    """

    def shown(*colour: int) -> torch.Tensor:
        pixels = np.full((PROBED_SIDE, PROBED_SIDE, num_channels), colour, dtype=np.uint8)
        picture = Image.fromarray(pixels if num_channels == 3 else pixels[:, :, 0])
        made = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"])
        if made.ndim != 4 or made.shape[:2] != (1, num_channels):
            raise ValueError(f"of an image it makes {tuple(made.shape)} numbers")
        return made[0].double()

    black = shown(*[0] * num_channels)
    units = [shown(*(255 * (index == other) for other in range(num_channels))) for index in range(num_channels)]
    row, column = black.shape[1] // 2, black.shape[2] // 2
    offset = black[:, row, column]
    matrix = torch.stack([(unit[:, row, column] - offset) / 255 for unit in units], dim=1)
    colour = (51, 102, 204)[:num_channels]
    expected = matrix @ torch.tensor(colour, dtype=torch.float64) + offset
    if (shown(*colour)[:, row, column] - expected).abs().max() > 1e-3 * (1 + expected.abs().max()):
        raise ValueError("it does more to colours than to scale and shift them")
    return Pixels(matrix, offset, (black.shape[1], black.shape[2]))


def _said(error: Exception) -> str:
    """The first words of an error, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _class_ids(name: str, config: Any, class_names: list[str]) -> torch.Tensor | None:
    """(K,) where the run's classes stand among the teacher's, by name; None where they are the same list."""
    theirs = [str(config.id2label[index]) for index in range(config.num_labels)]
    if theirs == class_names:
        return None
    strangers = [known for known in class_names if theirs.count(known) != 1]
    if strangers:
        raise UserError(
            f"{name} has to know each class of the images once, by its name; it does not know "
            f"{some(map(repr, strangers), 3)}. It has {some(map(repr, theirs), 3)}."
        )
    return torch.tensor([theirs.index(known) for known in class_names])
