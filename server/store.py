"""Where a run lives: everything that a restarted coordinator needs, and nothing that it could compute.

Two stores behind one protocol: memory, and one SQLite file (WAL, synchronous=FULL) through SQLAlchemy. A round is
released in one transaction: the new snapshot, the row of metrics, the rows of the privacy ledger, and the deletion of
the raw contributions. So no release is without its charge, and no charge without its release.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from sqlalchemy import BigInteger, Dialect, Engine, ForeignKey, TypeDecorator, delete, select, update
from sqlalchemy.exc import DatabaseError, NoResultFound
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from ..privacy.chain import Chain, Charge, Entry, Head, append, chained, charged, decimal, opened
from ..privacy.events import Event
from ..privacy.ledger import Ledger
from ..protocols.errors import OutputError
from ..protocols.layout import AdapterLayout, Flat
from ..protocols.update import Description, Update
from .optimizers import Buffers

Row = dict[str, Any]
"""One line of metrics.jsonl: what is known of a round."""


@dataclass(frozen=True)
class Snapshot:
    """The server's state after `round`: what nodes receive next, and the optimizer's buffers."""

    round: int
    state: Flat
    buffers: Buffers = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        blob: bytes = save_tensors({"state": self.state, **{f"buffer.{n}": b for n, b in self.buffers.items()}})
        return blob

    @classmethod
    def from_bytes(cls, round_: int, blob: bytes) -> "Snapshot":
        tensors = load_tensors(blob)
        buffers = {n.removeprefix("buffer."): t for n, t in tensors.items() if n != "state"}
        return cls(round_, tensors["state"], buffers)


class Store(Protocol):
    """The state of runs. Rounds count from 1; the snapshot of round 0 is the start."""

    def create(self, run: str, spec: str, description: Description, snapshot: Snapshot, row: Row) -> None:
        """Begin a run. `row` holds the start's evaluation. Raises ValueError where the run exists."""

    def find(self, run: str) -> tuple[str, Description] | None:
        """The run's spec (JSON) and description, or None."""

    def snapshot(self, run: str, round_: int | None = None) -> Snapshot:
        """The snapshot of a round that was kept (the last, or one that `commit` was told to keep); KeyError if not."""

    def open_round(self, run: str, round_: int, cohort: Sequence[int]) -> tuple[int, ...]:
        """Commit a draw before any assignment leaves; where the round is open already, its first draw stands."""

    def contribute(self, run: str, update: Update) -> bool:
        """Keep an admitted update. False where this node has already given one for the round."""

    def refuse(self, run: str, round_: int, node: int, reason: str) -> None:
        """Record a refusal."""

    def contributions(self, run: str, round_: int) -> list[Update]:
        """The updates of an open round, in node-id order."""

    def refusals(self, run: str, round_: int) -> list[tuple[int, str]]:
        """(node, reason) of a round, in the order of arrival."""

    def commit(
        self, run: str, snapshot: Snapshot, row: Row, kept: Sequence[int], events: Sequence[Event | Charge] = ()
    ) -> None:
        """Release a round and charge it with `events`, both or neither.

        Snapshots of rounds other than this one and `kept` are dropped, as are the round's contributions.
        """

    def rows(self, run: str) -> list[Row]:
        """The rows of all committed rounds, round 0 first."""

    def ledger(self, run: str, node: int | None = None) -> Ledger:
        """What the run's releases have been charged with, or those that are about one node's data alone."""

    def chain(self) -> Chain:
        """The ledger's rows, of all runs."""


