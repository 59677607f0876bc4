import contextlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from fedapt.client.builtin_data import EXCLUDED, stdlib_prose
from fedapt.client.sources import Tables, check_labels, encode_labels, groups, load_table, load_tables
from fedapt.protocols.errors import DataError
from fedapt.protocols.spec import Data, Model

CLASSIFY, GENERATE, SEE = "sequence-classification", "causal-lm", "image-classification"
NATURAL = {"kind": "natural", "column": "site"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": i % 2, **more} for i in range(count)]


def data(source: str, **more: Any) -> Data:
    return Data.model_validate({"source": source, **more})


def load(source: str, task: str = CLASSIFY, **more: Any) -> datasets.Dataset:
    return load_table(data(source, **more), source, task)


def tables(source: str, labels: int = 2, seed: int = 0, task: str = CLASSIFY, **more: Any) -> Tables:
    model = Model.model_validate({"base": "any", "task": task, "labels": labels})
    return load_tables(data(source, **more), model, seed)


@contextlib.contextmanager
def refused(*parts: str) -> Iterator[None]:
    """A DataError of one line that says all of `parts`."""
    with pytest.raises(DataError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_table(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    table = datasets.Dataset.from_list(rows(5, site="a"))
    if suffix == ".csv":
        path.write_text("text,label,site\n" + "".join(f"{r['text']},{r['label']},a\n" for r in rows(5)))
    elif suffix == ".parquet":
        with path.open("wb") as file:
            table.to_parquet(file)
    else:
        jsonl(path, *rows(5, site="a"))
    assert list(load(str(path))) == list(table)


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", *rows(9))
    assert load(source, limit=3)["text"][:] == ["text 0", "text 1", "text 2"]
    assert len(load(source, limit=100)) == 9


def test_columns_get_canonical_names_and_others_stay(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"sentence": "x", "text": "other", "stars": 1, "site": "s"})
    table = load(source, text="sentence", label="stars")
    assert list(table) == [{"text": "x", "label": 1, "site": "s"}]


def test_swapped_names_are_not_mixed_up(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"label": "x", "text": 1})
    assert list(load(source, text="label", label="text")) == [{"text": "x", "label": 1}]


def test_the_column_of_the_partition_keeps_its_name(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"text": "x", "stars": 1})
    table = load(source, label="stars", partition={"kind": "by-column", "column": "stars"})
    assert list(table) == [{"text": "x", "label": 1, "stars": 1}]


def test_the_column_of_the_partition_is_never_hidden(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"text": "x", "stars": 1, "label": 0})
    with refused('data.partition.column = "label"', 'data.label = "stars"', "Rename"):
        load(source, label="stars", partition={"kind": "by-column", "column": "label"})


def test_two_keys_do_not_name_one_column(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"text": "x"})
    with refused("data.prompt and data.response name the same column"):
        load(source, GENERATE, prompt="text", response="text")


def test_prompts_and_responses(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"q": "x", "a": "y"}, {"q": "x", "a": " "})
    assert list(load(source, GENERATE, prompt="q", response="a", limit=1)) == [{"prompt": "x", "response": "y"}]
    with refused("row 2: response is blank"):
        load(source, GENERATE, prompt="q", response="a")


