"""`vit-scratch doctor`: a network from a file, a preset or a checkpoint, or a set of images, examined and reported."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from ..configuration_vit_scratch import PRESETS, ViTScratchConfig
from ..data.folders import SPLIT_NAMES
from ..data.listing import is_hidden, shown
from ..data.sources import open_source
from ..errors import UserError, unknown
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..training.flags import Parser, exit_code
from ..training.machine import num_cores
from ..training.optimization import parameter_groups
from ..training.recipe import FIELDS, SPLIT_FLAGS
from ..weights import load_pretrained
from . import folder, folder_report
from .examination import CHECKS, examine
from .findings import Finding, report
from .learning import one_line

DEFAULT_LABELS, DEFAULT_CHANNELS = 10, 3
TRAINED = ("first_loss",)  # trained weights are past it
FORMATS: dict[str, Callable[[list[Finding]], str]] = {
    "table": report,
    "json": lambda findings: json.dumps([asdict(finding) for finding in findings], indent=1),
}
IMAGE_FORMATS = {"table": folder_report.as_table, "json": folder_report.as_json}
OF_NETWORK = ("image_size", "num_labels", "num_channels", "optimizer")
FOLDERS = ("data", "validation_dir", "test_dir")
OF_TABLE = ("dataset_config_name", *SPLIT_FLAGS, "image_column_name")
OF_IMAGES = (*FOLDERS, "dataset_name", *OF_TABLE, "label_column_name", "cpu_threads")
Made = TypeVar("Made")


def main(arguments: list[str]) -> int:
    """Examines a network and prints the findings. The exit code: 0 all pass, 1 some fail, 2 something to mend first."""
    answers: list[int] = []
    return exit_code(lambda: answers.append(_run(arguments))) or answers[0]


def build_parser() -> Parser:
    parser = Parser(
        prog="vit-scratch doctor",
        description="Finds what is wrong with a network that maps images to logits, or with a set of images: each "
        "check with what was measured and what was expected, and for one that fails the likely mistake and how to "
        "mend it.",
        epilog=f"Checks of a network: {', '.join(CHECKS)}. Checks of images: {', '.join(folder.CHECKS)}. The exit code "
        "is 0 when none fails, 1 when one does, 2 for wrong flags.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "network",
        metavar="NETWORK",
        nargs="?",
        help="file.py:factory, where factory() gives an nn.Module; a preset; or a folder or Hub name of a checkpoint",
    )
    parser.add_argument(
        "--image_size",
        metavar="PIXELS",
        type=_sides,
        help="of file.py:factory: the side, or the height and width as 32,48",
    )
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
    images = parser.add_argument_group("a set of images, in place of NETWORK")
    images.add_argument(
        "--data",
        metavar="FOLDER",
        help="training images, one folder a class or a metadata file; or train/, val/, test/",
    )
    for name in ("validation_dir", "test_dir"):
        images.add_argument(f"--{name}", metavar="FOLDER", help=FIELDS[name].metadata["help"])
    for name in ("dataset_name", *OF_TABLE, "label_column_name"):
        images.add_argument(f"--{name}", metavar="NAME", help=FIELDS[name].metadata["help"])
    images.add_argument("--cpu_threads", metavar="INT", type=int, help="threads that decode; else one a core")
    return parser


def _sides(text: str) -> tuple[int, int]:
    """(height, width) of "32" or "32,48"."""
    words = text.split(",")
    if len(words) > 2 or not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"pixels are one number or height,width, such as 32 or 32,48; got {text!r}")
    return int(words[0]), int(words[-1])


def _run(arguments: list[str]) -> int:
    flags = build_parser().parse_args(arguments)
    if flags.format not in FORMATS:
        raise unknown("--format", flags.format, FORMATS)
    skip = [name for name in flags.skip.split(",") if name]
    if flags.data is not None or flags.dataset_name is not None:
        text, findings = _examine_images(flags, skip)
    else:
        if flags.network is None:
            raise UserError("Say what to examine: NETWORK, --data FOLDER or --dataset_name NAME.")
        _refuse(flags, OF_IMAGES, "goes with --data FOLDER or --dataset_name NAME")
        findings = _findings(flags, skip)
        text = FORMATS[flags.format](findings)
    print(text)
    return int(any(finding.passed is False for finding in findings))


def _refuse(flags: argparse.Namespace, names: tuple[str, ...], reason: str):
    for name in names:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} {reason}: leave it out.")


# ---------------------------------------------------------------- images


def _examine_images(flags: argparse.Namespace, skip: list[str]) -> tuple[str, list[Finding]]:
    """The report on a set of images, and its findings."""
    if flags.network is not None:
        raise UserError(f"{flags.network} and a set of images are two things to examine: give one of them.")
    _refuse(flags, OF_NETWORK, "goes with a network")
    if flags.data is not None:
        _refuse(flags, ("dataset_name", *OF_TABLE), "goes with a dataset, not with --data")
    else:
        _refuse(flags, FOLDERS, "goes with folders of images, not with --dataset_name")
    if flags.cpu_threads is not None and flags.cpu_threads < 1:
        raise UserError(f"--cpu_threads must be at least 1, got {flags.cpu_threads}.")
    data_flags = _data_flags(flags)
    try:
        source = open_source(**data_flags, train_val_split=0.0)
    except UserError as error:
        if flags.data is None:
            raise
        # a layout that cannot be trained on is what the doctor is there to find
        return _layout_report(str(error), flags.format)
    images, findings = folder.examine_images(source, skip, flags.cpu_threads or num_cores())
    given = [word for name, value in data_flags.items() for word in (f"--{name}", value)]
    return IMAGE_FORMATS[flags.format](images, findings, given), findings


def _layout_report(error: str, format_name: str) -> tuple[str, list[Finding]]:
    cause = error.replace("--train_dir", "--data")
    remedy = "put it right and run this again: no image was looked at"
    findings = [Finding("layout", False, "no images in classes", "images in classes", cause, remedy)]
    if format_name == "json":
        return json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=1), findings
    return report(findings), findings


def _data_flags(flags: argparse.Namespace) -> dict[str, str]:
    """The trainer's flags that name these images, in its order. Raises UserError for a folder that is not there."""
    named = {name: getattr(flags, name) for name in OF_IMAGES if name not in ("data", "cpu_threads")}
    if flags.data is not None:
        for name in FOLDERS:
            path = getattr(flags, name)
            if path is not None and not os.path.isdir(os.path.expanduser(path)):
                raise UserError(f"--{name} {shown(path)}: there is no such folder.")
        splits = _splits_in(os.path.expanduser(flags.data))
        for split in splits:
            if named.get(f"{split}_dir") is not None:
                raise UserError(f"--{split}_dir: {shown(flags.data)} holds a {split} split already; leave it out.")
        named = {"train_dir": flags.data} | named | {f"{split}_dir": path for split, path in splits.items()}
    return {name: value for name, value in named.items() if value is not None}


