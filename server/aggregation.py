"""Updates of a round ⇒ one change of the adapter, and the error that this way of aggregating makes.

What a federation wants is the mean of the nodes' products, `mean(B_k·A_k)`. Averaging A and B each for itself gives
something else; how far off it is, is reported for every round.

Sums run in the order given (node-id order) and in float64, so equal updates give equal bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels.lowrank import LowRank, Matrix, refactor, weighted_sum
from ..protocols.layout import ROTATION_SUFFIX, AdapterLayout, Flat, Pair
from ..protocols.recipes import Recipe
from .optimizers import Buffers


@dataclass(frozen=True)
class Contribution:
    """One admitted and decoded update: `change` is fp32 over the recipe's trained layout; weights sum to 1."""

    weight: float
    change: Flat


def aggregate(
    recipe: Recipe, layout: AdapterLayout, adapter: Flat, contributions: Sequence[Contribution]
) -> tuple[Flat, float]:
    """The change of the round (fp32, over the trained layout) and its relative error.

    `adapter` (fp32, the whole layout) is what the nodes started from. The error is
    `‖mean(B_k·A_k) − B̂·Â‖ / ‖mean(B_k·A_k)‖` over all modules together (Frobenius), 0 where nothing was learned.
    """
    trained = recipe.trained(layout)
    change = _mean(contributions)
    if recipe.averages == "products":
        change = _truncated_products(layout, trained, adapter, contributions, change)
    return change, _error(layout, trained, adapter, contributions, change)


def settle(recipe: Recipe, layout: AdapterLayout, state: Flat, buffers: Buffers) -> tuple[Flat, Buffers]:
    """The state after its step, brought into the recipe's form (fp32, over the downlink layout).

    FedSVD (arXiv 2505.12805 §3): each `B·A` is refactored with A orthonormal; momentum is linear in B's basis
    and turns with it, and no other buffer depends on the basis. Rotations are re-orthonormalized each round, so that their product cannot drift.
    """
    if not recipe.refactorizes:
        return state, buffers
    downlink, trained = recipe.downlink(layout), recipe.trained(layout)
    state, buffers = state.copy(), {name: buffer.copy() for name, buffer in buffers.items()}
    tensors = downlink.split(state)
    momentum = trained.split(buffers["momentum"]) if "momentum" in buffers else {}
    for pair in layout.pairs:
        b, rotation = refactor(tensors[pair.b.name])
        total = tensors[pair.module + ROTATION_SUFFIX]
        tensors[pair.b.name][...] = b
        total[...] = _nearest_orthogonal(rotation @ total.astype(np.float64))
        if momentum:
            momentum[pair.b.name][...] = momentum[pair.b.name] @ rotation.T
    return state, buffers


def _mean(contributions: Sequence[Contribution]) -> Flat:
    total = np.zeros(contributions[0].change.shape, np.float64)
    for contribution in contributions:
        total += contribution.weight * contribution.change.astype(np.float64)
    return total.astype(np.float32)


def _truncated_products(
    layout: AdapterLayout,
    trained: AdapterLayout,
    adapter: Flat,
    contributions: Sequence[Contribution],
    mean: Flat,
) -> Flat:
    """FlexLoRA (arXiv 2402.11505 §3.2): the factors whose product is nearest to the mean product, as a change."""
    start, change = layout.split(adapter), trained.split(mean.copy())
    for pair in layout.pairs:
        best = _mean_product(pair, layout, trained, adapter, contributions).truncate(pair.rank)
        change[pair.b.name][...] = best.b - start[pair.b.name]
        change[pair.a.name][...] = best.a - start[pair.a.name]
    return trained.join(change)


def _mean_product(
    pair: Pair,
    layout: AdapterLayout,
    trained: AdapterLayout,
    adapter: Flat,
    contributions: Sequence[Contribution],
) -> LowRank:
    """`Σ w_k·B_k·A_k` of one module, float64; its rank stays r where no node trained A."""
    start = layout.split(adapter)
    terms = [(c.weight, _product(pair, start, trained.split(c.change))) for c in contributions]
    if pair.a in trained.tensors:
        return weighted_sum(terms)
    b = sum((weight * term.b for weight, term in terms), np.zeros(pair.b.shape))
    return LowRank(np.asarray(b), terms[0][1].a)


def _product(pair: Pair, start: dict[str, Matrix], change: dict[str, Matrix]) -> LowRank:
    """One node's `(B + ΔB)·(A + ΔA)`, float64."""

    def moved(name: str) -> Matrix:
        return np.asarray(start[name].astype(np.float64) + change.get(name, np.float64(0.0)))

    return LowRank(moved(pair.b.name), moved(pair.a.name))


def _error(
    layout: AdapterLayout,
    trained: AdapterLayout,
    adapter: Flat,
    contributions: Sequence[Contribution],
    change: Flat,
) -> float:
    start, step = layout.split(adapter), trained.split(change)
    missed = wanted = 0.0
    for pair in layout.pairs:
        mean = _mean_product(pair, layout, trained, adapter, contributions)
        wanted += mean.norm() ** 2
        missed += mean.minus(_product(pair, start, step)).norm() ** 2
    return float(np.sqrt(missed / wanted)) if wanted > 0 else 0.0


def _nearest_orthogonal(matrix: Matrix) -> Matrix:
    u, _, vt = np.linalg.svd(matrix)
    return np.asarray(u @ vt)
