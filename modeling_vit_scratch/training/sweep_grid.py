"""From a command line to a plan: the grid of a sweep, every combination parsed and checked before one is trained."""

import argparse
import hashlib
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configuration_vit_scratch import PRESETS, ViTScratchConfig, architecture_fields
from ..errors import UserError, unknown
from ..results.sweep_plot import value_text, values_text
from . import effects
from .flags import Parser, parse_arguments, parse_value
from .overrides import checkpoint_overrides, merged_overrides, parse_overrides, split_outside_brackets
from .recipe import FIELDS, SPLIT_FLAGS, Recipe
from .recipes import RECIPES

LONGEST_NAME = 120  # letters of a run's folder; longer names are cut and end in a digest
TOGETHER = 'Fields that must change together share an axis: --grid "pooling:use_cls_token=cls:true,mean:false".'
OTHER_IMAGES = "its runs would be validated on different images, and their scores could not be compared"
NOT_LEARNED = "it changes what is written, not what is learned"
WRITTEN = (
    "logging_steps", "save_steps", "save_strategy", "save_total_limit", "report_to", "push_to_hub", "hub_model_id",
    "hub_private_repo", "hub_strategy",
)  # fmt: skip
NOT_SWEPT = {
    "recipe": "a sweep varies one recipe; name it with --recipe",
    "config": "a sweep varies one set of flags",
    "output_dir": "each run gets a folder of its own below --output_dir",
    "overwrite_output_dir": "give it as a flag: it holds for the whole sweep",
    "config_overrides": 'sweep the fields themselves: --grid "pooling=cls,mean"',
    "seed": "use --seeds 1,2,3: the table shows mean and deviation over them",
    "metric_for_best_model": "the sweep is ranked by it; give it as a flag",
    **dict.fromkeys(("dataset_name", "dataset_config_name", "train_dir", "validation_dir", "test_dir"), OTHER_IMAGES),
    **dict.fromkeys((*SPLIT_FLAGS, "image_column_name", "label_column_name"), OTHER_IMAGES),
    **dict.fromkeys(("train_val_split", "max_eval_samples", "streaming"), OTHER_IMAGES),
    **dict.fromkeys(WRITTEN, NOT_LEARNED),
}


@dataclass(frozen=True)
class Axis:
    """Fields that change together, and their values: as they were typed, and as they are meant."""

    names: tuple[str, ...]
    texts: list[tuple[str, ...]]
    values: list[tuple[Any, ...]]

    def __str__(self) -> str:
        return ":".join(self.names) + "=" + ",".join(":".join(map(value_text, values)) for values in self.values)


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its folder's name, what it changes, and what `train` takes."""

    name: str
    values: dict[str, Any]
    seed: int | None
    recipe: Recipe
    chosen: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """A sweep that can be run: every combination parsed and checked."""

    folder: Path
    base: Recipe
    axes: list[Axis]
    seeds: list[int] | None
    runs: list[Run]

    def new_record(self) -> dict[str, Any]:
        """The content of sweep.json before the first run."""
        waiting = {"status": "waiting", "note": ""}
        return {
            "recipe": self.base.recipe,
            "metric": self.base.metric_for_best_model,
            "grid": [str(axis) for axis in self.axes],
            "axes": [{"names": list(a.names), "values": [list(v) for v in a.values]} for a in self.axes],
            "seeds": self.seeds,
            "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
            "flags": self.base.to_dict(),
            "runs": [{"name": run.name, "values": run.values, "seed": run.seed, **waiting} for run in self.runs],
        }


# ---------------------------------------------------------------- from the command line to a plan


