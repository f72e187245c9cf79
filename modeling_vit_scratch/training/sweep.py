"""A sweep: one run for every combination of values on a grid, compared by validation.

Every run is an ordinary run folder below the sweep's, so a sweep that was stopped goes on where it was: finished runs
are shown, a broken-off one goes on from its checkpoint. Every combination is checked before the first one trains.
"""

import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..errors import PassingError, UserError
from ..results.sweep_plot import COSTS, SCORES, markdown, table, write_sweep
from . import loop
from .flags import exit_code, out_of_memory
from .machine import LONGEST_WAIT, agree, check_launch
from .recipe import MAY_CHANGE_ON_RESUME, with_defaults
from .run_folder import OURS, has_begun, is_partial, write_json
from .sweep_grid import Plan, Run, parse_sweep

RECORD = "sweep.json"


# ---------------------------------------------------------------- the sweep's folder


def open_sweep(plan: Plan) -> dict[str, Any]:
    """The sweep's record, with what earlier starts finished; called by the main process.

    Raises UserError for a folder that holds another sweep, naming what differs, or files but no sweep.
    """
    path = plan.folder / RECORD
    record, old = plan.new_record(), None
    try:
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
        elif plan.folder.exists() and any(not is_partial(path) for path in plan.folder.iterdir()):
            raise UserError(f"--output_dir {plan.folder} holds files but no sweep; choose a new folder.")
        is_kept = old is not None and not plan.base.overwrite_output_dir
        if is_kept and any(has_begun(plan.folder / run["name"]) for run in old["runs"]):
            _refuse_another_sweep(plan.folder, old, record)
            record["runs"] = [_found(plan, run, old) for run in record["runs"]]
        plan.folder.mkdir(parents=True, exist_ok=True)
        if plan.base.overwrite_output_dir:  # one that is not reached must not be taken for one of this sweep
            for run in plan.runs:
                if any((plan.folder / run.name / name).exists() for name in OURS):
                    shutil.rmtree(plan.folder / run.name)
        write_json(path, record)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); start afresh with --overwrite_output_dir.") from error
    except OSError as error:
        raise UserError(f"--output_dir {plan.folder} cannot be used: {error}.") from error
    return record


def _refuse_another_sweep(folder: Path, old: dict[str, Any], new: dict[str, Any]):
    def facts(record: dict[str, Any]) -> dict[str, Any]:
        flags = {n: v for n, v in with_defaults(record["flags"]).items() if n not in MAY_CHANGE_ON_RESUME}
        return {**flags, **{name: record[name] for name in ("grid", "seeds", "mixed_precision")}}

    before, now = facts(old), facts(json.loads(json.dumps(new)))
    differing = [f"{n}: {before.get(n)!r} -> {now.get(n)!r}" for n in {**now, **before} if before.get(n) != now.get(n)]
    if differing:
        raise UserError(
            f"{folder} holds another sweep ({'; '.join(differing)}). Go on with the old values, choose another "
            "--output_dir, or start afresh with --overwrite_output_dir."
        )


