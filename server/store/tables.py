"""The tables of a store, but for the ledger's (`privacy/chain.py`).

A change here needs a migration (`server/migrations`); a test compares the two.
"""

from sqlalchemy import BigInteger, Dialect, ForeignKey, String, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from .protocol import Status


class NodeId(TypeDecorator[int]):
    """Flower's node ids have 64 bits without a sign, databases' integers have one: shifted, they keep their order."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else value - 2**63

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        return None if value is None else value + 2**63


class Tables(DeclarativeBase):
    """Times are UTC in ISO 8601, as in the ledger; hashes are SHA-256 in hexadecimal digits."""


class Blob(Tables):
    """Bytes under the name of their content, there for as long as something refers to them."""

    __tablename__ = "blobs"
    hash: Mapped[str] = mapped_column(primary_key=True)
    content: Mapped[bytes]


class Run(Tables):
    __tablename__ = "runs"
    name: Mapped[str] = mapped_column(primary_key=True)
    spec: Mapped[str]
    layout: Mapped[str]
    config: Mapped[str]
    base: Mapped[str]
    start_hash: Mapped[str] = mapped_column(ForeignKey(Blob.hash), index=True)
    status: Mapped[Status] = mapped_column(String)
    reason: Mapped[str]
    created: Mapped[str]
    updated: Mapped[str]


class Round(Tables):
    """A round is open from its draw until it has a row; its snapshot may be dropped later."""

    __tablename__ = "rounds"
    run: Mapped[str] = mapped_column(ForeignKey(Run.name), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    cohort: Mapped[str]
    row: Mapped[str | None]
    snapshot_hash: Mapped[str | None] = mapped_column(ForeignKey(Blob.hash), index=True)


class Release(Tables):
    """That a state was released, and when. It outlives the snapshot of this hash, and is never changed or removed."""

    __tablename__ = "releases"
    run: Mapped[str] = mapped_column(ForeignKey(Run.name), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    hash: Mapped[str]
    time: Mapped[str]


class Contribution(Tables):
    __tablename__ = "contributions"
    run: Mapped[str] = mapped_column(ForeignKey(Run.name), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    node: Mapped[int] = mapped_column(NodeId, primary_key=True)
    fields: Mapped[str]
    payload: Mapped[bytes]


class Refusal(Tables):
    __tablename__ = "refusals"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run: Mapped[str] = mapped_column(ForeignKey(Run.name))
    round: Mapped[int]
    node: Mapped[int] = mapped_column(NodeId)
    reason: Mapped[str]
