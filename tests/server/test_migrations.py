"""Databases of every version become one of today, on both databases, or stay as they were."""

import hashlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, Engine, Integer, MetaData, create_engine, inspect

from fedapt.privacy.chain import GENESIS, Head, chained, opened
from fedapt.protocols.errors import OutputError
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.update import Update
from fedapt.server.migrations.metadata import TABLES
from fedapt.server.store import Snapshot, SqliteStore, open_store
from fedapt.server.store.migrating import HEAD, MIGRATIONS
from fedapt.server.store.tables import Tables

from .crashing_store import EVENT, forget, on_writes

OLD = """
CREATE TABLE ledger (sequence INTEGER NOT NULL, run VARCHAR NOT NULL, round INTEGER NOT NULL, node VARCHAR,
    event VARCHAR NOT NULL, time VARCHAR NOT NULL, hash VARCHAR NOT NULL, PRIMARY KEY (sequence));
CREATE INDEX ix_ledger_run ON ledger (run);
CREATE TRIGGER ledger_refuses_update BEFORE UPDATE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER ledger_refuses_delete BEFORE DELETE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TABLE ledger_head (id INTEGER NOT NULL, count INTEGER NOT NULL, hash VARCHAR NOT NULL, PRIMARY KEY (id));
CREATE TABLE runs (name VARCHAR NOT NULL, spec VARCHAR NOT NULL, layout VARCHAR NOT NULL, config VARCHAR NOT NULL,
    base VARCHAR NOT NULL, start BLOB NOT NULL, PRIMARY KEY (name));
CREATE TABLE rounds (run VARCHAR NOT NULL, number INTEGER NOT NULL, cohort VARCHAR NOT NULL, "row" VARCHAR,
    snapshot BLOB, PRIMARY KEY (run, number), FOREIGN KEY(run) REFERENCES runs (name));
CREATE TABLE contributions (run VARCHAR NOT NULL, round INTEGER NOT NULL, node BIGINT NOT NULL, fields VARCHAR NOT NULL,
    payload BLOB NOT NULL, PRIMARY KEY (run, round, node), FOREIGN KEY(run) REFERENCES runs (name));
CREATE TABLE refusals (id INTEGER NOT NULL, run VARCHAR NOT NULL, round INTEGER NOT NULL, node BIGINT NOT NULL,
    reason VARCHAR NOT NULL, PRIMARY KEY (id), FOREIGN KEY(run) REFERENCES runs (name));
"""
LAYOUT = AdapterLayout([TensorSpec("score.bias", (3,), "other")])
START = np.arange(3, dtype=np.float32)


def blob(round_: int) -> bytes:
    return Snapshot(round_, np.full(3, round_, np.float32)).to_bytes()


