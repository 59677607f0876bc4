"""The narrow protocol by which the coordinator reaches nodes. `flower.py` gives it to any Flower grid."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..protocols.update import Assignment, Description, Update


@dataclass(frozen=True)
class Failure:
    """A node that answered with an error, or with something that is no update."""

    node: int
    reason: str


@dataclass(frozen=True)
class Evaluated:
    """A node's scores of an adapter on its own data: a mean over `weight` examples."""

    node: int
    weight: float
    metrics: Mapping[str, float]


@runtime_checkable
class NodeGrid(Protocol):
    """Nodes that can be asked to train. The grid alone knows which of them live."""

    def nodes(self) -> Sequence[int]:
        """The nodes that can train now, ascending."""

    def rank(self, node: int) -> int:
        """The largest rank that a node says it can afford; 0: any, or it has said nothing."""

    def describe(self) -> Description:
        """The model as the nodes have it. Raises RunError where no node answers."""

    def send(self, assignments: Sequence[Assignment]) -> None:
        """Hand out assignments; does not wait."""

    def replies(self, timeout: float) -> Iterator[Update | Failure]:
        """Answers to what was sent, as they come, until all are in or `timeout` seconds have passed."""

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated | Failure]:
        """The nodes' scores of the adapters in the assignments, on their own data, as they come."""


@runtime_checkable
class Parted(Protocol):
    """A grid that trains a round in parts."""

    def part(self, assignments: Sequence[Assignment]) -> None:
        """All of a round, before what is unanswered of it is sent: a run that goes on has the parts that it had before."""
