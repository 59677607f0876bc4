"""What a simulated grid tells the coordinator beyond `NodeGrid`: whom one may draw from unseen, and what time it is."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ..protocols.update import Assignment
from .store import Row


@runtime_checkable
class Virtual(Protocol):
    """A grid of virtual nodes, each of which affords the run: those that are not drawn need not be asked."""

    def population(self) -> Sequence[int]:
        """The nodes that can train now, in an order that depends on nothing but run and time; looked at by index."""


@runtime_checkable
class Clocked(Protocol):
    """A grid with a clock of its own. It stands where the last committed row says, so a resumed run has the same."""

    def begin(self, rows: Sequence[Row]) -> None:
        """A round begins after these rows."""

    def expect(self, assignments: Sequence[Assignment]) -> Row:
        """The whole cohort of the round, those included that have answered before a crash: what its row says of time.

        Raises RunError where too few of them will ever answer.
        """
