"""The command behind tables that take hours: it goes on where it was, and two of it share the work."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "resumable.py"


@pytest.fixture
def resumable() -> ModuleType:
    found = importlib.util.spec_from_file_location("resumable", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def run(resumable: ModuleType, monkeypatch: pytest.MonkeyPatch, rows: Path, *options: str) -> list[str]:
    """The methods that were measured, of a table of two methods with two seeds each."""
    measured: list[str] = []

    def todo(known: list[dict[str, object]]) -> Iterator[object]:
        points = [resumable.Point("test", method, 0.1, seed) for method in ("a", "b") for seed in (1, 2)]
        yield from (point for point in points if point not in resumable.done(known))

    def measure(point: Any, _model: Path, _data: Path) -> dict[str, object]:
        measured.append(point.method)
        return {"accuracy": 0.5}

    arguments = ["table", "--model", "m", "--data", "d", "--rows", str(rows), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    resumable.command("about", "table", todo, measure, lambda known: f"{len(known)} rows")
    return measured


def test_what_is_there_is_not_run_again(
    resumable: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    assert run(resumable, monkeypatch, rows, "--only", "b") == ["b", "b"]
    assert run(resumable, monkeypatch, rows) == ["a", "a"]
    assert run(resumable, monkeypatch, rows) == []
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["method"], row["seed"]) for row in written] == [("b", 1), ("b", 2), ("a", 1), ("a", 2)]
    assert capsys.readouterr().out.endswith("4 rows\n")


def test_nothing_starts_when_the_time_is_over(
    resumable: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(resumable, monkeypatch, tmp_path / "rows.jsonl", "--minutes", "0") == []


def test_a_table_needs_no_model(resumable: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["table"])
    with pytest.raises(SystemExit):
        resumable.command("about", "table", None, None, None)
    assert run(resumable, monkeypatch, tmp_path / "rows.jsonl", "--table") == []
