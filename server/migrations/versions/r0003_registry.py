"""Who belongs to the federation: nodes, join tokens, and the log of who changed what."""

import sqlalchemy as sa
from alembic import op

from fedapt.privacy.chain import GENESIS, append_only

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "nodes",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("fingerprint", sa.String, nullable=False, unique=True),
        sa.Column("serial", sa.String, nullable=False),
        sa.Column("renewed", sa.String),
        sa.Column("joined", sa.String, nullable=False),
        sa.Column("seen", sa.String),
        sa.Column("revoked", sa.String),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String, primary_key=True),
        *(sa.Column(name, sa.String, nullable=False) for name in ("name", "fingerprint", "created", "expires")),
        sa.Column("used", sa.String),
        sa.Column("revoked", sa.String),
        sa.Column("node", sa.BigInteger),
    )
    fields = ("time", "actor", "action", "subject", "detail", "hash")
    op.create_table(
        "audit",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.String, nullable=False) for name in fields),
    )
    append_only(op.get_bind(), "audit")
    head = op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("hash", sa.String, nullable=False),
    )
    op.bulk_insert(head, [{"id": 1, "count": 0, "hash": GENESIS}])