def build_parser() -> Parser:
    """The parser of what a sweep adds to the flags of a run; --help explains both."""
    parser = Parser(
        prog="vit-scratch sweep",
        usage='vit-scratch sweep [flags of train] --grid "name=value,value" [--grid ...] [--seeds N,N]',
        description="Trains one network for every combination of the grid and compares them by validation.\n\n"
        "Every flag of `vit-scratch train --help` holds for all runs. A name on the grid is such a flag, or a field\n"
        "of the network's configuration (pooling, patch_size, num_hidden_layers, ...). Fields that only make sense\n"
        'together share an axis: "pooling:use_cls_token=cls:true,mean:false" is two networks, not four.\n'
        'Values that hold commas stand in brackets: "patch_size=2,[2,4]".',
        epilog="example: three rates, with a class token and with mean pooling, each with three seeds: 18 runs\n\n"
        "  vit-scratch sweep --recipe mnist --num_train_epochs 3 --seeds 1,2,3 \\\n"
        '      --grid "learning_rate=1e-3,3e-3,1e-2" --grid "pooling:use_cls_token=cls:true,mean:false"\n\n'
        "Each run is a folder below --output_dir [outputs/sweep-RECIPE]; beside them sweep.md and sweep.png show the\n"
        "comparison, sweep.json holds it for programs. The best is chosen by --metric_for_best_model [accuracy] on\n"
        "the validation split; the test score is only shown. The same command goes on with a sweep that was stopped.\n"
        "A run that fails is recorded and not tried again until its folder is deleted.\n"
        "Several processes: accelerate launch -m modeling_vit_scratch.cli sweep ...\n"
        "Exit codes: 0 done, 2 something to mend, 3 stopped by a signal.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--grid", action="append", metavar="NAME=VALUE,VALUE", help="an axis; once for each")
    parser.add_argument("--seeds", metavar="N,N", help="train each combination with each of these seeds")
    return parser


def parse_sweep(arguments: list[str]) -> Plan:
    """The plan of a command line, its every combination checked as far as it can be without data.

    Raises UserError for a grid that makes no sense, and for the first combination that could not be trained.
    """
    own, words = build_parser().parse_known_args(arguments)
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    base, chosen = parse_arguments(words)
    if not own.grid:
        raise UserError('A sweep needs a grid: --grid "learning_rate=1e-3,3e-3". `vit-scratch sweep --help` explains.')
    if base.push_to_hub:
        raise UserError("--push_to_hub would push every run of a sweep: leave it out and `vit-scratch push` the best.")
    axes = [parse_axis(text) for text in own.grid]
    fields = [name for axis in axes for name in axis.names]
    recipes_own = parse_overrides(RECIPES[base.recipe].config_overrides)
    overrides = parse_overrides(base.config_overrides).items()
    given_fields = {name for name, value in overrides if name not in recipes_own or recipes_own[name] != value}
    for name in fields:
        if fields.count(name) > 1:
            raise UserError(f"--grid names {name} twice: put all its values on one axis.")
        if name in given:
            raise UserError(f"--{name} is given as a flag and on the grid: keep one of them.")
        if name in given_fields:
            raise UserError(f"{name} is given in --config_overrides and on the grid: keep one of them.")
    seeds = None if own.seeds is None else parse_seeds(own.seeds)
    if seeds is not None and "seed" in given:
        raise UserError("--seed and --seeds both say the seed: give one of them.")
    folder = Path(base.output_dir or f"outputs/sweep-{base.recipe}")
    runs = [
        combined_run(folder, words, axes, places, seed)
        for places in itertools.product(*(range(len(axis.values)) for axis in axes))
        for seed in (seeds or [None])
    ]
    names = [run.name.lower() for run in runs]  # file systems may not tell A from a
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            raise UserError(
                f"Two combinations of the grid would share the folder {run.name}: change a value's spelling."
            )
    return Plan(folder, base, axes, seeds, runs)


def parse_axis(text: str) -> Axis:
    """The axis of "name=value,value" or "name:name=value:value,value:value". Raises UserError if it is none."""
    left, equals, right = text.partition("=")
    names = tuple(name.strip() for name in left.split(":"))
    if not equals or not all(names):
        raise UserError(f'--grid takes "name=value,value", got {text!r}.')
    for name in names:
        if name in NOT_SWEPT:
            raise UserError(f"--grid {name}: {NOT_SWEPT[name]}.")
        if name not in FIELDS and name not in architecture_fields():
            raise unknown("flag or config field", name, {*FIELDS, *architecture_fields()} - set(NOT_SWEPT))
    texts, values = [], []
    for entry in split_outside_brackets(right, ","):
        parts = tuple(part.strip() for part in split_outside_brackets(entry, ":" if len(names) > 1 else "\0"))
        if not all(parts):
            raise UserError(f"--grid {left} has an empty value in {right!r}.")
        if len(parts) != len(names):
            raise UserError(f'--grid {left} takes {len(names)} values joined by ":", got {entry.strip()!r}.')
        value = tuple(_typed(name, part) for name, part in zip(names, parts, strict=True))
        if repr(value) in map(repr, values):  # 1 and true are equal, but not the same
            raise UserError(f"--grid {left} has the value {entry.strip()} twice.")
        texts.append(parts)
        values.append(value)
    return Axis(names, texts, values)