def test_only_an_empty_cell_of_a_csv_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nNone,1\nNA,0\n")
    assert load(str(path))["text"][:] == ["None", "NA"]
    path.write_text("text,label\nNone,1\n,0\n")
    with refused("row 2: text is missing"):
        load(str(path))
    path.write_text("text,label\nx,1\ny\n")
    with refused("row 2: label is missing"):
        load(str(path))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.jsonl", b"", ["is empty"]),
        ("blank.jsonl", b"\n\n", ["has no rows"]),
        ("header.csv", b"text,label\n", ["has no rows"]),
        ("bad.jsonl", b'{"text": "a", "label": 1}\n\n{"text": b}\n', ["bad.jsonl, line 3: not JSON", "column 10"]),
        ("cut.jsonl", b'{"text": "a", "label": 1}\n{"text": "b', ["line 2: not JSON (Unterminated string"]),
        ("list.jsonl", b"[1, 2]\n3\n", ["line 1: not a JSON object"]),
        ("latin.jsonl", b'{"text": "\xe9"}\n', ["line 1: not UTF-8 (byte 0xe9 at column 11)"]),
        ("latin.csv", b"text,label\na,1\n\xe9,1\n", ["line 3: not UTF-8"]),
        ("wide.csv", b'text,label\n"a\nb",1\nb,2,3,4\n', ["line 4: 4 fields where the header has 2"]),
        ("wider.csv", b"text,label\na,1,2\nb,2,3\n", ["line 2: 3 fields where the header has 2"]),
        ("quote.csv", b'text,label\na,1\n"b,2\nc,3\n', ["line 3: not CSV (unexpected end of data)"]),
        ("bad.parquet", b"text,label\n", ["cannot be read as .parquet (Parquet magic bytes"]),
        ("notes.txt", b"hello", ["unknown extension '.txt'", ".jsonl, .json, .csv, .parquet"]),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with refused(name, *parts):
        load(str(path))


def test_a_loader_that_fails_without_a_faulty_line_still_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1, "label": 2}\n', encoding="utf-8")
    with refused("a.jsonl: cannot be read as .jsonl (", "label"):
        load(str(path))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with refused("train.jsonl: no such file", "data.source"):
        load("train.jsonl")
    with refused("nowhere.txt: no such file"):
        load(str(tmp_path / "nowhere.txt"))
    with refused("is a folder", ".parquet"):
        load(str(tmp_path))


