"""Who belongs to the federation: nodes, join tokens, and a log of who changed what.

A certificate alone opens nothing: the registry must know its key, and may stop knowing it. Whatever changes who is
admitted is one transaction with its row of the log, so `changes`, the number of those rows, tells a server that runs
that another process has revoked somebody: it asks for the number often, and for `admits` where it has moved.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, String, TypeDecorator, insert, select, update
from sqlalchemy import event as sql_event
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from ..privacy.chain import GENESIS, Fault, append_only
from ..protocols.identity import Peer, Token, TrustError, checked_name
from .authority import Clock, utc_now
from .store.tables import NodeId

OPERATOR = "operator"


class _Utc(TypeDecorator[datetime]):
    """ISO 8601 with microseconds, as in the ledger: it sorts as text, and keeps its zone in every database."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        return None if value is None else value.astimezone(UTC).isoformat(timespec="microseconds")

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


class Tables(MappedAsDataclass, DeclarativeBase):
    """All times are in UTC. Serials and fingerprints are hex, as a Peer has them."""

    type_annotation_map = {datetime: _Utc}  # noqa: RUF012 (SQLAlchemy reads it, and nobody writes it)


class Node(Tables, kw_only=True):
    """A site that has joined. `serial` is that of the certificate in use, `renewed` that of one made to follow it."""

    __tablename__ = "nodes"
    id: Mapped[int] = mapped_column(NodeId, primary_key=True, autoincrement=False)
    name: Mapped[str]
    fingerprint: Mapped[str] = mapped_column(unique=True)
    serial: Mapped[str]
    renewed: Mapped[str | None] = mapped_column(default=None)
    joined: Mapped[datetime]
    seen: Mapped[datetime | None] = mapped_column(default=None)
    revoked: Mapped[datetime | None] = mapped_column(default=None)


class JoinToken(Tables, kw_only=True):
    """A token that was made; the token itself, a secret, is not kept. `node` is who joined with it."""

    __tablename__ = "tokens"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    fingerprint: Mapped[str]
    created: Mapped[datetime]
    expires: Mapped[datetime]
    used: Mapped[datetime | None] = mapped_column(default=None)
    revoked: Mapped[datetime | None] = mapped_column(default=None)
    node: Mapped[int | None] = mapped_column(NodeId, default=None)

    def state(self, now: datetime) -> str:
        """open, revoked, used or expired."""
        if self.revoked is not None:
            return "revoked"
        if self.used is not None:
            return "used"
        return "open" if now < self.expires else "expired"


class Audit(Tables, kw_only=True):
    """A row of the log: who did what to whom. `detail` is JSON and holds no secret."""

    __tablename__ = "audit"
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    time: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[str]
    hash: Mapped[str]

    def digest(self, previous: str) -> str:
        """What `hash` must be in a row that follows one with the hash `previous`."""
        time = self.time.astimezone(UTC).isoformat(timespec="microseconds")
        fields = [previous, self.sequence, time, self.actor, self.action, self.subject, self.detail]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


class AuditHead(Tables, kw_only=True):
    """Where the log ends. There is one, and it is there before the first row."""

    __tablename__ = "audit_head"
    id: Mapped[int] = mapped_column(primary_key=True, default=1)
    count: Mapped[int] = mapped_column(default=0)
    hash: Mapped[str] = mapped_column(default=GENESIS)


def _begin(_table: Any, connection: Connection, **_options: Any) -> None:
    connection.execute(insert(AuditHead).values(id=1, count=0, hash=GENESIS))


def _close(_table: Any, connection: Connection, **_options: Any) -> None:
    append_only(connection, "audit")


sql_event.listen(AuditHead.__table__, "after_create", _begin)
sql_event.listen(Audit.__table__, "after_create", _close)


