"""A process to be killed: for each path on stdin it forks a child that commits rounds to that store without end.

It says `pid N`, the child says `N` after each commit, and `dead` comes when the child is gone.
"""

import os
import sys
from pathlib import Path

import numpy as np

from fedapt.protocols.update import Update
from fedapt.server.store import Snapshot, SqliteStore


def best_of(number: int) -> int:
    """The largest power of two up to `number`: a best round that stays the best for a while."""
    return int(2 ** (number.bit_length() - 1))


def commit_for_ever(path: Path) -> None:
    store = SqliteStore(path)
    while True:
        number = len(store.rows("run"))
        cohort = store.open_round("run", number, [number, number + 1])
        for node in cohort:
            store.contribute("run", Update("run", number, 1, node, "v", "delta", 1.0, bytes(4096)))
        state = np.full(4096, number, np.float32)
        store.commit("run", Snapshot(number, state, {"momentum": state}), {"round": number}, kept=[best_of(number)])
        os.write(1, f"{number}\n".encode())


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        commit_for_ever(Path(line.strip()))
    os.write(1, f"pid {child}\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"dead\n")
