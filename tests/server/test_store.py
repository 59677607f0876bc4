import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import IO, cast

import numpy as np
import pytest
from sqlalchemy import text

from fedapt.privacy.chain import Charge
from fedapt.privacy.events import Event, to_json
from fedapt.privacy.ledger import Ledger
from fedapt.protocols.errors import OutputError, PrivacyError
from fedapt.protocols.layout import AdapterLayout, Flat, TensorSpec
from fedapt.protocols.update import Description, Update
from fedapt.server.store import MemoryStore, Snapshot, SqliteStore, Store

from .crashing_store import EVENT

LAYOUT = AdapterLayout([TensorSpec("q.lora_A.weight", (2, 3), "A"), TensorSpec("q.lora_B.weight", (4, 2), "B")])
DESCRIPTION = Description(LAYOUT, np.linspace(0, 5, 14, dtype=np.float32), {"r": 2, "name": "ü"}, "digest")
LARGEST_NODE = 2**64 - 1
FIRST = Update("run", 1, 1, 5, "version", "delta", 2.5, b"\x00payload\xff", {"loss": 1.25, "steps": 3.0})


def state(value: float) -> Flat:
    return np.full(3, value, np.float32)


def begin(store: Store, run: str = "run") -> None:
    store.create(run, '{"spec": 1}', DESCRIPTION, Snapshot(0, state(0)), {"round": 0})


def commit(
    store: Store,
    round_: int,
    kept: tuple[int, ...] = (),
    run: str = "run",
    events: Sequence[Event | Charge] = (),
) -> None:
    store.open_round(run, round_, [1])
    store.commit(run, Snapshot(round_, state(round_)), {"round": round_, "loss": round_ / 3}, kept, events=events)


