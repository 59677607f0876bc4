"""Where a run lives: everything that a restarted coordinator needs, and nothing that it could compute.

    protocol.py    what every store does
    memory.py      for one process
    tables.py      the tables of a database
    sql.py         one class for SQLite and PostgreSQL, and `open_store`
    migrating.py   an older database becomes one of today when it is opened

A round is released in one transaction: the new snapshot, the row of metrics, the release, the rows of the privacy
ledger, and the deletion of the raw contributions. So no release is without its charge, and no charge without its
release.
"""

from .memory import MemoryStore
from .protocol import Row, RunState, Snapshot, Status, Store
from .sql import SqliteStore, SqlStore, open_store

__all__ = [
    "MemoryStore",
    "Row",
    "RunState",
    "Snapshot",
    "SqlStore",
    "SqliteStore",
    "Status",
    "Store",
    "open_store",
]
