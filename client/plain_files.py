"""Small local files, read by the standard library: .jsonl and .json of one object a line, and .csv.

This is the fast path of `client/dataset_files.py`, whose import alone takes longer than reading such a file. It takes a
file only where there is one way to read it, and gives the same rows; whatever is not plain (a missing key, a number
among texts, a date, a faulty line) it leaves to the other, which also words the errors.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .table import Table

PLAIN_BYTES = 4 * 2**20
"""Files beyond this are left to the datasets library: it maps them from disk, and keeps their tokens from run to run."""

DATE = re.compile(r"\d{4}-\d\d")
"""How a text begins that Arrow may take for a date."""

WHOLE = re.compile(r"-?[0-9]{1,18}")


class _NotPlainError(ValueError):
    """Something that is left to the datasets library."""


def read_plain(path: Path) -> Table | None:
    """The rows of a file, or None where it is not plain."""
    readers: dict[str, Callable[[Path], Table]] = {".jsonl": _json, ".json": _json, ".csv": _csv}
    if path.suffix not in readers or path.stat().st_size > PLAIN_BYTES:
        return None
    try:
        return readers[path.suffix](path)
    except (ValueError, RecursionError, csv.Error, OSError):  # not UTF-8 and not JSON are ValueErrors too
        return None


# JSON


def _json(path: Path) -> Table:
    columns: dict[str, list[Any]] = {}
    with path.open("rb") as file:
        for line in filter(None, (line.strip(b" \t\r\n") for line in file)):
            row = json.loads(line.decode(), object_pairs_hook=_object, parse_constant=_refuse)
            if not isinstance(row, dict) or not row:
                raise _NotPlainError
            columns = columns or {name: [] for name in row}
            if row.keys() != columns.keys():
                raise _NotPlainError
            for name, value in row.items():
                columns[name].append(value)
    if not columns or not all(map(_is_plain, columns.values())):
        raise _NotPlainError
    return Table(columns)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):  # a key twice
        raise _NotPlainError
    return row


def _refuse(constant: str) -> None:
    raise _NotPlainError(constant)


def _is_plain(values: Sequence[Any]) -> bool:
    """Whether all values that are there are texts, or all whole numbers of 64 bits, or of another one kind."""
    there = [value for value in values if value is not None]
    kinds = {type(value) for value in there}
    if kinds == {str}:
        "".join(there).encode()  # raises UnicodeEncodeError, a ValueError, on half of a surrogate pair
        return not all(map(DATE.match, there))
    if kinds == {int}:
        return all(-(2**63) <= value < 2**63 for value in there)
    return kinds == {bool} or (kinds == {float} and all(map(math.isfinite, there)))


# CSV


def _csv(path: Path) -> Table:
    with path.open(encoding="utf-8", newline="") as file:
        reader = _cells(csv.reader(file, strict=True))
        header = next(reader, [])
        if len(set(header)) < len(header) or "" in header or not header or header[0].startswith("\ufeff"):
            raise _NotPlainError
        rows = list(reader)
    if not rows or any(len(row) != len(header) for row in rows):
        raise _NotPlainError
    return Table({name: _column(cells) for name, cells in zip(header, zip(*rows, strict=True), strict=True)})


def _cells(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows, without empty lines."""
    for row in filter(None, reader):
        if (len(row) == 1 and not row[0].strip()) or any("\0" in cell or "\r" in cell for cell in row):
            raise _NotPlainError
        yield row


def _column(cells: Sequence[str]) -> list[Any]:
    """Whole numbers where all are; texts, an empty one missing, where one cannot be anything else."""
    if all(map(WHOLE.fullmatch, cells)):
        return [int(cell) for cell in cells]
    if any(map(_is_text, cells)):
        return [cell or None for cell in cells]
    raise _NotPlainError


def _is_text(cell: str) -> bool:
    if not cell.strip() or cell.strip().lower() in ("true", "false"):
        return False
    try:
        float(cell)
    except ValueError:
        return True
    return False
