"""How the updates of a round become one: a weighted mean, or another rule.

Rules on distances look at the nodes' products `B·A`, which are the same in every gauge, and end in weights: any recipe
can take them. The greedy soup ends in weights too, and looks at scores on held-out data. Rules on entries look at each
number for itself: they are for recipes in which all nodes hold the same factor beside the one that they train
(`protocols/legality.py`). All but `mean`, `fisher` and the rules of model merging are there for bad nodes.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil

import numpy as np

from ..kernels import merging, robust
from ..kernels.lowrank import LowRank, Matrix
from ..protocols.layout import Flat
from ..protocols.spec import Recipe as Settings
from .rounds import Contribution, Round

logger = logging.getLogger(__name__)

FLOOR = 1e-6
"""Of a tensor's mean information: what a value counts at least, as in the code of Matena & Raffel (arXiv 2111.09832).

There it is absolute. Relative, the rule does not see in which unit the loss is, and small gradients are no reason for
the plain mean.
"""


def weighed(updates: Round, settings: Settings) -> Round:
    """The round with the weights that a rule on distances gives; unchanged where the aggregator is none."""
    weights = [c.weight for c in updates.contributions]
    match settings.aggregator:
        case "krum" | "multi-krum":
            weights = _krum(updates, settings)
        case "geometric-median":
            weights = robust.geometric_median(_gram(updates), weights).tolist()
        case "clip":
            weights = robust.clip(_gram(updates), weights).tolist()
        case _:
            return updates
    pairs = zip(updates.contributions, weights, strict=True)
    return replace(updates, contributions=[replace(c, weight=weight) for c, weight in pairs])


def _krum(updates: Round, settings: Settings) -> list[float]:
    """Weights of Krum or Multi-Krum against f = ⌈byzantine·K⌉ of the K nodes; what nodes claim to weigh plays no part.

    Where K < 2f + 3 it withstands fewer, ⌊(K − 3)/2⌋, and says so in the log. One or two updates cannot be told apart,
    and count alike.
    """
    count = len(updates.contributions)
    meant = ceil(settings.byzantine * count)
    withstood = max(0, min(meant, (count - 3) // 2))
    if count < 2 * meant + 3:
        logger.warning(
            'recipe.aggregator = "%s": %d updates withstand %d hostile nodes, and recipe.byzantine = %g of them means '
            "%d, which needs %d updates",
            *(settings.aggregator, count, withstood, settings.byzantine, meant, 2 * meant + 3),
        )
    if count < 3:
        return [1 / count] * count
    keep = 1 if settings.aggregator == "krum" else count - withstood
    return [float(weight) for weight in robust.krum(_gram(updates), withstood, keep)]


def souped(contributions: Sequence[Contribution], score: Callable[[Flat], float]) -> list[Contribution]:
    """The contributions with the weights of the greedy soup: all that it takes have one weight, the others 0.

    `score` judges a change of the round on held-out data: higher is better, NaN is the worst. Where even the soup
    scores below no change at all, every weight is 0. It asks for 2K + 1 scores (`kernels.merging.greedy_soup`).
    """

    def judged(change: Flat) -> float:
        value = score(change)
        return -np.inf if np.isnan(value) else value

    soup, taken = merging.greedy_soup(np.stack([c.change for c in contributions]), judged)
    if judged(soup) < judged(np.zeros_like(soup)):
        taken = ()
    return [replace(c, weight=1 / len(taken) if k in taken else 0.0) for k, c in enumerate(contributions)]


def combined(updates: Round, settings: Settings) -> Flat:
    """The change of the round, each tensor for itself, fp32 over `updates.trained`: the mean, or a rule on entries."""
    weights = [c.weight for c in updates.contributions]
    match settings.aggregator:
        case "median":
            change = _fp32(robust.coordinate_median(updates.changes(), weights))
        case "trimmed-mean":
            change = _fp32(robust.trimmed_mean(updates.changes(), weights, min(settings.byzantine, 0.49)))
        case "ties":
            change = merging.ties(updates.changes(), weights)
        case "breadcrumbs":
            # The paper adds up the changes of different tasks; those of a round are of one, and K times too far.
            sizes = [tensor.size for tensor in updates.trained.tensors]
            change = merging.breadcrumbs(updates.changes(), sizes, weights, scale=1 / len(weights))
        case "pcb":
            change = merging.pcb(updates.changes(), weights)
        case "fisher":
            change = _informed(updates, weights)
        case _:
            change = updates.mean()
    return change


def _informed(updates: Round, weights: Sequence[float]) -> Flat:
    """Each tensor's mean, weighted entry by entry with the nodes' information."""
    changes, information = updates.changes(), updates.information()
    merged: Flat = np.empty(updates.trained.size, np.float32)
    for tensor in updates.trained.tensors:
        first = updates.trained.offsets[tensor.name]
        own = slice(first, first + tensor.size)
        scale = float(information[:, own].mean(dtype=np.float64)) if tensor.size else 0.0
        # A tensor of which no node knows anything gets its weighted mean, whatever the floor.
        floor = FLOOR * scale or FLOOR
        merged[own] = merging.fisher(changes[:, own], information[:, own], weights, floor=floor)
    return merged


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
