"""Data sources: a file, a hub dataset or a builtin becomes one checked table with the columns its task needs.

Whatever is wrong with a source is found here, before a model is loaded, and is said with the row and the way out.
"""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import numpy as np

from ..protocols.errors import DataError
from ..protocols.keys import derive, generator
from ..protocols.spec import Data, Model
from .builtin_data import BUILTIN
from .plain_files import read_plain
from .table import Table

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Tables:
    """What a run trains on and is evaluated on.

    `labels` are the names of the classes by number; it is empty for causal-lm.
    """

    train: Table
    evaluation: Table
    labels: tuple[str, ...]


def load_tables(data: Data, model: Model, seed: int) -> Tables:
    """Training and evaluation table of a spec, with one mapping of string labels for both.

    Without `data.evaluation`, the keyed share `data.holdout` of the rows is kept for it; in a natural partition, of
    the groups, so that no client is on both sides. Raises DataError.
    """
    train = load_table(data, data.source, model.task)
    evaluation = None if data.evaluation is None else load_table(data, data.evaluation, model.task)
    labels: tuple[str, ...] = ()
    if model.task != "causal-lm":
        assert model.labels is not None  # the spec requires it for these tasks
        names = string_labels(train)
        if len(names) > model.labels:
            raise DataError(
                f"{data.source}: {len(names)} distinct labels ({_listed(names)}), but model.labels = {model.labels}. "
                f"Set model.labels = {len(names)}, or correct the labels."
            )
        train = _checked_labels(train, names, model.labels, data.source)
        if evaluation is not None:
            evaluation = _checked_labels(evaluation, names, model.labels, str(data.evaluation))
        labels = names or _class_names(train, model.labels)
    if evaluation is None:
        train, evaluation = _hold_out(train, data, seed)
    return Tables(train, evaluation, labels)


def load_table(data: Data, source: str, task: str) -> Table:
    """The rows of `source` (`data.source` or `data.evaluation`), at most `data.limit`, checked.

    Columns by task: `text` and `label` for sequence- and prompted-classification; `text`, or `prompt` and `response` where the
    spec names them, for causal-lm; `image` and `label` for image-classification. Other columns stay as they are.
    Raises DataError.
    """
    table = _read(source, task)
    if len(table) == 0:
        raise DataError(f"{source}: has no rows.")
    if data.limit is not None:
        table = table.select(range(min(data.limit, len(table))))
    needed = _needed(data, task)
    table = _with_canonical_names(table, data, source, needed)
    for column in (key for key in needed if key not in ("image", "label")):
        _check_texts(table, column, source)
    if task == "image-classification":
        from .dataset_files import with_images

        table = with_images(table, source)
    if task != "causal-lm":
        table = _with_whole_labels(table, source)
    return table


def string_labels(table: Table) -> tuple[str, ...]:
    """The distinct labels, sorted, where the labels are strings; empty where they are numbers."""
    values = table["label"][:]
    return tuple(sorted(set(values))) if isinstance(values[0], str) else ()


def encode_labels(table: Table, labels: Sequence[str], source: str) -> Table:
    """`table` with each label replaced by its place in `labels`. Raises DataError on a label that is not there."""
    codes = {label: code for code, label in enumerate(labels)}
    values = table["label"][:]
    row = _first(values, lambda value: value not in codes)
    if row is not None:
        raise DataError(
            f"{source}, row {row + 1}: label {shown(values[row])} does not occur in the training data, "
            f"whose labels are {_listed(labels)}. Correct it, or remove the row."
        )
    return _with_labels(table, [codes[value] for value in values])


def check_labels(table: Table, labels: int, source: str) -> None:
    """Raises DataError where a label is not a whole number in 0..labels-1."""
    values = table["label"][:]
    row = _first(values, lambda value: not isinstance(value, int) or not 0 <= value < labels)
    if row is not None:
        raise DataError(
            f"{source}, row {row + 1}: label {shown(values[row])} is not in the legal range 0..{labels - 1}. "
            f"Correct it, or set model.labels (now {labels}) to the number of classes."
        )


def _checked_labels(table: Table, names: Sequence[str], labels: int, source: str) -> Table:
    if names:
        table = encode_labels(table, names, source)
    check_labels(table, labels, source)
    return table


def groups(table: Table, column: str) -> tuple[tuple[str, ...], Indices]:
    """The distinct values of `column`, sorted, as text; and for each row the place of its value (int64, (rows,)).

    Raises DataError on an unknown column, a missing value, and values that are not all of one plain type.
    """
    key = f'data.partition.column = "{column}"'
    if column not in table.column_names:
        raise DataError(f"{key}: {_no_such_column(column, table.column_names, 'data.partition.column')}")
    values = table[column][:]
    row = _first(values, lambda value: value is None or (isinstance(value, float) and math.isnan(value)))
    if row is not None:
        raise DataError(f"{key}: row {row + 1} has no value. Fill it, or remove the row.")
    try:
        distinct = sorted(set(values))
    except TypeError:
        raise DataError(f"{key}: its values are not all numbers or all strings. Name another column.") from None
    place = {value: index for index, value in enumerate(distinct)}
    return tuple(str(value) for value in distinct), np.array([place[value] for value in values], np.int64)


