"""Which examples a node trains on, in which order: keyed by run, round and node, and by nothing else.

Batches hold examples of like length, so little is padded. Two nodes visit their lengths in the same order (quantile
by quantile), so that the members of a cohort pad little too, although each has its own data.
"""

from functools import lru_cache
from math import ceil

import numpy as np

from ..protocols.keys import derive, generator
from ..protocols.spec import Local
from .tasks import Indices

GOLDEN = (5**0.5 - 1) / 2


def plan_batches(lengths: Indices, local: Local, seed: int, round_: int, node: int) -> list[Indices]:
    """Positions in the node's own examples, one array a step.

    `local.steps` batches, or `local.epochs` passes (one, if neither is set), at least one batch; a node with fewer
    examples than a batch uses all of them in each step. No examples give no batches.
    """
    count = len(lengths)
    if count == 0:
        return []
    epoch_steps, steps = -(-count // local.batch_size), steps_of(count, local)
    if epoch_steps == 1:  # nothing to draw
        return [np.arange(count)] * steps
    batches: list[Indices] = []
    for epoch in range(-(-steps // epoch_steps)):
        random = generator(derive(seed, "batches", round_, node, epoch))
        near_length = lengths * random.uniform(0.9, 1.1, count)
        by_length = np.array_split(np.argsort(near_length, kind="stable"), epoch_steps)
        batches += [by_length[i] for i in _order(epoch_steps, seed, round_, epoch)]
    return batches[:steps]


def steps_of(count: int, local: Local) -> int:
    """How many steps a node with so many examples takes in a round."""
    return local.steps or ceil(-(-count // local.batch_size) * (local.epochs or 1.0))


@lru_cache(maxsize=64)
def _order(count: int, seed: int, round_: int, epoch: int) -> Indices:
    """The order of a pass over `count` batches: one for all nodes with as many."""
    return _quantile_order(count, generator(derive(seed, "quantiles", round_, epoch)).random())


def _quantile_order(count: int, start: float) -> Indices:
    """A permutation of 0 … count−1 whose t-th item lies near the quantile `frac(start + t·golden)`, for any count."""
    quantiles = (start + GOLDEN * np.arange(count)) % 1.0
    return np.asarray(np.argsort(np.argsort(quantiles)), np.int64)
