"""The ledger's rows: one for each noised release, in a chain of hashes in which no row can change unseen.

    row k   sequence, run, round, node, event, time; hash = SHA-256 over the hash of row k − 1 and all of these
    head    how many rows there are, and the hash of the last; written in the transaction of the rows

A row holds the event and never an ε: ε follows from the events, for whatever δ is asked. The tables serve the site's
file and the server's store alike, and rows are added in the transaction of what they are charged for.

A row that was changed, removed, inserted or moved breaks the chain where it stood, and rows that were cut off at the
end disagree with the head. That finds damage and careless edits. It does not find somebody who can write the file and
computes a new chain and a new head, or who puts an older copy of the file back: the hashes have no key. Against them
helps a hash that was noted elsewhere, because every chain that went on from it still holds it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    create_engine,
    func,
    insert,
    select,
    update,
)
from sqlalchemy import event as sql_event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from ..protocols.errors import DataError, PayloadError, PrivacyError
from .events import Event, from_json, to_json

GENESIS = "0" * 64
"""What stands for the hash before the first row."""


@dataclass(frozen=True)
class Charge:
    """An event, and the one node whose data it is about. None: the release of a run is about all of its nodes."""

    event: Event
    node: int | None = None

    @classmethod
    def of(cls, event: "Event | Charge") -> "Charge":
        return event if isinstance(event, Charge) else cls(event)


class Tables(MappedAsDataclass, DeclarativeBase):
    """The tables of a ledger: `Tables.metadata.create_all(engine)` makes them wherever one is kept."""


class Entry(Tables, kw_only=True):
    """One row. `event` is canonical JSON, `time` is UTC in ISO 8601, `node` is decimal: its 64 bits have no sign."""

    __tablename__ = "ledger"
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    run: Mapped[str] = mapped_column(index=True)
    round: Mapped[int]
    node: Mapped[str | None]
    event: Mapped[str]
    time: Mapped[str]
    hash: Mapped[str]

    def digest(self, previous: str) -> str:
        """What `hash` must be in a row that follows one with the hash `previous`."""
        fields = [previous, self.sequence, self.run, self.round, self.node, self.event, self.time]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


class Head(Tables, kw_only=True):
    """Where the chain ends. There is one, and it is there before the first row."""

    __tablename__ = "ledger_head"
    id: Mapped[int] = mapped_column(primary_key=True, default=1)
    count: Mapped[int] = mapped_column(default=0)
    hash: Mapped[str] = mapped_column(default=GENESIS)


def _begin(_table: Any, connection: Connection, **_options: Any) -> None:
    connection.execute(insert(Head).values(id=1, count=0, hash=GENESIS))


def append_only(connection: Connection, table: str) -> None:
    """From now on rows can be added to the table and nothing else: by mistake at least, as a trigger can be dropped."""
    refusal = f"the table {table} is append-only"
    if connection.dialect.name == "sqlite":
        actions, body = ["UPDATE", "DELETE"], f"BEGIN SELECT RAISE(ABORT, '{refusal}'); END"
    else:
        actions, body = ["UPDATE", "DELETE", "TRUNCATE"], f"EXECUTE FUNCTION {table}_refuses()"
        connection.exec_driver_sql(
            f"CREATE FUNCTION {table}_refuses() RETURNS trigger LANGUAGE plpgsql "
            f"AS $$ BEGIN RAISE EXCEPTION '{refusal}'; END $$"
        )
    for action in actions:
        connection.exec_driver_sql(f"CREATE TRIGGER {table}_refuses_{action.lower()} BEFORE {action} ON {table} {body}")


def _close(_table: Any, connection: Connection, **_options: Any) -> None:
    append_only(connection, "ledger")


sql_event.listen(Head.__table__, "after_create", _begin)
sql_event.listen(Entry.__table__, "after_create", _close)


def chained(head: Head, run: str, round_: int, events: Iterable[Event | Charge]) -> list[Entry]:
    """The rows that follow `head`, one for each event; none of them is stored yet, and `head` stays as it is."""
    entries: list[Entry] = []
    previous = head.hash
    for sequence, charge in enumerate(map(Charge.of, events), head.count + 1):
        entry = Entry(
            sequence=sequence,
            run=run,
            round=round_,
            node=decimal(charge.node),
            event=to_json(charge.event),
            time=datetime.now(UTC).isoformat(timespec="microseconds"),
            hash="",
        )
        entry.hash = previous = entry.digest(previous)
        entries.append(entry)
    return entries


def decimal(node: int | None) -> str | None:
    """A node as its rows have it."""
    return None if node is None else str(node)


def append(session: Session, run: str, round_: int, events: Sequence[Event | Charge]) -> None:
    """Add rows in the session's transaction, after those of any process that is just adding its own."""
    if not events:
        return
    head = locked(session)
    entries = chained(head, run, round_, events)
    session.add_all(entries)
    head.count, head.hash = entries[-1].sequence, entries[-1].hash


