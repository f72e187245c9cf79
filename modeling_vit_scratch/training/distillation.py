"""Distillation: a trained network's answers for the very images of a step are learned, beside the labels.

Hinton et al., "Distilling the knowledge in a neural network" (1503.02531), section 2; soft and hard as in DeiT
(2012.12877), section 4, on the classifier itself instead of a token of their own. The teacher sees the images as they
were augmented and mixed for the student: "Knowledge distillation: a good teacher is patient and consistent"
(2106.05237), section 3.1.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedConfig

from ..data.listing import some
from ..data.splits import Source
from ..errors import UserError
from .objectives import objective_kind
from .recipe import Recipe
from .teachers import Pixels, View, open_teacher, said

# B batch, K labels


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
        labels = objective_kind(self.is_multi_label)(logits.shape[1])
        if self.is_hard:
            return labels.loss_sum(logits, answers > 0 if self.is_multi_label else answers.argmax(dim=1))
        logits, answers = logits / self.temperature, answers / self.temperature
        if self.is_multi_label:  # cross-entropy less the teacher's own entropy
            shares = answers.sigmoid()
            divergence = labels.loss_sum(logits, shares) - labels.loss_sum(answers, shares)
        else:
            of_both = (log_softmax(logits, dim=1), log_softmax(answers, dim=1))
            divergence = kl_div(*of_both, reduction="sum", log_target=True)
        return self.temperature**2 * divergence

    def lines(self, finetune: str) -> list[str]:
        """What a run that fine-tunes so says of it."""
        kind = "hard" if self.is_hard else f"soft at temperature {self.temperature:g}"
        told = [f"taught by {self.teacher.told}: {kind}, {self.alpha:g} of the loss"]
        return told + (["the teacher sees images: features are not computed once"] if finetune == "head" else [])


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
        kind = objective_kind(source.is_multi_label).problem_type
        if config.problem_type not in (None, kind):
            raise UserError(f"{name} is for {config.problem_type}, these images for {kind}.")
        ids = _class_ids(name, config, source.class_names)
        network.requires_grad_(False).eval().to(device=device, dtype=dtype)
        _try(name, network, own, dtype)
    except UserError as error:
        raise UserError(f"--teacher_name_or_path {error}") from error
    if source.is_multi_label and config.problem_type is None:
        note += ", taken to give each class a probability of its own, which none of its files says"
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
        logits = network(pixel_values=black.to(dtype).to(device)).logits
    except Exception as error:  # whatever the network's own code raises
        raise UserError(f"{name} does not take the images that its own files ask for: {said(error)}") from error
    wanted = (1, network.config.num_labels)
    if logits.shape != wanted:
        raise UserError(f"{name} gives {tuple(logits.shape)} numbers of an image, where its files promise {wanted}.")
    if not logits.isfinite().all():
        raise UserError(f"{name} answers a black image with numbers that are not all finite.")


def _class_ids(name: str, config: PreTrainedConfig, class_names: list[str]) -> torch.Tensor | None:
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
