"""Runs, rounds and the ledger, as files had them before versions were kept."""

import sqlalchemy as sa
from alembic import op

from fedapt.privacy.chain import GENESIS, append_only

revision = "0001"
down_revision = None


def upgrade() -> None:
    _ledger()
    op.create_table(
        "runs",
        sa.Column("name", sa.String, primary_key=True),
        *(sa.Column(name, sa.String, nullable=False) for name in ("spec", "layout", "config", "base")),
        sa.Column("start", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "rounds",
        sa.Column("run", sa.String, sa.ForeignKey("runs.name"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("cohort", sa.String, nullable=False),
        sa.Column("row", sa.String),
        sa.Column("snapshot", sa.LargeBinary),
    )
    op.create_table(
        "contributions",
        sa.Column("run", sa.String, sa.ForeignKey("runs.name"), primary_key=True),
        sa.Column("round", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("node", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("fields", sa.String, nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "refusals",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run", sa.String, sa.ForeignKey("runs.name"), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("node", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
    )


def _ledger() -> None:
    op.create_table(
        "ledger",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("run", sa.String, nullable=False, index=True),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("node", sa.String),
        *(sa.Column(name, sa.String, nullable=False) for name in ("event", "time", "hash")),
    )
    append_only(op.get_bind(), "ledger")
    head = op.create_table(
        "ledger_head",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("hash", sa.String, nullable=False),
    )
    op.bulk_insert(head, [{"id": 1, "count": 0, "hash": GENESIS}])