def _typed(name: str, text: str) -> Any:
    if name in FIELDS:
        return parse_value(name, _unbracketed(text))
    return parse_overrides(f"{name}={text}")[name]


def _unbracketed(text: str) -> str:
    return text[1:-1] if re.fullmatch(r"\[.*\]|\(.*\)", text) else text


def parse_seeds(text: str) -> list[int]:
    """The seeds of "1,2,3". Raises UserError for an empty one and for one that stands there twice."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"--seeds has an empty value in {text!r}; --seeds 1,2,3 works.")
    seeds = [parse_value("seed", part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text} has a seed twice.")
    return seeds


def combined_run(folder: Path, words: list[str], axes: list[Axis], places: tuple[int, ...], seed: int | None) -> Run:
    """The run at these places of the axes. Raises UserError, naming it, where it could not be trained."""
    texts = {n: t for axis, place in zip(axes, places) for n, t in zip(axis.names, axis.texts[place], strict=True)}
    values = {n: v for axis, place in zip(axes, places) for n, v in zip(axis.names, axis.values[place], strict=True)}
    fields = {name: text for name, text in texts.items() if name not in FIELDS}
    flags = [f"--{name}={_unbracketed(text)}" for name, text in texts.items() if name in FIELDS]
    flags += [] if seed is None else [f"--seed={seed}"]
    try:
        recipe, chosen = parse_arguments([*words, *flags])
        if fields:
            swept = ",".join(f"{name}={text}" for name, text in fields.items())
            is_own = recipe.model_name_or_path is not None and "config_overrides" not in chosen
            overrides = merged_overrides(None if is_own else recipe.config_overrides, swept)  # own: no checkpoint's
            recipe, chosen = recipe.replace(config_overrides=overrides), chosen | {"config_overrides"}
        is_idle, _ = effects.IDLE_IN_RECIPE["metric_for_best_model"]
        if is_idle(recipe):  # idle in the run, but not in the sweep, which is ranked by it
            chosen -= {"metric_for_best_model"}
        effects.check_recipe(recipe, chosen)
        check_network(recipe, chosen)
    except UserError as error:
        hint = f" {TOGETHER}" if fields else ""
        raise UserError(f"{values_text(values)}: {error}{hint}") from error
    name = run_name(values, seed)
    return Run(name, values, seed, recipe.replace(output_dir=str(folder / name)), chosen)


def check_network(recipe: Recipe, chosen: frozenset[str]):
    """Raises UserError for a network that could not be built whatever the data."""
    if recipe.model_name_or_path is not None:
        fields = checkpoint_overrides(recipe, chosen)
    else:
        if recipe.preset not in PRESETS:
            raise unknown("preset", recipe.preset, PRESETS)
        overrides = parse_overrides(recipe.config_overrides)
        fields = {**PRESETS[recipe.preset], **overrides}
        # the images decide their size, where nobody else does: one patch fits every network
        fields["image_size"] = recipe.image_size or overrides.get("image_size") or fields.get("patch_size", 16)
    try:
        ViTScratchConfig(**fields)
    except Exception as error:  # the configuration says what is wrong and what would work
        raise UserError(" ".join(str(error.__cause__ or error).split())) from error


def run_name(values: dict[str, Any], seed: int | None) -> str:
    """A folder's name that tells the values: learning_rate-0.001_optim-sgd_seed-1."""
    told = {**values, **({} if seed is None else {"seed": seed})}
    name = "_".join(
        f"{key}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', value_text(v)).strip('-.') or 'x'}" for key, v in told.items()
    )
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha1(name.encode()).hexdigest()[:8]}"
    return name