class StoreSuite(ABC):
    """How every store behaves."""

    @pytest.fixture
    @abstractmethod
    def store(self, tmp_path: Path) -> Store | Iterator[Store]: ...

    def test_what_is_created_is_found(self, store: Store) -> None:
        assert store.find("run") is None
        begin(store)
        found = store.find("run")
        assert found is not None
        spec, description = found
        assert spec == '{"spec": 1}'
        assert description.layout == LAYOUT
        assert description.start.dtype == np.float32
        assert np.array_equal(description.start, DESCRIPTION.start)
        assert (description.config, description.base) == (DESCRIPTION.config, DESCRIPTION.base)
        assert description.version == DESCRIPTION.version
        assert store.rows("run") == [{"round": 0}]

    def test_a_run_is_created_once(self, store: Store) -> None:
        begin(store)
        with pytest.raises(ValueError, match="run 'run' exists"):
            begin(store)

    def test_snapshots_and_buffers_come_back_as_they_were(self, store: Store) -> None:
        begin(store)
        store.open_round("run", 1, [1])
        tensors = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
        store.commit("run", Snapshot(1, tensors[0], {"first": tensors[1], "second": tensors[2]}), {"round": 1}, [])
        back = store.snapshot("run")
        assert back.round == 1
        assert set(back.buffers) == {"first", "second"}
        for tensor, expected in zip([back.state, back.buffers["first"], back.buffers["second"]], tensors, strict=True):
            assert tensor.dtype == np.float32
            assert tensor.tobytes() == expected.tobytes()

    def test_an_open_round_is_never_redrawn(self, store: Store) -> None:
        begin(store)
        assert store.open_round("run", 1, [7, LARGEST_NODE]) == (7, LARGEST_NODE)
        assert store.open_round("run", 1, [1]) == (7, LARGEST_NODE)
        assert store.open_round("run", 2, []) == ()
        assert store.open_round("run", 2, [1]) == ()
        assert store.rows("run") == [{"round": 0}]

    def test_the_first_update_of_a_node_stands(self, store: Store) -> None:
        begin(store)
        store.open_round("run", 1, [5, 2, LARGEST_NODE])
        assert store.contribute("run", FIRST)
        assert not store.contribute("run", replace(FIRST, payload=b"other", weight=9.0))
        assert not store.contribute("run", FIRST)
        assert store.contributions("run", 1) == [FIRST]

    def test_contributions_are_in_node_id_order(self, store: Store) -> None:
        begin(store)
        store.open_round("run", 1, [])
        nodes = [2**63 + 1, 5, LARGEST_NODE, 0, 2**63 - 1, 10]
        updates = {node: replace(FIRST, node=node, kind="empty", payload=b"", metrics={}) for node in nodes}
        assert all(store.contribute("run", update) for update in updates.values())
        assert store.contributions("run", 1) == [updates[node] for node in sorted(nodes)]
        assert store.contributions("run", 2) == []

    def test_refusals_are_in_order_of_arrival(self, store: Store) -> None:
        begin(store)
        given = [(LARGEST_NODE, "NaN"), (3, "stale"), (3, "stale")]
        for node, reason in given:
            store.refuse("run", 1, node, reason)
        store.refuse("run", 2, 1, "later")
        assert store.refusals("run", 1) == given
        assert store.refusals("run", 3) == []

    def test_a_commit_releases_the_round(self, store: Store) -> None:
        begin(store)
        store.open_round("run", 1, [5])
        store.contribute("run", FIRST)
        store.contribute("run", replace(FIRST, round=2))
        store.refuse("run", 1, 3, "stale")
        commit(store, 1)
        assert store.rows("run") == [{"round": 0}, {"round": 1, "loss": 1 / 3}]
        assert store.snapshot("run").round == 1
        assert store.contributions("run", 1) == []
        assert [update.round for update in store.contributions("run", 2)] == [2]
        assert store.refusals("run", 1) == [(3, "stale")]

    def test_only_the_last_and_the_kept_snapshots_stay(self, store: Store) -> None:
        begin(store)
        for round_, kept in [(1, (0,)), (2, (0,)), (3, (2,)), (4, (2,)), (5, (5,))]:
            commit(store, round_, kept)
            there = {round_, *kept}
            for old in range(round_ + 1):
                if old in there:
                    assert np.array_equal(store.snapshot("run", old).state, state(old))
                else:
                    with pytest.raises(KeyError):
                        store.snapshot("run", old)
            assert store.snapshot("run").round == round_
        assert [row["round"] for row in store.rows("run")] == [0, 1, 2, 3, 4, 5]

    def test_two_runs_in_one_store_do_not_mix(self, store: Store) -> None:
        begin(store)
        begin(store, "other")
        store.open_round("run", 1, [1])
        assert store.open_round("other", 1, [2]) == (2,)
        store.contribute("run", FIRST)
        assert store.contribute("other", replace(FIRST, run="other"))
        store.refuse("run", 1, 9, "stale")
        commit(store, 1)
        assert [update.run for update in store.contributions("other", 1)] == ["other"]
        assert store.refusals("other", 1) == []
        assert (len(store.rows("run")), len(store.rows("other"))) == (2, 1)
        assert (store.snapshot("run").round, store.snapshot("other").round) == (1, 0)
        with pytest.raises(KeyError):
            store.snapshot("run", 0)

    def test_a_release_is_charged_with_its_events(self, store: Store) -> None:
        begin(store)
        commit(store, 1)
        assert store.chain().entries == []
        commit(store, 2, events=[EVENT, EVENT])
        commit(store, 3, events=[EVENT])
        chain = store.chain()
        assert chain.verify() is None
        assert [(e.sequence, e.run, e.round, e.node) for e in chain.entries] == [
            (1, "run", 2, None),
            (2, "run", 2, None),
            (3, "run", 3, None),
        ]
        assert {entry.event for entry in chain.entries} == {to_json(EVENT)}
        thrice = replace(EVENT, count=3)
        assert store.ledger("run").spent(1e-5).epsilon == Ledger({to_json(thrice): 1}).spent(1e-5).epsilon > 0

    def test_accounts_of_runs_and_nodes_do_not_mix(self, store: Store) -> None:
        begin(store)
        begin(store, "other")
        commit(store, 1, events=[EVENT, Charge(EVENT, LARGEST_NODE)])
        commit(store, 1, run="other", events=[EVENT] * 3)
        commit(store, 2, events=[Charge(EVENT, 3), Charge(EVENT, LARGEST_NODE)])
        rows = {
            (run, node): sum(store.ledger(run, node)._releases.values())
            for run in ("run", "other", "none")
            for node in (None, 3, LARGEST_NODE)
        }
        assert {key: number for key, number in rows.items() if number} == {
            ("run", None): 1,
            ("run", 3): 1,
            ("run", LARGEST_NODE): 2,
            ("other", None): 3,
        }
        assert store.chain().verify() is None
        assert len(store.chain().entries) == 7


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return MemoryStore()


