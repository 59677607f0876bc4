"""The updates of a round beside what they started from, as a whole and module by module."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.lowrank import LowRank, Matrix, weighted_sum
from ..protocols.errors import SpecError
from ..protocols.layout import AdapterLayout, Flat, Pair, TensorSpec
from .grid import Evaluated, Failure

ROUNDING = 1e-9
"""What a sum of weights may miss of 1."""


@dataclass(frozen=True)
class Contribution:
    """One admitted and decoded update: `change` is fp32 over the recipe's trained layout, zero beyond the node's
    `rank` (0: the adapter's own). `information` is how sure the node is of each value, where nodes send that.
    Weights of a round sum to 1."""

    weight: float
    change: Flat
    rank: int = 0
    information: Flat | None = None


def evaluation_of(answers: Iterable[Evaluated | Failure]) -> dict[str, Any]:
    """What nodes say of an adapter, as part of a round's row: the mean over all their examples."""
    scores = [answer for answer in answers if isinstance(answer, Evaluated) and answer.weight > 0]
    total = sum(score.weight for score in scores)
    names = set.intersection(*(set(score.metrics) for score in scores)) if scores else set()
    means = {name: sum(score.weight * score.metrics[name] for score in scores) / total for name in sorted(names)}
    return {"federated": means | {"nodes": len(scores), "examples": total}}


@dataclass(frozen=True)
class Module:
    """One adapted module in a round, float64: the factors it started from, and each node's after training.

    A node's factors are cut at its rank, but where all nodes share one A: there a node leaves the columns of B that
    it was not sent as they were.
    """

    pair: Pair
    start: LowRank
    ended: list[LowRank]
    weights: list[float]

    def mean(self) -> LowRank:
        """`Σ w_k·B_k·A_k`; its rank stays r where all nodes share one A.

        Weights that sum to less than 1, as clipping gives, take a step of that size: the rest stays at the start.
        """
        terms = list(zip(self.weights, self.ended, strict=True))
        rest = 1.0 - sum(self.weights)
        if rest > ROUNDING:
            terms.append((rest, self.start))
        if any(product.a is not self.start.a for product in self.ended):
            return weighted_sum(terms)
        b = sum((weight * product.b for weight, product in terms), np.zeros_like(self.start.b))
        return LowRank(b, self.start.a)

    def unsent(self) -> list[tuple[float, LowRank]]:
        """The parts of the start that nodes of a smaller rank were not sent, each with the weight of those nodes."""
        parts: dict[int, float] = {}
        for weight, product in zip(self.weights, self.ended, strict=True):
            if product.rank < self.pair.rank:
                parts[product.rank] = parts.get(product.rank, 0.0) + weight
        return [(weight, LowRank(self.start.b[:, rank:], self.start.a[rank:])) for rank, weight in parts.items()]


@dataclass(frozen=True)
class Round:
    """The updates of a round beside what they started from: `adapter` is fp32 over the whole `layout`."""

    layout: AdapterLayout
    trained: AdapterLayout
    adapter: Flat
    contributions: Sequence[Contribution]

    def mean(self) -> Flat:
        """The weighted mean of the changes, each tensor for itself; fp32 over `trained`."""
        total = np.zeros(self.trained.size, np.float64)
        for contribution in self.contributions:
            total += contribution.weight * contribution.change.astype(np.float64)
        return total.astype(np.float32)

    def changes(self) -> Matrix:
        """All changes, fp32, (K, trained.size)."""
        return np.stack([c.change for c in self.contributions])

    def information(self) -> Matrix:
        """All diagonal Fisher information, fp32, (K, trained.size). Raises SpecError where a node has sent none."""
        known = [c.information for c in self.contributions if c.information is not None]
        if len(known) < len(self.contributions):
            raise SpecError(
                f'recipe.aggregator = "fisher": {len(self.contributions) - len(known)} of {len(self.contributions)} '
                'nodes sent no Fisher information, which fedapt\'s own clients alone do. Nearest legal: "mean".'
            )
        return np.stack(known)

    def module(self, pair: Pair) -> Module:
        b, a = (self.layout.view(self.adapter, spec.name).astype(np.float64) for spec in (pair.b, pair.a))
        shares_a = pair.a.name not in self.trained.offsets
        ended = []
        for contribution, own_b, own_a in zip(
            self.contributions, self._trained(pair.b, b), self._trained(pair.a, a), strict=True
        ):
            rank = pair.rank if shares_a else min(contribution.rank or pair.rank, pair.rank)
            ended.append(LowRank(own_b[:, :rank], own_a if rank == len(own_a) else own_a[:rank]))
        return Module(pair, LowRank(b, a), ended, [c.weight for c in self.contributions])

    def _trained(self, spec: TensorSpec, start: Matrix) -> Iterable[Matrix]:
        """A tensor as each node has it after training: `start` itself where nobody trains it."""
        if spec.name not in self.trained.offsets:
            return [start] * len(self.contributions)
        first = self.trained.offsets[spec.name]
        changes = np.array([c.change[first : first + spec.size] for c in self.contributions], np.float32)
        return np.asarray(start + changes.reshape(len(changes), *spec.shape))
