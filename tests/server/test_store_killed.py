"""A process that is killed at any write leaves a sound store: each round is there whole, with its charge, or not at all."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO

import pytest
from sqlalchemy import text

from fedapt.server.store import SqlStore, open_store

from .postgres import slow_on_postgres
from .test_store import Place, begin

OTHERS = text(
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
)


def sound(store: SqlStore) -> None:
    """What the database itself says. PostgreSQL may still be at what the killed process asked last: it is awaited."""
    with store.engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall() == []
        else:
            while connection.scalar(OTHERS):
                connection.rollback()
                time.sleep(0.01)
        unused = "SELECT hash FROM blobs EXCEPT SELECT start_hash FROM runs EXCEPT SELECT snapshot_hash FROM rounds"
        assert connection.scalars(text(unused)).all() == []
        released = "SELECT (SELECT count(*) FROM releases) = (SELECT count(*) - 1 FROM rounds WHERE row IS NOT NULL)"
        assert connection.scalar(text(released))


def check_after_kill(where: str, said: int) -> None:
    """The store is sound, every commit that was reported is in it, and each round is there whole or not at all."""
    store = open_store(where)
    sound(store)
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

    def child(self, where: str, kind: str = "Wrapped", point: int = 0) -> int:
        print(kind, point, where, file=self._to, flush=True)
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


def begun(where: str) -> str:
    store = open_store(where)
    begin(store)
    store.close()
    return where


@pytest.mark.slow
@slow_on_postgres
def test_killed_in_the_middle_of_commits(place: Place) -> None:
    where, chance, said = begun(place()), random.Random(0), 0
    with nursery() as children:
        for _ in range(20):
            child = children.child(where)
            for _ in range(chance.randint(0, 4)):
                said = children.next_commit()
            time.sleep(chance.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
            check_after_kill(where, children.last_commit(said))
            said = last_round(where)
    assert said >= 20


def kill_at_each_write(place: Place, kind: str) -> int:
    """Kill a child at its first write, another one at its second, …, until one lives for two rounds: how many died."""
    with nursery() as children:
        for point in count(1):
            where = begun(place())
            children.child(where, kind, point)
            said = children.last_commit(0)
            check_after_kill(where, said)
            if said == 2:
                return point
    raise AssertionError


@slow_on_postgres
def test_killed_at_each_write(place: Place) -> None:
    assert kill_at_each_write(place, "Wrapped") > 20


@slow_on_postgres
@pytest.mark.parametrize(
    ("mutant", "fault"),
    [("ChargesAfter", "released, and not charged"), ("ChargesBefore", "charged, and not released")],
)
def test_what_parts_charge_and_release_is_caught(place: Place, mutant: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        kill_at_each_write(place, mutant)


def last_round(where: str) -> int:
    """The last round that is committed."""
    store = open_store(where)
    rows = store.rows("run")
    store.close()
    return len(rows) - 1
