"""The shelf: the last version before a round, whatever came after it; a budget of memory; and what outlives a kill."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.client.shelf import MOST_RUNS, Shelf, Tensors
from fedapt.protocols.errors import OutputError
from fedapt.protocols.update import Assignment


def asked(node: int, round_: int, run: str = "run") -> Assignment:
    return Assignment(run, round_, 1, node, "", b"")


def value(number: float) -> Tensors:
    return {"x": np.full(3, number, np.float32)}


def read(shelf: Shelf, node: int, round_: int, run: str = "run") -> tuple[int, float] | None:
    found = shelf.before(asked(node, round_, run))
    return None if found is None else (found[0], float(found[1]["x"][0]))


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=30))
def test_it_is_a_dictionary_of_rounds_that_go_on_or_are_asked_again(visits: list[tuple[int, bool]]) -> None:
    """The plain reference: everything that was ever put, by node and round."""
    shelf, kept, round_ = Shelf(), {node: dict[int, float]() for node in range(3)}, 1
    for count, (node, goes_on) in enumerate(visits):
        round_ += goes_on
        before = [number for number in kept[node] if number < round_]
        expected = (max(before), kept[node][max(before)]) if before else None
        assert read(shelf, node, round_) == expected
        shelf.put(asked(node, round_), value(count))
        kept[node][round_] = count
    assert len(shelf) == sum(bool(own) for own in kept.values())
    assert all(len(shelf[node]) <= 2 for node in kept)


def test_what_is_newer_than_a_round_that_is_asked_again_is_forgotten() -> None:
    shelf = Shelf()
    for round_ in (1, 2, 3):
        shelf.put(asked(5, round_), value(round_))
    shelf.put(asked(5, 3), value(30))
    assert read(shelf, 5, 4) == (3, 30)
    assert read(shelf, 5, 3) == (2, 2)
    assert read(shelf, 5, 2) is None, "of a round before the last two nothing is known"


def test_another_run_has_a_past_of_its_own() -> None:
    shelf = Shelf()
    shelf.put(asked(5, 1), value(1))
    assert read(shelf, 5, 2, "another") is None
    shelf.put(asked(5, 1, "another"), value(2))
    assert read(shelf, 5, 2, "another") == (1, 2)
    assert read(shelf, 5, 2) == (1, 1), "runs that alternate keep what is theirs"


def test_a_run_that_has_ended_or_begins_anew_as_another_is_forgotten() -> None:
    shelf = Shelf()
    for run in ("one", "two"):
        shelf.begin(run, "as it was")
        shelf.put(asked(5, 1, run), value(1))
        shelf.begin(run, "as it was")
    shelf.begin("one", "another seed")
    assert read(shelf, 5, 2, "one") is None
    assert read(shelf, 5, 2, "two") == (1, 1)
    shelf.put(asked(5, 1, "one"), value(2))
    shelf.begin("one", "another seed")
    assert read(shelf, 5, 2, "one") == (1, 2)
    shelf.drop("two")
    assert read(shelf, 5, 2, "two") is None
    assert read(shelf, 5, 2, "one") == (1, 2)


def test_names_without_end_do_not_fill_the_disk() -> None:
    """The runs that were gone on with last are kept, not those whose first round was last."""
    shelf = Shelf()
    for number in range(2 * MOST_RUNS):
        for run in ("old", f"run {number}"):
            shelf.begin(run, "")
            shelf.put(asked(5, 1, run), value(number))
    assert len(shelf[5]) == MOST_RUNS
    assert read(shelf, 5, 2, "old") == (1, 2 * MOST_RUNS - 1)
    assert read(shelf, 5, 2, "run 0") is None


def test_tensors_come_back_as_they_were() -> None:
    tensors = {
        "empty": np.zeros(0, np.float32),
        "strided": np.arange(12.0).reshape(3, 4)[:, ::2],
        "count": np.array([2**62], np.int64),
        "bytes": np.frombuffer(b"[]", np.uint8),
    }
    shelf = Shelf()
    shelf.put(asked(2**64 - 1, 1), tensors)
    found = shelf.before(asked(2**64 - 1, 2))
    assert found is not None
    for name, tensor in tensors.items():
        assert found[1][name].dtype == tensor.dtype
        assert np.array_equal(found[1][name], tensor)


def test_nodes_move_to_another_process_and_a_pickled_shelf_is_empty() -> None:
    shelf, other = Shelf(), Shelf()
    for round_ in (1, 2):
        shelf.put(asked(5, round_), value(round_))
    assert 5 in shelf
    assert 6 not in shelf
    other.update({5: shelf[5]})
    assert other[5] == shelf[5]
    other.pop(5)
    other.pop(5)
    assert 5 not in other
    assert 5 in shelf
    assert len(pickle.loads(pickle.dumps(shelf))) == 0


def test_a_file_goes_on_and_can_be_cleared(tmp_path: Path) -> None:
    first = Shelf(tmp_path / "nodes.sqlite")
    first.put(asked(5, 1), value(1))
    again = Shelf(tmp_path / "nodes.sqlite")
    assert read(again, 5, 2) == (1, 1)
    again.clear()
    assert len(again) == 0


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "nodes.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(OutputError, match=r"nodes\.sqlite: cannot hold what nodes keep"):
        Shelf(tmp_path / "nodes.sqlite")
    with pytest.raises(OutputError, match="take another folder"):
        Shelf(tmp_path / "no folder" / "nodes.sqlite")


def test_what_was_put_outlives_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, numpy as np; from pathlib import Path; from fedapt.client.shelf import Shelf;"
        "from fedapt.protocols.update import Assignment; shelf = Shelf(Path(sys.argv[1]));"
        "shelf.put(Assignment('run', 1, 1, 5, '', b''), {'x': np.full(3, 7, np.float32)});"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "nodes.sqlite")]
    assert subprocess.run(command, check=False, env=dict(os.environ)).returncode == -signal.SIGKILL
    assert read(Shelf(tmp_path / "nodes.sqlite"), 5, 2) == (1, 7)


def test_memory_is_bounded_by_the_budget() -> None:
    """40 MB of versions under a budget of 1 MB: the process stays small. The control has room for all."""
    blob = {"x": np.zeros(25_000, np.float32)}

    def held(budget: int) -> int:
        script = (
            "import psutil, sys, numpy as np; from fedapt.client.shelf import Shelf;"
            "from fedapt.protocols.update import Assignment; shelf = Shelf(budget=int(sys.argv[1]));"
            "blob = {'x': np.zeros(25_000, np.float32)}; put = lambda n: shelf.put(Assignment('r', 1, 1, n, '', b''), blob);"
            "put(0); rss = lambda: psutil.Process().memory_info().rss; before = rss();"
            "[put(node) for node in range(400)]; assert len(shelf) == 400;"
            "print(rss() - before)"
        )
        done = subprocess.run([sys.executable, "-P", "-c", script, str(budget)], capture_output=True, check=True)
        return int(done.stdout)

    size = 400 * sum(tensor.nbytes for tensor in blob.values())
    assert held(2**20) < size / 3
    assert held(2 * size) > size / 2