def _hold_out(table: Table, data: Data, seed: int) -> tuple[Table, Table]:
    """`table` without, and only, the rows kept for evaluation."""
    unit, member = "row", np.arange(len(table))
    if data.partition.kind == "natural":
        assert data.partition.column is not None  # the spec requires it for this kind
        unit, (_, member) = f"distinct {data.partition.column}", groups(table, data.partition.column)
    count = int(member.max()) + 1
    if count < 2:
        raise DataError(
            f"{data.source}: 1 {unit} cannot be divided into training and evaluation data. "
            "Add data, or name a file in data.evaluation."
        )
    kept = min(max(1, round(data.holdout * count)), count - 1)
    chosen = np.isin(member, generator(derive(seed, "holdout")).permutation(count)[:kept])
    return table.select(np.flatnonzero(~chosen)), table.select(np.flatnonzero(chosen))


# Reading


def _read(source: str, task: str) -> Table:
    if source.startswith("builtin:"):
        if source not in BUILTIN:
            raise DataError(f"{source}: no such data; there are {_listed(sorted(BUILTIN))}.")
        return BUILTIN[source]()
    path = Path(source).expanduser()
    # Hub names may hold dots ("org/v1.5"), but hardly ever end like a file.
    if not path.exists() and not path.suffix[1:].isalpha() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:.+)?", source):
        from .dataset_files import read_hub  # a second, as below

        found: Table = read_hub(source)
        return found
    _require_file(path, source)
    # An image is a kind of value that a plain table has not.
    table = None if task == "image-classification" else read_plain(path)
    if table is None:
        from .dataset_files import read_file

        table = read_file(path, source)
    return table


def _require_file(path: Path, source: str) -> None:
    if not path.exists():
        raise DataError(f"{source}: no such file. Check data.source and data.evaluation in the spec.")
    if path.suffix not in EXTENSIONS or not path.is_file():
        what = f"unknown extension {path.suffix!r}" if path.is_file() else "is a folder"
        raise DataError(f"{source}: {what}. Name a {', '.join(EXTENSIONS)} file.")
    if path.stat().st_size == 0:
        raise DataError(f"{source}: is empty.")


# Columns


def _needed(data: Data, task: str) -> dict[str, str]:
    """Canonical name, which is also the key under `data`, ⇒ the column's name in the source."""
    if task in ("sequence-classification", "prompted-classification"):
        return {"text": data.text, "label": data.label}
    if task == "image-classification":
        return {"image": data.image, "label": data.label}
    if data.prompt is not None and data.response is not None:
        return {"prompt": data.prompt, "response": data.response}
    return {"text": data.text}


def _with_canonical_names(table: Table, data: Data, source: str, needed: dict[str, str]) -> Table:
    """`table` with its needed columns renamed; a column whose name is thereby taken gives way."""
    for key, name in needed.items():
        if name not in table.column_names:
            raise DataError(f"{source}: {_no_such_column(name, table.column_names, f'data.{key}')}")
    canonical = {name: key for key, name in needed.items()}
    if len(canonical) < len(needed):
        keys = " and ".join(f"data.{key}" for key in needed)
        raise DataError(f"{source}: {keys} name the same column. Give each its own.")
    division = data.partition.column
    hidden = [name for name in table.column_names if name in needed and name not in canonical]
    if division is not None and division in hidden:
        raise DataError(
            f'data.partition.column = "{division}": this name stands for data.{division} = "{needed[division]}" '
            f"while fedapt runs. Rename the column {division} of {source}."
        )
    table = table.remove_columns(hidden)
    table = table.rename_columns({name: key for name, key in canonical.items() if name != key})
    if division in canonical and division not in table.column_names:
        # The spec divides by the column's name in the source, which must go on to exist.
        table = table.add_column(division, table[canonical[division]][:])
    return table


def _check_texts(table: Table, column: str, source: str) -> None:
    values = table[column][:]
    row = _first(values, lambda value: not isinstance(value, str) or not value.strip())
    if row is not None:
        value = values[row]
        what = "missing" if value is None else "blank" if isinstance(value, str) else f"{shown(value)}, not a string"
        raise DataError(f"{source}, row {row + 1}: {column} is {what}. Correct it, or remove the row.")


def _with_whole_labels(table: Table, source: str) -> Table:
    """`table` with labels that are all whole numbers or all strings."""
    values = table["label"][:]
    row = _first(values, lambda value: value is None)
    if row is not None:
        raise DataError(f"{source}, row {row + 1}: label is missing. Add it, or remove the row.")
    kind = str if isinstance(values[0], str) else int
    row = _first(values, lambda value: not isinstance(value, kind))
    if row is not None:
        expected = "a string, as in row 1" if kind is str else "a whole number"
        raise DataError(
            f"{source}, row {row + 1}: label {shown(values[row])} is not {expected}. "
            "Labels are whole numbers from 0 on, or strings."
        )
    # Python takes true and false for whole numbers; the table should as well.
    return _with_labels(table, [int(value) for value in values]) if isinstance(values[0], bool) else table


def _with_labels(table: Table, labels: Sequence[int]) -> Table:
    return table.remove_columns("label").add_column("label", list(labels))


def _class_names(table: Table, labels: int) -> tuple[str, ...]:
    """The names that a table of the datasets library has for its numbers; else the numbers."""
    feature = None if isinstance(table, Table) else table.features["label"]
    names = getattr(feature, "names", ())
    return tuple(names) if len(names) == labels else tuple(str(label) for label in range(labels))


def _first(values: Sequence[Any], bad: Callable[[Any], bool]) -> int | None:
    return next((row for row, value in enumerate(values) if bad(value)), None)


def _no_such_column(name: str, columns: Sequence[str], key: str) -> str:
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    way_out = f'Set {key} = "{near[0]}".' if near else f"Set {key} to one of them."
    return f'no column "{name}"; the columns are {_listed(columns)}. {way_out}'


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(names[:20])
    return listed if len(names) <= 20 else f"{listed}, … ({len(names)} in all)"