class TestSqliteStore(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = SqliteStore(tmp_path / "run.sqlite")
        yield store
        store.close()


class TestReopenedSqliteStore(StoreSuite):
    """The same behaviour where every call is made by a process that has just opened the file."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return cast(Store, Reopened(tmp_path / "run.sqlite"))


class Reopened:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object, **options: object) -> object:
            store = SqliteStore(self._path)
            try:
                return getattr(store, name)(*arguments, **options)
            finally:
                store.close()

        return call


def test_a_commit_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Charge, snapshot, row and deletion are one transaction: the last of them fails here."""
    store = SqliteStore(tmp_path / "run.sqlite")
    begin(store)
    store.open_round("run", 1, [5])
    store.contribute("run", FIRST)
    trigger = "CREATE TRIGGER t BEFORE DELETE ON contributions BEGIN SELECT RAISE(ABORT, 'full'); END"
    with store.engine.begin() as connection:
        connection.execute(text(trigger))
    with pytest.raises(Exception, match="full"):
        commit(store, 1, events=[EVENT])
    assert store.rows("run") == [{"round": 0}]
    assert store.snapshot("run").round == 0
    assert store.chain().entries == []
    assert store.chain().verify() is None
    assert store.contributions("run", 1) == [FIRST]
    with store.engine.begin() as connection:
        connection.execute(text("DROP TRIGGER t"))
    commit(store, 1, events=[EVENT])
    assert store.snapshot("run").round == 1
    assert store.contributions("run", 1) == []
    assert [entry.round for entry in store.chain().entries] == [1]
    store.close()


def test_a_store_with_a_broken_ledger_is_not_opened(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "run.sqlite")
    begin(store)
    commit(store, 1, events=[EVENT, EVENT])
    with store.engine.begin() as connection:
        connection.execute(text("DROP TRIGGER ledger_refuses_delete"))
        connection.execute(text("DELETE FROM ledger WHERE sequence = 2"))
    store.close()
    with pytest.raises(PrivacyError, match="the ledger's row 2 is not as it was written: the head counts 2"):
        SqliteStore(tmp_path / "run.sqlite")


def test_commits_are_durable_and_do_not_block_readers(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "run.sqlite")
    with store.engine.connect() as one, store.engine.connect() as other:
        for connection in (one, other):
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
            assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL
            assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
    store.close()


def test_any_path_will_do(tmp_path: Path) -> None:
    path = tmp_path / "50% of a?b=c#d ü" / "run.sqlite"
    path.parent.mkdir()
    store = SqliteStore(path)
    begin(store)
    store.close()
    assert path.is_file()


def test_what_is_no_store_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "run.sqlite").write_text("this is a letter, not a database; it is long enough to have a header" * 9)
    with pytest.raises(OutputError, match="cannot be used as a run's store"):
        SqliteStore(tmp_path / "run.sqlite")
    with pytest.raises(OutputError, match="unable to open database file"):
        SqliteStore(tmp_path / "nowhere" / "run.sqlite")


def check_after_kill(path: Path, said: int) -> None:
    """The file is sound, every commit that was reported is in it, and each round is there whole or not at all."""
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
    store = SqliteStore(path)
    rows = store.rows("run")
    last = len(rows) - 1
    assert [row["round"] for row in rows] == list(range(last + 1))
    assert last in (said, said + 1)
    for round_ in (None, 2 ** (last.bit_length() - 1) if last else 0):
        snapshot = store.snapshot("run", round_)
        assert snapshot.round == (last if round_ is None else round_)
        for tensor in (snapshot.state, *snapshot.buffers.values()):
            assert (tensor == snapshot.round).all()
    assert all(store.contributions("run", number) == [] for number in range(last + 1))
    assert {update.node for update in store.contributions("run", last + 1)} <= {last + 1, last + 2}
    charged = [entry.round for entry in store.chain().entries]
    store.close()
    released = list(range(1, last + 1))
    assert set(released) <= set(charged), f"released, and not charged: {released}, {charged}"
    assert charged == released, f"charged, and not released: {charged}, {released}"


class Nursery:
    """A process that forks children for us to kill; see `crashing_store`."""

    def __init__(self, to: IO[str], of: IO[str]) -> None:
        self._to, self._of = to, of

    def child(self, path: Path, kind: str = "SqliteStore", point: int = 0) -> int:
        print(kind, point, path, file=self._to, flush=True)
        return int(self._of.readline().split()[1])

    def next_commit(self) -> int:
        return int(self._of.readline())

    def last_commit(self, said: int) -> int:
        """The last round that the child reported before it died; `said`, if none since."""
        while (line := self._of.readline()) != "dead\n":
            said = int(line)
        return said


@contextmanager
def nursery() -> Iterator[Nursery]:
    command = [sys.executable, str(Path(__file__).with_name("crashing_store.py"))]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Nursery(process.stdin, process.stdout)
        finally:
            process.stdin.close()
    assert process.returncode == 0


def begun(path: Path) -> Path:
    store = SqliteStore(path)
    begin(store)
    store.close()
    return path


def test_killed_in_the_middle_of_commits(tmp_path: Path) -> None:
    path, chance, said = begun(tmp_path / "run.sqlite"), random.Random(0), 0
    with nursery() as children:
        for _ in range(20):
            child = children.child(path)
            for _ in range(chance.randint(0, 4)):
                said = children.next_commit()
            time.sleep(chance.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            check_after_kill(path, children.last_commit(said))
            said = len_rows(path)
    assert said >= 20


def kill_at_each_write(folder: Path, kind: str) -> int:
    """Kill a child at its first write, another one at its second, …, until one lives for two rounds: how many died."""
    with nursery() as children:
        for point in count(1):
            path = begun(folder / str(point))
            children.child(path, kind, point)
            said = children.last_commit(0)
            check_after_kill(path, said)
            if said == 2:
                return point
    raise AssertionError


def test_killed_at_each_write(tmp_path: Path) -> None:
    assert kill_at_each_write(tmp_path, "SqliteStore") > 20


@pytest.mark.parametrize(
    ("mutant", "fault"),
    [("ChargesAfter", "released, and not charged"), ("ChargesBefore", "charged, and not released")],
)
def test_what_parts_charge_and_release_is_caught(tmp_path: Path, mutant: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        kill_at_each_write(tmp_path, mutant)


def len_rows(path: Path) -> int:
    """The last round that is committed."""
    store = SqliteStore(path)
    rows = store.rows("run")
    store.close()
    return len(rows) - 1
