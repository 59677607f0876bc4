"""A table in memory: what a source of data is once it has been read.

`Table` names what this package asks of a table, in the words of the datasets library. So a `datasets.Dataset`, whose
rows may lie on disk, stands wherever a Table does, and only who needs one imports that library, which takes a second.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Table:
    """Columns of one length by name, in order. A value is what JSON has for one: text, a number, true or false, None."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self._columns = {name: list(values) for name, values in columns.items()}
        self._rows = len(next(iter(self._columns.values()), ()))
        if any(len(values) != self._rows for values in self._columns.values()):
            lengths = {name: len(values) for name, values in self._columns.items()}
            raise ValueError(f"columns of different lengths: {lengths}")

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, name: str) -> list[Any]:
        """One column. Who changes the list changes the table."""
        return self._columns[name]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows."""
        return (dict(zip(self._columns, row, strict=True)) for row in zip(*self._columns.values(), strict=True))

    def select(self, rows: "Sequence[int] | range | np.ndarray[Any, np.dtype[np.int64]]") -> "Table":
        """The rows of these numbers, in this order."""
        return Table({name: [values[row] for row in rows] for name, values in self._columns.items()})

    def select_columns(self, names: Sequence[str]) -> "Table":
        return Table({name: self._columns[name] for name in names})

    def remove_columns(self, names: str | Sequence[str]) -> "Table":
        gone = {names} if isinstance(names, str) else set(names)
        return Table({name: values for name, values in self._columns.items() if name not in gone})

    def rename_columns(self, names: Mapping[str, str]) -> "Table":
        """Each column in its place under its new name, where `names` has one for it."""
        return Table({names.get(name, name): values for name, values in self._columns.items()})

    def add_column(self, name: str, values: Sequence[Any]) -> "Table":
        """With one more column, the last. Raises ValueError where there is one of this name."""
        if name in self._columns:
            raise ValueError(f"a column {name!r} is there already")
        return Table({**self._columns, name: values})