class MemoryStore:
    """For simulations that need not survive their process."""

    def __init__(self) -> None:
        self._runs: dict[str, tuple[str, Description]] = {}
        self._snapshots: dict[tuple[str, int], Snapshot] = {}
        self._rows: dict[str, list[Row]] = {}
        self._cohorts: dict[tuple[str, int], tuple[int, ...]] = {}
        self._updates: dict[tuple[str, int], dict[int, Update]] = {}
        self._refusals: dict[tuple[str, int], list[tuple[int, str]]] = {}
        self._ledger: list[Entry] = []

    def create(self, run: str, spec: str, description: Description, snapshot: Snapshot, row: Row) -> None:
        if run in self._runs:
            raise ValueError(f"run {run!r} exists")
        self._runs[run] = spec, description
        self._snapshots[run, 0] = snapshot
        self._rows[run] = [row]

    def find(self, run: str) -> tuple[str, Description] | None:
        return self._runs.get(run)

    def snapshot(self, run: str, round_: int | None = None) -> Snapshot:
        return self._snapshots[run, len(self._rows[run]) - 1 if round_ is None else round_]

    def open_round(self, run: str, round_: int, cohort: Sequence[int]) -> tuple[int, ...]:
        return self._cohorts.setdefault((run, round_), tuple(cohort))

    def contribute(self, run: str, update: Update) -> bool:
        held = self._updates.setdefault((run, update.round), {})
        if update.node in held:
            return False
        held[update.node] = update
        return True

    def refuse(self, run: str, round_: int, node: int, reason: str) -> None:
        self._refusals.setdefault((run, round_), []).append((node, reason))

    def contributions(self, run: str, round_: int) -> list[Update]:
        return [u for _, u in sorted(self._updates.get((run, round_), {}).items())]

    def refusals(self, run: str, round_: int) -> list[tuple[int, str]]:
        return list(self._refusals.get((run, round_), []))

    def commit(
        self, run: str, snapshot: Snapshot, row: Row, kept: Sequence[int], events: Sequence[Event | Charge] = ()
    ) -> None:
        self._ledger += chained(self._head(), run, snapshot.round, events)
        self._snapshots[run, snapshot.round] = snapshot
        self._rows[run].append(row)
        self._updates.pop((run, snapshot.round), None)
        for name, round_ in list(self._snapshots):
            if name == run and round_ != snapshot.round and round_ not in kept:
                del self._snapshots[name, round_]

    def rows(self, run: str) -> list[Row]:
        return list(self._rows[run])

    def ledger(self, run: str, node: int | None = None) -> Ledger:
        return Ledger(Counter(e.event for e in self._ledger if (e.run, e.node) == (run, decimal(node))))

    def chain(self) -> Chain:
        return Chain(list(self._ledger), self._head())

    def _head(self) -> Head:
        return Head(count=len(self._ledger), hash=self._ledger[-1].hash) if self._ledger else Head()


