"""What several commands of `vit-scratch` take: flags of the trainer that mean the same, and a model with its pixels."""

from collections.abc import Iterable
from typing import Any

from ..data.decoding import Processor
from ..errors import UserError
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..results.prediction import open_model
from ..weights import LoadingReport
from .effects import IDLE_IN_RECIPE
from .flags import Parser, parse_value
from .recipe import FIELDS, Recipe

PIXELS = {  # those of the trainer's flags that give a checkpoint other pixels than its own
    "image_size": "side of the images the network sees, in pixels, or height,width; positions are interpolated",
    "crop_pct": "share of an image's shorter side that the central crop keeps",
}


def add_trainers_flags(parser: Parser, names: Iterable[str], texts: dict[str, str] | None = None):
    """Adds flags of the trainer that mean the same here, with its help or with `texts`."""
    for name in names:
        item = FIELDS[name]
        default = "" if item.default is None else f" [{item.default}]"
        value = {"nargs": "?", "const": "true"} if name == "streaming" else {}
        parser.add_argument(f"--{name}", help=(texts or {}).get(name, item.metadata["help"]) + default, **value)


def trainers_options(own: Any, names: Iterable[str], **fields: Any) -> Recipe:
    """Those of these flags that were given, and `fields`, as a recipe; raises UserError for one without effect."""
    given = {name: parse_value(name, getattr(own, name)) for name in names if getattr(own, name) is not None}
    options = Recipe(**{**given, **fields})
    for name in given:
        is_idle, reason = IDLE_IN_RECIPE.get(name, (lambda _: False, ""))
        if is_idle(options):
            raise UserError(f"--{name} has no effect here: {reason}.")
    return options


def add_pixel_flags(parser: Parser):
    """--image_size and --crop_pct, for a model that was trained with others."""
    for name, text in PIXELS.items():
        parser.add_argument(f"--{name}", help=f"{text} [the checkpoint's]")


def open_model_of(own: Any) -> tuple[ViTScratchForImageClassification, Processor, LoadingReport]:
    """The model that the command line names, with the pixels that it asks for."""
    options = trainers_options(own, PIXELS)
    given = {name: getattr(options, name) for name in PIXELS if getattr(own, name) is not None}
    return open_model(own.model, **given)
