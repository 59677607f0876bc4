"""From the state before a round to the state after it: aggregate, step, settle."""

from collections.abc import Sequence

from ..protocols.layout import Flat
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
        stepped = recipe.stepped(shared.layout, number)
        updates = Round(shared.layout, shared.sent(number), shared.whole(received, number), contributions)
        result = aggregate(recipe, settings, updates, buffers.pop(RESIDUAL, None), number=number)
        step, buffers = optimizers.step(result.change, buffers, settings, stepped)
        if result.residual.size:
            buffers[RESIDUAL] = result.residual
        if recipe.replaces:  # any other change is a step, and keeps what a lossy downlink rounded away
            state = received.copy()
        moved = shared.received(number).split(state)
        for name, values in stepped.split(step).items():
            moved[name] += values
        error = result.error
    return *settle(shared, state, buffers, number), error