class _NodeId(TypeDecorator[int]):
    """Flower's node ids have 64 bits without a sign, SQLite's integers have one: shifted, they keep their order."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else value - 2**63

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else value + 2**63


class _Base(DeclarativeBase):
    pass


class _Run(_Base):
    __tablename__ = "runs"
    name: Mapped[str] = mapped_column(primary_key=True)
    spec: Mapped[str]
    layout: Mapped[str]
    config: Mapped[str]
    base: Mapped[str]
    start: Mapped[bytes]


class _Round(_Base):
    """A round is open from its draw until it has a row; its snapshot may be dropped later."""

    __tablename__ = "rounds"
    run: Mapped[str] = mapped_column(ForeignKey("runs.name"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    cohort: Mapped[str]
    row: Mapped[str | None]
    snapshot: Mapped[bytes | None]


class _Contribution(_Base):
    __tablename__ = "contributions"
    run: Mapped[str] = mapped_column(ForeignKey("runs.name"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    node: Mapped[int] = mapped_column(_NodeId, primary_key=True)
    fields: Mapped[str]
    payload: Mapped[bytes]


class _Refusal(_Base):
    __tablename__ = "refusals"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run: Mapped[str] = mapped_column(ForeignKey("runs.name"))
    round: Mapped[int]
    node: Mapped[int] = mapped_column(_NodeId)
    reason: Mapped[str]


class SqliteStore:
    """One file that survives `kill -9` at any line. Safe to open again after a crash.

    Raises OutputError where the file cannot be written or is no store, PrivacyError where its ledger's chain is broken.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.engine: Engine = opened(path, _Base.metadata)
        except DatabaseError as error:
            raise OutputError(f"{path}: cannot be used as a run's store ({error.orig}); choose another --out") from None

    def close(self) -> None:
        self.engine.dispose()

    def create(self, run: str, spec: str, description: Description, snapshot: Snapshot, row: Row) -> None:
        if self.find(run) is not None:
            raise ValueError(f"run {run!r} exists")
        with Session(self.engine) as session, session.begin():
            session.add(
                _Run(
                    name=run,
                    spec=spec,
                    layout=description.layout.to_json(),
                    config=json.dumps(dict(description.config)),
                    base=description.base,
                    start=description.start.tobytes(),
                )
            )
            session.flush()
            session.add(_Round(run=run, number=0, cohort="[]", row=json.dumps(row), snapshot=snapshot.to_bytes()))

    def find(self, run: str) -> tuple[str, Description] | None:
        with Session(self.engine) as session:
            found = session.get(_Run, run)
            if found is None:
                return None
            start = np.frombuffer(found.start, np.float32).copy()
            layout = AdapterLayout.from_json(found.layout)
            return found.spec, Description(layout, start, json.loads(found.config), found.base)

    def snapshot(self, run: str, round_: int | None = None) -> Snapshot:
        query = select(_Round.number, _Round.snapshot).where(_Round.run == run, _Round.snapshot.is_not(None))
        if round_ is not None:
            query = query.where(_Round.number == round_)
        with Session(self.engine) as session:
            try:
                number, blob = session.execute(query.order_by(_Round.number.desc()).limit(1)).one()
            except NoResultFound:
                raise KeyError(run, round_) from None
            return Snapshot.from_bytes(number, blob or b"")

    def open_round(self, run: str, round_: int, cohort: Sequence[int]) -> tuple[int, ...]:
        with Session(self.engine) as session, session.begin():
            opened = session.get(_Round, (run, round_))
            if opened is None:
                opened = _Round(run=run, number=round_, cohort=json.dumps(list(cohort)))
                session.add(opened)
            return tuple(json.loads(opened.cohort))

    def contribute(self, run: str, update: Update) -> bool:
        with Session(self.engine) as session, session.begin():
            if session.get(_Contribution, (run, update.round, update.node)) is not None:
                return False
            session.add(
                _Contribution(
                    run=run, round=update.round, node=update.node, fields=_fields(update), payload=update.payload
                )
            )
            return True

    def refuse(self, run: str, round_: int, node: int, reason: str) -> None:
        with Session(self.engine) as session, session.begin():
            session.add(_Refusal(run=run, round=round_, node=node, reason=reason))

    def contributions(self, run: str, round_: int) -> list[Update]:
        query = select(_Contribution).where(_Contribution.run == run, _Contribution.round == round_)
        with Session(self.engine) as session:
            found = session.scalars(query.order_by(_Contribution.node))
            return [Update(**json.loads(c.fields), payload=c.payload) for c in found]

    def refusals(self, run: str, round_: int) -> list[tuple[int, str]]:
        query = select(_Refusal).where(_Refusal.run == run, _Refusal.round == round_).order_by(_Refusal.id)
        with Session(self.engine) as session:
            return [(r.node, r.reason) for r in session.scalars(query)]

    def commit(
        self, run: str, snapshot: Snapshot, row: Row, kept: Sequence[int], events: Sequence[Event | Charge] = ()
    ) -> None:
        others = _Round.number.not_in([snapshot.round, *kept])
        with Session(self.engine) as session, session.begin():
            append(session, run, snapshot.round, events)
            released = session.get_one(_Round, (run, snapshot.round))
            released.row, released.snapshot = json.dumps(row), snapshot.to_bytes()
            session.execute(update(_Round).where(_Round.run == run, others).values(snapshot=None))
            session.execute(
                delete(_Contribution).where(_Contribution.run == run, _Contribution.round == snapshot.round)
            )

    def rows(self, run: str) -> list[Row]:
        query = select(_Round.row).where(_Round.run == run, _Round.row.is_not(None)).order_by(_Round.number)
        with Session(self.engine) as session:
            return [json.loads(row or "{}") for row in session.scalars(query)]

    def ledger(self, run: str, node: int | None = None) -> Ledger:
        with Session(self.engine) as session:
            return Ledger(charged(session, Entry.run == run, Entry.node == decimal(node)))

    def chain(self) -> Chain:
        with Session(self.engine) as session:
            return Chain.of(session)


def _fields(update: Update) -> str:
    """All of an update but its payload, as JSON."""
    fields: Mapping[str, Any] = {
        name: getattr(update, name) for name in ("run", "round", "attempt", "node", "version", "kind", "weight")
    }
    return json.dumps({**fields, "metrics": dict(update.metrics)})