class Registry:
    """Nodes and tokens in a database that has `Tables`. Any number of processes may use it at once.

    What changes something raises TrustError, with the reason, where it may not be, and then nothing has changed.
    """

    def __init__(self, engine: Engine, now: Clock = utc_now) -> None:
        self._engine, self._now = engine, now

    def add_token(self, token: Token, actor: str = OPERATOR) -> None:
        """From now on the token can be used, once."""
        row = JoinToken(
            id=token.id,
            name=token.name,
            fingerprint=token.peer.fingerprint,
            created=self._now(),
            expires=token.expires,
        )
        with self._changing() as session:
            if session.get(JoinToken, token.id) is not None:
                raise TrustError(f"token {token.id} is there already: make another")
            session.add(row)
            self._note(session, actor, "token.create", token.id, name=token.name, expires=token.expires.isoformat())

    def redeem(self, peer: Peer, csr: bytes, certify: Callable[[bytes], bytes]) -> tuple[bytes, str]:
        """A node's certificate and name for the holder of a token, in one transaction with the token's use.

        `certify` signs a request (`Authority.certify`). The same key may ask again while the token lasts, because the
        answer may have been lost on its way; another key may not. A known node with a new token gets a certificate over
        its key and keeps its id. Raises TrustError where the token is no more, PayloadError for a malformed request.
        """
        with self._changing() as session:
            token = session.get(JoinToken, peer.serial)
            if peer.kind != "join" or token is None or token.fingerprint != peer.fingerprint:
                raise TrustError(f"{peer.kind} certificate {peer.serial} is that of no token here: ask for a token")
            if token.revoked is not None or self._now() >= token.expires:
                state = "revoked" if token.revoked is not None else f"expired since {token.expires:%Y-%m-%d %H:%M} UTC"
                raise TrustError(f"token {token.id} is {state}: ask for another")
            chain = certify(csr)
            new = Peer.of(chain)
            if token.used is not None and token.node != new.node:
                raise TrustError(
                    f"token {token.id} was used by another key: ask for another, and ask who used this one"
                )
            self._enter(session, token, new)
            token.used, token.node = token.used or self._now(), new.node
            subject = str(new.node)
            self._note(session, f"token {token.id}", "node.join", subject, name=token.name, serial=new.serial)
        return chain, token.name

    def _enter(self, session: Session, token: JoinToken, new: Peer) -> None:
        node = session.get(Node, new.node)
        if node is None:
            made = Node(
                id=new.node, name=token.name, fingerprint=new.fingerprint, serial=new.serial, joined=self._now()
            )
            session.add(made)
            return
        if node.revoked is not None or node.fingerprint != new.fingerprint:
            raise TrustError(f"node {node.id} was revoked: join with a new key, in another folder")
        node.name, node.renewed = token.name, new.serial

    def renew(self, peer: Peer, csr: bytes, certify: Callable[[bytes], bytes]) -> bytes:
        """Another certificate over a node's own key. The older one serves until the new one is seen, and no longer."""
        if (reason := self.admits(peer)) is not None:
            raise TrustError(reason)
        chain = certify(csr)
        new = Peer.of(chain)
        if new.fingerprint != peer.fingerprint:
            raise TrustError(f"node {peer.node} asked for a certificate over another key: its own is the one renewed")
        with self._changing() as session:
            node = session.get_one(Node, peer.node)
            if node.revoked is not None:
                raise TrustError(f"node {node.id} is revoked")
            node.renewed = new.serial
            self._note(session, f"node {node.id}", "node.renew", str(node.id), serial=new.serial)
        return chain

    def admits(self, peer: Peer) -> str | None:
        """Why a peer may have no stream, or keep none; None where it may."""
        if peer.kind != "node":
            return f"a {peer.kind} certificate opens no stream of a node: join with it first"
        with Session(self._engine) as session:
            node = session.get(Node, peer.node)
        if node is None or node.fingerprint != peer.fingerprint:
            return f"node {peer.node} is unknown here: join with a token"
        if node.revoked is not None:
            return f"node {peer.node} was revoked on {node.revoked:%Y-%m-%d %H:%M} UTC"
        if peer.serial not in (node.serial, node.renewed):
            return f"certificate {peer.serial} of node {peer.node} was replaced by a newer one"
        if self._now() >= peer.expires:
            return f"the certificate of node {peer.node} expired on {peer.expires:%Y-%m-%d %H:%M} UTC: join with a new token"
        return None

    def seen(self, peer: Peer) -> None:
        """An admitted node is here. Where its certificate is the renewed one, it replaces the older from now on."""
        with Session(self._engine) as session, session.begin():
            here = update(Node).where(Node.id == peer.node)
            session.execute(here.values(seen=self._now()))
            is_new = session.scalar(select(Node.renewed).where(Node.id == peer.node)) == peer.serial
        if is_new:
            with self._changing() as session:
                replace = here.where(Node.renewed == peer.serial).values(serial=peer.serial, renewed=None)
                if (
                    session.scalar(replace.returning(Node.id)) is not None
                ):  # and not by another stream of the node in between
                    self._note(session, f"node {peer.node}", "node.replace", str(peer.node), serial=peer.serial)

    def tokens(self) -> Sequence[JoinToken]:
        """All tokens, the oldest first."""
        with Session(self._engine) as session:
            return session.scalars(select(JoinToken).order_by(JoinToken.created, JoinToken.id)).all()

    def nodes(self) -> Sequence[Node]:
        """All nodes, revoked ones too, by id."""
        with Session(self._engine) as session:
            return session.scalars(select(Node).order_by(Node.id)).all()

    def revoke_token(self, token: str, actor: str = OPERATOR) -> None:
        """Nobody joins with it any more. Who has joined stays: `revoke_node` is for that."""
        with self._changing() as session:
            row = session.get(JoinToken, token)
            if row is None:
                raise TrustError(f"token {token!r} is unknown: `fedapt token list` shows those that there are")
            row.revoked = row.revoked or self._now()
            self._note(session, actor, "token.revoke", token, name=row.name)

    def revoke_node(self, node: int, actor: str = OPERATOR) -> None:
        """The node is admitted no more, for good: it needs a new key to come back, and is another node then."""
        with self._changing() as session:
            row = self._node(session, node)
            row.revoked = row.revoked or self._now()
            self._note(session, actor, "node.revoke", str(node), name=row.name)

    def rename(self, node: int, name: str, actor: str = OPERATOR) -> None:
        """Give a node another name; its id stays."""
        with self._changing() as session:
            row = self._node(session, node)
            before, row.name = row.name, checked_name(name)
            self._note(session, actor, "node.rename", str(node), before=before, name=name)

    def changes(self) -> int:
        """How many rows the log has. It moves with everything on which `admits` depends, but for time."""
        with Session(self._engine) as session:
            return session.scalars(select(AuditHead.count)).one()

    def audit(self) -> Sequence[Audit]:
        """The log, the oldest row first."""
        with Session(self._engine) as session:
            return session.scalars(select(Audit).order_by(Audit.sequence)).all()

    def verify(self, noted: str | None = None) -> Fault | None:
        """The first row of the log that is not what was written, or None. `noted`: a hash that it must still hold.

        Formal guarantees: those of the ledger's chain (`privacy/chain.py`), which has the same form.
        """
        with Session(self._engine) as session:
            if session.get_bind().dialect.name == "sqlite":
                session.connection().exec_driver_sql("BEGIN")  # both as they stood at one moment
            head = session.get(AuditHead, 1) or AuditHead(count=-1)
            rows = session.scalars(select(Audit).order_by(Audit.sequence)).all()
        previous = GENESIS
        for sequence, row in enumerate(rows, 1):
            if row.sequence != sequence:
                return Fault(sequence, "is missing")
            if row.digest(previous) != row.hash:
                return Fault(sequence, "is not what was written here: it does not match its hash and the row before it")
            previous = row.hash
        if (head.count, head.hash) != (len(rows), previous):
            return Fault(len(rows), f"is not the one that the head ends with, as its number {head.count}")
        if noted is not None and noted not in {GENESIS, *(row.hash for row in rows)}:
            return Fault(len(rows), f"ends another chain: no row has the hash {noted}")
        return None

    @contextmanager
    def _changing(self) -> Iterator[Session]:
        """A transaction that no other change runs beside: the head is written first, because a write takes the lock."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            session.execute(update(AuditHead).where(AuditHead.id == 1).values(count=AuditHead.count))
            yield session

    def _note(self, session: Session, actor: str, action: str, subject: str, **detail: str) -> None:
        head = session.get_one(AuditHead, 1)
        text = json.dumps(detail, sort_keys=True)
        row = Audit(
            sequence=head.count + 1, time=self._now(), actor=actor, action=action, subject=subject, detail=text, hash=""
        )
        row.hash = row.digest(head.hash)
        session.add(row)
        head.count, head.hash = row.sequence, row.hash

    def _node(self, session: Session, node: int) -> Node:
        row = session.get(Node, node)
        if row is None:
            raise TrustError(f"node {node} is unknown: `fedapt server status` shows those that there are")
        return row
