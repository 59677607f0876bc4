"""Ledgers of a site: an event that needs no accountant's second, and a chain that is broken."""

import sqlite3
from contextlib import closing
from pathlib import Path

from fedapt.privacy.events import Everyone, GaussianEvent

FULL = GaussianEvent(
    unit="example", relation="add-remove", noise_std=2.0, sensitivity=1.0, secret=True, sampling=Everyone(), count=1
)
"""One step on all examples, whose ε is in closed form."""


def broken(path: Path) -> None:
    """The head of the ledger's chain counts rows that are not there."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE ledger_head SET count = 5")
