"""Distillation: a trained network's answers for the very images of a step are learned, beside the labels.

Hinton et al., "Distilling the knowledge in a neural network" (1503.02531), section 2; soft and hard as in DeiT
(2012.12877), section 4, on the classifier itself instead of a token of their own. The teacher sees the images as they
were augmented and mixed for the student: "Knowledge distillation: a good teacher is patient and consistent"
(2106.05237), section 3.1.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    interpolate,
    kl_div,
    log_softmax,
)
from transformers import AutoModelForImageClassification

from ..configuration_vit_scratch import ViTScratchConfig, pair
from ..data.listing import some
from ..data.splits import Source
from ..errors import UserError
from ..weights import load_pixel_facts, load_pretrained
from ..weights.files import Checkpoint, open_checkpoint
from ..weights.pixels import format_of_files, pixel_facts, processor_fields
from .recipe import Recipe

# B batch, C channels, H and W a teacher's own height and width, K labels

MULTI_LABEL, SINGLE_LABEL = "multi_label_classification", "single_label_classification"
READ_HERE = (ViTScratchConfig.model_type, "vit")  # model types; all other networks are built by transformers
PLAIN = ("vit_", "deit_", "torchvision.")  # architectures of timm's and torchvision's files that are read here


@dataclass(frozen=True)
class Teacher:
    """A frozen network with the run's classes, and how it wants its images.

    mean, std: (C, 1, 1) of pixels in [0, 255], as the student's are. class_ids: (K,) where the run's classes stand
    among the teacher's; None: in the same order. size: (H, W).
    """

    network: torch.nn.Module
    size: tuple[int, int]
    mean: torch.Tensor
    std: torch.Tensor
    class_ids: torch.Tensor | None = None
    autocast: Callable[[], AbstractContextManager] = field(default=nullcontext)

    @torch.no_grad()
    def logits(self, images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """(B, K) in the images' precision, of images that were normalised for a student by (mean, std)."""
        dtype = images.dtype
        if len(images[0]) < len(self.mean):  # a grey image, in the colours of its own
            images = images.expand(-1, len(self.mean), -1, -1)
        if not (torch.equal(mean.expand_as(self.mean), self.mean) and torch.equal(std.expand_as(self.std), self.std)):
            images = images * (std / self.std).to(dtype) + ((mean - self.mean) / self.std).to(dtype)
        if images.shape[-2:] != self.size:
            images = interpolate(images, self.size, mode="bilinear", antialias=True)
        with self.autocast():
            logits = self.network(pixel_values=images).logits.to(dtype)
        return logits if self.class_ids is None else logits[:, self.class_ids]


