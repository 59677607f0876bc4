"""Who trains in a round."""

import math
from collections.abc import Sequence

import numpy as np

from ..protocols.keys import derive, generator
from ..protocols.spec import Participation

ORDERED = 10_000
"""Up to so many nodes a draw puts all of them in order; of more it looks at those that it draws, and at no others."""


def draw(nodes: Sequence[int], participation: Participation, seed: int, round_: int) -> tuple[int, ...]:
    """The round's cohort, ascending, keyed by run and round.

    `all` takes everybody; `fixed` takes `rate` of them without replacement, at least one, and `spare` more; `poisson` takes each with
    probability `rate`, so a draw may be small or empty. Fewer than `minimum` are filled up at random. Of more than
    ORDERED nodes, their order counts, and only those drawn are looked at.
    """
    random = generator(derive(seed, "participation", round_))
    if participation.sampling == "all":
        return tuple(sorted(nodes))
    if len(nodes) > ORDERED:
        chosen = _chosen(len(nodes), participation, random)
        return tuple(sorted(nodes[i] for i in random.choice(len(nodes), chosen, replace=False, shuffle=False)))
    everybody = sorted(nodes)
    order = random.permutation(len(everybody))
    first = order[: _chosen(len(everybody), participation, random)]
    return tuple(everybody[i] for i in np.sort(first))


def _chosen(nodes: int, participation: Participation, random: np.random.Generator) -> int:
    """How many of the nodes a draw takes."""
    if participation.sampling == "poisson":
        chosen = int(random.binomial(nodes, participation.rate))
    else:
        chosen = with_spare(cohort_size(nodes, participation), participation)
    return min(nodes, max(chosen, participation.minimum))


def with_spare(size: int, participation: Participation) -> int:
    """How many are drawn so that `size` of them are likely to answer."""
    return math.ceil(size * (1 + participation.spare))


def wanted(drawn: int, participation: Participation) -> int:
    """How many answers end a round of `drawn` nodes: the slowest of those that were drawn as spares are not waited for."""
    if participation.sampling != "fixed":
        return drawn
    return min(size for size in range(1, drawn + 1) if with_spare(size, participation) >= drawn) if drawn else 0


def cohort_size(nodes: int, participation: Participation) -> int:
    """Nodes in a round: exact for `all` and `fixed`, the mean for `poisson` (rounded; minimum not counted)."""
    if participation.sampling == "all" or nodes == 0:
        return nodes
    return min(nodes, max(1, participation.minimum, round(participation.rate * nodes)))
