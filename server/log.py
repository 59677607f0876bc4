"""The log of a zeroth-order run: its Steps, in a chain of hashes, appended and never changed. The run is its log.

    row k   number, body (the Step's bytes), hash = SHA-256 over the hash of row k − 1 and the body

One transaction holds a Step and what it is charged for, and is on disk before anybody is sent the Step: all answers of an
exchange share it. The first hash is of the run's start, so a log belongs to one spec, one adapter and one base.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from sqlalchemy import BigInteger, Connection, Engine, LargeBinary, func, insert, select
from sqlalchemy import event as sql_event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from ..kernels.replica import Replica
from ..privacy.chain import Entry, append, charged
from ..privacy.events import Event, to_json
from ..privacy.ledger import Ledger
from ..protocols.errors import RunError
from ..protocols.exchange import Step

BATCH = 256
"""Rows read at once, so that a replay's memory does not grow with the run."""


@dataclass(frozen=True)
class Row:
    """One Step as it was logged. Row 0 is the genesis: it holds no Step, and its hash is of the run's start."""

    number: int
    body: bytes
    hash: bytes

    def follows(self, previous: "Row") -> bool:
        """Whether this is the row behind `previous`, unchanged."""
        return self.number == previous.number + 1 and self.hash == chained(previous.hash, self.body)


def chained(previous: bytes, body: bytes) -> bytes:
    """The hash of a row with this body behind one with that hash, 32 bytes."""
    return hashlib.sha256(previous + body).digest()


def genesis(spec: str, version: str, base: str) -> bytes:
    """The hash before the first Step: of the run's spec (without its name and length), its start and its base."""
    parts = (part.encode() for part in (spec, version, base))
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()


class ExchangeLog(Protocol):
    """The Steps of runs. Numbers count from 1."""

    def open(self, run: str, start: bytes) -> Row:
        """The last row; a new run begins with row 0, whose hash is `start`. Raises RunError where it began elsewhere."""

    def append(self, run: str, step: Step, events: Sequence[Event] = ()) -> Row:
        """Log the next Step and charge `events`, both or neither; both are durable when this returns.

        Raises RunError where the Step is not the next one: another process serves this run.
        """

    def rows(self, run: str, after: int = -1) -> Iterator[Row]:
        """The rows behind number `after`, in order."""

    def keep(self, run: str, number: int, snapshot: bytes) -> None:
        """Keep the state after a Step, so that a restart need not replay from the beginning. The last two are kept."""

    def kept(self, run: str, number: int) -> bytes | None:
        """The state that was kept after this Step."""

    def ledger(self, run: str) -> Ledger:
        """What the run's Steps have been charged with."""