def _splits_in(root: str) -> dict[str, str]:
    """The folders of the splits where `root` holds nothing but splits, training among them; else none."""
    try:
        names = [entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name)]
    except OSError:
        return {}  # what reads the images says why
    meant = {name: split for split, known in SPLIT_NAMES.items() for name in names if name.lower() in known}
    splits = {split: os.path.join(root, name) for name, split in meant.items()}
    return splits if len(splits) == len(names) and "train" in splits else {}


# ---------------------------------------------------------------- networks


def _findings(flags: argparse.Namespace, skip: list[str]) -> list[Finding]:
    files: dict[Path, ModuleType] = {}  # a class of a file that is run twice is two classes
    if ".py:" in flags.network:
        if flags.image_size is None:
            raise UserError("--image_size is needed with file.py:factory: pixels, such as 32, or height,width.")
        module = _from_file(flags.network, "network", nn.Module, files)
        num_labels = DEFAULT_LABELS if flags.num_labels is None else flags.num_labels
        num_channels = DEFAULT_CHANNELS if flags.num_channels is None else flags.num_channels
        sizes = (flags.image_size, num_labels, num_channels)
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
        optimizer = _from_file(flags.optimizer, "optimizer", torch.optim.Optimizer, files, module)
    return examine(module, *sizes, optimizer=optimizer, skip=skip)


def _own_network(flags: argparse.Namespace) -> ViTScratchForImageClassification:
    """The network of a preset, freshly drawn, or of a checkpoint; both say their own sizes."""
    name = flags.network
    if name.endswith(".py"):
        raise UserError(f"{name}: name the function in it that gives the network too: {name}:build.")
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


def _from_file(place: str, what: str, kind: type[Made], files: dict[Path, ModuleType], *arguments: Any) -> Made:
    """What the function of file.py:function gives for these arguments. Raises UserError where that is no `kind`.

    files: the modules of those that have run, by path.
    """
    file, _, name = place.rpartition(":")
    path = Path(file).expanduser()
    if not file.endswith(".py") or not path.is_file():
        raise UserError(f"{place}: expected file.py:function, and there is no file {file or place!r}.")
    sys.path.insert(0, str(path.parent))  # as `python file.py` does, for what stands beside it
    try:
        module = files.get(path.resolve()) or _run_file(path)
        files[path.resolve()] = module
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


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
