"""What scripts record, and how it is read again: a JSON file of measurements beside what gave them."""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("timm", "kornia", "simplejpeg")  # what some are compared with or use
sys.path.insert(0, str(ROOT))

from modeling_vit_scratch.results.record import public_command  # noqa: E402
from modeling_vit_scratch.training.machine import commit, hardware, versions  # noqa: E402


def facts_of(script: str, words: list[str], device: str = "cpu") -> dict[str, Any]:
    """The command that a script was called with, without its paths outside the working folder; commit, versions, those
    of the peers too, and machine."""
    command = public_command(["python", f"benchmarks/{script}", *words])
    peers = {name: importlib.metadata.version(name) for name in PEERS if importlib.util.find_spec(name)}
    machine = hardware(Accelerator(cpu=device == "cpu"))
    return {"command": command, "commit": commit(), "versions": {**versions(), **peers}, "hardware": machine}


def write_record(path: str | Path, script: str, words: list[str], device: str = "cpu", **measured: Any):
    """A JSON file of these measurements beside `facts_of` the command."""
    write_json(path, {**facts_of(script, words, device), **measured})


def write_json(path: str | Path, record: dict[str, Any]):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(name: str) -> dict[str, Any]:
    """What was recorded under the name on a CPU."""
    return json.loads((RESULTS / f"{name}-cpu.json").read_text(encoding="utf-8"))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
