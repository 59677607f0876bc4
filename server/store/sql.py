"""A store in a database: one SQLite file (WAL), or PostgreSQL."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sqlalchemy import URL, Engine, create_engine, delete, func, insert, make_url, select, update
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError
from sqlalchemy.orm import Session

from ...privacy.chain import Chain, Charge, Entry, append, charged, decimal, durable, locked
from ...privacy.events import Event
from ...privacy.ledger import Ledger
from ...protocols.errors import OutputError
from ...protocols.layout import AdapterLayout
from ...protocols.update import Description, Update
from .migrating import migrate
from .protocol import Row, RunState, Snapshot, Status, hides_who_took_part, now, released_before, storable
from .tables import Blob, Contribution, Refusal, Release, Round, Run

NOBODY = "[]"
"""A cohort without a node, as a round keeps it."""


class SqlStore:
    """A database that survives `kill -9` of this process at any line. Safe to open again after a crash.

    `where` names it in errors. Raises OutputError where it cannot be reached or written, is no store, or is newer than
    this program; PrivacyError where its ledger's chain is broken.
    """

    def __init__(self, engine: Engine, where: str) -> None:
        self.engine = engine
        try:
            migrate(engine, where)
            self.chain().require(where)
        except BaseException as error:
            engine.dispose()
            if isinstance(error, DatabaseError):
                raise OutputError(_unusable(engine.url, where, error)) from None
            raise

    def close(self) -> None:
        self.engine.dispose()

    def create(self, run: str, spec: str, description: Description, snapshot: Snapshot, row: Row) -> None:
        with Session(self.engine) as session, session.begin():
            locked(session)
            if session.get(Run, run) is not None:
                raise ValueError(f"run {run!r} exists")
            time = now().isoformat()
            session.add(
                Run(
                    name=run,
                    spec=spec,
                    layout=description.layout.to_json(),
                    config=json.dumps(dict(description.config)),
                    base=description.base,
                    start_hash=_keep(session, description.start.tobytes()),
                    status="running",
                    reason="",
                    created=time,
                    updated=time,
                )
            )
            session.flush()
            start = _keep(session, snapshot.to_bytes())
            session.add(Round(run=run, number=0, cohort=NOBODY, row=json.dumps(row), snapshot_hash=start))

    def find(self, run: str) -> tuple[str, Description] | None:
        query = select(Run, Blob.content).join(Blob, Run.start_hash == Blob.hash).where(Run.name == run)
        with Session(self.engine) as session:
            row = session.execute(query).one_or_none()
            if row is None:
                return None
            found, content = row
            start = np.frombuffer(content, np.float32).copy()
            layout = AdapterLayout.from_json(found.layout)
            return found.spec, Description(layout, start, json.loads(found.config), found.base)

    def runs(self) -> list[RunState]:
        count = select(func.count()).where(Round.run == Run.name, Round.row.is_not(None), Round.number > 0)
        query = select(Run.name, Run.status, Run.reason, count.scalar_subquery(), Run.created, Run.updated)
        with Session(self.engine) as session:
            return [
                RunState(name, status, reason, rounds, datetime.fromisoformat(created), datetime.fromisoformat(updated))
                for name, status, reason, rounds, created, updated in session.execute(
                    query.order_by(Run.created, Run.name)
                )
            ]

    def status(self, run: str) -> Status:
        with Session(self.engine) as session:
            status = session.scalar(select(Run.status).where(Run.name == run))
        if status is None:
            raise KeyError(run)
        return status

    def set_status(self, run: str, status: Status, reason: str = "") -> None:
        with Session(self.engine) as session, session.begin():
            found = session.get(Run, run, with_for_update=True)
            if found is None:
                raise KeyError(run)
            found.status, found.reason, found.updated = status, storable(reason), now().isoformat()

    def snapshot(self, run: str, round_: int | None = None) -> Snapshot:
        query = select(Round.number, Blob.content).join(Blob, Round.snapshot_hash == Blob.hash).where(Round.run == run)
        if round_ is not None:
            query = query.where(Round.number == round_)
        with Session(self.engine) as session:
            found = session.execute(query.order_by(Round.number.desc()).limit(1)).one_or_none()
        if found is None:
            raise KeyError(run, round_)
        return Snapshot.from_bytes(*found)

    def open_round(self, run: str, round_: int, cohort: Sequence[int]) -> tuple[int, ...]:
        with Session(self.engine) as session, session.begin():
            opened = session.get(Round, (run, round_))
            if opened is None:
                opened = Round(run=run, number=round_, cohort=json.dumps(list(cohort)))
                session.add(opened)
            return tuple(json.loads(opened.cohort))

    def contribute(self, run: str, update: Update) -> bool:
        key = {"run": run, "round": update.round, "node": update.node}
        row = key | {"fields": _fields(update), "payload": update.payload}
        try:
            with self.engine.begin() as connection:  # one statement: a round may have ten thousand
                connection.execute(insert(Contribution), row)
        except IntegrityError:
            with Session(self.engine) as session:
                if session.get(Contribution, key) is None:
                    raise
            return False
        return True

    def refuse(self, run: str, round_: int, node: int, reason: str) -> None:
        with Session(self.engine) as session, session.begin():
            session.add(Refusal(run=run, round=round_, node=node, reason=storable(reason)))

    def contributions(self, run: str, round_: int) -> list[Update]:
        query = select(Contribution.fields, Contribution.payload)
        query = query.where(Contribution.run == run, Contribution.round == round_).order_by(Contribution.node)
        with self.engine.connect() as connection:
            return [Update(**json.loads(fields), payload=payload) for fields, payload in connection.execute(query)]

    def refusals(self, run: str, round_: int) -> list[tuple[int, str]]:
        query = select(Refusal).where(Refusal.run == run, Refusal.round == round_).order_by(Refusal.id)
        with Session(self.engine) as session:
            return [(r.node, r.reason) for r in session.scalars(query)]

    def commit(
        self, run: str, snapshot: Snapshot, row: Row, kept: Sequence[int], events: Sequence[Event | Charge] = ()
    ) -> None:
        number, time = snapshot.round, now().isoformat()
        dropped = Round.number.not_in([number, *kept])
        with Session(self.engine) as session, session.begin():
            locked(session)
            round_ = session.get_one(Round, (run, number), with_for_update=True)
            if round_.row is not None:
                raise released_before(run, number)
            append(session, run, number, events)
            released = _keep(session, snapshot.to_bytes())
            round_.row, round_.snapshot_hash = json.dumps(row), released
            session.add(Release(run=run, round=number, hash=released, time=time))
            session.execute(update(Run).where(Run.name == run).values(updated=time))
            session.execute(update(Round).where(Round.run == run, dropped).values(snapshot_hash=None))
            if number - 1 in kept:  # those before it were bared when they were the last
                _bare(session, run, number - 1)
            session.execute(delete(Contribution).where(Contribution.run == run, Contribution.round == number))
            if hides_who_took_part(session.get_one(Run, run).spec):
                named = Round.run == run, Round.number <= number, Round.cohort != NOBODY
                session.execute(update(Round).where(*named).values(cohort=NOBODY))
                session.execute(delete(Refusal).where(Refusal.run == run, Refusal.round <= number))
            _drop_unused(session)

    def rows(self, run: str) -> list[Row]:
        query = select(Round.row).where(Round.run == run, Round.row.is_not(None)).order_by(Round.number)
        with Session(self.engine) as session:
            return [json.loads(row or "{}") for row in session.scalars(query)]

    def ledger(self, run: str, node: int | None = None) -> Ledger:
        with Session(self.engine) as session:
            return Ledger(charged(session, Entry.run == run, Entry.node == decimal(node)))

    def chain(self) -> Chain:
        with Session(self.engine) as session:
            return Chain.of(session)


def _keep(session: Session, content: bytes) -> str:
    """The hash under which the blob is kept.

    Only under the lock of the ledger's head: between looking and writing nobody else may drop what was seen.
    """
    digest = hashlib.sha256(content).hexdigest()
    if session.scalar(select(Blob.hash).where(Blob.hash == digest)) is None:
        session.add(Blob(hash=digest, content=content))
        session.flush()
    return digest


def _bare(session: Session, run: str, number: int) -> None:
    """Leave the state of a snapshot, and none of its buffers."""
    round_ = session.get_one(Round, (run, number))
    content = session.scalars(select(Blob.content).where(Blob.hash == round_.snapshot_hash)).one()
    round_.snapshot_hash = _keep(session, Snapshot.from_bytes(number, content).bare().to_bytes())


def _drop_unused(session: Session) -> None:
    """Drop the blobs that nothing refers to, under the same lock."""
    started = select(Run.name).where(Run.start_hash == Blob.hash).exists()
    held = select(Round.number).where(Round.snapshot_hash == Blob.hash).exists()
    session.execute(delete(Blob).where(~started, ~held).execution_options(synchronize_session=False))


def _fields(update: Update) -> str:
    """All of an update but its payload, as JSON."""
    fields: Mapping[str, Any] = {
        name: getattr(update, name) for name in ("run", "round", "attempt", "node", "version", "kind", "weight", "rank")
    }
    return json.dumps({**fields, "metrics": dict(update.metrics)})


class SqliteStore(SqlStore):
    """The store in one file, which is made where there is none. What `synchronous` says of a commit: `durable`."""

    def __init__(self, path: Path, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> None:
        super().__init__(durable(path, synchronous), str(path))


def open_store(where: str) -> SqlStore:
    """The store at a path (SQLite) or a URL (`postgresql+psycopg://user:password@host/database`).

    Raises OutputError and PrivacyError as `SqlStore`, and OutputError where the URL or the machine has no driver for
    it. No error holds a password.
    """
    if "://" not in where:
        return SqliteStore(Path(where))
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):  # their texts repeat the URL
        raise OutputError(
            "the store's URL cannot be read; it looks like postgresql+psycopg://user:password@host:5432/database, with "
            "%40 for @, %2F for / and %3A for : in a password"
        ) from None
    if url.get_backend_name() == "sqlite":
        return SqliteStore(Path(url.database or "run.sqlite"))
    if url.drivername not in {"postgresql", "postgresql+psycopg"}:
        raise OutputError(f"{url.drivername}: no such store; name a file, or postgresql+psycopg://user@host/database")
    url = url.set(drivername="postgresql+psycopg")
    try:
        engine = create_engine(url, pool_pre_ping=True, hide_parameters=True)
    except ImportError:
        raise OutputError(f"{_shown(url)}: needs psycopg; pip install 'fedapt[postgres]'") from None
    return SqlStore(engine, _shown(url))


def _shown(url: URL) -> str:
    """A URL without its password, and without its query, which can hold one too."""
    return URL.create(url.drivername, url.username, None, url.host, url.port, url.database).render_as_string()


def _unusable(url: URL, where: str, error: DatabaseError) -> str:
    if url.get_backend_name() == "sqlite":
        return f"{where}: cannot be used as a run's store ({error.orig}); choose another --out, or another `store` in server.toml"
    reason = " ".join(str(error.orig).split())
    for secret in filter(None, (url.password, url.query.get("password"))):
        reason = reason.replace(str(secret), "***")
    return (
        f"{where}: cannot be used as a run's store ({reason}); see that the server runs, that the database exists "
        "(`createdb`), and that this user may make tables in it"
    )
