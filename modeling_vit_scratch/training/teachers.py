"""Trained classifiers that teach another network: any that transformers can build, and what they see of its images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor, AutoModelForImageClassification, TimmWrapperImageProcessor
from transformers.utils import logging

from ..configuration_vit_scratch import ViTScratchConfig
from ..data.listing import some
from ..errors import UserError, quiet_hub
from ..weights import load_pixel_facts, load_pretrained
from ..weights.files import FOLDER_WEIGHTS, open_checkpoint

# B batch, C channels of the teacher, H and W its images' height and width

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
        self.matrix = (diagonal[:, None, None] if self.is_diagonal else pixels.matrix).to(dtype).to(device)
        self.offset = pixels.offset[:, None, None].to(dtype).to(device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] < self.num_channels:
            images = images.expand(-1, self.num_channels, -1, -1)
        if not self.is_as_it_was:
            turned = images * self.matrix if self.is_diagonal else torch.einsum("dc,bchw->bdhw", self.matrix, images)
            images = turned + self.offset
        if images.shape[-2:] != self.size:
            images = interpolate(images, self.size, mode="bilinear", antialias=True)
        return images


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
    if path.is_file() and path.name not in FOLDER_WEIGHTS:
        raise UserError(f"{name}: of such a network, name the folder with its config.json and {FOLDER_WEIGHTS[0]}.")
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
        raise UserError(f"{name} is no image classifier that transformers can build: {said(error)}") from error
    if lacking := sorted(report["missing_keys"]):
        raise UserError(f"{name} has no trained head: {some(lacking, 3)} would be drawn at random.")
    try:
        with quiet_hub():
            trained = getattr(network.config, "pretrained_cfg", None)  # of timm's networks, in their config.json
            if trained:
                processor = TimmWrapperImageProcessor(pretrained_cfg=trained)
            else:
                processor = AutoImageProcessor.from_pretrained(place, **options)
    except Exception as error:
        raise UserError(f"{name} has no image processor: nothing says how its images look: {said(error)}") from error
    try:
        pixels = pixels_of(processor, _num_channels(network.config))
    except Exception as error:
        raise UserError(f"{name}: what its image processor does cannot be done here: {said(error)}") from error
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


def said(error: Exception) -> str:
    """The first words of an error, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
