"""The tables of docs/exactness.md, from the records that the scripts below leave. `--write` puts them into the page.

python benchmarks/kill_and_resume.py --kills 50 --output benchmarks/results/kill-and-resume-cpu.json
python benchmarks/kill_and_resume.py --kills 50 --streaming
    --output benchmarks/results/kill-and-resume-streamed-cpu.json
python benchmarks/kill_and_resume.py --kills 20 --streaming --num_processes 2
    --output benchmarks/results/kill-and-resume-two-processes-cpu.json
python benchmarks/equality.py --output benchmarks/results/equality-cpu.json
python benchmarks/faults.py --output benchmarks/results/faults-cpu.json
python benchmarks/resume_start.py --dataset_name datasets/cifar10 --output benchmarks/results/resume-start-cpu.json
"""

import collections

import equality
import faults
import resume_start
from markers import show_pages, with_table
from recorded import ROOT, markdown_table
from recorded import read_record as read

PAGE = ROOT / "docs" / "exactness.md"
SOAKS = ("kill-and-resume", "kill-and-resume-streamed", "kill-and-resume-two-processes")


def soak_table() -> str:
    rows = []
    for record in map(read, SOAKS):
        settings, kills = record["settings"], record["kills"]
        moments = collections.Counter(kill["kind"] for kill in kills)
        rows.append([
            "streamed, 0 to 2 workers" if settings["streaming"] else "kept decoded", str(settings["num_processes"]),
            f"{settings['steps']:,}", ", ".join(f"{count} {kind}" for kind, count in sorted(moments.items())),
            str(sum(kill["is_saving"] for kill in kills)), ", ".join(record["differing"]) or "nothing",
        ])  # fmt: skip
    header = ["images", "processes", "steps", "killed while", "checkpoints left half written", "differs at the end"]
    return markdown_table(header, rows)


def equality_table() -> str:
    rows = [equality.cells(*equality.from_record(record)) for record in read("equality")["rows"]]
    return markdown_table(equality.HEADER, rows)


def fault_table() -> str:
    own = [{name: value for name, value in record.items() if name != "is_ok"} for record in read("faults")["rows"]]
    return markdown_table(faults.HEADER, [faults.cells(faults.Outcome(**record)) for record in own])


def start_table() -> str:
    return markdown_table(resume_start.HEADER, list(map(resume_start.cells, read("resume-start")["rows"])))


def with_tables(page: str) -> str:
    """The page with the tables between their markers."""
    tables = {"soak": soak_table, "equality": equality_table, "faults": fault_table, "resume start": start_table}
    for name, table in tables.items():
        page = with_table(page, name, "exactness.py", table())
    return page


if __name__ == "__main__":
    show_pages(__doc__, {PAGE: with_tables})
