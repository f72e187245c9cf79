"""Tables of recorded numbers in the README and in docs/: each stands between two comments that name its script."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def with_table(page: str, name: str, script: str, table: str) -> str:
    """The page with the table between its markers. Raises ValueError where the page has not each of them once."""
    start, end = f"<!-- {name}: benchmarks/{script} -->", f"<!-- end of {name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"The page needs {start} and {end}, each once.")
    before, rest = page.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


def is_written(page: Path, with_its_tables: Callable[[str], str]) -> bool:
    """Whether the command line is --write alone; the page then has its tables, and there is nothing to measure."""
    if sys.argv[1:] != ["--write"]:
        return False
    page.write_text(with_its_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    return True


def show_pages(description: str, pages: dict[Path, Callable[[str], str]]):
    """The command of a script that keeps tables: prints each page with its tables, or writes it with --write."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = " and ".join(path.name for path in pages)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {names}")
    is_written = parser.parse_args().write
    for path, with_its_tables in pages.items():
        page = with_its_tables(path.read_text(encoding="utf-8"))
        if is_written:
            path.write_text(page, encoding="utf-8")
        else:
            print(page)
