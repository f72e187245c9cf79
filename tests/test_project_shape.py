"""The rules of the house: who may import whom, how long a file may be, what the frame files hold.

Every rule is a function from texts to a list of breaches; each has a companion test that feeds it a breach and sees it
found.
"""

import ast
import configparser
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "modeling_vit_scratch"
HUB = "hub files"  # they travel to the Hub with a checkpoint: modeling_vit_scratch/*_vit_scratch.py
HUB_THIRD_PARTIES = {"torch", "transformers", "huggingface_hub.dataclasses"}
# Who may import whom: a module imports from rows below its own, and within its own unit; two units of one row do not
# know each other.
LAYERS = (
    {"run_train", "cli"},
    {"doctor"},
    {"training"},
    {"results"},
    {"data", "weights", "specimens"},
    {HUB},
    {"errors"},
)
HEIGHT = {unit: -row for row, units in enumerate(LAYERS) for unit in units}
LONGEST_FILE = 450
# The network is read in one sitting, from equation 1 to 4, and a Hub file cannot become a folder.
LONGER_FILES = {f"{PACKAGE}/modeling_vit_scratch.py": 700}


def package_sources() -> dict[str, str]:
    """The text of run_train.py and of every module of the package, by path from the root."""
    paths = [path for path in [ROOT / "run_train.py", *sorted((ROOT / PACKAGE).rglob("*.py"))] if path.exists()]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


# ---------------------------------------------------------------- who may import whom


def module_name(path: str) -> str:
    """The dotted name of a source file: a/b.py -> a.b, a/__init__.py -> a."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def unit_of(module: str) -> str | None:
    """The unit of a module: `run_train`, `hub files`, or the name after the package's; None where it is not ours."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return parts[0] if parts[0] == "run_train" else None
    return HUB if len(parts) == 1 or parts[1].endswith("_vit_scratch") else parts[1]


def imported_modules(path: str, text: str, known: set[str]) -> Iterator[tuple[str, int]]:
    """The absolute name of every module the file imports, anywhere in it, with the line.

    `from package import name` imports package.name where that is a module (it is in `known`), else package.
    """
    here = module_name(path).split(".")
    package = here if path.endswith("/__init__.py") else here[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*origin, *filter(None, [node.module])])
            for name in (f"{base}.{alias.name}" for alias in node.names):
                yield (name if name in known else base), node.lineno


def import_breaches(sources: dict[str, str]) -> list[str]:
    """One line for each import that goes upwards, sideways, or to or from a unit without a place in LAYERS."""
    files = {module_name(path) for path in sources}
    known = files | {name.rpartition(".")[0] for name in files}
    breaches = []
    for path, text in sources.items():
        importer = unit_of(module_name(path))
        if importer not in HEIGHT:
            breaches.append(f"{path}: {importer} has no place in LAYERS")
            continue
        for module, line in imported_modules(path, text, known):
            imported = unit_of(module)
            if imported in (None, importer):
                continue
            if imported not in HEIGHT:
                breaches.append(f"{path}:{line}: {imported} has no place in LAYERS")
            elif HEIGHT[imported] >= HEIGHT[importer] or (importer, imported) == (HUB, "errors"):
                breaches.append(f"{path}:{line}: {importer} must not import {imported}")
    return breaches


def hub_import_breaches(sources: dict[str, str]) -> list[str]:
    """One line for each import of a hub file that a stranger's machine may not have, or that is not flat."""
    hub_paths = {path for path in sources if re.fullmatch(rf"{PACKAGE}/\w+_vit_scratch\.py", path)}
    names = {Path(path).stem for path in hub_paths}
    breaches = []
    for path in sorted(hub_paths):
        for node in ast.walk(ast.parse(sources[path])):
            if isinstance(node, ast.ImportFrom) and node.level:
                if node.level > 1 or node.module not in names:
                    breaches.append(f"{path}:{node.lineno}: only `from .name import ...` of another hub file")
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                breaches += [f"{path}:{node.lineno}: {name}" for name in modules if not is_everywhere(name)]
    return breaches


def is_everywhere(module: str) -> bool:
    """True for what every reader of a checkpoint has: the standard library, torch, transformers, `strict`."""
    top = module.split(".")[0]
    return top in sys.stdlib_module_names or top in HUB_THIRD_PARTIES or module in HUB_THIRD_PARTIES


def test_imports_go_downwards():
    assert import_breaches(package_sources()) == []