@dataclass(frozen=True)
class Distillation:
    """What a step learns from the teacher.

    alpha: the teacher's share of the loss, labels have the rest. temperature: what both networks' logits are divided
    by; its square is a factor, which keeps gradients in size (1503.02531, section 2). is_hard: the teacher's answers
    alone are learned, as if they were labels. pixels: (mean, std) by which the student's images are normalised.
    """

    teacher: Teacher
    pixels: tuple[torch.Tensor, torch.Tensor]
    alpha: float
    temperature: float = 1.0
    is_hard: bool = False
    is_multi_label: bool = False

    def joined(self, loss_sum: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The sum over the images of the loss with labels `loss_sum` and of the teacher's, each with its share."""
        answers = self.teacher.logits(images, *self.pixels)
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


# ---------------------------------------------------------------- of a run


def distillation_of(
    recipe: Recipe,
    source: Source,
    pixels: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    autocast: Callable[[], AbstractContextManager],
) -> Distillation | None:
    """What a run on these images learns from its teacher, on the device of `pixels`; None: it has none.

    Raises UserError where the teacher cannot be read, does not know the run's classes or takes other channels.
    """
    if recipe.teacher_name_or_path is None:
        return None
    name, mean = recipe.teacher_name_or_path, pixels[0]
    network, facts, size = open_teacher(name, recipe.teacher_revision)
    config, class_names = network.config, source.class_names
    num_channels = getattr(config, "num_channels", 3)
    if len(mean) not in (1, num_channels):
        raise UserError(f"--teacher_name_or_path {name} takes {num_channels} channel(s), the images have {len(mean)}.")
    kind = MULTI_LABEL if source.is_multi_label else SINGLE_LABEL
    if config.problem_type not in (None, kind):
        raise UserError(f"--teacher_name_or_path {name} is for {config.problem_type}, these images for {kind}.")
    statistics = [facts.get(name, [0.5]) for name in ("image_mean", "image_std")]
    own = [torch.tensor(values).expand(num_channels)[:, None, None] * 255 for values in statistics]
    ids = _class_ids(name, config, class_names)
    network.requires_grad_(False).eval().to(device=mean.device, dtype=dtype)
    if recipe.torch_compile:
        network.compile()
    teacher = Teacher(
        network, size, *(values.to(mean) for values in own), None if ids is None else ids.to(mean.device), autocast
    )
    return Distillation(
        teacher, pixels, recipe.distillation_alpha, recipe.distillation_temperature,
        recipe.distillation_type == "hard", source.is_multi_label,
    )  # fmt: skip


def open_teacher(
    name: str, revision: str | None = None
) -> tuple[torch.nn.Module, dict[str, list[float]], tuple[int, int]]:
    """A network with its head, image_mean and image_std of pixels in [0, 1], and the (height, width) of its images.

    What this package does not read is built by transformers, any image classifier that it knows, timm's others among
    them where timm is installed. No code of a repository is run. Raises UserError where there is no such classifier,
    where a tensor of it would be drawn anew, and where nothing says how its images look.
    """
    checkpoint = open_checkpoint(name, {"revision": revision})
    config = checkpoint.config
    kind, architecture = config.get("model_type", READ_HERE[0]), str(config.get("architecture", PLAIN[0]))
    if kind in READ_HERE and architecture.startswith(PLAIN):
        network, _ = load_pretrained(name, revision=revision)
        return network, load_pixel_facts(name, revision=revision), network.config.image_height_width
    is_here = Path(name).expanduser().exists()
    options: dict[str, Any] = {} if is_here else {"revision": revision, "use_safetensors": True}
    path = str(Path(name).expanduser()) if is_here else name
    try:
        network, report = AutoModelForImageClassification.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # whatever the network's own code raises
        text = " ".join(str(error).split())
        raise UserError(f"{name} is no image classifier that transformers can build: {text[:300]}") from error
    if lacking := sorted(report["missing_keys"]):
        raise UserError(f"{name} has no trained head: {some(lacking, 3)} would be drawn at random.")
    facts = pixel_facts(checkpoint, format_of_files(checkpoint) or "transformers")
    if "image_mean" not in facts:
        raise UserError(f"{name} has no preprocessor_config.json: nothing says how its images look.")
    return network, facts, _size_of(checkpoint, network.config)


def _size_of(checkpoint: Checkpoint, config: Any) -> tuple[int, int]:
    """(height, width) of the images that a network built by transformers takes."""
    trained = checkpoint.config.get("pretrained_cfg", {}).get("input_size")
    usual = tuple(trained[1:]) if trained else pair(getattr(config, "image_size", None) or 224)
    if not checkpoint.processor:
        return usual
    fields = processor_fields(checkpoint, "transformers", usual)
    sides = dict(fields["crop_size"] if fields.get("do_center_crop") else fields["size"])
    shortest = sides.get("shortest_edge")
    return (shortest, shortest) if shortest else (sides["height"], sides["width"])


def _class_ids(name: str, config: Any, class_names: list[str]) -> torch.Tensor | None:
    """(K,) where the run's classes stand among the teacher's, by name; None where they are the same list."""
    theirs = [str(config.id2label[index]) for index in range(config.num_labels)]
    if theirs == class_names:
        return None
    strangers = [known for known in class_names if theirs.count(known) != 1]
    if strangers:
        raise UserError(
            f"--teacher_name_or_path {name} has to know each class of the images once, by its name; it does not know "
            f"{some(map(repr, strangers), 3)}. It has {some(map(repr, theirs), 3)}."
        )
    return torch.tensor([theirs.index(known) for known in class_names])
