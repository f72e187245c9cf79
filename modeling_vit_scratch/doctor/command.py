"""`vit-scratch doctor`: a network from a file, a preset or a checkpoint, examined and reported."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..configuration_vit_scratch import PRESETS, ViTScratchConfig
from ..errors import UserError, unknown
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..training.flags import Parser, exit_code
from ..training.optimization import parameter_groups
from ..weights import load_pretrained
from .examination import CHECKS, examine
from .findings import Finding, report
from .learning import one_line

DEFAULT_LABELS, DEFAULT_CHANNELS = 10, 3
TRAINED = ("first_loss",)  # trained weights are past it
FORMATS: dict[str, Callable[[list[Finding]], str]] = {
    "table": report,
    "json": lambda findings: json.dumps([asdict(finding) for finding in findings], indent=1),
}
Made = TypeVar("Made")


def main(arguments: list[str]) -> int:
    """Examines a network and prints the findings. The exit code: 0 all pass, 1 some fail, 2 something to mend first."""
    answers: list[int] = []
    return exit_code(lambda: answers.append(_run(arguments))) or answers[0]


def build_parser() -> Parser:
    parser = Parser(
        prog="vit-scratch doctor",
        description="Finds what is wrong with a network that maps images to logits: each check with what was measured "
        "and what was expected, and for one that fails the likely mistake and how to mend it.",
        epilog=f"Checks: {', '.join(CHECKS)}. The exit code is 0 when none fails, 1 when one does, 2 for wrong flags.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "network",
        metavar="NETWORK",
        help="file.py:factory, where factory() gives an nn.Module; a preset; or a folder or Hub name of a checkpoint",
    )
    parser.add_argument("--image_size", metavar="PIXELS", type=int, help="side of the images of file.py:factory")
    parser.add_argument("--num_labels", metavar="INT", type=int, help="of file.py:factory [10]")
    parser.add_argument("--num_channels", metavar="INT", type=int, help="of file.py:factory [3]")
    parser.add_argument(
        "--optimizer",
        metavar="FILE:FUNCTION",
        help="file.py:function, where function(network) gives the optimizer [presets and checkpoints: AdamW in the "
        "groups that training makes; else none]",
    )
    parser.add_argument(
        "--skip", metavar="CHECK,CHECK", default="", help="checks whose failing is meant, as patch_order_matters may be"
    )
    parser.add_argument("--format", default="table", help=f"of the report: {', '.join(FORMATS)} [table]")
    return parser


def _run(arguments: list[str]) -> int:
    flags = build_parser().parse_args(arguments)
    if flags.format not in FORMATS:
        raise unknown("--format", flags.format, FORMATS)
    skip = [name for name in flags.skip.split(",") if name]
    findings = _findings(flags, skip)
    print(FORMATS[flags.format](findings))
    return int(any(finding.passed is False for finding in findings))


def _findings(flags: argparse.Namespace, skip: list[str]) -> list[Finding]:
    if ".py:" in flags.network:
        if flags.image_size is None:
            raise UserError("--image_size is needed with file.py:factory: the side in pixels, such as 32.")
        module = _from_file(flags.network, "network", nn.Module)
        sizes = (flags.image_size, flags.num_labels or DEFAULT_LABELS, flags.num_channels or DEFAULT_CHANNELS)
        optimizer = None
    else:
        module = _own_network(flags)
        config = module.config
        sizes = (config.image_height_width, config.num_labels, config.num_channels)
        groups = parameter_groups(module, weight_decay=0.05)
        optimizer = torch.optim.AdamW([{"params": group.parameters} for group in groups])
        if flags.network not in PRESETS:
            skip = [*skip, *TRAINED]
    if flags.optimizer is not None:
        optimizer = _from_file(flags.optimizer, "optimizer", torch.optim.Optimizer, module)
    return examine(module, *sizes, optimizer=optimizer, skip=skip)


def _own_network(flags: argparse.Namespace) -> ViTScratchForImageClassification:
    """The network of a preset, freshly drawn, or of a checkpoint; both say their own sizes."""
    name = flags.network
    for size in ("image_size", "num_labels", "num_channels"):
        if getattr(flags, size) is not None:
            raise UserError(f"--{size} goes with file.py:factory; {name} says its own: leave it out.")
    if name in PRESETS:
        labels = {} if "num_labels" in PRESETS[name] else {"num_labels": DEFAULT_LABELS}
        return ViTScratchForImageClassification(ViTScratchConfig.from_preset(name, **labels))
    if "/" not in name and not Path(name).exists():
        raise unknown("file.py:factory, folder or preset", name, PRESETS)
    network, _ = load_pretrained(name)
    return network


def _from_file(place: str, what: str, kind: type[Made], *arguments: Any) -> Made:
    """What the function of file.py:function gives for these arguments. Raises UserError where that is no `kind`."""
    file, _, name = place.rpartition(":")
    path = Path(file).expanduser()
    if not file.endswith(".py") or not path.is_file():
        raise UserError(f"{place}: expected file.py:function, and there is no file {file or place!r}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as `python file.py` does, for what stands beside it
    try:
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        function = getattr(module, name, None)
        if not callable(function):
            raise unknown(f"function in {file}", name, [key for key in vars(module) if not key.startswith("_")])
        made = function(*arguments)
    except UserError:
        raise
    except Exception as error:
        given = "the network" if arguments else "no arguments"
        raise UserError(f"{place}, called with {given}, raised {one_line(error)}.") from error
    finally:
        sys.path.remove(str(path.parent))
    if not isinstance(made, kind):
        raise UserError(f"{place} must give the {what}, a {kind.__name__}; it gave {type(made).__name__}.")
    return made
