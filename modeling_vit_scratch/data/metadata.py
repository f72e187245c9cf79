"""The labels that metadata.csv, metadata.jsonl or metadata.parquet give to the images of a folder.

The layout is that of the image folders of `datasets`: a row an image, its path in the column `file_name`. A list, or in
csv names with | between them, is several labels of one image; as soon as one row has several, all may.
"""

import csv
import json
import os
import posixpath
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from .listing import shown

FILE_COLUMN = "file_name"
LABEL_COLUMNS = ("label", "labels")
SEPARATOR = "|"  # between the labels of an image, in csv

Row = tuple[str, dict[str, Any]]  # (where it stands, its cells)


def labels_from_metadata(path: str, root: str, images: list[str], label_column: str | None) -> list[Any]:
    """The raw label of each of these images of `root`: a name or number, or else, for all of them, a tuple of those.

    Raises UserError naming the row or the image that does not fit the other.
    """
    columns, rows = read_rows(path)
    listing = ", ".join(map(repr, columns)) or "none"
    if FILE_COLUMN not in columns:
        remedy = f"it has: {listing}"
        if re.match(f"{FILE_COLUMN}[;\t]", columns[0] if columns else ""):
            remedy += ", so put commas between the columns"
        raise UserError(f"{shown(path)} has no column {FILE_COLUMN!r}, the image's path from there; {remedy}.")
    column = _label_column(path, columns, listing, label_column)
    labels = {}
    start = len(os.path.join(root, ""))
    names = [image[start:].replace(os.sep, "/") for image in images]
    known = set(names)
    for where, row in rows:
        name = _image_of(row.get(FILE_COLUMN), where, root, known)
        if name in labels:
            raise UserError(f"{where} names {shown(name)} a second time; keep one row an image.")
        if row.get(column) is None:
            raise UserError(f"{where} has no {column!r}; every image needs one (an empty list: none of the classes).")
        labels[name] = (where, row[column])
    for image, name in zip(images, names, strict=True):
        if name not in labels:
            raise UserError(f"{shown(image)} has no row in {shown(path)}; add one, or remove the image.")
    cells = [cell for _, cell in labels.values()]
    if path.endswith(".csv"):
        parse, are_several = _parse_text, any(SEPARATOR in cell for cell in cells)
    else:
        parse, are_several = _parse_cell, any(isinstance(cell, list) for cell in cells)
    parsed = {name: parse(cell, where, column, are_several) for name, (where, cell) in labels.items()}
    return [parsed[name] for name in names]


def read_rows(path: str) -> tuple[list[str], list[Row]]:
    """The columns of a metadata file and its rows. Raises UserError naming the line that cannot be read."""
    try:
        if path.endswith(".parquet"):
            table = pq.read_table(path)
            return table.column_names, [(f"{shown(path)} row {row}", c) for row, c in enumerate(table.to_pylist())]
        # a byte order mark is what spreadsheets write first
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.endswith(".csv"):
                return _csv_rows(path, csv.reader(file, strict=True))
            rows = [_json_row(f"{shown(path)} line {n}", line) for n, line in enumerate(file, 1) if line.strip()]
            return list(dict.fromkeys(name for _, row in rows for name in row)), rows
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{shown(path)} cannot be read: {text}; mend it, or remove it.") from error


def _csv_rows(path: str, reader: Any) -> tuple[list[str], list[Row]]:
    columns = [name.strip() for name in next(reader, [])]
    rows = []
    for fields in reader:
        where = f"{shown(path)} line {reader.line_num}"
        if fields and len(fields) != len(columns):
            raise UserError(
                f"{where} has {len(fields)} fields where the first line has {len(columns)}; put a field that holds a "
                "comma in double quotes."
            )
        if fields:
            rows.append((where, dict(zip(columns, fields, strict=True))))
    return columns, rows


def _json_row(where: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}; mend the line.") from error
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object such as {{"file_name": "1.jpg", "label": "cat"}}.')
    return where, row


def _label_column(path: str, columns: list[str], listing: str, label_column: str | None) -> str:
    if label_column is not None:
        if label_column not in columns:
            raise UserError(f"--label_column_name {label_column}: {shown(path)} has no such column; it has: {listing}.")
        return label_column
    known = [name for name in LABEL_COLUMNS if name in columns]
    if len(known) != 1:
        found = "several label columns" if known else "no column 'label' or 'labels'"
        remedy = "name it with --label_column_name"
        if not known:
            remedy += ", or move the file away to take the names of the folders"
        raise UserError(f"{shown(path)} has {found}: {remedy}; it has: {listing}.")
    return known[0]


def _image_of(cell: Any, where: str, root: str, known: set[str]) -> str:
    """The path from `root` that a row names, with / between its parts."""
    if not isinstance(cell, str) or not cell:
        raise UserError(f"{where} has no {FILE_COLUMN}; every row names an image by its path from {shown(root)}.")
    if cell in known:
        return cell
    name = cell.replace("\\", "/")  # written on Windows
    if name.startswith(("/", "~")) or re.match("[A-Za-z]:", name) or "://" in name or ".." in name.split("/"):
        raise UserError(
            f"{where} names {shown(cell)}; expected a path from {shown(root)} on, neither absolute nor with '..'."
        )
    name = posixpath.normpath(name)
    if name not in known:
        is_there = os.path.lexists(os.path.join(root, name))
        reason = "is no image by its name" if is_there else f"is not in {shown(root)}"
        raise UserError(f"{where} names {shown(cell)}, which {reason}; mend the row, or remove it.")
    return name


def _parse_text(cell: str, where: str, column: str, are_several: bool) -> Any:
    names = [name.strip() for name in cell.split(SEPARATOR)]
    return _checked([name for name in names if name], where, column, are_several)


def _parse_cell(cell: Any, where: str, column: str, are_several: bool) -> Any:
    names = cell if isinstance(cell, list) else [cell]
    for name in names:
        if type(name) not in (str, int) or name == "":
            raise UserError(f"{where} has the {column} {name!r}; expected a name, a whole number, or a list of them.")
    return _checked(names, where, column, are_several)


def _checked(names: list[Any], where: str, column: str, are_several: bool) -> Any:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"{where} has the {column} {twice!r} more than once; expected the names or numbers of its classes, "
            "not a row of 0 and 1."
        )
    if are_several:
        return tuple(names)
    if not names:
        raise UserError(f"{where} has no {column!r}; every image needs one.")
    return names[0]
