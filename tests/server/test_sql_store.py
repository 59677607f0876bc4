"""What databases do besides what every store does: one transaction, blobs, rows that stay, several at once."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from fedapt.protocols.errors import PrivacyError
from fedapt.server.store import Snapshot, SqliteStore, SqlStore, open_store

from .crashing_store import EVENT
from .test_store import DESCRIPTION, FIRST, Place, begin, commit, state


@pytest.fixture
def database(place: Place) -> Iterator[SqlStore]:
    store = open_store(place())
    yield store
    store.close()


def execute(store: SqlStore, *statements: str) -> None:
    with store.engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def hashes(store: SqlStore, query: str) -> list[str]:
    with store.engine.connect() as connection:
        return sorted(connection.scalars(text(query)))


FULL = {
    "sqlite": ["CREATE TRIGGER full_disk BEFORE DELETE ON {} BEGIN SELECT RAISE(ABORT, 'full'); END"],
    "postgresql": [
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'full'; END $$",
        "CREATE TRIGGER full_disk BEFORE DELETE ON {} EXECUTE FUNCTION full_disk()",
    ],
}


@pytest.mark.parametrize("table", ["contributions", "blobs"])
def test_a_commit_that_fails_leaves_nothing(database: SqlStore, table: str) -> None:
    """Charge, snapshot, row, release and deletions are one transaction: one of the last of them fails here."""
    begin(database)
    database.open_round("run", 1, [5])
    database.contribute("run", FIRST)
    before = database.runs()
    dialect = database.engine.dialect.name
    execute(database, *(statement.format(table) for statement in FULL[dialect]))
    with pytest.raises(Exception, match="full"):
        commit(database, 1, events=[EVENT])
    assert database.rows("run") == [{"round": 0}]
    assert database.snapshot("run").round == 0
    assert database.runs() == before
    assert database.chain().entries == []
    assert database.chain().verify() is None
    assert database.contributions("run", 1) == [FIRST]
    assert hashes(database, "SELECT hash FROM releases") == []
    execute(database, f"DROP TRIGGER full_disk{' ON ' + table if dialect == 'postgresql' else ''}")
    commit(database, 1, events=[EVENT])
    assert database.snapshot("run").round == 1
    assert database.contributions("run", 1) == []
    assert [entry.round for entry in database.chain().entries] == [1]


def test_equal_bytes_are_stored_once_and_dropped_with_their_last_use(database: SqlStore) -> None:
    def blob(round_: int) -> str:
        return hashlib.sha256(Snapshot(round_, state(round_)).to_bytes()).hexdigest()

    start = hashlib.sha256(DESCRIPTION.start.tobytes()).hexdigest()
    begin(database)
    begin(database, "other")
    there = "SELECT hash FROM blobs"
    assert hashes(database, there) == sorted([start, blob(0)])
    commit(database, 1)
    assert hashes(database, there) == sorted([start, blob(0), blob(1)])
    commit(database, 1, run="other")
    assert hashes(database, there) == sorted([start, blob(1)])
    commit(database, 2)
    commit(database, 2, kept=(1,), run="other")
    assert hashes(database, there) == sorted([start, blob(1), blob(2)])
    for number in (3, 4):
        database.open_round("run", number, [])
        database.commit("run", Snapshot(number, state(9)), {"round": number}, [])
    assert np.array_equal(database.snapshot("run").state, state(9))


def test_releases_are_rows_that_stay(database: SqlStore) -> None:
    begin(database)
    for number in (1, 2, 3):
        commit(database, number)
    expected = [hashlib.sha256(Snapshot(n, state(n)).to_bytes()).hexdigest() for n in (1, 2, 3)]
    assert hashes(database, "SELECT hash FROM releases") == sorted(expected)


@pytest.mark.parametrize("table", ["ledger", "releases"])
def test_what_is_append_only_is_not_changed(database: SqlStore, table: str) -> None:
    begin(database)
    commit(database, 1, events=[EVENT])
    statements = [f"UPDATE {table} SET hash = 'x'", f"DELETE FROM {table}"]
    if database.engine.dialect.name == "postgresql":
        statements.append(f"TRUNCATE {table}")
    for statement in statements:
        with pytest.raises(DatabaseError, match=f"the table {table} is append-only"):
            execute(database, statement)
    assert database.chain().verify() is None


def test_charges_of_two_runs_at_once_are_one_chain(database: SqlStore) -> None:
    """Each waits for the other where both add rows."""
    names = ["first", "second", "third"]
    for name in names:
        begin(database, name)

    def release(name: str) -> None:
        for number in range(1, 4):
            commit(database, number, run=name, events=[EVENT, EVENT])

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(release, names))
    chain = database.chain()
    assert chain.verify() is None
    assert sorted((entry.run, entry.round) for entry in chain.entries) == sorted(
        (name, number) for name in names for number in range(1, 4) for _ in range(2)
    )


def test_a_run_that_two_begin_at_once_is_begun_by_one(database: SqlStore) -> None:
    def attempt(_: int) -> bool:
        try:
            begin(database)
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(attempt, range(4))) == [False, False, False, True]


def test_a_store_with_a_broken_ledger_is_not_opened(place: Place) -> None:
    where = place()
    store = open_store(where)
    begin(store)
    commit(store, 1, events=[EVENT, EVENT])
    on = " ON ledger" if store.engine.dialect.name == "postgresql" else ""
    execute(store, f"DROP TRIGGER ledger_refuses_delete{on}", "DELETE FROM ledger WHERE sequence = 2")
    store.close()
    with pytest.raises(PrivacyError, match="the ledger's row 2 is not as it was written: the head counts 2"):
        open_store(where)


def test_what_is_stored_stands_in_no_error(database: SqlStore) -> None:
    """An update is of a node's data, and errors go to logs."""
    secret = "a very private payload"
    with pytest.raises(DatabaseError) as caught:  # there is no such run
        database.contribute("none", replace(FIRST, payload=secret.encode()))
    assert secret not in str(caught.value)


def test_commits_are_durable_and_do_not_block_readers(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "run.sqlite")
    with store.engine.connect() as one, store.engine.connect() as other:
        for connection in (one, other):
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
            assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL
            assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
    store.close()
