"""From the state before a round to the state after it: aggregate, step, settle."""

from collections.abc import Sequence

import numpy as np

from ..protocols.layout import AdapterLayout, Flat
from ..protocols.shared import SharedAdapter
from . import optimizers
from .aggregation import aggregate
from .optimizers import Buffers
from .rounds import Contribution, Round
from .settling import settle

RESIDUAL = "residual"
"""The buffer of what the server keeps of the products for the next round; no optimizer reads it."""


def advance(
    shared: SharedAdapter,
    state: Flat,
    received: Flat,
    buffers: Buffers,
    contributions: Sequence[Contribution],
    *,
    number: int,
) -> tuple[Flat, Buffers, float]:
    """The state that round `number + 1` starts from, its buffers, and the aggregation error of round `number`.

    `state` is fp32 over `shared.received(number)`; `received` is the same as it arrived at the nodes, which a lossy
    downlink rounds. Without a contribution no tensor moves.
    """
    error, state, buffers = 0.0, state.copy(), dict(buffers)
    if contributions:
        recipe, settings = shared.recipe, shared.settings
        stepped, whole = shared.stepped(number), recipe.stepped(shared.layout, number)
        updates = Round(shared.layout, shared.sent(number), shared.whole(received, number), contributions)
        result = aggregate(recipe, settings, updates, buffers.pop(RESIDUAL, None), number=number)
        change = whole.cut(result.change, stepped)
        step, moved_buffers = optimizers.step(change, _cut(buffers, whole, stepped), settings, stepped)
        buffers = _merged(buffers, moved_buffers, whole, stepped)
        if result.residual.size:
            buffers[RESIDUAL] = result.residual
        if recipe.replaces:  # any other change is a step, and keeps what a lossy downlink rounded away
            state = received.copy()
        moved = shared.received(number).split(state)
        for name, values in stepped.split(step).items():
            moved[name] += values
        error = result.error
    return *settle(shared, state, buffers, number), error


def _cut(buffers: Buffers, whole: AdapterLayout, part: AdapterLayout) -> Buffers:
    """The optimizer's buffers of a fragment. One number a tensor (NovoGrad's) goes with no fragment."""
    return {name: whole.cut(b, part) if part != whole else b for name, b in buffers.items()}


def _merged(buffers: Buffers, moved: Buffers, whole: AdapterLayout, part: AdapterLayout) -> Buffers:
    """The buffers after a step: those of the fragment moved, the others as they were."""
    if part == whole:
        return moved
    merged = {}
    for name, values in moved.items():
        merged[name] = buffers.get(name, np.zeros(whole.size, np.float32)).copy()
        views = whole.split(merged[name])
        for tensor, own in part.split(values).items():
            views[tensor][...] = own
    return merged
