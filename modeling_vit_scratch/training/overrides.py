"""--config_overrides: fields of the configuration over the preset, "pooling=mean,hidden_size=192"."""

import contextlib
from typing import Any

import yaml

from ..configuration_vit_scratch import RATES_OF_TRAINING, architecture_fields
from ..errors import UserError, unknown
from .recipe import Recipe
from .recipes import RECIPES


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


def checkpoint_overrides(recipe: Recipe, chosen: frozenset[str]) -> dict[str, Any]:
    """What is changed of a checkpoint's network: the rates of training that a person gave, and what is pooled. chosen:
    the fields that one set; a recipe's own overrides are for networks of its own.

    Raises UserError for any other field, and for the rates of a network that is frozen.
    """
    changed = parse_overrides(recipe.config_overrides) if "config_overrides" in chosen else {}
    rates = [name for name in changed if name in RATES_OF_TRAINING]
    if rates and recipe.finetune == "head":
        raise UserError(
            f"--config_overrides {rates[0]} has no effect here: the checkpoint's network is frozen but for its head."
        )
    if others := [name for name in changed if name not in (*RATES_OF_TRAINING, "pooling")]:
        raise UserError(
            f"--config_overrides {others[0]} has no effect here: the checkpoint decides the network. Pooling may be "
            f"another, and what it leaves out in training another share: {', '.join(RATES_OF_TRAINING)}."
        )
    return changed


def patch_drop_rate_of(recipe: Recipe) -> float:
    """The share of patches that the recipe's overrides leave out in training."""
    return parse_overrides(recipe.config_overrides).get("patch_drop_rate") or 0.0


def has_own_patch_drop_rate(recipe: Recipe) -> bool:
    """Whether the rate is that of the named recipe. It is told by its value, because the command that results.json
    keeps names every override."""
    return patch_drop_rate_of(recipe) == patch_drop_rate_of(RECIPES.get(recipe.recipe, recipe))


def may_see_less(recipe: Recipe) -> bool:
    """Whether a step may see smaller images or leave out patches; a checkpoint's network is not known yet."""
    is_small = recipe.initial_image_size is not None
    return is_small or recipe.model_name_or_path is not None or patch_drop_rate_of(recipe) > 0


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
