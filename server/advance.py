"""From the state before a round to the state after it: aggregate, step, settle."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..protocols.errors import SpecError
from ..protocols.layout import AdapterLayout, Flat
from ..protocols.shared import SharedAdapter
from . import optimizers
from .aggregation import aggregate
from .combining import souped
from .optimizers import Buffers
from .rounds import Contribution, Round
from .settling import settle

Score = Callable[[Flat], float]
"""A whole adapter (fp32, the layout's size) ⇒ how good it is on held-out data: higher is better."""

UNSCORED = (
    'recipe.aggregator = "greedy-soup" tries adapters on held-out data, and this server cannot evaluate: hand it '
    'evaluation data, or take the nearest legal: "mean" with recipe.weighting = "uniform", the uniform soup.'
)

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
    score: Score | None = None,
) -> tuple[Flat, Buffers, float | None]:
    """The state that round `number + 1` starts from, its buffers, and the aggregation error of round `number`
    (of its averaging, before the server's own step: `aggregation.aggregate`; None where there is no pair of factors).

    `state` is fp32 over `shared.received(number)`; `received` is the same as it arrived at the nodes, which a lossy
    downlink rounds. Without a contribution no tensor moves. Raises SpecError where the aggregator needs a `score` and
    there is none.
    """
    if contributions and shared.settings.aggregator == "greedy-soup":
        trial = _trial(shared, state, received, buffers, number=number, score=score)
        contributions = souped(contributions, trial)
    error: float | None = 0.0 if shared.layout.pairs else None
    state, buffers = state.copy(), dict(buffers)
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


def _trial(
    shared: SharedAdapter, state: Flat, received: Flat, buffers: Buffers, *, number: int, score: Score | None
) -> Callable[[Flat], float]:
    """A change of the round ⇒ the score of the adapter that it would give."""
    if score is None:
        raise SpecError(UNSCORED)
    judge, plain = score, replace(shared, settings=shared.settings.model_copy(update={"aggregator": "mean"}))

    def trial(change: Flat) -> float:
        after, _, _ = advance(plain, state, received, buffers, [Contribution(1.0, change)], number=number)
        return judge(shared.whole(after, number + 1))

    return trial


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
        whole.put(merged[name], part.split(values))
    return merged
