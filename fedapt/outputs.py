"""What a run leaves in its folder: the spec as run, metrics.jsonl, the adapter in peft's format, report.html."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tomli_w

from .protocols.errors import DataError, OutputError
from .protocols.spec import RunSpec

SPEC, METRICS, STORE = "spec.toml", "metrics.jsonl", "run.sqlite"


def spec_toml(spec: RunSpec) -> str:
    """A spec as TOML, without the keys that are not set."""
    return tomli_w.dumps(spec.model_dump(exclude_none=True, mode="json"))


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing, in UTF-8 (a lone surrogate becomes a question mark). Raises OutputError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        scratch.write_bytes(text.encode("utf-8", "replace"))
        os.replace(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); name a folder that can be."
        ) from error


def read_run(folder: Path) -> tuple[RunSpec, list[dict[str, Any]]]:
    """The spec and the rows of a run that lies in a folder. Raises DataError or SpecError where it holds none."""
    for name in (SPEC, METRICS):
        if not (folder / name).is_file():
            what = f"it has no {name}" if folder.is_dir() else "no such folder"
            raise DataError(f"{folder}: {what}; name a folder that `fedapt simulate --out` has written")
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / METRICS}: cannot be read ({error})") from error
    return RunSpec.load(folder / SPEC), [_row(folder, number, line) for number, line in enumerate(lines, 1)]


def _row(folder: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("round"), int):
        raise DataError(
            f"{folder / METRICS}: line {number} is no round of a run; `fedapt simulate` with this --out repairs it"
        )
    return row


class RunFolder:
    """The output folder of one run. Raises OutputError at once where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".write-test"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another --out") from error

    @property
    def store(self) -> Path:
        """The SQLite store that a run interrupted at any point resumes from."""
        return self.path / STORE

    @property
    def sites(self) -> Path:
        """The ledgers that the simulated nodes keep, where privacy is of their examples."""
        return self.path / "sites"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def begin(self, spec: RunSpec, rows: Sequence[Mapping[str, Any]]) -> Self:
        """Write the spec and the rows that a resumed run already has."""
        write_text(self.path / SPEC, spec_toml(spec))
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        return self

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one round's line to metrics.jsonl."""
        try:
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error.strerror or error})") from error
