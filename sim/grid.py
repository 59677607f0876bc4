"""The grid of a simulation: all nodes live in this process, and a whole round is one call of `client.train`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ..client.client import Client
from ..client.exchanger import Exchanger
from ..client.slopes import exchanger_of
from ..protocols.exchange import Answer, Exchange
from ..protocols.legality import rank_of
from ..protocols.update import Assignment, Description, Update
from ..server.grid import Evaluated, Failure

PORTION = 64
"""Assignments trained in one call, at most: enough for a full cohort of small clients."""

QUARTERS = 4
"""Parts of a round come in multiples of it: two or four workers have as many each, also where clients are few."""


def portions(assignments: Sequence[Assignment], most: int) -> list[Sequence[Assignment]]:
    """A round in parts of like size, in order, of at most PORTION and `most`: it does not matter who trains them."""
    count, size = len(assignments), min(PORTION, most)
    parts = min(count, QUARTERS * -(-count // (QUARTERS * size)))
    bounds = [count * part // max(1, parts) for part in range(parts + 1)]
    return [assignments[first:last] for first, last in pairwise(bounds)]


class VirtualNodes(ABC):
    """The nodes of a client that are all on this machine (`server.grid.NodeGrid`). `replies` trains a round."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._sent: list[Assignment] = []
        self._round: list[Assignment] = []

    def nodes(self) -> list[int]:
        return self.client.sites.nodes

    def population(self) -> list[int]:
        """All of them: `rank` is of the ranks that the spec mixes, so each affords the run (`server.clock.Virtual`)."""
        return self.nodes()

    def rank(self, node: int) -> int:
        """One of `adapter.ranks` by key: what a virtual node can afford."""
        return rank_of(self.client.spec, node)

    def describe(self) -> Description:
        return self.client.describe()

    def part(self, assignments: Sequence[Assignment]) -> None:
        self._round = list(assignments)

    def send(self, assignments: Sequence[Assignment]) -> None:
        self._sent = list(assignments)

    def parts(self) -> list[Sequence[Assignment]]:
        """What was sent, in the parts of its round, which do not depend on what of them is answered already."""
        sent, self._sent = self._sent, []
        whole, self._round = self._round or sent, []
        waiting = set(sent)
        cut = ([asked for asked in own if asked in waiting] for own in portions(whole, self.client.together()))
        return [own for own in cut if own]

    @abstractmethod
    def replies(self, timeout: float) -> Iterator[Update | Failure]: ...

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated]:
        for asked in assignments:
            self.client.load(asked)
            scores = self.client.evaluate(asked.node)
            yield Evaluated(asked.node, float(len(scores.loss)), scores.metrics(self.client.adapted.task))


class LocalGrid(VirtualNodes):
    """A grid in this process. Flower reaches it through `server.messages.Messages`; a test holds both ways equal."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self._exchanger: Exchanger | None = None

    def replies(self, timeout: float) -> Iterator[Update]:
        """Trains a portion of the round at a time. Virtual clients share this process, so there is no deadline."""
        for portion in self.parts():
            yield from self.client.train(portion)

    def exchange(self, requests: Sequence[Exchange], timeout: float) -> Iterator[Answer]:
        """Answers to an exchange of codes (`server.exchanges.ExchangeGrid`): all nodes are one cohort."""
        if self._exchanger is None:
            self._exchanger = exchanger_of(self.client)
        yield from self._exchanger.answer(requests)
