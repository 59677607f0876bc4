"""What the data of the nodes held here has been charged with: each virtual node has an account, and a real site has one."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from decimal import ROUND_CEILING, Context
from math import isfinite
from pathlib import Path

from ..privacy.accounting import Account
from ..privacy.events import Event
from ..privacy.ledger import NO_ROOM, Ledger, SiteLedger
from ..protocols.errors import OutputError, PrivacyError
from ..protocols.update import Assignment
from .policy import UNTOLD, RefusalError

OPEN_FILES = 64
"""Ledgers of so many nodes stay open; a simulation may charge more nodes than a process may have files."""

STATED = Context(prec=2, rounding=ROUND_CEILING)
"""How ε is told. A cap of two digits is never passed by what is told."""

LEDGER = "ledger.sqlite"
"""A real site's ledger, in its folder of accounts."""


class Accounts:
    """The virtual nodes' ledgers: a file each in `folder`, or in memory where there is none. Both behave the same.

    A row is written before the training that it is charged for begins, so a training that is lost is charged, and one
    that is asked for again is charged again: never too little.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[tuple[int, str | None], Ledger] = {}  # without a run: all of a node's
        self._files: dict[Path, SiteLedger] = {}

    def table(self) -> dict[tuple[int, str | None], Ledger]:
        """What is kept in memory, by node and run (None: over all runs); empty where the ledgers are files."""
        return self._memory

    def charge(self, asked: Assignment, event: Event, delta: float, *, per_run: float, in_all: float) -> None:
        """Charge a node with a round's event, under caps on ε at `delta` over the run and over all of its runs.

        Raises RefusalError, and charges nothing, where it would pass one or the account cannot be had.
        """
        try:
            if self.folder is None:
                self._remember(asked, event, delta, {asked.run: per_run, None: in_all})
            else:
                file = self._file(asked.node)
                file.charge(asked.run, asked.round, event, delta, per_run=per_run, in_all=in_all)
        except PrivacyError as error:
            caps = f" (this site's caps: {per_run:g} a run, {in_all:g} over all runs)" if isfinite(in_all) else ""
            passed = self._passed(asked, event, delta, per_run=per_run, in_all=in_all)
            raise RefusalError(f"{error}{caps}", told=passed) from None

    def spent(self, asked: Assignment, delta: float) -> Account:
        """What the node has spent in the run, as it may tell the server: ε is rounded up to two digits.

        Noise and rounds are public, so the exact ε would give away the share of its examples that a step draws, and with
        it their number. What is rounded up is an upper bound still; `ledger` has the exact one.
        """
        account = self.ledger(asked.node, asked.run).spent(delta)
        return replace(account, epsilon=float(STATED.create_decimal_from_float(account.epsilon)))

    def ledger(self, node: int, run: str | None) -> Ledger:
        """The account of one run, or of all."""
        if self.folder is None:
            return self._memory.get((node, run), Ledger({}))
        return self._file(node).ledger(run)

    def _remember(self, asked: Assignment, event: Event, delta: float, caps: dict[str | None, float]) -> None:
        before = {run: self.ledger(asked.node, run) for run in caps}
        for run, ledger in before.items():
            ledger.require(event, caps[run], delta)
        self._memory |= {(asked.node, run): ledger.after([event]) for run, ledger in before.items()}

    def _passed(self, asked: Assignment, event: Event, delta: float, *, per_run: float, in_all: float) -> str:
        """The cap that leaves no room, in words that say nothing of what was spent."""
        caps: list[tuple[str | None, float, str]] = [
            (asked.run, per_run, "the run's cap, the smaller of privacy.epsilon and the site's most_epsilon_per_run"),
            (None, in_all, "the site's most_epsilon, over all runs"),
        ]
        try:
            for run, cap, clause in caps:
                if not self.ledger(asked.node, run).allows(event, cap, delta):
                    above = f"{NO_ROOM} {cap:g} at delta = {delta:g}: {clause}"
                    return f"{above}. Way out: stop here, or from the start more noise or fewer rounds"
        except PrivacyError:  # the ledger is broken, or an accountant cannot read the event
            pass
        return UNTOLD

    def _file(self, node: int) -> SiteLedger:
        path = self._path(node)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = self._files.pop(path, None) or SiteLedger(path)
        self._files[path] = file  # the one that was used last is the last
        if len(self._files) > OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return file

    def _path(self, node: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{node}.sqlite"


class SiteAccounts(Accounts):
    """A real site's ledger: one file in `folder`, whatever the node is called.

    A site with a new key or another name is another node to its servers, and a SuperNode without a key is another one each
    time that it starts; the data is the same, and so is the cap. Ledgers used to be named after the node: a single one of
    them is renamed, and so keeps what was spent.

    A ledger that is there is opened at once, so that whoever serves the site need not wait for a charge to find it broken.
    Raises PrivacyError where its chain is broken or there are several ledgers, OutputError where it cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if folder.is_dir():
            _take_over(folder)
        if (folder / LEDGER).exists():
            self._file(0)

    def _path(self, node: int) -> Path:
        assert self.folder is not None
        return self.folder / LEDGER


def _take_over(folder: Path) -> None:
    """Give a ledger that is named after a node the site's name for it. Processes that begin together do so in turn."""
    try:
        with _locked(folder) as descriptor:
            older = sorted(path for path in folder.glob("*.sqlite") if path.stem.isdecimal())
            if not older:
                return
            _require_one([*older, *folder.glob(LEDGER)])
            _fold_log(older[0])
            older[0].rename(folder / LEDGER)
            os.fsync(descriptor)
    except OSError as error:
        raise OutputError(f"{folder}: the site's ledger there cannot be used ({error.strerror})") from None


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The folder's descriptor, for one process at a time."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _require_one(files: list[Path]) -> None:
    if len(files) == 1:
        return
    raise PrivacyError(
        f"{files[0].parent}: holds {len(files)} ledgers ({', '.join(path.name for path in files)}), of the nodes that this "
        f"site has been, and its caps are over all of them. Way out: divide delta in [policy] by {len(files)}; take from "
        "most_epsilon what `fedapt ledger show FILE --delta` states at the new delta for all of them but one; move those "
        f"elsewhere, and name the one that stays {LEDGER}"
    )


def _fold_log(path: Path) -> None:
    """Move what stands in an SQLite file's log, which is found by the file's name, into the file.

    Raises OutputError where another process has the file open.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.DatabaseError as error:
        raise OutputError(
            f"{path}: cannot be renamed to {LEDGER} ({error}). Way out: end every process that serves this site, and start "
            "again; where it is no database, restore it from a copy"
        ) from None
