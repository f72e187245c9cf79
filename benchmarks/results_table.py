"""Prints the README's table of scores from the recorded runs in benchmarks/results/runs/, one row a command.

python benchmarks/results_table.py            prints it
python benchmarks/results_table.py --write    puts it between the README's markers

python benchmarks/results_table.py --record outputs/mnist              keeps its results.json as mnist-seed42.json
python benchmarks/results_table.py --record outputs/c10 --name cifar10-10m    and this one's as cifar10-10m-seed42.json
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from markers import with_table

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "benchmarks" / "results" / "runs"


def command_of(run: dict[str, Any]) -> str:
    """What trains so today: `command_today` where the recipe has become another since the run was recorded."""
    return run.get("command_today", run["command"])


def flags_of(command: str) -> str:
    """The flags of run_train.py that matter to a reader: without where the copy of the set lay, and the trackers."""
    return re.sub(r" --(dataset_name datasets/|report_to )\S+", "", command.partition("run_train.py ")[2])


def read_runs(folder: Path = RUNS) -> dict[str, list[dict[str, Any]]]:
    """The recorded runs by the command that they share, seeds left out."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        command = re.sub(r" --seed \S+", "", command_of(run))
        groups.setdefault(command, []).append(run)
    return groups


def spread(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation, or the value of a single run."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(groups: dict[str, list[dict[str, Any]]]) -> str:
    rows = [
        "| recipe | parameters | test accuracy, % | seeds | PFLOP | seconds of training | images/s | machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for command, runs in groups.items():
        first = runs[0]
        hardware = first["hardware"]
        precision = "" if first["mixed_precision"] == "no" else f", {first['mixed_precision']}"
        cells = [
            f"`{flags_of(command)}`",
            f"{first['num_parameters']:,}",
            spread([100 * run["test_accuracy"] for run in runs], 2),
            ", ".join(str(run["seed"]) for run in runs),
            "" if None in (pflop := [run.get("train_pflop") for run in runs]) else f"{statistics.mean(pflop):.2g}",
            spread([run["train_seconds"] for run in runs], 0),
            f"{statistics.mean(run['images_per_second'] for run in runs):,.0f}",
            f"{hardware['gpu'] or str(hardware['cores']) + ' CPU cores'}{precision}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def with_scores(readme: str) -> str:
    """The README with the table between its markers."""
    return with_table(readme, "scores", "results_table.py", table(read_runs()))


def record(folder: Path, name: str | None):
    """Keeps a finished run's results.json under the name, else its recipe's, and its seed."""
    run = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / f"{name or run['recipe']}-seed{run['seed']}.json").write_text(json.dumps(run, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table between the README's markers")
    parser.add_argument("--record", nargs="+", type=Path, metavar="RUN", help="folders of finished runs to keep")
    parser.add_argument("--name", help="of what is kept, where a recipe has runs of several lengths")
    arguments = parser.parse_args()
    for folder in arguments.record or ():
        record(folder, arguments.name)
    if arguments.write:
        path = ROOT / "README.md"
        path.write_text(with_scores(path.read_text(encoding="utf-8")), encoding="utf-8")
    elif not arguments.record:
        print(table(read_runs()))


if __name__ == "__main__":
    main()