def test_the_library_stays_quiet_and_its_settings_return(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = datasets.are_progress_bars_disabled(), datasets.utils.logging.get_verbosity()
    tables(jsonl(tmp_path / "a.jsonl", *({"text": "x", "label": name} for name in "abab")))
    (tmp_path / "b.jsonl").write_text("{")
    with refused("line 1"):
        load(str(tmp_path / "b.jsonl"))
    assert capfd.readouterr() == ("", "")
    assert before == (datasets.are_progress_bars_disabled(), datasets.utils.logging.get_verbosity())


def test_a_hub_dataset_is_asked_for_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("imdb", "org/name-v1.5", "org/name:test[:10%]"):
        assert len(load(source)) == 3
    assert asked == [("imdb", "train"), ("org/name-v1.5", "train"), ("org/name", "test[:10%]")]


def test_a_hub_dataset_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with refused("no-such-org/none: no network or no such dataset", ".jsonl, .csv or .parquet path works offline"):
        load("no-such-org/none")


def test_a_hub_dataset_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> datasets.Dataset:
        raise ValueError("Config name is missing.\nPlease pick one.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with refused("glue: cannot be loaded from the hub (Config name is missing); a local"):
        load("glue")


@pytest.mark.parametrize(
    ("row", "task", "parts"),
    [
        ({"texts": "a", "label": 1}, CLASSIFY, ['no column "text"', "texts, label", 'Set data.text = "texts"']),
        ({"zzz": "a"}, GENERATE, ['no column "text"', "Set data.text to one of them"]),
        ({"text": "a"}, CLASSIFY, ['no column "label"', "data.label"]),
        ({"text": None, "label": 1}, CLASSIFY, ["row 3: text is missing"]),
        ({"text": " \n", "label": 1}, CLASSIFY, ["row 3: text is blank"]),
        ({"text": "a", "label": None}, CLASSIFY, ["row 3: label is missing"]),
        ({"text": "a", "label": 0.5}, CLASSIFY, ["label", "is not a whole number"]),
        ({"text": "a", "label": "x"}, CLASSIFY, ["row 3: label 'x' is not a whole number"]),
    ],
)
def test_unusable_rows(tmp_path: Path, row: dict[str, Any], task: str, parts: list[str]) -> None:
    first = [] if "no column" in parts[0] else rows(2)
    with refused("a.jsonl", *parts):
        load(jsonl(tmp_path / "a.jsonl", *first, row), task)


def test_a_text_that_is_a_number(tmp_path: Path) -> None:
    with refused("row 1: text is 5, not a string"):
        load(jsonl(tmp_path / "a.jsonl", {"text": 5}), GENERATE)
    with refused("row 1: text is [0, 1, 2, 3, 4, 5, ...], not a string"):
        load(jsonl(tmp_path / "b.jsonl", {"text": list(range(1000))}), GENERATE)


def test_labels_out_of_range(tmp_path: Path) -> None:
    table = load(jsonl(tmp_path / "a.jsonl", *rows(3), {"text": "a", "label": 2}))
    check_labels(table, 3, "a")
    with refused("a, row 4: label 2", "0..1", "model.labels (now 2)"):
        check_labels(table, 2, "a")
    with refused("row 4"):
        tables(str(tmp_path / "a.jsonl"))
    with refused("row 1: label -1"):
        check_labels(datasets.Dataset.from_dict({"label": [-1]}), 2, "a")


def test_booleans_are_labels(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", {"text": "a", "label": True}, {"text": "b", "label": False})
    assert [type(label) for label in load(source)["label"][:]] == [int, int]


def test_string_labels_have_one_mapping(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", *({"text": "x", "label": name} for name in ("pos", "neg", "odd")))
    test = jsonl(tmp_path / "b.jsonl", {"text": "x", "label": "odd"}, {"text": "x", "label": "pos"})
    both = tables(train, 3, evaluation=test)
    assert both.labels == ("neg", "odd", "pos")
    assert both.train["label"][:] == [2, 0, 1]
    assert both.evaluation["label"][:] == [1, 2]
    with refused("3 distinct labels (neg, odd, pos)", "model.labels = 2", "Set model.labels = 3"):
        tables(train, 2, evaluation=test)
    with refused("a, row 1: label 'pos'", "neg, odd"):
        encode_labels(load(train), ["neg", "odd"], "a")


def test_unseen_evaluation_labels(tmp_path: Path) -> None:
    strings = jsonl(tmp_path / "a.jsonl", *({"text": "x", "label": name} for name in "ab"))
    other = jsonl(tmp_path / "b.jsonl", {"text": "x", "label": "a"}, {"text": "x", "label": "c"})
    numbers = jsonl(tmp_path / "c.jsonl", *rows(2))
    with refused("b.jsonl, row 2: label 'c' does not occur in the training data", "a, b"):
        tables(strings, evaluation=other)
    with refused("c.jsonl, row 1: label 0 does not occur"):
        tables(strings, evaluation=numbers)
    with refused("b.jsonl, row 1: label 'a'", "0..1"):
        tables(numbers, evaluation=other)


def test_class_names_come_from_the_dataset_where_it_has_them(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    path = tmp_path / "a.parquet"
    with path.open("wb") as file:
        datasets.Dataset.from_list(rows(4), features=features).to_parquet(file)
    assert tables(str(path)).labels == ("no", "yes")
    assert tables(str(path), 3).labels == ("0", "1", "2")


def test_holdout_by_rows_is_keyed(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", *rows(50))
    first, again, other = (tables(source, seed=seed, holdout=0.2) for seed in (1, 1, 2))
    assert (len(first.train), len(first.evaluation)) == (40, 10)
    assert set(first.train["text"]).isdisjoint(first.evaluation["text"])
    assert list(first.evaluation) == list(again.evaluation)
    assert list(first.evaluation) != list(other.evaluation)


def test_holdout_keeps_groups_whole(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", *({"text": "x", "label": 0, "site": i % 7} for i in range(50)))
    both = tables(source, holdout=0.3, partition=NATURAL)
    train, evaluation = set(both.train["site"]), set(both.evaluation["site"])
    assert len(evaluation) == 2
    assert len(train) == 5
    assert train.isdisjoint(evaluation)
    assert len(both.train) + len(both.evaluation) == 50


@pytest.mark.parametrize("holdout", [0.001, 0.999])
def test_holdout_leaves_a_row_on_each_side(tmp_path: Path, holdout: float) -> None:
    both = tables(jsonl(tmp_path / "a.jsonl", *rows(3)), holdout=holdout)
    assert min(len(both.train), len(both.evaluation)) == 1


def test_holdout_of_too_little(tmp_path: Path) -> None:
    with refused("1 row cannot be divided", "data.evaluation"):
        tables(jsonl(tmp_path / "a.jsonl", *rows(1)))
    with refused("1 distinct site cannot be divided"):
        tables(jsonl(tmp_path / "b.jsonl", *rows(9, site="a")), partition=NATURAL)
    with refused('no column "site"'):
        tables(jsonl(tmp_path / "c.jsonl", *rows(9)), partition=NATURAL)


def test_groups() -> None:
    table = datasets.Dataset.from_dict(
        {"site": [30, 4, 30], "empty": [1.0, float("nan"), None], "list": [[1], [2], [3]]}
    )
    names, member = groups(table, "site")
    assert names == ("4", "30")
    assert member.tolist() == [1, 0, 1]
    with refused('"sit"', 'Set data.partition.column = "site"'):
        groups(table, "sit")
    with refused('"empty"', "row 2 has no value"):
        groups(table, "empty")
    with refused('"list"', "not all numbers or all strings"):
        groups(table, "list")


def test_image_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    source = jsonl(tmp_path / "a.jsonl", {"image": "red.png", "label": 0})
    assert load(source, SEE)[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    with refused("row 2: image 'blue.png' is no file"):
        load(jsonl(tmp_path / "b.jsonl", {"image": "red.png", "label": 0}, {"image": "blue.png", "label": 0}), SEE)


def test_image_arrays(tmp_path: Path) -> None:
    good = {"image": [[0, 1], [2, 3]], "label": 0}
    assert load(jsonl(tmp_path / "a.jsonl", good), SEE)[0] == good
    with refused("row 2: image is missing"):
        load(jsonl(tmp_path / "b.jsonl", good, {"image": None, "label": 0}), SEE)
    with refused("row 1: image is 5, neither an image nor an array nor a path"):
        load(jsonl(tmp_path / "c.jsonl", {"image": 5, "label": 0}), SEE)


def test_digits() -> None:
    both = tables("builtin:digits", 10, task=SEE)
    assert len(both.train) + len(both.evaluation) == 1797
    image = load("builtin:digits", SEE, limit=1)[0]["image"]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    pixels = np.asarray(image)
    assert pixels.min() == 0
    assert 200 < pixels.max() <= 255
    assert both.labels == tuple("0123456789")


def test_stdlib() -> None:
    table = load("builtin:stdlib", GENERATE)
    assert table.column_names == ["module", "path", "text"]
    modules, paths = table["module"][:], table["path"][:]
    assert len(set(modules)) > 150
    assert set(modules) <= sys.stdlib_module_names
    assert ("json", "json/decoder.py") in zip(modules, paths, strict=True)
    assert ("abc", "abc.py") in zip(modules, paths, strict=True)
    assert len(set(paths)) == len(paths)
    assert all(EXCLUDED.isdisjoint(path.split("/")) for path in paths)
    assert modules == sorted(modules)
    assert list(load("builtin:stdlib", GENERATE)) == list(table)
    with refused('no column "label"', "module, path, text"):
        load("builtin:stdlib", CLASSIFY)


def test_stdlib_prose() -> None:
    assert "assert" in stdlib_prose()
    assert "\n\n" in stdlib_prose()


def test_texts_are_no_images() -> None:
    with refused("builtin:stdlib, row 1: image ", "is no file"):
        load("builtin:stdlib", SEE, image="text", label="module", limit=2)


def test_unknown_builtin() -> None:
    with refused("builtin:digit: no such data", "builtin:digits, builtin:stdlib"):
        load("builtin:digit")


def test_no_global_generator_is_touched(tmp_path: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    tables(jsonl(tmp_path / "a.jsonl", *rows(20)))
    tables("builtin:digits", 10, task=SEE)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
