"""What follows the step of a round: the state is brought into the form in which the next round travels."""

import numpy as np

from ..kernels.lowrank import LowRank, Matrix, refactor
from ..protocols.layout import FROZEN_B_SUFFIX, ROTATION_SUFFIX, AdapterLayout, Flat
from ..protocols.shared import SharedAdapter
from .optimizers import Buffers


def settle(shared: SharedAdapter, state: Flat, buffers: Buffers, number: int) -> tuple[Flat, Buffers]:
    """The state after the step of round `number`, as the next round starts from it, and its buffers."""
    recipe, layout = shared.recipe, shared.layout
    if recipe.refactorizes and number % recipe.every(shared.settings) == 0:
        return _refactor(shared.received(number), layout, state, buffers)
    before, after = (recipe.refreshed(layout, n, shared.settings) for n in (number, number + 1))
    if after > before:
        return _start_afresh(shared, state, number), {}
    return state, buffers


def effective_rank(layout: AdapterLayout, adapter: Flat) -> float | None:
    """The mean over modules of the effective rank of ΔW, frozen factors included (`LowRank.effective_rank`).

    None where no tensors are a pair of factors: there nothing is measured.
    """
    tensors = layout.split(adapter)
    ranks = []
    for pair in layout.pairs:
        b, a = tensors[pair.b.name], tensors[pair.a.name]
        if pair.frozen[0] in tensors:
            b = np.concatenate([b, tensors[pair.frozen[0]]], axis=1)
            a = np.concatenate([a, tensors[pair.frozen[1]]])
        ranks.append(LowRank(b, a).effective_rank())
    return float(np.mean(ranks)) if ranks else None


def _refactor(received: AdapterLayout, layout: AdapterLayout, state: Flat, buffers: Buffers) -> tuple[Flat, Buffers]:
    """FedSVD (arXiv 2505.12805 §3): each `B·A` is refactored with A orthonormal.

    Momentum is linear in B's basis and turns with it; no other buffer depends on the basis. Rotations are
    re-orthonormalized each time, so that their product cannot drift.
    """
    state, buffers = state.copy(), {name: buffer.copy() for name, buffer in buffers.items()}
    tensors = received.split(state)
    momentum = layout.select({"B", "other"}).split(buffers["momentum"]) if "momentum" in buffers else {}
    for pair in layout.pairs:
        b, rotation = refactor(tensors[pair.b.name])
        total = tensors[pair.module + ROTATION_SUFFIX]
        tensors[pair.b.name][...] = b
        total[...] = _nearest_orthogonal(rotation @ total.astype(np.float64))
        if momentum:
            momentum[pair.b.name][...] = momentum[pair.b.name] @ rotation.T
    return state, buffers


def _start_afresh(shared: SharedAdapter, state: Flat, number: int) -> Flat:
    """`refresh`: B joins the frozen B's, and the next round starts from zero in the row space of another A."""
    tensors = dict(shared.received(number).split(state))
    for pair in shared.layout.pairs:
        frozen = pair.module + FROZEN_B_SUFFIX
        tensors[frozen] = np.concatenate([tensors[frozen], tensors[pair.b.name]], axis=1)
        tensors[pair.b.name] = np.zeros_like(tensors[pair.b.name])
    return shared.received(number + 1).join(tensors)


def _nearest_orthogonal(matrix: Matrix) -> Matrix:
    u, _, vt = np.linalg.svd(matrix)
    return np.asarray(u @ vt)