def fill(connection: sqlite3.Connection) -> None:
    """Three runs: one with all of its two rounds, one that waits for node 7 in its second, one that has just begun."""
    connection.executescript(OLD)
    for name, rounds in [("done", 2), ("open", 2), ("begun", 1)]:
        spec = json.dumps({"run": {"name": name, "rounds": rounds}})
        values = (name, spec, LAYOUT.to_json(), '{"r": 1}', "base", START.tobytes())
        connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", values)
        connection.execute("INSERT INTO rounds VALUES (?, 0, '[]', '{\"round\": 0}', ?)", (name, blob(0)))
    for name, number, snapshot in [("done", 1, None), ("done", 2, blob(2)), ("open", 1, blob(1))]:
        released = (name, number, json.dumps({"round": number}), snapshot)
        connection.execute("INSERT INTO rounds VALUES (?, ?, '[1]', ?, ?)", released)
    connection.execute("INSERT INTO rounds VALUES ('open', 2, '[7]', NULL, NULL)")
    fields = json.dumps(
        {"run": "open", "round": 2, "attempt": 1, "node": 7, "version": "v", "kind": "delta", "weight": 2.0}
    )
    connection.execute("INSERT INTO contributions VALUES ('open', 2, ?, ?, ?)", (7 - 2**63, fields, b"\x00payload"))
    connection.execute("INSERT INTO refusals VALUES (NULL, 'open', 2, ?, 'stale')", (2**63 - 1,))
    entries = chained(Head(count=0, hash=GENESIS), "done", 1, [EVENT, EVENT])
    for e in entries:
        row = (e.sequence, e.run, e.round, e.node, e.event, e.time, e.hash)
        connection.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    connection.execute("INSERT INTO ledger_head VALUES (1, 2, ?)", (entries[-1].hash,))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file as the code wrote it before versions were kept."""
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as connection:
        fill(connection)
    connection.close()
    return path


def check(path: Path) -> None:
    """All that was in the old file can be read, and its runs go on."""
    store = SqliteStore(path)
    assert {(s.name, s.status, s.rounds) for s in store.runs()} == {
        ("done", "finished", 2),
        ("open", "stopped", 1),
        ("begun", "stopped", 0),
    }
    for name in ("done", "open", "begun"):
        found = store.find(name)
        assert found is not None
        spec, description = found
        assert json.loads(spec)["run"]["name"] == name
        assert (description.layout, description.config, description.base) == (LAYOUT, {"r": 1}, "base")
        assert np.array_equal(description.start, START)
        assert np.array_equal(store.snapshot(name, 0).state, np.zeros(3))
    assert np.array_equal(store.snapshot("done").state, np.full(3, 2))
    with pytest.raises(KeyError):
        store.snapshot("done", 1)
    assert [row["round"] for row in store.rows("open")] == [0, 1]
    assert store.open_round("open", 2, [9]) == (7,)
    assert store.contributions("open", 2) == [Update("open", 2, 1, 7, "v", "delta", 2.0, b"\x00payload")]
    assert store.refusals("open", 2) == [(2**64 - 1, "stale")]
    chain = store.chain()
    assert (chain.verify(), [entry.round for entry in chain.entries]) == (None, [1, 1])
    store.commit("open", Snapshot(2, START), {"round": 2}, kept=[], events=[EVENT])
    assert store.chain().verify() is None
    with store.engine.connect() as connection:
        hashes = connection.exec_driver_sql("SELECT hash, content FROM blobs").fetchall()
        assert all(name == hashlib.sha256(content).hexdigest() for name, content in hashes)
        assert len(hashes) == 4  # the start, the snapshots of round 0 and of round 2 of "done", and the new one
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall() == []
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    store.close()


def test_an_old_file_is_migrated_with_all_that_is_in_it(old: Path) -> None:
    check(old)


class CrashError(Exception):
    """The migration ends here."""


def test_an_old_file_survives_a_crash_in_the_middle_of_its_migration(tmp_path: Path) -> None:
    """It is one transaction: whatever comes in between, the next one who opens the file begins again."""
    undone = 0
    for at in count(1, step=4):
        path, writes = tmp_path / f"{at}.sqlite", count(1)
        with sqlite3.connect(path) as connection:
            fill(connection)
        connection.close()

        def crash(writes: Iterator[int] = writes, at: int = at) -> None:
            if next(writes) == at:
                raise CrashError

        hooks = on_writes(crash)
        try:
            SqliteStore(path).close()
            break
        except CrashError:
            pass
        finally:
            forget(hooks)
        with sqlite3.connect(path) as connection:
            undone += (
                "start BLOB" in connection.execute("SELECT sql FROM sqlite_master WHERE name = 'runs'").fetchone()[0]
            )
        connection.close()
        check(path)
    assert undone > 10


def differences(engine: Engine, tables: list[MetaData]) -> list[Any]:
    with engine.connect() as connection:
        return list(compare_metadata(MigrationContext.configure(connection), tables))  # type: ignore[arg-type]


def test_migrations_and_tables_agree(empty_place: Callable[[], str]) -> None:
    store = open_store(empty_place())
    assert differences(store.engine, TABLES) == []
    other = MetaData()
    for table in Tables.metadata.sorted_tables:
        table.to_metadata(other)
    other.tables["runs"].append_column(Column("more", Integer))
    assert [change[0] for change in differences(store.engine, [*TABLES[:1], other, *TABLES[2:]])] == ["add_column"]
    store.close()


def test_a_migrated_file_has_the_tables_of_today(old: Path) -> None:
    store = SqliteStore(old)
    assert differences(store.engine, TABLES) == []
    store.close()


def test_what_is_append_only_is_so_in_a_fresh_database(empty_place: Callable[[], str]) -> None:
    store = open_store(empty_place())
    catalogue = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger'",
        "postgresql": "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal",
    }
    with store.engine.connect() as connection:
        names = set(connection.exec_driver_sql(catalogue[connection.dialect.name]).scalars())
    tables = ("ledger", "releases", "audit", "zeroth_log")
    assert names >= {f"{table}_refuses_{action}" for table in tables for action in ("update", "delete")}
    store.close()


def test_the_files_of_the_versions_are_a_line() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [HEAD]
    revisions = [revision.revision for revision in script.walk_revisions("base", HEAD)]
    assert revisions[::-1] == [f"{number:04}" for number in range(1, len(revisions) + 1)]
    assert {f"r{revision}" for revision in revisions} == {f.stem[:5] for f in MIGRATIONS.glob("versions/r*.py")}


def test_a_newer_database_is_left_alone(place: Callable[[], str]) -> None:
    where = place()
    store = open_store(where)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    store.close()
    with pytest.raises(OutputError, match=rf"newer fedapt \(version 9999 .* knows {HEAD}\); update fedapt"):
        open_store(where)


def test_a_database_that_several_open_at_once_is_made_once(empty_place: Callable[[], str]) -> None:
    where = empty_place()
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda _: open_store(where), range(3)))
    for store in stores:
        assert store.runs() == []
        assert store.chain().head is not None
        store.close()


def test_a_sites_ledger_is_no_store(tmp_path: Path) -> None:
    """It stays as it was."""
    path = tmp_path / "ledger.sqlite"
    opened(path).dispose()
    with pytest.raises(OutputError, match="cannot be used as a run's store"):
        SqliteStore(path)
    engine = create_engine(f"sqlite:///{path}")
    assert set(inspect(engine).get_table_names()) == {"ledger", "ledger_head"}
    engine.dispose()


def test_versions_are_never_renamed() -> None:
    """Databases name them: 0001 is what a file without a version is taken for."""
    assert re.fullmatch(r"r0001_\w+\.py", min(file.name for file in MIGRATIONS.glob("versions/r*.py")))
