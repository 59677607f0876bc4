"""What the codes of an exchange become: the body of a Step.

Where nodes probe directions of their own, the codes are kept as they came. Where all probe the same ones, they are
added: plainly, without the extreme ones (trimmed mean; Yin et al., arXiv 1803.01498, §4), or, under client-level privacy,
as vectors that are clipped and summed with noise, and only that sum leaves this file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels.directions import Doubles
from ..privacy.events import Event
from ..protocols.errors import PayloadError
from ..protocols.exchange import Answer, Terms
from ..protocols.scalars import Counts
from ..protocols.spec import RunSpec
from .private import ClientLevel


@dataclass(frozen=True)
class Asked:
    """One exchange as it was sent: its number, the scale of codes, and each node's slot and picks."""

    number: int
    scale: int
    slots: Mapping[int, int]
    picks: Mapping[int, bytes]

    def refusal(self, answer: Answer, terms: Terms) -> str | None:
        """Why an answer with codes is not taken, or None."""
        if answer.node not in self.slots:
            return f"node {answer.node} was not asked in this exchange"
        if answer.number != self.number:
            return f"stale: exchange {answer.number}, not {self.number}"
        try:
            terms.code.decode(answer.codes, terms.directions)
        except PayloadError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Reduction:
    """`nodes` is how many an exchange expects: a constant."""

    spec: RunSpec
    terms: Terms
    nodes: int
    private: ClientLevel | None = None

    def body(self, asked: Asked, answers: Mapping[int, Answer]) -> tuple[bytes, list[Event]]:
        """The body of the Step, and what it is to be charged with; `answers` are admitted, by node."""
        if self.terms.mode != "shared":
            own = sorted((asked.slots[node], asked.picks.get(node, b""), a.codes) for node, a in answers.items())
            return self.terms.body(own), []
        decoded = [self.terms.code.decode(answers[n].codes, self.terms.directions) for n in sorted(answers)]
        counts: Counts = np.array(decoded, np.int64).reshape(len(answers), self.terms.directions)
        events: list[Event] = []
        if self.private is not None:
            sums, events = self._noised(list(counts), asked)
        elif self.spec.recipe.aggregator == "trimmed-mean" and answers:
            sums = trimmed(counts, self.spec.recipe.byzantine, self.nodes)
        else:
            sums = counts.sum(axis=0)
        most = self.terms.code.largest * max(self.nodes, len(counts) if self.private is None else 0)
        return np.clip(sums, -most, most).astype("<i4").tobytes(), events

    def released(self, counts: Sequence[Counts], scale: int, number: int) -> tuple[Doubles, list[Event]]:
        """The noised sum of nodes' slopes, float64 (K,): what a Step rounds to its steps, and an audit looks at.

        Clipping is of the slopes that the codes stand for, so a node that lies is clipped too.
        """
        assert self.private is not None
        slopes = [np.ldexp(own.astype(np.float64), scale).astype(np.float32) for own in counts]
        mean, _, events = self.private.release(slopes, {}, number)
        return mean.astype(np.float64) * self.private.mechanism.expected, list(events)

    def _noised(self, counts: Sequence[Counts], asked: Asked) -> tuple[Counts, list[Event]]:
        total, events = self.released(counts, asked.scale, asked.number)
        return np.rint(np.ldexp(total, -asked.scale)).astype(np.int64), events


def trimmed(counts: Counts, byzantine: float, nodes: int) -> Counts:
    """`nodes` times the trimmed mean of each column, rounded: int64 (K,) from counts (J, K).

    ⌈byzantine·J⌉ of the J values are left out at either end, as many as leave one.

    Formal guarantees: if at most that many rows are dishonest, each column lies between the smallest and the largest
    honest value, times `nodes`; and one row moves it by at most nodes·2·largest / (J − 2·trimmed), whatever it holds.
    """
    rows = len(counts)
    cut = min(int(np.ceil(byzantine * rows)), (rows - 1) // 2)
    kept = np.sort(counts, axis=0)[cut : rows - cut]
    result: Counts = np.rint(kept.mean(axis=0) * nodes).astype(np.int64)
    return result
