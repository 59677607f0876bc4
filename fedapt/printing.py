"""Results on standard output: one JSON document for machines, text for people."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def emit(document: Mapping[str, Any], as_json: bool, text: str) -> None:
    if as_json:
        print(json.dumps({key: value for key, value in document.items() if key != "text"}, indent=2))
        return
    from rich.console import Console

    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def columns(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as a table."""
    from .presentation import table

    head = list(rows[0])
    return table(head, [["" if row[key] is None else str(row[key]) for key in head] for row in rows])
