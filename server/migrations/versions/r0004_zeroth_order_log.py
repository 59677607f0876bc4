"""The log of a zeroth-order run, and the snapshots from which late joiners read it."""

import sqlalchemy as sa
from alembic import op

from fedapt.privacy.chain import append_only

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "zeroth_log",
        sa.Column("run", sa.String, primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
    )
    append_only(op.get_bind(), "zeroth_log")
    op.create_table(
        "zeroth_snapshots",
        sa.Column("run", sa.String, primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("state", sa.LargeBinary, nullable=False),
    )
