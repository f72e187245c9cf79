"""Rows of cells as a table for a terminal."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], num_names: int = 1, indent: str = "") -> str:
    """The rows, the first one the heads, in aligned columns: the first `num_names` of them names, set to the left, the
    others numbers, set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        indent
        + "  ".join(
            cell.ljust(width) if place < num_names else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
