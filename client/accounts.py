"""What the data of the nodes held here has been charged with: each node keeps an account of its own."""

from pathlib import Path

from ..privacy.accounting import Account
from ..privacy.events import Event
from ..privacy.ledger import Ledger, SiteLedger
from ..protocols.spec import Privacy
from ..protocols.update import Assignment


class Accounts:
    """The nodes' ledgers: a file each in `folder`, or in memory where there is none.

    A row is written before the training that it is charged for begins, so a training that is lost is charged, and one
    that is asked for again is charged again: never too little.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._memory: dict[tuple[int, str], Ledger] = {}
        self._files: dict[int, SiteLedger] = {}

    def charge(self, asked: Assignment, event: Event, cap: Privacy) -> None:
        """Charge a node with a round's event. Raises PrivacyError, and charges nothing, where it would pass the cap."""
        assert cap.epsilon is not None, "a spec with a unit has a cap"
        if self.folder is not None:
            file = self._file(asked.node)
            file.charge(asked.run, asked.round, event, cap.delta, per_run=cap.epsilon, in_all=float("inf"))
            return
        before = self._memory.get((asked.node, asked.run), Ledger({}))
        before.require(event, cap.epsilon, cap.delta)
        self._memory[asked.node, asked.run] = before.after([event])

    def spent(self, asked: Assignment, delta: float) -> Account:
        """What the node has spent in the run."""
        if self.folder is not None:
            return self._file(asked.node).ledger(asked.run).spent(delta)
        return self._memory.get((asked.node, asked.run), Ledger({})).spent(delta)

    def _file(self, node: int) -> SiteLedger:
        if node not in self._files:
            assert self.folder is not None
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[node] = SiteLedger(self.folder / f"{node}.sqlite")
        return self._files[node]