@pytest.mark.parametrize(
    ("path", "text", "breach"),
    [
        ("data/loading.py", "from ..training import loop", "data must not import training"),
        ("data/loading.py", "from ..training.loop import train", "data must not import training"),
        ("data/loading.py", "import modeling_vit_scratch.weights", "data must not import weights"),
        ("weights.py", "def f():\n    from modeling_vit_scratch import data", "weights must not import data"),
        ("results/plots.py", "from ..doctor import examine", "results must not import doctor"),
        ("training/loop.py", "from .. import cli", "training must not import cli"),
        ("cli.py", "import run_train", "cli must not import run_train"),
        ("errors.py", "from modeling_vit_scratch import ViTScratchConfig", "errors must not import hub files"),
        ("configuration_vit_scratch.py", "from .errors import UserError", "hub files must not import errors"),
        ("__init__.py", "from .training import train", "hub files must not import training"),
        ("helpers.py", "import os", "helpers has no place in LAYERS"),
    ],
)
def test_an_import_that_goes_upwards_or_sideways_is_found(path: str, text: str, breach: str):
    bystanders = ("cli.py", "doctor.py", "weights.py", "errors.py", "data/order.py", "training/loop.py")
    sources = {f"{PACKAGE}/{name}": "" for name in bystanders} | {"run_train.py": "", f"{PACKAGE}/{path}": text}
    (found,) = import_breaches(sources)
    assert breach in found


def test_imports_that_go_downwards_pass():
    sources = {
        "run_train.py": "from modeling_vit_scratch.training.loop import train",
        f"{PACKAGE}/training/loop.py": "import torch\nfrom ..data.order import f\nfrom .recipes import Recipe\n"
        "from .. import ViTScratchConfig, weights\nfrom ..errors import UserError",
        f"{PACKAGE}/training/recipes.py": "from modeling_vit_scratch.configuration_vit_scratch import PRESETS",
        f"{PACKAGE}/data/order.py": "",
        f"{PACKAGE}/weights.py": "from .errors import UserError",
        f"{PACKAGE}/errors.py": "import difflib",
    }
    assert import_breaches(sources) == []


def test_hub_files_import_only_what_every_machine_has():
    sources = package_sources()
    assert any(path.endswith("_vit_scratch.py") for path in sources)
    assert hub_import_breaches(sources) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torchvision",
        "from huggingface_hub import snapshot_download",
        "def f():\n    import numpy as np",
        "from . import configuration_vit_scratch",
        "from .errors import UserError",
        "from ..data import order",
        "from modeling_vit_scratch.weights import load",
    ],
)
def test_an_import_a_hub_file_must_not_have_is_found(text: str):
    assert len(hub_import_breaches({f"{PACKAGE}/modeling_vit_scratch.py": text})) == 1


def test_imports_a_hub_file_may_have_pass():
    text = "import math\nimport torch\nfrom transformers.utils import logging\n"
    text += "from huggingface_hub.dataclasses import strict\nfrom .configuration_vit_scratch import ViTScratchConfig"
    sources = {f"{PACKAGE}/modeling_vit_scratch.py": text, f"{PACKAGE}/configuration_vit_scratch.py": ""}
    assert hub_import_breaches(sources) == []


# ---------------------------------------------------------------- the length of a file


def length_breaches(sources: dict[str, str]) -> list[str]:
    """One line for each file that is longer than a file may be."""
    lengths = {path: len(text.splitlines()) for path, text in sources.items()}
    limits = {path: LONGER_FILES.get(path, LONGEST_FILE) for path in sources}
    return [f"{path}: {lines} lines, {limits[path]} at most" for path, lines in lengths.items() if lines > limits[path]]


def test_no_file_is_too_long_to_read():
    assert length_breaches(package_sources()) == []


def test_a_file_that_is_too_long_is_found():
    text = "x = 1\n" * (LONGEST_FILE + 1)
    assert length_breaches({"data.py": text}) == [f"data.py: {LONGEST_FILE + 1} lines, {LONGEST_FILE} at most"]
    assert length_breaches({"data.py": "x = 1\n" * LONGEST_FILE}) == []


# ---------------------------------------------------------------- setup.cfg holds the settings


def foreign_tables(pyproject: str) -> list[str]:
    """The tables of a pyproject.toml beside [build-system]: metadata and tools have their place in setup.cfg."""
    tables = re.findall(r"^\s*\[+\s*([^\]]+?)\s*\]+", pyproject, flags=re.MULTILINE)
    return [table for table in tables if table != "build-system"]


def test_pyproject_has_the_build_system_alone():
    assert foreign_tables((ROOT / "pyproject.toml").read_text(encoding="utf-8")) == []


def test_another_table_in_pyproject_is_found():
    assert foreign_tables('[build-system]\nrequires = ["setuptools"]\n[tool.pytest.ini_options]\n') == [
        "tool.pytest.ini_options"
    ]


