"""The tables of docs/speed.md and of the README's section on speed, from the records that the scripts below leave.

python benchmarks/train_step.py --shapes nano,micro,d192,vit_ti_16,vit_s_16 --rounds 5
    --output benchmarks/results/train-step-cpu.json
python benchmarks/train_step.py --shapes nano,micro,d192,vit_ti_16,vit_s_16 --rounds 11
    --output benchmarks/results/train-step-zen5-cpu.json                                  on AMD's Zen 5
    ... --output benchmarks/results/train-step-amx-cpu.json                               on a processor with AMX
python benchmarks/train_step.py --precisions no --shapes micro,d192,vit_ti_16 --rounds 15
    --output benchmarks/results/train-step-avx2-cpu.json                                  without units for bf16
python benchmarks/end_to_end.py datasets/cifar10 --output benchmarks/results/end-to-end-cpu.json
    ... --output benchmarks/results/end-to-end-zen5-cpu.json                              on AMD's Zen 5
python benchmarks/attention.py --output benchmarks/results/attention-cpu.json
python benchmarks/input.py --cifar10 datasets/cifar10 --flowers datasets/flowers/train
    --imagenet datasets/imagenet-1k-sample --output benchmarks/results/input-cpu.json

python benchmarks/speed.py --write    puts the tables into the two pages
"""

import attention
import end_to_end
import input as input_speed
import train_step
from markers import show_pages, with_table
from recorded import ROOT, markdown_table
from recorded import read_record as read

PAGE, README = ROOT / "docs" / "speed.md", ROOT / "README.md"


def step_table(record: str) -> str:
    return markdown_table(train_step.HEADER, list(map(train_step.as_words, read(record)["rows"])))


def summary_table() -> str:
    """What a person asks first: images a second of ours and of what they have, a step and a whole run."""
    lines = []
    for precision, name in train_step.PRECISION_NAMES.items():
        rows = [row for row in read("train-step")["rows"] if (row["shape"], row["precision"]) == ("d192", precision)]
        rates = {row["network"]: row["images_per_second"] for row in rows}
        peers = ("transformers", "timm", "torchvision")
        lines.append(_compared(f"a training step, {name}", rates["ours"], {peer: rates[peer] for peer in peers}))
    measured = read("end-to-end")["rows"]
    for precision, name in train_step.PRECISION_NAMES.items():
        rates = {run: end_to_end.rate(measured, run, precision) for run in ("ours", "example", "example, 4 workers")}
        lines.append(_compared(f"a whole run, {name}", rates.pop("ours"), rates))
    return markdown_table(["images a second", "ours", "others (how many times as fast ours is)"], lines)


def _compared(what: str, ours: float, others: dict[str, float]) -> list[str]:
    return [what, f"{ours:,.0f}", ", ".join(f"{name} {rate:,.0f} ({ours / rate:.2f})" for name, rate in others.items())]


def with_readme_tables(page: str) -> str:
    """The README with its two tables between their markers."""
    page = with_table(page, "speed", "speed.py", summary_table())
    return with_table(page, "input", "speed.py", input_speed.markdown(read("input")["results"]))


def with_tables(page: str) -> str:
    """docs/speed.md with its tables between their markers."""
    tables = {
        "train step": lambda: step_table("train-step"),
        "train step on Zen 5": lambda: step_table("train-step-zen5"),
        "train step with AMX": lambda: step_table("train-step-amx"),
        "train step without bf16": lambda: step_table("train-step-avx2"),
        "end to end": lambda: end_to_end.table(read("end-to-end")["rows"]),
        "end to end on Zen 5": lambda: end_to_end.table(read("end-to-end-zen5")["rows"]),
        "attention": lambda: attention.table(read("attention")["rows"]),
    }
    for name, table in tables.items():
        page = with_table(page, name, "speed.py", table())
    return page


PAGES = {README: with_readme_tables, PAGE: with_tables}


if __name__ == "__main__":
    show_pages(__doc__, PAGES)
