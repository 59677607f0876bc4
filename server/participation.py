"""Who trains in a round."""

from collections.abc import Sequence

from ..protocols.keys import derive, generator
from ..protocols.spec import Participation


def draw(nodes: Sequence[int], participation: Participation, seed: int, round_: int) -> tuple[int, ...]:
    """The round's cohort, ascending, keyed by run and round.

    `all` takes everybody; `fixed` takes `rate` of them without replacement, at least one; `poisson` takes each with
    probability `rate`, so a draw may be small or empty. Fewer than `minimum` are filled up at random.
    """
    everybody = sorted(nodes)
    random = generator(derive(seed, "participation", round_))
    order = [everybody[i] for i in random.permutation(len(everybody))]
    match participation.sampling:
        case "all":
            chosen = len(everybody)
        case "fixed":
            chosen = cohort_size(len(everybody), participation)
        case "poisson":
            chosen = int(random.binomial(len(everybody), participation.rate))
    return tuple(sorted(order[: max(chosen, min(participation.minimum, len(everybody)))]))


def cohort_size(nodes: int, participation: Participation) -> int:
    """Nodes in a round: exact for `all` and `fixed`, the mean for `poisson` (rounded; minimum not counted)."""
    if participation.sampling == "all" or nodes == 0:
        return nodes
    return min(nodes, max(1, participation.minimum, round(participation.rate * nodes)))