def _names(assignment: ast.Assign) -> list[str]:
    return [target.id for target in assignment.targets if isinstance(target, ast.Name)]


def test_the_version_can_be_read_without_importing_torch():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    assert settings["metadata"]["version"] == f"attr: {PACKAGE}.__version__"
    body = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    versions = [node.value for node in body if isinstance(node, ast.Assign) and _names(node) == ["__version__"]]
    assert len(versions) == 1 and isinstance(ast.literal_eval(versions[0]), str)


def test_the_oldest_versions_that_are_tested_are_those_that_are_promised():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    words = [settings["options"]["install_requires"], settings["options.extras_require"]["lora"]]
    promised = dict(re.findall(r"^([\w-]+)>=([\d.]+\d)", "\n".join(words), flags=re.MULTILINE))
    tested = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / ".ci" / "oldest.txt").read_text(), flags=re.MULTILINE))
    assert set(tested) == set(promised) - {"torch", "torchvision"}
    assert {name: Version(version) for name, version in tested.items()} == {
        name: Version(promised[name]) for name in tested
    }


# ---------------------------------------------------------------- the README's commands


def launched_commands(text: str) -> list[list[str]]:
    """The flags of every `run_train.py` command line in a text, backslash continuations joined.

    A command that starts with `accelerate launch` is read by accelerate's own parser, which exits on a flag that it
    does not know.
    """
    commands = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        is_command = re.match(r"\s*(\$ )?([A-Z_]+=\S+ )*(accelerate|python) ", line)
        words = shlex.split(line, comments=True) if is_command else []
        if "run_train.py" not in words:
            continue
        if "accelerate" in words:
            launcher_words = words[words.index("accelerate") + 2 :]  # after "accelerate launch"
            commands.append(launch_command_parser().parse_args(launcher_words).training_script_args)
        else:
            commands.append(words[words.index("run_train.py") + 1 :])
    return commands


def command_breaches(text: str, parse: Callable[[list[str]], object]) -> list[str]:
    """One line for each command of a text that `parse` refuses."""
    breaches = []
    for flags in launched_commands(text):
        try:
            parse(flags)
        except (ValueError, SystemExit) as error:
            breaches.append(f"run_train.py {shlex.join(flags)}: {error}")
    return breaches


def test_every_command_of_the_readme_parses():
    from modeling_vit_scratch.training.flags import parse_arguments

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert launched_commands(readme), "README.md names no run_train.py command"
    assert command_breaches(readme, parse_arguments) == []


README_EXAMPLE = """
Run it with `accelerate launch run_train.py`:
```bash
accelerate launch --config_file accelerate_config.yaml --num_processes 2 run_train.py --recipe digits \\
    --learning_rate 1e-3  # the default
python run_train.py --recipe mnist
ACCELERATE_USE_CPU=true accelerate launch run_train.py
```
"""


def test_commands_are_read_out_of_a_readme():
    assert launched_commands(README_EXAMPLE) == [
        ["--recipe", "digits", "--learning_rate", "1e-3"],
        ["--recipe", "mnist"],
        [],
    ]


def test_a_command_that_does_not_parse_is_found():
    def knows_one_recipe(flags: list[str]):
        if "mnist" in flags:
            raise ValueError("No recipe 'mnist'. Known: digits.")

    assert command_breaches(README_EXAMPLE, knows_one_recipe) == [
        "run_train.py --recipe mnist: No recipe 'mnist'. Known: digits."
    ]


def test_an_unknown_flag_of_the_launcher_is_found():
    with pytest.raises(SystemExit):
        launched_commands("accelerate launch --num_procesess 2 run_train.py --recipe digits")


# ---------------------------------------------------------------- nothing of one machine

# Put together here, so that this file does not hold them itself.
PRIVATE_PATHS = tuple("".join(parts).encode() for parts in (("/", "work", "/"), ("/tmp", "/v"), ("bash", "_jobs")))


def private_path_breaches(files: dict[str, bytes]) -> list[str]:
    """One line for each file that names a path of a machine it was written on."""
    return [f"{name}: {path.decode()}" for name, content in files.items() for path in PRIVATE_PATHS if path in content]


def test_no_file_names_a_path_of_one_machine():
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(listing, cwd=ROOT, capture_output=True, check=False)
    if answer.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in answer.stdout.decode().split("\0") if name]
    assert private_path_breaches({str(path): path.read_bytes() for path in paths if path.is_file()}) == []


def test_a_private_path_is_found():
    files = {"a.py": b"open('" + PRIVATE_PATHS[0] + b"data')", "b.png": b"\x89PNG\xff" + PRIVATE_PATHS[2], "c": b"work"}
    assert len(private_path_breaches(files)) == 2
