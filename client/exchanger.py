"""A node's side of an exchange: catch up, probe, answer in codes. It knows no model: slopes come from a `Prober`.

Virtual nodes of one process share one replica, because all nodes of a run hold the same bits. Whatever the server sends is
checked; a node whose state turns out to be another one says that it is lost, and begins again from its start.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..kernels.directions import Directions, Doubles, Floats
from ..kernels.replica import Replica
from ..protocols.errors import PayloadError, RunError
from ..protocols.exchange import Answer, Exchange, Terms
from ..protocols.keys import derive
from ..protocols.scalars import SCALES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """What one node measures in one exchange: the slopes of its loss along K directions, at ± `radius`."""

    node: int
    number: int
    directions: Directions
    radius: float


@dataclass(frozen=True)
class Slopes:
    """Projected gradients, float64 (K,); None where the node has no data. `refusal` is why a node does not take part.

    `epsilon` and `private` are its account, where it keeps one and the exchange is looked at.
    """

    values: Doubles | None = None
    refusal: str = ""
    epsilon: float | None = None
    private: bool = False


class Prober(Protocol):
    """Measures slopes: a model with its data, or a function that a test writes down."""

    def __call__(self, weights: Floats, probes: Sequence[Probe]) -> list[Slopes]:
        """One Slopes a probe, all at the same `weights`, fp32 (n,)."""


class Exchanger:
    """One run at this site, for one node or many. `start` is the adapter that the run begins with, fp32 (n,)."""

    def __init__(self, run: str, terms: Terms, start: Floats, prober: Prober) -> None:
        self.run, self.terms, self.prober = run, terms, prober
        self.start = self.replica = Replica.begin(terms, start)

    def answer(self, requests: Sequence[Exchange]) -> Iterator[Answer]:
        """One Answer a request. A request that makes no sense is answered with the reason, and harms no other."""
        ready: list[tuple[Exchange, Probe]] = []
        for request in requests:
            reason = self._reason(request)
            if reason:
                yield Answer(request.node, request.number, "refused", reason=reason)
            elif not self._catch_up(request):
                yield Answer(request.node, request.number, "lost")
            else:
                try:
                    ready.append((request, self._probe(request)))
                except PayloadError as error:
                    yield Answer(request.node, request.number, "refused", reason=str(error))
        if ready:
            slopes = self.prober(self.replica.weights, [probe for _, probe in ready])
            for (request, _), own in zip(ready, slopes, strict=True):
                yield self._coded(request, own)

    def reply(self, node: int, body: bytes) -> bytes:
        """`answer` to one request, as a link carries both. Raises PayloadError for bytes that are no exchange."""
        (answer,) = self.answer([Exchange.from_bytes(node, body)])
        return answer.to_bytes()

    def _reason(self, request: Exchange) -> str:
        if request.run != self.run:
            return f'this node trains run "{self.run}", and was asked for "{request.run}"'
        if request.scale not in SCALES:
            return f"a step of 2^{request.scale} is outside of 2^{SCALES[0]} to 2^{SCALES[-1]}"
        return ""

    def _catch_up(self, request: Exchange) -> bool:
        """Apply what the request brings; whether this node then stands where it asks."""
        try:
            self._read(request.snapshot, request.number)
            for step in request.steps:
                if step.number > self.replica.number:
                    self.replica = self.replica.after(step)
            if self.replica.number != request.number - 1:
                return False
            self.replica.require(request.proof)
        except (PayloadError, RunError) as error:
            logger.warning("exchange %d: %s; this node begins again from its start", request.number, error)
            self.replica = self.start
            return False
        return True

    def _read(self, snapshot: bytes, number: int) -> None:
        """A snapshot counts where this node is behind it, or where the server has gone back."""
        if self.replica.number > number - 1:
            self.replica = self.start
        if snapshot and self.replica.number < number - 1:
            self.replica = self.start.restored(snapshot)

    def _probe(self, request: Exchange) -> Probe:
        streams, indices = self.terms.probed(request.number, request.slot, request.picks)
        return Probe(request.node, request.number, Directions(self.terms.key, streams, indices), request.radius)

    def _coded(self, request: Exchange, own: Slopes) -> Answer:
        node, number = request.node, request.number
        if own.refusal:
            return Answer(node, number, "refused", reason=own.refusal)
        if own.values is None:
            return Answer(node, number, "empty")
        key = derive(self.terms.key, "rounding", number, node)
        codes = self.terms.code.encode(own.values, request.scale, key)
        return Answer(node, number, "codes", codes, epsilon=own.epsilon, private=own.private)
