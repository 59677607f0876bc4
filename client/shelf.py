"""What nodes keep from round to round, on disk: memory holds as much of it as a budget allows, for any number of nodes.

A version is how a node stood after a round. Of each node the last two are kept, so that a round which is asked for again
starts where it started before, and so that a process which is killed in a round leaves nothing behind that a resumed
run would take for the past: it asks for the same round, and what was kept of that round is newer.

Runs have pasts of their own, because a node may serve several at once. SQLite does the work: its page cache is the
budget, and what does not fit is in the file.
"""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from safetensors.numpy import load, save

from ..protocols.errors import OutputError
from ..protocols.update import Assignment

BUDGET = 256 * 2**20
"""Bytes of memory for what nodes keep."""

MOST_RUNS = 16
"""Runs that are begun on one shelf: a server can name runs without end, and each would hold its place on the disk."""

Tensors = Mapping[str, np.ndarray[Any, np.dtype[Any]]]

Versions = list[tuple[str, int, bytes]]
"""Of one node: run, round, and the tensors after it."""

SCHEMA = (
    """CREATE TABLE IF NOT EXISTS version
    (node TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, tensors BLOB NOT NULL, PRIMARY KEY (node, run, round))""",
    "CREATE TABLE IF NOT EXISTS run (name TEXT PRIMARY KEY, about TEXT NOT NULL)",
)


class Shelf:
    """The versions of all nodes, in a file, or (without a path) in one that ends with this object.

    `in`, `[]`, `pop` and `update` move a node's versions to another process; a copy that is pickled is empty.
    Raises OutputError where the file cannot be used. On disk means: out of this process, so that a kill loses nothing; a
    power cut may.
    """

    def __init__(self, path: Path | None = None, budget: int = BUDGET) -> None:
        self.path, self.budget = path, budget
        try:
            self._rows = sqlite3.connect(path or "", check_same_thread=False, isolation_level=None)
            finalize(self, self._rows.close)
            self._rows.execute(f"PRAGMA cache_size = -{max(1, budget // 1024)}")
            self._rows.execute("PRAGMA journal_mode = WAL" if path else "PRAGMA journal_mode = OFF")
            self._rows.execute("PRAGMA synchronous = NORMAL")
            for table in SCHEMA:
                self._rows.execute(table)
        except sqlite3.Error as error:
            raise OutputError(
                f"{path}: cannot hold what nodes keep ({error}); delete it, or take another folder"
            ) from None

    def __reduce__(self) -> tuple[type["Shelf"], tuple[()]]:
        return Shelf, ()

    def begin(self, run: str, about: str) -> None:
        """A run is taken up, or gone on with; `about` tells it from another one of its name, whose versions are forgotten.

        Of all runs that were begun, the last MOST_RUNS are kept.
        """
        with self._rows:
            self._rows.execute("BEGIN")
            self._rows.execute("DELETE FROM run WHERE name = ? AND about != ?", (run, about))
            self._rows.execute("DELETE FROM version WHERE run = ?1 AND ?1 NOT IN (SELECT name FROM run)", (run,))
            self._rows.execute("REPLACE INTO run VALUES (?, ?)", (run, about))  # which makes its row the last
            old = "SELECT name FROM run ORDER BY rowid DESC LIMIT -1 OFFSET ?"
            for table, column in (("version", "run"), ("run", "name")):
                self._rows.execute(f"DELETE FROM {table} WHERE {column} IN ({old})", (MOST_RUNS,))

    def drop(self, run: str) -> None:
        """Forget a run that has ended."""
        with self._rows:
            self._rows.execute("BEGIN")
            self._rows.execute("DELETE FROM version WHERE run = ?", (run,))
            self._rows.execute("DELETE FROM run WHERE name = ?", (run,))

    def before(self, asked: Assignment) -> tuple[int, Tensors] | None:
        """The round that the node's last version before the one that is asked for is of, and its tensors; None: the run
        has not seen it."""
        found = self._rows.execute(
            "SELECT round, tensors FROM version WHERE node = ? AND run = ? AND round < ? ORDER BY round DESC LIMIT 1",
            (str(asked.node), asked.run, asked.round),
        ).fetchone()
        return None if found is None else (found[0], load(found[1]))

    def put(self, asked: Assignment, tensors: Tensors) -> None:
        """How the node stands after the round; what is older than its last version before it in the run is forgotten."""
        key = str(asked.node), asked.run
        before = "(SELECT MAX(round) FROM version WHERE node = ?1 AND run = ?2 AND round < ?3)"
        blob = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
        with self._rows:
            self._rows.execute("BEGIN")
            self._rows.execute(
                f"DELETE FROM version WHERE node = ?1 AND run = ?2 AND (round >= ?3 OR round < {before})",
                (*key, asked.round),
            )
            self._rows.execute("INSERT INTO version VALUES (?, ?, ?, ?)", (*key, asked.round, blob))

    def clear(self) -> None:
        """Forget everything: what is left of another run is not this one's past."""
        self._rows.execute("DELETE FROM version")

    def __len__(self) -> int:
        """How many nodes have a version."""
        return int(self._rows.execute("SELECT COUNT(DISTINCT node) FROM version").fetchone()[0])

    def __contains__(self, node: int) -> bool:
        return bool(self[node])

    def __getitem__(self, node: int) -> Versions:
        rows = self._rows.execute("SELECT run, round, tensors FROM version WHERE node = ? ORDER BY round", (str(node),))
        return rows.fetchall()

    def pop(self, node: int, default: None = None) -> None:
        self._rows.execute("DELETE FROM version WHERE node = ?", (str(node),))

    def update(self, versions: Mapping[int, Versions]) -> None:
        with self._rows:
            self._rows.execute("BEGIN")
            for node, own in versions.items():
                self._rows.executemany(
                    "INSERT OR REPLACE INTO version VALUES (?, ?, ?, ?)", [(str(node), *version) for version in own]
                )
