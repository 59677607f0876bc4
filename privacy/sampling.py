"""Who takes part. An accountant's claim about sampling holds for these draws, if their source is secret.

Nobody is added to a draw that came out small or empty: that would be another distribution than the one that is charged.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from ..protocols.errors import PrivacyError
from ..protocols.keys import derive
from .randomness import Integers, Randomness


def poisson(nodes: Collection[int], rate: float, source: Randomness) -> tuple[int, ...]:
    """Each of the distinct `nodes` for itself with probability `rate`: ascending, often few, perhaps nobody.

    Raises and guarantees as `poisson_batch`.
    """
    ascending = sorted(nodes)
    return tuple(ascending[i] for i in poisson_batch(len(ascending), rate, source))


def poisson_batch(examples: int, rate: float, source: Randomness) -> Integers:
    """Each index below `examples` for itself with probability `rate`: int64, ascending, perhaps empty.

    PrivacyError where `rate` is not between 0 and 1.

    Formal guarantees: independent, each with `rate` rounded down to a multiple of 2⁻⁶⁴, so never more likely than charged.
    """
    if not 0 <= rate <= 1:
        raise PrivacyError(f"the sampling rate is {rate}, and a probability between 0 and 1 is needed")
    if rate == 1:
        return np.arange(examples)
    return np.flatnonzero(_words(examples, source) < np.uint64(rate * 2.0**64))


def fixed_size(nodes: Collection[int], size: int, source: Randomness) -> tuple[int, ...]:
    """`size` of the distinct `nodes` without replacement: ascending. Its event is replace-one, not Poisson's.

    PrivacyError where there are not so many nodes.

    Formal guarantees: each subset of that size is equally likely.
    """
    ascending = sorted(nodes)
    if not 0 <= size <= len(ascending):
        raise PrivacyError(f"{size} nodes are asked for, and there are {len(ascending)}")
    ranks = _words(len(ascending), source)
    while np.unique(ranks).size < ranks.size:  # a tie would favour a place in the list
        ranks = _words(len(ascending), source)
    return tuple(ascending[i] for i in sorted(np.argsort(ranks)[:size]))


def everybody(nodes: Collection[int]) -> tuple[int, ...]:
    """All of the `nodes`, ascending: nothing is drawn, and no amplification may be claimed."""
    return tuple(sorted(nodes))


def in_turn(nodes: Collection[int], separation: int, round_: int) -> tuple[int, ...]:
    """The `nodes` whose turn it is in a round, ascending: nothing is drawn, and no amplification may be claimed.

    A node's turn follows from its id alone, and comes once in each `separation` rounds. So whoever comes and goes moves
    no other's turn, and after a crash no turn is lost or had twice.
    """
    return tuple(sorted(node for node in nodes if (derive(0, "turn", node) - round_) % separation == 0))


def _words(count: int, source: Randomness) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.frombuffer(source.octets(8 * count), np.uint64)
