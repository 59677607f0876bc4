"""Which directions of a pool are probed: at random, more often where slopes have been large (FedKSeed-Pro,
arXiv 2312.06353, §4.3: softmax of the mean absolute slope, scaled to 0 … 1).

The picks travel, two bytes each, so nodes need not repeat this; a replay needs the log alone.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..protocols.exchange import Step, Terms
from ..protocols.keys import derive, generator

Doubles = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Pool:
    """What is known of each direction: how often it was probed, and the sum of its absolute slopes; float64 (pool,)."""

    terms: Terms
    weighted: bool
    probed: Doubles = field(init=False)
    slopes: Doubles = field(init=False)

    def __post_init__(self) -> None:
        self.probed, self.slopes = np.zeros(self.terms.pool), np.zeros(self.terms.pool)

    def take(self, step: Step) -> None:
        """Learn from a Step."""
        _, indices, counts = self.terms.applied(step)
        np.add.at(self.probed, indices, 1.0)
        np.add.at(self.slopes, indices, np.ldexp(np.abs(counts).astype(np.float64), step.scale))

    def weights(self) -> Doubles:
        """With what probability each direction is picked, (pool,); one that was never probed counts as the mean."""
        if not self.weighted or not self.probed.any():
            return np.full(self.terms.pool, 1.0 / self.terms.pool)
        known = self.probed > 0
        mean = self.slopes / np.maximum(self.probed, 1.0)
        mean[~known] = mean[known].mean()
        spread = mean.max() - mean.min()
        raised = np.exp((mean - mean.min()) / spread if spread > 0 else np.zeros_like(mean))
        result: Doubles = raised / raised.sum()
        return result

    def picks(self, seed: int, number: int, slot: int) -> bytes:
        """What the node in a slot probes in an exchange: indices as an Exchange has them."""
        random = generator(derive(seed, "picks", number, slot))
        return random.choice(self.terms.pool, self.terms.directions, p=self.weights()).astype("<u2").tobytes()
