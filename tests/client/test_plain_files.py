"""The fast way to read a small file gives what the datasets library gives, or leaves the file to it."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedapt.client import plain_files
from fedapt.client.dataset_files import read_file
from fedapt.client.plain_files import read_plain
from fedapt.client.table import Table

NAMES = st.lists(st.sampled_from(["text", "label", "site", "ü", " a b", "1"]), min_size=1, max_size=3, unique=True)
WORDS = st.sampled_from(
    [
        "",
        " ",
        "NA",
        "null",
        "nan",
        "inf",
        "True",
        "false",
        "0",
        "-7",
        "007",
        "+3",
        "1e3",
        "1.5",
        " 2",
        "2020-01-02",
        "0x1",
    ]
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6) | WORDS
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "text": TEXTS,
    "words": st.sampled_from(["good", "bad, very", 'a "b"', "two\nlines", "é", "2020-01-02 or so"]),
    "whole": st.integers(-(2**63), 2**63 - 1),
    "small": st.integers(-3, 3),
    "large": st.integers(-(2**70), 2**70),
    "real": st.floats(),
    "truth": st.booleans(),
}
SEVERAL = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Ever new files: what the library has read it keeps by name."""
    folder = tmp_path / "files"
    folder.mkdir()
    return (folder / f"{number}.jsonl" for number in range(10**9))


@st.composite
def columns(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Some columns, each of one kind but for what is missing."""
    count = draw(st.integers(0, 4))
    gap = st.none() if draw(st.booleans()) else st.nothing()
    kinds = {name: draw(st.sampled_from(sorted(KINDS))) for name in draw(NAMES)}
    return {name: draw(st.lists(KINDS[k] | gap, min_size=count, max_size=count)) for name, k in kinds.items()}


def same(path: Path) -> bool:
    """Whether the file is read in the fast way; the rows are then those of the other."""
    plain = read_plain(path)
    if plain is None:
        return False
    other = read_file(path, "a")
    assert plain.column_names == other.column_names
    assert list(plain) == list(other)
    assert [[*map(type, row.values())] for row in plain] == [[*map(type, row.values())] for row in other]
    return True


@SEVERAL
@given(table=columns(), escaped=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_json_lines_are_read_alike(path: Iterator[Path], table: dict[str, list[Any]], escaped: bool, end: str) -> None:
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    file = next(path)
    file.write_text("".join(json.dumps(row, ensure_ascii=escaped) + end for row in rows), "utf-8", newline="")
    same(file)


@SEVERAL
@given(
    table=columns(), end=st.sampled_from(["\n", "\r\n"]), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
)
def test_csv_is_read_alike(path: Iterator[Path], table: dict[str, list[Any]], end: str, quoting: Any) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, quoting=quoting)
    writer.writerows([list(table), *zip(*table.values(), strict=True)])
    file = next(path).with_suffix(".csv")
    file.write_text(text.getvalue(), "utf-8", newline="")
    same(file)


@SEVERAL
@given(lines=st.lists(st.text("ab1,\"' \t.", max_size=8), min_size=1, max_size=4))
def test_any_text_as_csv_is_read_alike_or_not_at_all(path: Iterator[Path], lines: list[str]) -> None:
    file = next(path).with_suffix(".csv")
    file.write_text("\n".join(["x,y", *lines]), "utf-8")
    same(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n{"label": 0, "text": "y\\n\\ud83d\\ude00 é"}'),
        ("a.json", '{"text": null, "real": 0.5, "truth": true}\r\n\r\n{"text": "", "real": -1e-3, "truth": null}\r\n'),
        ("a.csv", 'text,label\n"two\nlines, ""quoted""",1\n\nNA,-3\n,0\n'),
        ("a.csv", "text,label\r\n1,a\r\n2,\r\n3,7\r\n"),
    ],
)
def test_what_is_plain_is_read_here(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8", newline="")
    assert same(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": 1}\n'),
        ("a.jsonl", '{"a": 1}\n{"b": 1}\n'),
        ("a.jsonl", '{"a": 1, "a": 2}\n'),
        ("a.jsonl", '{"a": [1]}\n'),
        ("a.jsonl", '{"a": {"b": 1}}\n'),
        ("a.jsonl", '{"a": "2020-01-02"}\n'),
        ("a.jsonl", '{"a": NaN}\n'),
        ("a.jsonl", '{"a": 9223372036854775808}\n'),
        ("a.jsonl", '{"a": "\\ud800"}\n'),
        ("a.jsonl", '{"a": null}\n'),
        ("a.jsonl", '[{"a": 1}]\n'),
        ("a.jsonl", "{}\n"),
        ("a.jsonl", "\n"),
        ("a.csv", "a,a\nx,y\n"),
        ("a.csv", "a,\nx,y\n"),
        ("a.csv", "\ufeffa\nx\n"),
        ("a.csv", "a,b\nx\n"),
        ("a.csv", "a,b\nx,y,z\n"),
        ("a.csv", "a\n1.5\n2\n"),
        ("a.csv", "a,b\n1,x\n,y\n"),
        ("a.csv", "a\nTrue\n1\n"),
        ("a.csv", "a\n"),
        ("a.txt", "a\n"),
    ],
)
def test_what_is_not_plain_is_left(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    assert read_plain(tmp_path / name) is None


def test_a_large_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a\nx\n")
    assert read_plain(path) is not None
    monkeypatch.setattr(plain_files, "PLAIN_BYTES", 3)
    assert read_plain(path) is None


OTHER = st.lists(st.tuples(st.text(max_size=3), st.integers(-9, 9)), max_size=5)


@settings(max_examples=30, deadline=None)
@given(rows=OTHER, data=st.data())
def test_a_table_is_a_small_dataset(rows: list[tuple[str, int]], data: st.DataObject) -> None:
    """All that is asked of a table is the same of both."""
    raw: dict[str, list[Any]] = {"text": [text for text, _ in rows], "site": [site for _, site in rows]}
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6)) if rows else []
    found = []
    for table in (Table(raw), datasets.Dataset.from_dict(raw)):
        changed = table.select(chosen).rename_columns({"text": "site", "site": "text"}).add_column("label", chosen)
        parts = [table, changed, changed.remove_columns("site"), changed.remove_columns(["text"])]
        parts += [changed.select_columns(["label", "text"]), table.select(range(len(rows) // 2))]
        found.append(
            [(part.column_names, len(part), list(part), [part[n][:] for n in part.column_names]) for part in parts]
        )
    assert found[0] == found[1]


def test_columns_of_a_table_are_of_one_length_and_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="columns of different lengths"):
        Table({"a": [1], "b": []})
    with pytest.raises(ValueError, match="a column 'a' is there already"):
        Table({"a": [1]}).add_column("a", [2])
