"""Tables of recorded numbers in the README and in docs/: each stands between two comments that name its script."""


def with_table(page: str, name: str, script: str, table: str) -> str:
    """The page with the table between its markers. Raises ValueError where the page has not each of them once."""
    start, end = f"<!-- {name}: benchmarks/{script} -->", f"<!-- end of {name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"The page needs {start} and {end}, each once.")
    before, rest = page.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
