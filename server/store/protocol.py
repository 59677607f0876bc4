"""What every store of runs does."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ...privacy.chain import Chain, Charge
from ...privacy.events import Event
from ...privacy.ledger import Ledger
from ...protocols.errors import RunError
from ...protocols.layout import Flat
from ...protocols.update import Description, Update
from ..optimizers import Buffers

Row = dict[str, Any]
"""One line of metrics.jsonl: what is known of a round."""

Status = Literal["running", "stopping", "stopped", "finished", "failed"]
"""How a run stands. `stopping`: somebody has asked for its end, and its coordinator has not come to it yet."""


@dataclass(frozen=True)
class Snapshot:
    """The server's state after `round`: what nodes receive next, and the optimizer's buffers."""

    round: int
    state: Flat
    buffers: Buffers = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        blob: bytes = save_tensors({"state": self.state, **{f"buffer.{n}": b for n, b in self.buffers.items()}})
        return blob

    def bare(self) -> "Snapshot":
        """The state alone: buffers are what the next round needs, and of a private run they tell what noise hides."""
        return Snapshot(self.round, self.state)

    @classmethod
    def from_bytes(cls, round_: int, blob: bytes) -> "Snapshot":
        tensors = load_tensors(blob)
        buffers = {n.removeprefix("buffer."): t for n, t in tensors.items() if n != "state"}
        return cls(round_, tensors["state"], buffers)


@dataclass(frozen=True)
class RunState:
    """A run from outside. `rounds` counts the committed ones, without the start.

    Both times are UTC. `updated` is when a round was last committed, or the status set.
    """

    name: str
    status: Status
    reason: str
    rounds: int
    created: datetime
    updated: datetime


class Store(Protocol):
    """The state of runs. Rounds count from 1; the snapshot of round 0 is the start."""

    def create(self, run: str, spec: str, description: Description, snapshot: Snapshot, row: Row) -> None:
        """Begin a run, `running`. `row` holds the start's evaluation. Raises ValueError where the run exists."""

    def find(self, run: str) -> tuple[str, Description] | None:
        """The run's spec (JSON) and description, or None."""

    def runs(self) -> list[RunState]:
        """All runs, the oldest first."""

    def status(self, run: str) -> Status:
        """How the run stands. Raises KeyError where there is none of this name."""

    def set_status(self, run: str, status: Status, reason: str = "") -> None:
        """Say how the run stands, and why. Raises KeyError where there is none of this name."""

    def snapshot(self, run: str, round_: int | None = None) -> Snapshot:
        """The snapshot of a round that was kept (the last, or one that `commit` was told to keep); KeyError if not."""

    def open_round(self, run: str, round_: int, cohort: Sequence[int]) -> tuple[int, ...]:
        """Commit a draw before any assignment leaves; where the round is open already, its first draw stands."""

    def contribute(self, run: str, update: Update) -> bool:
        """Keep an admitted update. False where this node has already given one for the round."""

    def refuse(self, run: str, round_: int, node: int, reason: str) -> None:
        """Record a refusal."""

    def contributions(self, run: str, round_: int) -> list[Update]:
        """The updates of an open round, in node-id order."""

    def refusals(self, run: str, round_: int) -> list[tuple[int, str]]:
        """(node, reason) of a round, in the order of arrival."""

    def commit(
        self, run: str, snapshot: Snapshot, row: Row, kept: Sequence[int], events: Sequence[Event | Charge] = ()
    ) -> None:
        """Release a round and charge it with `events`, both or neither.

        Snapshots of rounds other than this one and `kept` are dropped, the buffers of those kept, and the round's
        contributions. Of a run that `hides_who_took_part`, the cohorts and refusals up to this round are dropped too: an
        open round needs them, and nobody after it. Raises RunError where the round has been released: a release never changes.
        """

    def rows(self, run: str) -> list[Row]:
        """The rows of all committed rounds, round 0 first."""

    def ledger(self, run: str, node: int | None = None) -> Ledger:
        """What the run's releases have been charged with, or those that are about one node's data alone."""

    def chain(self) -> Chain:
        """The ledger's rows, of all runs."""


def now() -> datetime:
    """UTC."""
    return datetime.now(UTC)


def storable(text: str) -> str:
    """`text` as every database keeps it: a node words its own refusal, and NUL and lone surrogates are kept by none."""
    return text.encode("utf-8", "replace").decode().replace("\0", "?")


def hides_who_took_part(spec: str) -> bool:
    """Whether a run's promise rests on draws that nobody learns: client-level privacy. `spec` is JSON."""
    return bool(json.loads(spec).get("privacy", {}).get("unit") == "client")


def released_before(run: str, round_: int) -> RunError:
    return RunError(
        f'run "{run}": round {round_} is released already, so another process works on this run; '
        "end one of the two, and start the other again"
    )
