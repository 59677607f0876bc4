"""What the data of the nodes held here has been charged with: each node keeps an account of its own."""

from math import isfinite
from pathlib import Path

from ..privacy.accounting import Account
from ..privacy.events import Event
from ..privacy.ledger import Ledger, SiteLedger
from ..protocols.errors import PrivacyError
from ..protocols.update import Assignment

OPEN_FILES = 64
"""Ledgers of so many nodes stay open; a simulation may charge more nodes than a process may have files."""


class Accounts:
    """The nodes' ledgers: a file each in `folder`, or in memory where there is none. Both behave the same.

    A row is written before the training that it is charged for begins, so a training that is lost is charged, and one
    that is asked for again is charged again: never too little.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[tuple[int, str | None], Ledger] = {}  # without a run: all of a node's
        self._files: dict[int, SiteLedger] = {}

    def table(self) -> dict[tuple[int, str | None], Ledger]:
        """What is kept in memory, by node and run (None: over all runs); empty where the ledgers are files."""
        return self._memory

    def charge(self, asked: Assignment, event: Event, delta: float, *, per_run: float, in_all: float) -> None:
        """Charge a node with a round's event, under caps on ε at `delta` over the run and over all of its runs.

        Raises PrivacyError, and charges nothing, where it would pass one.
        """
        try:
            if self.folder is None:
                self._remember(asked, event, delta, {asked.run: per_run, None: in_all})
            else:
                file = self._file(asked.node)
                file.charge(asked.run, asked.round, event, delta, per_run=per_run, in_all=in_all)
        except PrivacyError as error:
            if not isfinite(in_all):
                raise
            raise PrivacyError(f"{error} (this site's caps: {per_run:g} a run, {in_all:g} over all runs)") from None

    def spent(self, asked: Assignment, delta: float) -> Account:
        """What the node has spent in the run."""
        if self.folder is not None:
            return self._file(asked.node).ledger(asked.run).spent(delta)
        return self._remembered(asked.node, asked.run).spent(delta)

    def _remember(self, asked: Assignment, event: Event, delta: float, caps: dict[str | None, float]) -> None:
        before = {run: self._remembered(asked.node, run) for run in caps}
        for run, ledger in before.items():
            ledger.require(event, caps[run], delta)
        self._memory |= {(asked.node, run): ledger.after([event]) for run, ledger in before.items()}

    def _remembered(self, node: int, run: str | None) -> Ledger:
        return self._memory.get((node, run), Ledger({}))

    def _file(self, node: int) -> SiteLedger:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._files.pop(node, None) or SiteLedger(self.folder / f"{node}.sqlite")
        self._files[node] = file  # the one that was used last is the last
        if len(self._files) > OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return file
