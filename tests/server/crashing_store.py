"""A process to be killed: for each line on stdin it forks a child that commits rounds to a store without end.

A line is `KIND POINT WHERE`: a class below, the write of the child at which it kills itself (0: never), and the store as
`open_store` takes it. The process says `pid N`, the child says `N` after each commit, and `dead` comes when the child is gone.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
from sqlalchemy import Engine
from sqlalchemy import event as sql_event
from sqlalchemy.orm import Session

from fedapt.privacy.chain import Charge, append
from fedapt.privacy.events import Event, Everyone, GaussianEvent
from fedapt.protocols.update import Update
from fedapt.server.store import Row, Snapshot, SqlStore, open_store

EVENT = GaussianEvent(
    unit="client", relation="add-remove", noise_std=2.0, sensitivity=0.5, secret=True, sampling=Everyone()
)


class Wrapped:
    """A store that does something of its own at a commit."""

    def __init__(self, store: "SqlStore | Wrapped") -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def charge(self, run: str, round_: int, events: Sequence[Event | Charge]) -> None:
        with Session(self._store.engine) as session, session.begin():
            append(session, run, round_, events)


class ChargesAfter(Wrapped):
    """A mutant: the release is there first, and its charge is another transaction."""

    def commit(
        self, run: str, snapshot: Snapshot, row: Row, kept: Sequence[int], events: Sequence[Event | Charge] = ()
    ) -> None:
        self._store.commit(run, snapshot, row, kept)
        self.charge(run, snapshot.round, events)


class ChargesBefore(Wrapped):
    """A mutant: the charge is there first, and its release may never come."""

    def commit(
        self, run: str, snapshot: Snapshot, row: Row, kept: Sequence[int], events: Sequence[Event | Charge] = ()
    ) -> None:
        self.charge(run, snapshot.round, events)
        self._store.commit(run, snapshot, row, kept)


KINDS: dict[str, type[Wrapped]] = {kind.__name__: kind for kind in (Wrapped, ChargesAfter, ChargesBefore)}
"""What a store is wrapped in: the first leaves it as it is."""


def on_writes(hook: Callable[[], object]) -> list[tuple[str, Any]]:
    """Call `hook` before each statement that writes and before each commit, in any engine; `forget` what comes back."""

    def statement(_connection: Any, _cursor: Any, sql: str, *_rest: Any) -> None:
        if not sql.startswith(("SELECT", "PRAGMA")):
            hook()

    def commit(_connection: Any) -> None:
        hook()

    hooks: list[tuple[str, Any]] = [("before_cursor_execute", statement), ("commit", commit)]
    for name, function in hooks:
        sql_event.listen(Engine, name, function)
    return hooks


def forget(hooks: Sequence[tuple[str, Any]]) -> None:
    for name, function in hooks:
        sql_event.remove(Engine, name, function)


def best_of(number: int) -> int:
    """The largest power of two up to `number`: a best round that stays the best for a while."""
    return int(2 ** (number.bit_length() - 1))


def commit_for_ever(kind: str, point: int, where: str) -> None:
    writes = count(1)

    def crash() -> None:
        if next(writes) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    on_writes(crash)
    store = KINDS[kind](open_store(where))
    while True:
        number = len(store.rows("run"))
        cohort = store.open_round("run", number, [number, number + 1])
        for node in cohort:
            store.contribute("run", Update("run", number, 1, node, "v", "delta", 1.0, bytes(4096)))
        state = np.full(4096, number, np.float32)
        snapshot = Snapshot(number, state, {"momentum": state})
        store.commit("run", snapshot, {"round": number}, kept=[best_of(number)], events=[EVENT])
        os.write(1, f"{number}\n".encode())


def main() -> None:
    for line in sys.stdin:
        kind, point, where = line.rstrip("\n").split(" ", 2)
        child = os.fork()
        if child == 0:
            commit_for_ever(kind, int(point), where)
        os.write(1, f"pid {child}\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"dead\n")


if __name__ == "__main__":
    main()
