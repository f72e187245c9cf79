"""What the same minutes bring on the same machine: run_train.py's recipe beside transformers' example and article 4.

python benchmarks/same_minutes.py datasets/cifar10 --minutes 10 --output benchmarks/results/same-minutes-cpu.json
python benchmarks/same_minutes.py --write     puts the recorded table between the README's markers

Each run is a process of its own, one after the other, on all cores: train from nothing, score the test images once,
with the last weights. run_train.py has the minutes for its whole command, with the start, the decoding and all scores;
transformers' example has them for its training steps alone. Its network has the sizes of ours (`micro`), class token
and linear head as ViT has them; its loop is example_loop.py, with flips and crops out of four pixels of padding as
ours. Article 4 is the recipe of that name: its network and settings, with its mistakes, at the speed of our loop. The
rate of float32 matrix products is taken before and after each run: where it differs, the machine had other work.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from end_to_end import launched
from markers import with_table
from recorded import RESULTS, ROOT, markdown_table, write_record
from results_table import spread
from started_runs import working_folder
from train_step import matrix_product_rate

RUNS = {
    "ours": "`--recipe cifar10`: Muon, a quarter of the patches for 75 % of the steps",
    "transformers": "transformers' example: ViT of the same sizes, AdamW at {rate:g}, linear",
    "article 4": "article 4's network and settings (`--recipe article_4`)",
}
NO_EVALUATION = 10**9


def run(name: str, dataset: str, arguments: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """The accuracy on the test images, how long it took, and what the machine did meanwhile."""
    peaks = [matrix_product_rate("no", "cpu")]
    began = time.perf_counter()
    if name == "transformers":
        folder.mkdir()
        output = folder / "scores.json"
        files = {part: next(Path(dataset).rglob(f"{part}*.parquet")) for part in ("train", "test")}
        flags = {
            "train_file": files["train"], "test_file": files["test"], "minutes": arguments.minutes, "shape": "micro",
            "learning_rate": arguments.learning_rate, "seed": seed, "eval_steps": NO_EVALUATION,
            "dataloader_num_workers": arguments.dataloader_num_workers, "output": output,
        }  # fmt: skip
        launched("benchmarks/example_loop.py", arguments.mixed_precision, flags)
    else:
        output = folder / "results.json"
        flags = {
            "recipe": {"ours": "cifar10"}.get(name, name.replace(" ", "_")), "dataset_name": dataset, "seed": seed,
            "time_budget": f"{60 * arguments.minutes:g}s", "report_to": "none", "output_dir": folder,
        }  # fmt: skip
        launched("run_train.py", arguments.mixed_precision, flags)
    found = json.loads(output.read_text())
    kept = {key: found[key] for key in ("test_accuracy", "steps", "train_seconds")}
    seconds = round(time.perf_counter() - began, 1)
    peaks.append(matrix_product_rate("no", "cpu"))
    return {"run": name, "seed": seed, **kept, "seconds": seconds, "matrix_product_rates": peaks}


def table(record: dict[str, Any]) -> str:
    rows = []
    for name, text in RUNS.items():
        runs = [row for row in record["rows"] if row["run"] == name]
        if not runs:
            continue
        scores = [100 * row["test_accuracy"] for row in runs]
        means = [statistics.mean(row[key] for row in runs) for key in ("steps", "train_seconds", "seconds")]
        rows.append([
            text.format(rate=record["settings"]["learning_rate"]), spread(scores, 2),
            ", ".join(str(row["seed"]) for row in runs), *(f"{mean:,.0f}" for mean in means),
            f"{statistics.mean(rate for row in runs for rate in row['matrix_product_rates']) / 1e9:,.0f}",
        ])  # fmt: skip
    head = ["run", "test accuracy, %", "seeds", "steps", "seconds of training", "of the command", "peak, GFLOP/s"]
    return markdown_table(head, rows)


def with_recorded(page: str) -> str:
    record = json.loads((RESULTS / "same-minutes-cpu.json").read_text(encoding="utf-8"))
    return with_table(page, "same minutes", "same_minutes.py", table(record))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", help="folder of CIFAR-10 in the Hub's layout (parquet)")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--runs", default=",".join(RUNS), help="with commas [all]")
    parser.add_argument("--seeds", default="1", help="with commas [1]")
    parser.add_argument("--mixed_precision", default="no")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of transformers' example [1e-3]")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="of transformers' example [0]")
    parser.add_argument("--output", help="a JSON file to keep the numbers in")
    parser.add_argument("--write", action="store_true", help="only puts the recorded table into the README")
    arguments = parser.parse_args()
    if arguments.write:
        readme = ROOT / "README.md"
        readme.write_text(with_recorded(readme.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if arguments.dataset is None:
        parser.error("name the folder of CIFAR-10, or --write")
    names = ("minutes", "mixed_precision", "learning_rate", "dataloader_num_workers")
    record: dict[str, Any] = {"settings": {name: getattr(arguments, name) for name in names}, "rows": []}
    with working_folder("same-minutes-") as folder:
        for seed in map(int, arguments.seeds.split(",")):
            for name in arguments.runs.split(","):
                place = folder / f"{name.replace(' ', '-')}-{seed}"
                record["rows"].append(run(name, os.path.abspath(arguments.dataset), arguments, seed, place))
                print(record["rows"][-1], flush=True)
                if arguments.output:  # after each: a run takes long and may be stopped
                    write_record(arguments.output, "same_minutes.py", sys.argv[1:], **record)
    print(table(record))


if __name__ == "__main__":
    main()
