"""Client-level privacy where nobody can be sampled: noise that is correlated over the rounds (DP-FTRL).

    C·x + z  =  C·(x + C⁻¹z)        x: the rounds' clipped sums, z: independent noise, C: banded, lower triangular

What is trained on is x + C⁻¹z. Noise of a round is taken back in later ones, so the sum over rounds, which is what the
adapter becomes, has far less of it than with independent noise. The price is that of C·x, once for the whole run.

| here           | paper   | meaning                                                          |
|----------------|---------|------------------------------------------------------------------|
| `coefficients` | c       | the first column of C: `bands` numbers, the first is 1           |
| `separation`   | b       | rounds from one turn of a client to its next, at least           |
| `correlated`   | C⁻¹z    | a round's noise, from fresh noise and that of the rounds before  |

C holds the first coefficients of (1 − x)^(−1/2), the square root of the matrix that sums over rounds (Kalinin and
Lampert 2024, arXiv 2405.13763, §3): a closed form, the same on every machine. It has no more bands than rounds between
two turns of a client, so its turns touch different rows of C·x (Choquette-Choo et al. 2023, arXiv 2306.08153, §3).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, fsum, sqrt

import numpy as np

from ..protocols.errors import PrivacyError
from ..protocols.layout import Flat
from ..protocols.spec import RunSpec
from .calibration import noise_multiplier
from .clipping import clip
from .events import Everyone, MatrixEvent
from .mechanism import ROOM
from .noise import Grid, Values, total
from .randomness import Integers, Randomness
from .sampling import in_turn

REPLACED = 2
"""Clips by which one round's sum differs, where one client stands in another's place."""

ROUNDED = 1.1
"""Steps by which rounding what is taken back moves an entry, between two worlds: a half in each, and some for float64."""


def coefficients(bands: int) -> Values:
    """The first column of C, float64 (bands,): binom(2j, j) / 4^j, which is 1, 1/2, 3/8, …"""
    j = np.arange(1, bands)
    return np.cumprod(np.concatenate([[1.0], (2 * j - 1) / (2 * j)]))


def encoder(rounds: int, bands: int) -> Values:
    """C itself, float64 (rounds, rounds): what a plain reader of the papers would write down."""
    column = np.zeros(rounds)
    column[: min(bands, rounds)] = coefficients(min(bands, rounds))
    return np.stack([np.concatenate([np.zeros(t), column[: rounds - t]]) for t in range(rounds)], axis=1)


def encoded_norm(rounds: int, separation: int, bands: int) -> float:
    """The largest norm of C·x, if each row of x has a norm of 1 in the rounds of one client and of 0 in the others.

    `bands` ≤ `separation`: then the columns of two turns have no row in common, their squares add up whatever the
    directions are, and the worst client is one whose turn is the first round.
    """
    squares = coefficients(bands) ** 2
    turns = range(0, rounds, separation)
    return sqrt(fsum(fsum(squares[: rounds - first]) for first in turns))


def correlated(fresh: Integers, past: Integers, column: Values) -> Integers:
    """The noise of a round, W_t = Z_t − Σⱼ c_j·W_(t−j), in steps: int64 (d,).

    `fresh` is Z_t (int64 (d,)), `past` the noise of the rounds before, the last one first (int64 (≤ bands − 1, d)).
    """
    taken_back = np.zeros(fresh.shape)
    for c, noise in zip(column[1:], past, strict=False):
        taken_back += c * noise
    return fresh - np.rint(taken_back).astype(np.int64)


@dataclass(frozen=True)
class Banded:
    """The releases of a whole run of `rounds`: clip, turns, noise, denominator and event from one frozen object.

    Each client has its turn once in each `separation` rounds, so no draw is needed, and none is claimed. `clip` bounds
    the L2 norm of a client's whole change, of `dimensions` numbers. `noise_multiplier` is z: the noise on C·x beside
    its sensitivity over the run. `expected` is the number of answers that a round expects: a constant.

    Formal guarantees: all that `release` returns in `rounds` rounds together has, for another client in the place of
    one, the privacy of `event`, for changes that may depend on earlier releases. Given these, a round's release is
    discrete Gaussian noise around numbers that differ by C's entry times what the client's last turn changed, and by
    the rounding of what is taken back; the squares of these sum up to `sensitivity` squared at most, and zCDP adds up.
    Raises PrivacyError for values out of bounds.
    """

    clip: float
    noise_multiplier: float
    dimensions: int
    rounds: int
    separation: int
    expected: float

    @property
    def bands(self) -> int:
        return min(self.separation, self.rounds)

    @property
    def participations(self) -> int:
        """Turns of one client in the run, at most."""
        return ceil(self.rounds / self.separation)

    @cached_property
    def coefficients(self) -> Values:
        return coefficients(self.bands)

    @cached_property
    def grid(self) -> Grid:
        grid = Grid.fitting(ROOM * self.noise_multiplier * self._ideal(self.clip), self.clip, self.dimensions)
        charge = self._sensitivity(grid) / self._ideal(self.clip)
        if charge > ROOM:
            raise PrivacyError(
                f"rounding {self.dimensions} parameters in {self.rounds} rounds would add {charge - 1:.1%} to the "
                f"sensitivity; the limit is {ROOM - 1:.0%}: take fewer rounds, or train fewer parameters"
            )
        return grid

    @cached_property
    def sensitivity(self) -> float:
        """Of C·x over the whole run, rounding included."""
        return self._sensitivity(self.grid)

    @cached_property
    def noise_std(self) -> float:
        """Of each coordinate of C·x, in the unit of the change."""
        return self.noise_multiplier * self.sensitivity

    @cached_property
    def independent_std(self) -> float:
        """The independent noise a round that would leave the same mean square in the sums over rounds: to compare."""
        summed = np.cumsum(np.linalg.inv(encoder(self.rounds, self.bands)), axis=0)
        return self.noise_std * float(np.linalg.norm(summed)) / sqrt(self.rounds * (self.rounds + 1) / 2)

    def event(self, *, secret: bool) -> MatrixEvent:
        """What the whole run costs, charged with its first release. `secret` is that of the randomness of its noise."""
        return MatrixEvent(
            unit="client",
            relation="replace-one",
            noise_std=self.noise_std,
            sensitivity=self.sensitivity,
            secret=secret,
            rounds=self.rounds,
            separation=self.separation,
            participations=self.participations,
        )

    def draw(self, nodes: Sequence[int], round_: int) -> tuple[int, ...]:
        """The nodes whose turn it is in a round, ascending."""
        return in_turn(nodes, self.separation, round_)

    def release(self, changes: Iterable[Flat], past: Integers, source: Randomness) -> tuple[Flat, Integers]:
        """The noised mean change (fp32, (dimensions,)), and the `past` of the next round.

        `changes` are decoded updates, fp32 (dimensions,), at most one a node; those that are not finite count as zeros.
        `past` is as in `correlated`. With a release it tells the sum that noise was added to, so it is as secret as that.
        """
        sums = total((self.grid.rounded(clip(change, self.clip)[0]) for change in changes), self.dimensions)
        noise = self._noise(past, source)
        mean = self.grid.values(total([sums, noise], self.dimensions)) / self.expected
        return mean.astype(np.float32), np.concatenate([noise[None], past])[: self.bands - 1]

    def _noise(self, past: Integers, source: Randomness) -> Integers:
        fresh = self.grid.noised(np.zeros(self.dimensions, np.int64), self.noise_std, source)
        return correlated(fresh, past, self.coefficients)

    def _ideal(self, bound: float) -> float:
        """The sensitivity for changes of norm `bound`, were nothing else rounded."""
        return REPLACED * bound * encoded_norm(self.rounds, self.separation, self.bands)

    def _sensitivity(self, grid: Grid) -> float:
        moved = self.participations * (self.bands - 1)  # rounds in which a turn before is taken back
        rounding = ROUNDED * grid.step * sqrt(moved * self.dimensions)
        return self._ideal(grid.sensitivity(self.clip, self.dimensions)) + rounding


def banded_of(spec: RunSpec, population: int, dimensions: int) -> Banded:
    """The banded mechanism of a spec, for a public number of nodes; noise is solved for where only ε is given.

    Raises PrivacyError for a cap that no noise can meet.
    """
    privacy, separation = spec.privacy, spec.privacy.separation
    assert separation is not None, "a spec with a banded mechanism has a separation"
    multiplier = privacy.noise_multiplier
    if multiplier is None:
        assert privacy.epsilon is not None, "a spec with a unit has a cap or a noise multiplier"
        multiplier = noise_multiplier(privacy.epsilon, privacy.delta, Everyone(), 1)  # a run is one release of C·x
    return Banded(privacy.clip, multiplier, dimensions, spec.run.rounds, separation, population / separation)