def _found(plan: Plan, run: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The run as it is on disk: finished, failed, or still to be run."""
    folder = plan.folder / run["name"]
    if (folder / "results.json").exists() and (folder / "report.html").exists():
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return {**run, **finished(results)}
    before = next((other for other in old["runs"] if other["name"] == run["name"]), run)
    return before if before["status"] == "failed" and folder.exists() else run


def finished(results: dict[str, Any]) -> dict[str, Any]:
    """What the sweep keeps of a finished run's results."""
    scores = {name: results[name] for name in (*SCORES, *COSTS) if results.get(name) is not None}
    images = (results.get("dataset") or {}).get("splits", {}).get("validation")
    command = results.get("command")
    return {"status": "finished", "note": "", **scores, "num_validation_images": images, "command": command}


# ---------------------------------------------------------------- the sweep


def sweep(plan: Plan) -> dict[str, Any]:
    """Runs what is not finished and returns the sweep's record, which sweep.json holds too.

    Raises UserError where no run can succeed: the first one fails before its first step, there is no validation split,
    or all failed. Raises Interrupted after a signal.
    """
    # as Accelerator reads it, which finds this one there
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    check_launch(state.num_processes)
    record = agree(state, lambda: open_sweep(plan))
    with _one_process_group(), _sigterm_as_interrupt():
        for number, run in enumerate(plan.runs):
            heading = f"[{number + 1}/{len(plan.runs)}] {run.name}"
            if record["runs"][number]["status"] == "waiting":
                state.print(f"\n{heading}", flush=True)
                try:
                    outcome = run_one(plan, record, run, state)
                except (loop.Interrupted, KeyboardInterrupt) as stop:
                    raise loop.Interrupted(_stop_text(plan, heading, stop)) from stop
                record["runs"][number] |= outcome
                _check_has_validation(record["runs"][number], record["metric"])
                if state.is_main_process:
                    write_json(plan.folder / RECORD, record)
                    (plan.folder / "sweep.md").write_text(markdown(record), encoding="utf-8")
                if number + 1 < len(plan.runs):
                    state.print(f"\n{table(record)}", flush=True)
            else:
                state.print(f"{heading}: {record['runs'][number]['status']} before", flush=True)
                _check_has_validation(record["runs"][number], record["metric"])
    if state.is_main_process:
        write_sweep(plan.folder, record)
        write_json(plan.folder / RECORD, record)
    failed = [run for run in record["runs"] if run["status"] == "failed"]
    state.print(f"\n{markdown(record)}\n{plan.folder} holds the sweep.", flush=True)
    if len(failed) == len(record["runs"]):
        raise UserError(f"All {len(failed)} runs failed. {failed[0]['name']}: {failed[0]['note']}")
    return record


def run_one(plan: Plan, record: dict[str, Any], run: Run, state: PartialState) -> dict[str, Any]:
    """What the record keeps of one run, failed ones included.

    Raises the run's own UserError where it would hit every run: no run of this sweep has found its data yet.
    """
    if run.recipe.torch_compile:
        torch.compiler.reset()  # else the eighth network of a sweep runs uncompiled: torch's recompile limit
    # torch's defaults, which --tf32 or --full_determinism true of an earlier run changed
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    try:
        return finished(loop.train(run.recipe, run.chosen))
    except PassingError:
        raise  # the same command goes on with this run when it has passed
    except UserError as error:
        if error.met_alone and state.num_processes > 1:
            raise  # the other processes wait for this one
        wrong = error
    except (RuntimeError, MemoryError) as error:
        if state.num_processes > 1 or (wrong := out_of_memory(error)) is None:
            raise
    # a run that has written down its recipe has found its data: what stops it then may be a value of the grid
    folders = [plan.folder / other["name"] for other in record["runs"]]
    if not agree(state, lambda: any(has_begun(folder) or (folder / "recipe.json").exists() for folder in folders)):
        raise wrong
    sentence = " ".join(str(wrong).split()).replace(str(plan.folder / run.name), run.name)
    wrong.__traceback__ = None  # it holds the network
    gc.collect()
    torch.cuda.empty_cache()
    state.print(f"failed: {sentence}", flush=True)
    return {"status": "failed", "note": sentence}


def _check_has_validation(run: dict[str, Any], metric: str):
    if run["status"] == "finished" and f"validation_{metric}" not in run:
        raise UserError(
            "A sweep chooses by validation, and this data has no validation split: give --train_val_split 0.1."
        )


def _stop_text(plan: Plan, heading: str, stop: BaseException) -> str:
    where = str(stop) or "stopped outside its steps. The same command goes on from its last checkpoint."
    is_told = "--overwrite_output_dir" in where
    afresh = " Leave out --overwrite_output_dir then." if plan.base.overwrite_output_dir and not is_told else ""
    return f"{heading}: {where} Finished runs are not repeated.{afresh}"


@contextmanager
def _one_process_group() -> Iterator[None]:
    """Keeps the processes connected from run to run: `train` ends with `end_training`, which disconnects them.

    accelerate 1 leaves the group alone where FORK_LAUNCHED says that a notebook started the processes.
    """
    before = os.environ.get("FORK_LAUNCHED")
    os.environ["FORK_LAUNCHED"] = "1"
    try:
        yield
    finally:
        del os.environ["FORK_LAUNCHED"]
        if before is not None:
            os.environ["FORK_LAUNCHED"] = before


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Outside the steps of a run, which see to signals themselves, SIGTERM ends the sweep as Ctrl-C does."""
    try:
        old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def main(arguments: list[str] | None = None) -> int:
    """Sweeps as the command line says. The exit code: 0 done, 2 something to mend, 3 stopped by a signal."""
    arguments = sys.argv[1:] if arguments is None else arguments

    def act():
        sweep(parse_sweep(arguments))
        PartialState().destroy_process_group()  # reads FORK_LAUNCHED again

    return exit_code(act)
