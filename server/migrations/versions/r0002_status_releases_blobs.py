"""Runs have a status, releases are rows of their own, and snapshots and starts are stored by their content."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

from fedapt.privacy.chain import append_only

revision = "0002"
down_revision = "0001"

BLOBS = sa.table("blobs", sa.column("hash"), sa.column("content"))
RUNS = sa.table("runs", *map(sa.column, ("name", "spec", "start", "start_hash")), *map(sa.column, ("status", "reason")))
ROUNDS = sa.table("rounds", *map(sa.column, ("run", "number", "row", "snapshot", "snapshot_hash")))


def upgrade() -> None:
    op.create_table(
        "blobs", sa.Column("hash", sa.String, primary_key=True), sa.Column("content", sa.LargeBinary, nullable=False)
    )
    op.create_table(
        "releases",
        sa.Column("run", sa.String, sa.ForeignKey("runs.name"), primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("hash", sa.String, nullable=False),
        sa.Column("time", sa.String, nullable=False),
    )
    append_only(op.get_bind(), "releases")
    moment = datetime.now(UTC).isoformat(timespec="microseconds")
    for name, default in [
        ("start_hash", ""),
        ("status", "stopped"),
        ("reason", "from before runs had a status"),
        ("created", moment),
        ("updated", moment),
    ]:
        op.add_column("runs", sa.Column(name, sa.String, nullable=False, server_default=default))
    op.add_column("rounds", sa.Column("snapshot_hash", sa.String))
    _move()
    _constrain()


def _move() -> None:
    """Bytes become blobs. A run that had all of its rounds is finished; one that ended early cannot be told apart."""
    connection = op.get_bind()
    for name, spec, start in connection.execute(sa.select(RUNS.c.name, RUNS.c.spec, RUNS.c.start)).all():
        here = ROUNDS.c.run == name
        ids = sa.select(ROUNDS.c.number).where(here, ROUNDS.c.snapshot.is_not(None))
        for number in connection.scalars(ids).all():
            this = sa.and_(here, ROUNDS.c.number == number)
            content = connection.scalar(sa.select(ROUNDS.c.snapshot).where(this))
            connection.execute(sa.update(ROUNDS).where(this).values(snapshot_hash=_kept(connection, content)))
        last = connection.scalar(sa.select(sa.func.max(ROUNDS.c.number)).where(here, ROUNDS.c.row.is_not(None)))
        values = {"start_hash": _kept(connection, start)}
        if last is not None and last >= json.loads(spec).get("run", {}).get("rounds", float("inf")):
            values |= {"status": "finished", "reason": ""}
        connection.execute(sa.update(RUNS).where(RUNS.c.name == name).values(values))


def _kept(connection: sa.Connection, content: Any) -> str:
    digest = hashlib.sha256(content).hexdigest()
    if connection.scalar(sa.select(BLOBS.c.hash).where(BLOBS.c.hash == digest)) is None:
        connection.execute(sa.insert(BLOBS).values(hash=digest, content=content))
    return digest


def _constrain() -> None:
    with op.batch_alter_table("runs") as runs:
        runs.drop_column("start")
        for name in ("start_hash", "status", "reason", "created", "updated"):
            runs.alter_column(name, server_default=None, existing_type=sa.String(), existing_nullable=False)
        runs.create_foreign_key("runs_start_hash_fkey", "blobs", ["start_hash"], ["hash"])
        runs.create_index("ix_runs_start_hash", ["start_hash"])
    with op.batch_alter_table("rounds") as rounds:
        rounds.drop_column("snapshot")
        rounds.create_foreign_key("rounds_snapshot_hash_fkey", "blobs", ["snapshot_hash"], ["hash"])
        rounds.create_index("ix_rounds_snapshot_hash", ["snapshot_hash"])
