"""A store that ends with its process."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ...privacy.chain import Chain, Charge, Entry, Head, chained, decimal
from ...privacy.events import Event
from ...privacy.ledger import Ledger
from ...protocols.update import Description, Update
from .protocol import Row, RunState, Snapshot, Status, hides_who_took_part, now, released_before, storable


class MemoryStore:
    """For simulations that need not survive their process."""

    def __init__(self) -> None:
        self._runs: dict[str, tuple[str, Description]] = {}
        self._states: dict[str, RunState] = {}
        self._snapshots: dict[tuple[str, int], Snapshot] = {}
        self._rows: dict[str, list[Row]] = {}
        self._cohorts: dict[tuple[str, int], tuple[int, ...]] = {}
        self._updates: dict[tuple[str, int], dict[int, Update]] = {}
        self._refusals: dict[tuple[str, int], list[tuple[int, str]]] = {}
        self._ledger: list[Entry] = []

    def create(self, run: str, spec: str, description: Description, snapshot: Snapshot, row: Row) -> None:
        if run in self._runs:
            raise ValueError(f"run {run!r} exists")
        self._runs[run] = spec, description
        self._states[run] = RunState(run, "running", "", 0, created=(time := now()), updated=time)
        self._snapshots[run, 0] = snapshot
        self._rows[run] = [row]

    def find(self, run: str) -> tuple[str, Description] | None:
        return self._runs.get(run)

    def runs(self) -> list[RunState]:
        return list(self._states.values())

    def status(self, run: str) -> Status:
        return self._states[run].status

    def set_status(self, run: str, status: Status, reason: str = "") -> None:
        self._states[run] = replace(self._states[run], status=status, reason=storable(reason), updated=now())

    def snapshot(self, run: str, round_: int | None = None) -> Snapshot:
        return self._snapshots[run, len(self._rows[run]) - 1 if round_ is None else round_]

    def open_round(self, run: str, round_: int, cohort: Sequence[int]) -> tuple[int, ...]:
        return self._cohorts.setdefault((run, round_), tuple(cohort))

    def contribute(self, run: str, update: Update) -> bool:
        held = self._updates.setdefault((run, update.round), {})
        if update.node in held:
            return False
        held[update.node] = update
        return True

    def refuse(self, run: str, round_: int, node: int, reason: str) -> None:
        self._refusals.setdefault((run, round_), []).append((node, storable(reason)))

    def contributions(self, run: str, round_: int) -> list[Update]:
        return [u for _, u in sorted(self._updates.get((run, round_), {}).items())]

    def refusals(self, run: str, round_: int) -> list[tuple[int, str]]:
        return list(self._refusals.get((run, round_), []))

    def commit(
        self, run: str, snapshot: Snapshot, row: Row, kept: Sequence[int], events: Sequence[Event | Charge] = ()
    ) -> None:
        if snapshot.round < len(self._rows[run]):
            raise released_before(run, snapshot.round)
        self._ledger += chained(self._head(), run, snapshot.round, events)
        self._snapshots[run, snapshot.round] = snapshot
        self._rows[run].append(row)
        self._states[run] = replace(self._states[run], rounds=len(self._rows[run]) - 1, updated=now())
        self._updates.pop((run, snapshot.round), None)
        if hides_who_took_part(self._runs[run][0]):
            self._cohorts |= {key: () for key in self._cohorts if key[0] == run and key[1] <= snapshot.round}
            self._refusals = {k: v for k, v in self._refusals.items() if k[0] != run or k[1] > snapshot.round}
        for name, round_ in list(self._snapshots):
            if name != run or round_ == snapshot.round:
                continue
            if round_ in kept:
                self._snapshots[name, round_] = self._snapshots[name, round_].bare()
            else:
                del self._snapshots[name, round_]

    def rows(self, run: str) -> list[Row]:
        return list(self._rows[run])

    def ledger(self, run: str, node: int | None = None) -> Ledger:
        return Ledger(Counter(e.event for e in self._ledger if (e.run, e.node) == (run, decimal(node))))

    def chain(self) -> Chain:
        return Chain(list(self._ledger), self._head())

    def _head(self) -> Head:
        return Head(count=len(self._ledger), hash=self._ledger[-1].hash) if self._ledger else Head()
