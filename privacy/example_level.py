"""Example-level privacy at a node (DP-SGD): draw, clip, noise, denominator and event, derived from ONE frozen object.

    own examples ─► Poisson batch ─► one gradient each ─► bounded (clip, round to the grid) ─► exact sum
                                                    event ◄─ ÷ constant ◄─ + discrete Gaussian ◄─┘

Nothing after the gradients depends on how many examples were drawn: an empty batch takes a noised step too, and the
denominator is the expected number of examples (Abadi et al., arXiv 1607.00133, algorithm 1, with a constant L).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf, isfinite
from typing import Any

import numpy as np

from ..protocols.errors import PrivacyError
from ..protocols.spec import RunSpec
from .calibration import noise_multiplier
from .clipping import clip
from .events import GaussianEvent, Poisson
from .mechanism import ROOM
from .noise import Floats, Grid, Values, total
from .randomness import Integers, Randomness
from .sampling import poisson_batch

Sums = np.ndarray[Any, np.dtype[Any]]
"""A sum of bounded gradients, (dimensions,): int64 steps of the grid; float64 values where there is no noise."""


@dataclass(frozen=True)
class ExampleLevel:
    """One step's release of a noised mean gradient over `dimensions` numbers, at a node with `examples` examples.

    Each example is drawn with probability q = `batch_size` / `examples` (1, where there are fewer than a batch). Its
    gradient counts with an L2 norm of at most C = `clip`, over all that is trained together. `noise_multiplier` is z,
    noise ÷ sensitivity; 0 adds none, and an infinite clip clips nothing: then it is plain SGD, and promises nothing.
    `examples` is in q and in the denominator, so it counts as public.

    Formal guarantees: n steps of `draw`, `bounded` and `release` have, for one example more or less, the privacy of
    `event(n)`, for gradients that are functions of their own example. Raises PrivacyError for values out of bounds.
    """

    clip: float
    noise_multiplier: float
    batch_size: int
    examples: int
    dimensions: int

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise PrivacyError(f"the clip is {self.clip}, and a positive number is needed")
        if not (isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise PrivacyError(f"the noise multiplier is {self.noise_multiplier}, and a number of at least 0 is needed")
        if self.clip == inf and self.noise_multiplier > 0:
            raise PrivacyError("noise protects nobody beside an infinite clip: set a clip, 1.0 for example")
        for name, value in (("batch size", self.batch_size), ("number of examples", self.examples)):
            if value < 1:
                raise PrivacyError(f"the {name} is {value}, and at least 1 is needed")

    @property
    def rate(self) -> float:
        """q, with which each example is drawn for a step."""
        return min(1.0, self.batch_size / self.examples)

    @property
    def expected(self) -> int:
        """How many examples a step draws on average: the constant that a noised sum is divided by."""
        return min(self.batch_size, self.examples)

    @cached_property
    def grid(self) -> Grid | None:
        """Where sums are exact and noise is discrete; None without noise."""
        if self.noise_multiplier == 0:
            return None
        return Grid.fitting(ROOM * self.noise_multiplier * self.clip, self.clip, self.dimensions)

    @cached_property
    def sensitivity(self) -> float:
        """How far one example moves the sum: C, and what rounding to the grid adds to it."""
        return self.clip if self.grid is None else self.grid.sensitivity(self.clip, self.dimensions)

    @cached_property
    def noise_std(self) -> float:
        """Of each coordinate of the sum, in the unit of the gradients."""
        return 0.0 if self.grid is None else self.noise_multiplier * self.sensitivity

    def event(self, count: int, *, secret: bool) -> GaussianEvent:
        """What `count` steps cost. `secret` is that of the randomness which draws batches and noise.

        PrivacyError where the clip is infinite.
        """
        return GaussianEvent(
            unit="example",
            relation="add-remove",
            noise_std=self.noise_std,
            sensitivity=self.sensitivity,
            secret=secret,
            sampling=Poisson(self.rate),
            count=count,
        )

    def draw(self, source: Randomness) -> Integers:
        """The examples of a step: int64 positions below `examples`, ascending, perhaps none."""
        return poisson_batch(self.examples, self.rate, source)

    def bounded(self, gradients: Floats) -> Sums:
        """The sum of some examples' clipped gradients; `gradients` are (K, dimensions), one row an example.

        A gradient that is not finite counts as zeros.
        """
        clipped = (clip(row, self.clip)[0] for row in gradients)  # one by one: a row stays in the cache
        if self.grid is None:
            return sum(clipped, np.zeros(self.dimensions))
        return total(map(self.grid.rounded, clipped), self.dimensions)

    def release(self, sums: Iterable[Sums], source: Randomness) -> Values:
        """The noised mean gradient (float64, (dimensions,)) of a step, from the `bounded` sums of its parts, or none."""
        if self.grid is None:
            return sum(sums, np.zeros(self.dimensions)) / self.expected
        counts = self.grid.noised(total(sums, self.dimensions), self.noise_std, source)
        return self.grid.values(counts) / self.expected


def example_level_of(spec: RunSpec, examples: int, dimensions: int, steps: int) -> ExampleLevel:
    """The example-level mechanism of a spec at a node that takes at most `steps` steps in the whole run.

    Noise is solved for where only ε is given. Raises PrivacyError for a cap that no noise can meet.
    """
    privacy, batch_size = spec.privacy, spec.local.batch_size
    multiplier = privacy.noise_multiplier
    if multiplier is None:
        assert privacy.epsilon is not None, "a spec with a unit has a cap or a noise multiplier"
        sampling = Poisson(min(1.0, batch_size / examples))
        multiplier = _solved(privacy.epsilon, privacy.delta, sampling, steps)
    return ExampleLevel(privacy.clip, multiplier, batch_size, examples, dimensions)


_solved = lru_cache(maxsize=2**12)(noise_multiplier)  # a node asks the same in each of its rounds
