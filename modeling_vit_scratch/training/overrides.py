"""--config_overrides: fields of the configuration over the preset, "pooling=mean,hidden_size=192"."""

import contextlib
from typing import Any

import yaml

from ..configuration_vit_scratch import RATES_OF_TRAINING, architecture_fields
from ..errors import UserError, unknown
from .recipes import RECIPES, Recipe


def parse_overrides(text: str | None) -> dict[str, Any]:
    """The fields of "pooling=mean,hidden_size=192"; values are YAML, so [32,64] and null work.

    Raises UserError for a part without "=", and for a name that is no field of the architecture.
    """
    values: dict[str, Any] = {}
    for part in _parts(text):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f'--config_overrides takes "field=value,field=value", got {part!r}.')
        if name.strip() not in architecture_fields():
            raise unknown("config field", name.strip(), architecture_fields())
        values[name.strip()] = _parsed(part, value)
    return values


def merged_overrides(first: str | None, second: str | None) -> str | None:
    """The fields of both texts as one; where both name a field, the second has it."""
    parts: dict[str, str] = {}
    for part in _parts(first) + _parts(second):
        name = part.partition("=")[0].strip()
        parts.pop(name, None)
        parts[name] = part.strip()
    return ",".join(parts.values()) or None


def checkpoint_rates(recipe: Recipe, chosen: frozenset[str]) -> dict[str, Any]:
    """What is changed of a checkpoint's network: the rates of training that a person gave. chosen: the fields that one
    set; a recipe's own overrides are for networks of its own.

    Raises UserError for any other field, and for a network that is frozen.
    """
    rates = parse_overrides(recipe.config_overrides) if "config_overrides" in chosen else {}
    if rates and recipe.finetune == "head":
        raise UserError("--config_overrides has no effect here: the checkpoint's network is frozen but for its head.")
    if others := [name for name in rates if name not in RATES_OF_TRAINING]:
        raise UserError(
            f"--config_overrides {others[0]} has no effect here: the checkpoint decides the network. What it leaves "
            f"out in training may be another share: {', '.join(RATES_OF_TRAINING)}."
        )
    return rates


def own_patch_drop_rate(recipe: Recipe) -> float:
    """The share of patches that the named recipe leaves out where nobody changes it."""
    own = RECIPES.get(recipe.recipe, recipe).config_overrides
    return parse_overrides(own).get("patch_drop_rate", 0.0)


def may_see_less(recipe: Recipe) -> bool:
    """Whether a step may see smaller images or leave out patches; a checkpoint's network is not known yet."""
    rate = parse_overrides(recipe.config_overrides).get("patch_drop_rate")
    return recipe.initial_image_size is not None or recipe.model_name_or_path is not None or bool(rate)


def _parts(text: str | None) -> list[str]:
    return [part for part in split_outside_brackets(text or "", ",") if part.strip()]


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """The parts of the text between separators that do not stand within brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _parsed(part: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--config_overrides: {part.strip()!r} has no value that can be read.") from None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # YAML 1.1 takes 1e-6 for text
    return value
