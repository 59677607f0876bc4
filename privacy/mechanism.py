"""Client-level privacy at the server: clip, sum, noise, denominator and event, derived from ONE frozen object.

    changes ─► bounded (clip, round to the grid) ─► exact sum ─► + discrete Gaussian ─► ÷ constant
                                                                        └─► event, in the same transaction

Nothing in the way depends on who answered: an empty draw takes a noised step too, the denominator is the expected
number of answers, and every node counts once whatever data it holds (McMahan et al., arXiv 1710.06963, §2).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..protocols.errors import RunError
from ..protocols.layout import Flat
from ..protocols.spec import RunSpec
from .calibration import noise_multiplier
from .clipping import BIT_NOISE, AdaptiveClip, clip
from .events import Everyone, FixedSize, GaussianEvent, Poisson, Relation, Sampling, relation_of, sum_multiplier
from .noise import Grid, total
from .randomness import Integers, Randomness
from .sampling import everybody, fixed_size, poisson

ROOM = 1.02
"""The grid is chosen for a little more noise than the clip alone asks for: rounding adds to the sensitivity."""


@dataclass(frozen=True)
class Mechanism:
    """One round's release of a sum over nodes, `dimensions` numbers, with noise of `noise_multiplier` sensitivities.

    `clip` bounds the L2 norm of a node's whole change. Where it is adaptive, a node's bit (is its norm within the clip)
    is summed and noised beside the change, and both are charged as one event of `noise_multiplier`. `expected` is the
    number of answers that a round expects: a constant.

    Formal guarantees: what `release` returns has, for one node more or less (Poisson) or another one in its place (all
    other draws), the privacy of `event`. Raises PrivacyError for values out of bounds.
    """

    clip: AdaptiveClip
    noise_multiplier: float
    dimensions: int
    sampling: Sampling
    expected: float
    adapts: bool = False

    @property
    def relation(self) -> Relation:
        return relation_of(self.sampling)

    @cached_property
    def grid(self) -> Grid:
        bound = self.clip.bound
        return Grid.fitting(ROOM * self._sum_multiplier * self._changed * bound, bound, self.dimensions)

    @cached_property
    def noise_std(self) -> float:
        """Of each coordinate of the sum, in the unit of the change."""
        return self._sum_multiplier * self._changed * self.grid.sensitivity(self.clip.bound, self.dimensions)

    def event(self, count: int = 1, *, secret: bool) -> GaussianEvent:
        """What `count` releases cost. `secret` is that of the randomness which drew its noise."""
        sensitivity = self._changed * self.grid.sensitivity(self.clip.bound, self.dimensions)
        return GaussianEvent(
            unit="client",
            relation=self.relation,
            noise_std=self.noise_multiplier * sensitivity,
            sensitivity=sensitivity,
            secret=secret,
            sampling=self.sampling,
            count=count,
        )

    def draw(self, nodes: Sequence[int], source: Randomness) -> tuple[int, ...]:
        """The nodes of a round, ascending, as `event` says that they are drawn.

        Raises RunError where a draw of fixed size does not have the population that is accounted for.
        """
        match self.sampling:
            case Poisson(rate=rate):
                return poisson(nodes, rate, source)
            case FixedSize(size=size, population=population):
                if len(nodes) != population:
                    raise RunError(
                        f"{len(nodes)} nodes are there, and the draw is accounted as {size} of {population}: wait for "
                        'the others, or take participation.sampling = "poisson", whose ε holds for any number'
                    )
                return fixed_size(nodes, size, source)
        return everybody(nodes)

    def release(self, changes: Iterable[Flat], source: Randomness) -> tuple[Flat, "Mechanism"]:
        """The noised mean change (fp32, (dimensions,)), and the mechanism of the next round.

        `changes` are decoded updates, fp32 (dimensions,), at most one a node; those that are not finite count as zeros.
        """
        bounded = [clip(change, self.clip.bound) for change in changes]
        counts = self._noised([self.grid.rounded(change) for change, _ in bounded], source)
        mean = (self.grid.values(counts) / self.expected).astype(np.float32)
        return mean, self._adapted([not clipped for _, clipped in bounded], source)

    def _noised(self, rounded: Iterable[Integers], source: Randomness) -> Integers:
        return self.grid.noised(total(rounded, self.dimensions), self.noise_std, source)

    def _adapted(self, within: Iterable[bool], source: Randomness) -> "Mechanism":
        if not self.adapts:
            return self
        bits = [np.array([1 if bit else -1], np.int64) for bit in within]  # in halves: the grid's unit is one half
        grid = Grid.fitting(self._bit_noise, 0.5, 1)
        halves = round(0.5 / grid.step)
        counts = grid.noised(total((halves * bit for bit in bits), 1), self._bit_noise, source)
        return replace(self, clip=self.clip.after(float(grid.values(counts)[0]) / self.expected + 0.5))

    @property
    def _changed(self) -> int:
        """How many updates differ between two neighbouring runs: one comes or goes, or one goes and another comes."""
        return 1 if self.relation == "add-remove" else 2

    @property
    def _bit_noise(self) -> float:
        return max(BIT_NOISE * self.expected, self.noise_multiplier * self._changed)

    @property
    def _sum_multiplier(self) -> float:
        if not self.adapts:
            return self.noise_multiplier
        # Both sensitivities double under replace-one: the split is of multipliers, relative to the changed updates.
        return sum_multiplier(self.noise_multiplier, self._bit_noise / self._changed)


def mechanism_of(spec: RunSpec, population: int, dimensions: int) -> Mechanism:
    """The client-level mechanism of a spec, for a public number of nodes; noise is solved for where only ε is given.

    Raises PrivacyError for a cap that no noise can meet.
    """
    privacy, draw = spec.privacy, spec.participation
    sampling: Sampling = Everyone()
    answers = float(population)
    if draw.sampling == "poisson":
        sampling, answers = Poisson(draw.rate), draw.rate * population
    elif draw.sampling == "fixed":
        size = max(1, round(draw.rate * population))
        sampling, answers = FixedSize(size, population), float(size)
    multiplier = privacy.noise_multiplier
    if multiplier is None:
        assert privacy.epsilon is not None, "a spec with a unit has a cap or a noise multiplier"
        multiplier = noise_multiplier(privacy.epsilon, privacy.delta, sampling, spec.run.rounds)
    clipping = AdaptiveClip(privacy.clip)
    return Mechanism(clipping, multiplier, dimensions, sampling, answers, adapts=privacy.clipping == "adaptive")
