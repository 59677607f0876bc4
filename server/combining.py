"""How the updates of a round become one: a weighted mean, or a rule that a minority of bad or odd nodes cannot steer.

Rules on distances look at the nodes' products `B·A`, which are the same in every gauge, and end in weights: any recipe
can take them. Rules on entries look at each number for itself: they are for recipes in which all nodes hold the same
factor beside the one that they train (`protocols/legality.py`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..kernels import merging, robust
from ..kernels.lowrank import LowRank, Matrix
from ..protocols.layout import Flat
from ..protocols.spec import Recipe as Settings
from .rounds import Round


def weighed(updates: Round, settings: Settings) -> Round:
    """The round with the weights that a rule on distances gives; unchanged where the aggregator is none.

    Krum is meant for `byzantine` of the nodes, and for as many as it can bear where they are fewer than 2f + 3.
    """
    count = len(updates.contributions)
    weights = [c.weight for c in updates.contributions]
    hostile = max(0, min(int(settings.byzantine * count), (count - 3) // 2))
    match settings.aggregator:
        case "krum" | "multi-krum" if count >= 3:
            keep = 1 if settings.aggregator == "krum" else count - hostile
            weights = robust.krum(_gram(updates), hostile, keep).tolist()
        case "geometric-median":
            weights = robust.geometric_median(_gram(updates), weights).tolist()
        case "clip":
            weights = robust.clip(_gram(updates), weights).tolist()
        case _:
            return updates
    pairs = zip(updates.contributions, weights, strict=True)
    return replace(updates, contributions=[replace(c, weight=weight) for c, weight in pairs])


def combined(updates: Round, settings: Settings) -> Flat:
    """The change of the round, each tensor for itself, fp32 over `updates.trained`: the mean, or a rule on entries."""
    weights = [c.weight for c in updates.contributions]
    match settings.aggregator:
        case "median":
            return _fp32(robust.coordinate_median(updates.changes(), weights))
        case "trimmed-mean":
            return _fp32(robust.trimmed_mean(updates.changes(), weights, min(settings.byzantine, 0.49)))
        case "ties":
            return merging.ties(updates.changes(), weights)
        case "breadcrumbs":
            # The paper adds up the changes of different tasks; those of a round are of one, and K times too far.
            sizes = [tensor.size for tensor in updates.trained.tensors]
            return merging.breadcrumbs(updates.changes(), sizes, weights, scale=1 / len(weights))
        case "pcb":
            return merging.pcb(updates.changes(), weights)
        case _:
            return updates.mean()


def _gram(updates: Round) -> Matrix:
    """Inner products of the nodes' changes, (K, K)."""
    count = len(updates.contributions)
    own = set(updates.trained.offsets) - {spec.name for pair in updates.layout.pairs for spec in (pair.a, pair.b)}
    views = [updates.trained.split(c.change) for c in updates.contributions]
    others = [
        np.concatenate([view[name].ravel() for name in sorted(own)] or [np.zeros(0, np.float32)]) for view in views
    ]
    total = np.asarray(robust.gram([[] for _ in range(count)], others))
    for pair in updates.layout.pairs:
        module = updates.module(pair)
        total = total + robust.gram([[_change(module.start.b, module.start.a, end.b, end.a)] for end in module.ended])
    return total


def _change(b: Matrix, a: Matrix, new_b: Matrix, new_a: Matrix) -> LowRank:
    rank = len(new_a)
    return robust.product_change(b[:, :rank], a[:rank], new_b, new_a)


def _fp32(values: Sequence[float] | Matrix) -> Flat:
    return np.asarray(values, np.float32)