def locked(session: Session) -> Head:
    """The head, for this transaction alone: others that ask for it wait until this one has ended.

    PostgreSQL locks the row as it is read. SQLite leaves FOR UPDATE out, and locks the file at the first write.
    """
    if session.get_bind().dialect.name == "sqlite":
        session.execute(update(Head).where(Head.id == 1).values(count=Head.count))
    return session.get_one(Head, 1, with_for_update=True)


def charged(session: Session, *conditions: ColumnElement[bool]) -> dict[str, int]:
    """The events of the rows that meet the conditions ⇒ how many rows each has."""
    query = select(Entry.event, func.count()).where(*conditions).group_by(Entry.event)
    return dict(session.execute(query).all())


@dataclass(frozen=True)
class Fault:
    """The first row that is not what was written, and why."""

    sequence: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.sequence} {self.reason}"


@dataclass(frozen=True)
class Chain:
    """All rows of a ledger as they were read, by sequence, and its head; None where the head is lost."""

    entries: Sequence[Entry]
    head: Head | None

    @classmethod
    def of(cls, session: Session) -> Self:
        """Read both as they stood at one moment; the session must be a new one, because that takes a transaction."""
        if session.get_bind().dialect.name == "sqlite":
            session.connection().exec_driver_sql("BEGIN")  # the driver would begin at a write alone
        else:
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        entries = session.scalars(select(Entry).order_by(Entry.sequence)).all()
        return cls(entries, session.get(Head, 1))

    def verify(self, noted: str | None = None) -> Fault | None:
        """The first fault, or None. `noted`: a hash that the chain is known to have had, and must still hold.

        Formal guarantees: a chain without a fault holds the rows that were hashed, all of them and in their order, as
        far as SHA-256 has no collisions and nobody computed a new chain and a new head. With `noted` even then,
        for the rows up to that hash. Each event is canonical, so its ε can be computed.
        """
        previous, count = GENESIS, 0
        for count, entry in enumerate(self.entries, 1):
            if (reason := _misfit(entry, count, previous)) is not None:
                return Fault(min(count, entry.sequence), reason)
            previous = entry.hash
        counted = self.head.count if self.head is not None and isinstance(self.head.count, int) else 0
        if counted != count:
            reason = f"is not as it was written: the head counts {counted} rows, and {count} are here"
            return Fault(max(0, min(counted, count)) + 1, reason)
        if self.head is None or self.head.hash != previous:
            return Fault(count, "is not the one that the head ends with")
        if noted is not None and noted not in {GENESIS, *(entry.hash for entry in self.entries)}:
            return Fault(count, f"ends another chain: no row has the hash {noted}")
        return None

    def require(self, where: Path | str) -> None:
        """Raises PrivacyError where there is a fault: nothing may be charged on top of it, and no ε follows from it."""
        if (fault := self.verify()) is not None:
            raise PrivacyError(
                f"{where}: the ledger's {fault}. What has been spent is not known: restore the file from a copy that "
                "`fedapt ledger verify` finds whole"
            )


_parsed = lru_cache(maxsize=2**12)(from_json)


def _misfit(entry: Entry, sequence: int, previous: str) -> str | None:
    """Why this is not the row that was written here; None if it is."""
    if entry.sequence != sequence:
        return "is missing" if entry.sequence > sequence else "stands before the first row"
    try:
        if entry.digest(previous) != entry.hash:
            return "is not what was written here: it does not match its hash and the row before it"
        _parsed(entry.event)
    except (PayloadError, TypeError) as error:
        return f"is no charge: {error}"
    return None


def opened(path: Path) -> Engine:
    """A site's own file: `durable`, with the tables of a ledger and nothing else.

    Missing tables are made in one transaction, so a crash leaves none without its first row. Raises SQLAlchemy's
    DatabaseError where the file cannot be used, and PrivacyError where the ledger's chain is broken.
    """
    engine = durable(path)
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # of itself the driver begins at the first row, not here
            Tables.metadata.create_all(connection)
        with Session(engine) as session:
            Chain.of(session).require(path)
    except (DatabaseError, PrivacyError):
        engine.dispose()
        raise
    return engine


def durable(path: Path, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> Engine:
    """An SQLite file in which a commit is on disk when it returns, and readers never wait.

    With "NORMAL" it is with the operating system when it returns: it outlives this process, however that ends, and the
    last commits are lost where the power fails.
    What is stored never stands in the text of an error: it may be of somebody's data.
    """
    engine = create_engine(URL.create("sqlite", database=str(path)), hide_parameters=True)

    def begin(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
        connection.execute("PRAGMA foreign_keys=ON")

    sql_event.listen(engine, "connect", begin)
    return engine


def read_chain(path: Path) -> Chain:
    """The chain in a site's ledger or a run's store, neither created nor changed by looking. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; name a run's folder, or a site's ledger")
    engine = create_engine(URL.create("sqlite", database=path.resolve().as_uri(), query={"mode": "ro", "uri": "true"}))
    try:
        with Session(engine) as session:
            return Chain.of(session)
    except DatabaseError as error:
        raise DataError(f"{path}: holds no ledger ({error.orig}); name a run's folder, or a site's ledger") from None
    finally:
        engine.dispose()
