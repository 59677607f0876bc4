"""The global adapter as it travels down, and how either side rebuilds the whole adapter from it.

The server's state *is* the vector that nodes receive: all tensors that have changed since the start, in their
smallest form. What never changes (FFA's A) or changes by a rotation alone (FedSVD's A) is rebuilt from the start,
which every node holds.
"""

import numpy as np

from .layout import A_SUFFIX, ROTATION_SUFFIX, AdapterLayout, Flat
from .recipes import Recipe


def initial_state(recipe: Recipe, layout: AdapterLayout, start: Flat) -> Flat:
    """The state of round 0, fp32, (recipe.downlink(layout).size,): the start itself, every rotation the identity."""
    tensors = layout.split(start)
    for pair in layout.pairs:
        tensors[pair.module + ROTATION_SUFFIX] = np.eye(pair.rank, dtype=np.float32)
    return recipe.downlink(layout).join(tensors)


def whole_adapter(recipe: Recipe, layout: AdapterLayout, start: Flat, state: Flat) -> Flat:
    """The whole adapter, fp32, (layout.size,), that `state` stands for. `A = rotation·A₀` where A rotates."""
    received = recipe.downlink(layout).split(state)
    tensors = layout.split(start.copy())
    for name, view in tensors.items():
        if name in received:
            view[...] = received[name]
    if recipe.refactorizes:
        for pair in layout.pairs:
            tensors[pair.a.name][...] = received[pair.module + ROTATION_SUFFIX] @ tensors[pair.module + A_SUFFIX]
    return layout.join(tensors)
