"""What the datasets library reads: hub datasets, .parquet, images, and every file that is not plain (`plain_files.py`).

Its import takes a second, so `sources.py` imports this module where something has to be read by it.
"""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as shown

import datasets
import pandas

from ..protocols.errors import DataError
from .table import Table

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
WAY_OUT = "a local .jsonl, .csv or .parquet path works offline"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines of `datasets`: what goes wrong is said once, by us."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


@_quiet()
def read_file(path: Path, source: str) -> datasets.Dataset:
    """The rows of a file with one of these extensions. Raises DataError, with the line where a line is at fault."""
    kind = LOADERS[path.suffix]
    # Arrow's JSON reader takes any bytes for text, and fails at the first look at them.
    fault = None if kind == "parquet" else _not_utf8(path)
    if fault is not None:
        raise DataError(f"{source}, line {fault[0]}: {fault[1]}. Save the file as UTF-8.")
    try:
        if kind == "csv":
            return _read_csv(path)
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # pandas, pyarrow and datasets each raise their own
        if "no data" in str(error):
            raise DataError(f"{source}: has no rows.") from error
        fault = _faulty_json(path) if kind == "json" else _faulty_csv(path) if kind == "csv" else None
        if fault is not None:
            raise DataError(f"{source}, line {fault[0]}: {fault[1]}. Correct or remove the line.") from error
        raise DataError(f"{source}: cannot be read as {path.suffix} ({_reason(error)}).") from error


@_quiet()
def read_hub(source: str) -> datasets.Dataset:
    """The rows of a hub dataset: `name`, or `name:split`. Raises DataError."""
    name, _, split = source.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(f"{source}: no network or no such dataset ({_reason(error)}); {WAY_OUT}.") from error
    except Exception as error:  # an unknown split or configuration, a loading script, a damaged download
        raise DataError(f"{source}: cannot be loaded from the hub ({_reason(error)}); {WAY_OUT}.") from error


def _read_csv(path: Path) -> datasets.Dataset:
    # The loader in `datasets` calls pandas as well, but leaves the file open.
    # Only an empty cell is missing: by default pandas reads the texts "None", "null" and "NA" as missing too.
    frame = pandas.read_csv(path, keep_default_na=False, na_values=[""], low_memory=False)
    if not isinstance(frame.index, pandas.RangeIndex):
        raise pandas.errors.ParserError("the rows have more fields than the header")
    return datasets.Dataset.from_pandas(frame, preserve_index=False)


@_quiet()
def with_images(table: datasets.Dataset | Table, source: str) -> datasets.Dataset:
    """`table` with images for paths; a relative path is taken from the source's own folder. Raises DataError."""
    if isinstance(table, Table):
        table = datasets.Dataset.from_dict({name: table[name] for name in table.column_names})
    feature = table.features["image"]
    column = table.data.column("image")
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"{source}, row {row + 1}: image is missing. Add it, or remove the row.")
    if not isinstance(feature, datasets.Value):
        return table
    values = table["image"][:]
    if not isinstance(values[0], str):
        raise DataError(f"{source}, row 1: image is {shown(values[0])}, neither an image nor an array nor a path.")
    paths = [str(Path(source).expanduser().parent / value) for value in values]
    row = next((row for row, path in enumerate(paths) if not os.path.isfile(path)), None)
    if row is not None:
        raise DataError(f"{source}, row {row + 1}: image {shown(values[row])} is no file. Correct the path.")
    return table.remove_columns("image").add_column("image", paths).cast_column("image", datasets.Image())


def _reason(error: BaseException) -> str:
    """The first line of the error at the root of `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _not_utf8(path: Path) -> tuple[int, str] | None:
    """The first line (from 1) that is not UTF-8, and why."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                return number, f"not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1})"
    return None


def _faulty_json(path: Path) -> tuple[int, str] | None:
    """The first line that is malformed, and why; looked for only once a file has failed to load."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return number, f"not JSON ({error.msg} at column {error.colno})"
            if not isinstance(row, dict):
                return number, 'not a JSON object; each line holds one, as in {"text": "…"}'
    return None


def _faulty_csv(path: Path) -> tuple[int, str] | None:
    """As `_faulty_json`; a quoted field may span lines, so the line is where its row begins."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        width = 0
        while True:
            number = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                return number, f"not CSV ({error})"
            if row is None:
                return None
            width = width or len(row)
            if len(row) > width:
                return number, f"{len(row)} fields where the header has {width}"