class MemoryLog:
    """For simulations that need not survive their process."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Row]] = {}
        self._kept: dict[str, dict[int, bytes]] = {}
        self._events: dict[str, Counter[str]] = {}

    def open(self, run: str, start: bytes) -> Row:
        rows = self._rows.setdefault(run, [Row(0, b"", start)])
        return _checked(run, rows[0], start) and rows[-1]

    def append(self, run: str, step: Step, events: Sequence[Event] = ()) -> Row:
        row = _behind(self._rows[run][-1], run, step)
        self._rows[run].append(row)
        self._events.setdefault(run, Counter()).update(map(to_json, events))
        return row

    def rows(self, run: str, after: int = -1) -> Iterator[Row]:
        yield from self._rows[run][after + 1 :]

    def keep(self, run: str, number: int, snapshot: bytes) -> None:
        kept = self._kept.setdefault(run, {})
        kept[number] = snapshot
        for old in sorted(kept)[:-2]:
            del kept[old]

    def kept(self, run: str, number: int) -> bytes | None:
        return self._kept.get(run, {}).get(number)

    def ledger(self, run: str) -> Ledger:
        return Ledger(self._events.get(run, Counter()))


class Tables(DeclarativeBase):
    """The tables of the log, beside those of the store: `Tables.metadata.create_all(engine)` makes them."""


class _Logged(Tables):
    __tablename__ = "zeroth_log"
    run: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    hash: Mapped[bytes] = mapped_column(LargeBinary)


class _Kept(Tables):
    __tablename__ = "zeroth_snapshots"
    run: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    state: Mapped[bytes] = mapped_column(LargeBinary)


def _close(_table: Any, connection: Connection, **_options: Any) -> None:
    """Rows can be added and nothing else: by mistake at least, since a trigger can be dropped."""
    if connection.dialect.name == "sqlite":
        for action in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER zeroth_log_refuses_{action.lower()} BEFORE {action} ON zeroth_log "
                "BEGIN SELECT RAISE(ABORT, 'the log of a run is append-only'); END"
            )


sql_event.listen(_Logged.__table__, "after_create", _close)


_ADD = insert(_Logged)
"""Bare, because a Step a transaction is what bounds a run's rate, and the ORM's half of it would be the larger one."""


class SqlLog:
    """The log in a database that SQLAlchemy knows; `engine` is the store's, whose commits are durable.

    The last row is remembered; that nobody else has written behind it, the table's key says.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._last: dict[str, Row] = {}
        Tables.metadata.create_all(engine)

    def open(self, run: str, start: bytes) -> Row:
        with Session(self.engine) as session, session.begin():
            first = session.get(_Logged, (run, 0))
            if first is None:
                first = _Logged(run=run, number=0, body=b"", hash=start)
                session.add(first)
            _checked(run, _row(first), start)
            self._last[run] = last_row(session, run)
        return self._last[run]

    def append(self, run: str, step: Step, events: Sequence[Event] = ()) -> Row:
        row = _behind(self._last[run], run, step)
        with self.engine.begin() as connection:
            try:
                connection.execute(_ADD, {"run": run, "number": row.number, "body": row.body, "hash": row.hash})
            except IntegrityError:
                raise _served_twice(run, step, f"row {row.number}") from None
            if events:
                with Session(connection) as session:
                    append(session, run, step.number, events)
                    session.commit()
        self._last[run] = row
        return row

    def rows(self, run: str, after: int = -1) -> Iterator[Row]:
        while True:
            query = select(_Logged).where(_Logged.run == run, _Logged.number > after)
            with Session(self.engine) as session:
                batch = [_row(row) for row in session.scalars(query.order_by(_Logged.number).limit(BATCH))]
            yield from batch
            if len(batch) < BATCH:
                return
            after = batch[-1].number

    def keep(self, run: str, number: int, snapshot: bytes) -> None:
        with Session(self.engine) as session, session.begin():
            session.merge(_Kept(run=run, number=number, state=snapshot))
            session.flush()
            old = select(_Kept).where(_Kept.run == run).order_by(_Kept.number.desc()).offset(2)
            for row in session.scalars(old):
                session.delete(row)

    def kept(self, run: str, number: int) -> bytes | None:
        with Session(self.engine) as session:
            found = session.get(_Kept, (run, number))
            return None if found is None else found.state

    def ledger(self, run: str) -> Ledger:
        with Session(self.engine) as session:
            return Ledger(charged(session, Entry.run == run))


def last_row(session: Session, run: str) -> Row:
    """The run's last row. Raises RunError where its log has not begun."""
    newest = select(func.max(_Logged.number)).where(_Logged.run == run).scalar_subquery()
    found = session.scalars(select(_Logged).where(_Logged.run == run, _Logged.number == newest)).one_or_none()
    if found is None:
        raise RunError(f'run "{run}" has no log of exchanges')
    return _row(found)


def verified(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, from row 0 on. Raises RunError at the first that is not what was written."""
    first = True
    for before, row in pairwise(rows):
        if first and before.number != 0:
            raise RunError(f"the log begins with row {before.number}: row 0 is missing")
        first = False
        if not row.follows(before):
            raise RunError(f"row {before.number + 1} of the log is not what was written: it breaks the chain of hashes")
        yield row


def replay(start: Replica, rows: Iterable[Row]) -> Replica:
    """The state that a log leads to from `start`, the state before its first Step; `rows` begin with row 0.

    Raises RunError where the chain is broken or a proof on the way is of another state.

    Formal guarantees: the result is the state of every node that applied these Steps, in every bit.
    """
    state = start
    for row in verified(rows):
        state = state.after(Step.from_bytes(row.body))
    return state


def _behind(last: Row, run: str, step: Step) -> Row:
    if step.number != last.number + 1:
        raise _served_twice(run, step, f"row {last.number}")
    body = step.to_bytes()
    return Row(step.number, body, chained(last.hash, body))


def _served_twice(run: str, step: Step, last: str) -> RunError:
    return RunError(f'run "{run}": step {step.number} does not follow {last}: is it served twice?')


def _checked(run: str, first: Row, start: bytes) -> Row:
    if first.hash != start:
        raise RunError(f'run "{run}": the log began from another spec, adapter or base; give this run its own name')
    return first


def _row(logged: _Logged) -> Row:
    return Row(logged.number, logged.body, logged.hash)
