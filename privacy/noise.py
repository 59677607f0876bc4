"""Gaussian noise on a grid: what is released are multiples of one step, and integers decide all of it.

    vectors of norm ≤ C ─► round to the grid ─► exact integer sum ─► + discrete Gaussian ─► values
                           adds step·√d/2 to C                       parameter σ

The step is a power of two, so going from values to steps and back is exact. Rounding is to the nearest: a fixed function
of the vector, which moves it by at most step·√d/2, whatever the data. The charge is small enough to pay (below
`LARGEST_CHARGE`), so nothing is drawn twice to avoid it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, frexp, inf, isfinite, ldexp, nextafter, sqrt
from typing import Any

import numpy as np

from ..protocols.errors import PrivacyError, RunError
from .discrete import LARGEST_DEVIATION, discrete_gaussian
from .randomness import Integers, Randomness

Values = np.ndarray[Any, np.dtype[np.float64]]
Floats = np.ndarray[Any, np.dtype[np.float32 | np.float64]]

LARGEST_CHARGE = 0.01
"""What rounding may add to the sensitivity, as a part of the clip."""

LARGEST_COUNT = 2**53
"""Steps that an entry may be away from zero: up to here float64 holds every integer."""


@dataclass(frozen=True)
class Grid:
    """The multiples of `step`, a power of two (ValueError otherwise). A vector on the grid is counted in steps: int64.

    Formal guarantees: for vectors of L2 norm ≤ C in d dimensions, of which one is added or removed,
    `noised(total([rounded(v) for v in vectors], d), noise_std, source)` is ρ-zCDP with ρ = C'²/2σ², σ = `noise_std`,
    C' = `sensitivity(C, d)`, if the source is secret (arXiv 2004.00010, theorem 4, coordinate by coordinate); where one
    vector is replaced by another, C' doubles. For accountants that know the continuous Gaussian alone: T releases of d
    coordinates are within √(T·d/1152)·(step/σ)² in total variation of those with a Gaussian rounded to the grid, so
    their δ is off by at most 1 + exp ε times that (d = 10⁷, T = 10⁴, ε = 6, a `fitting` grid: 5e-8).
    """

    step: float

    def __post_init__(self) -> None:
        if not (isfinite(self.step) and self.step > 0 and frexp(self.step)[0] == 0.5):
            raise ValueError(f"step is {self.step}: a power of two is needed")

    @classmethod
    def fitting(cls, noise_std: float, clip: float, dimensions: int) -> "Grid":
        """The finest grid whose noise the sampler can draw: `noise_std` is 2²³ to 2²⁴ steps.

        PrivacyError where `noise_std` or `clip` is not a positive number, and where the noise is so large beside the clip
        that even this grid adds more than `LARGEST_CHARGE` to the sensitivity.
        """
        for name, value in (("noise", noise_std), ("clip", clip)):
            if not (isfinite(value) and value > 0):
                raise PrivacyError(f"the {name} is {value}, and a positive number is needed")
        mantissa, exponent = frexp(noise_std / LARGEST_DEVIATION)
        grid = cls(ldexp(1.0, exponent - (mantissa == 0.5)))
        charge = grid.sensitivity(clip, dimensions) / clip - 1
        if charge > LARGEST_CHARGE:
            raise PrivacyError(
                f"rounding {dimensions} parameters for noise of {noise_std:.3g} would add {charge:.1%} to the "
                f"clip of {clip:.3g}; the limit is {LARGEST_CHARGE:.0%}. The noise is {noise_std / clip:.3g} times the "
                "clip and drowns every update: allow a larger epsilon, more nodes a round, or train fewer parameters"
            )
        return grid

    def sensitivity(self, clip: float, dimensions: int) -> float:
        """C' ≥ the norm of any `rounded` vector of norm ≤ `clip`, in the unit of the values: what an event charges."""
        return nextafter(clip + self.step * sqrt(dimensions) / 2, inf)

    def deviation(self, noise_std: float) -> int:
        """The noise in steps, rounded up: what is drawn is never less than what is charged."""
        return ceil(noise_std / self.step)

    def rounded(self, vector: Floats) -> Integers:
        """The nearest point of the grid: (d,), float32 or float64 ⇒ int64 (d,), in steps; ties go to the even one.

        RunError where an entry is not finite, or more than `LARGEST_COUNT` steps from zero: clip first.
        """
        with np.errstate(over="ignore"):  # infinity is refused below
            counts = np.rint(np.asarray(vector, np.float64) / self.step)
        largest = np.abs(counts).max(initial=0)
        if not largest <= LARGEST_COUNT:
            raise RunError(
                f"an entry is {largest * self.step:.3g}, and the noise's grid of step {self.step:.3g} ends at "
                f"{LARGEST_COUNT * self.step:.3g}: clip the update first, or lower the clip beside the noise"
            )
        return counts.astype(np.int64)

    def noised(self, counts: Integers, noise_std: float, source: Randomness) -> Integers:
        """`counts` (int64 (d,), in steps) plus a discrete Gaussian of `noise_std`, in the unit of the values.

        ValueError where `noise_std` is not between 1 and `discrete.LARGEST_DEVIATION` steps; RunError where a result
        is more than `LARGEST_COUNT` steps from zero.
        """
        return total([counts, discrete_gaussian(self.deviation(noise_std), counts.size, source)], counts.size)

    def values(self, counts: Integers) -> Values:
        """What `counts` steps are worth: float64 (d,), exact."""
        return np.multiply(counts, self.step, dtype=np.float64)


def total(vectors: Iterable[Integers], dimensions: int) -> Integers:
    """The sum of int64 vectors (d,): int64 (d,), exact and the same in any order; zeros where there is none.

    RunError where an entry could pass `LARGEST_COUNT`: the sum of the vectors' largest entries is bounded, so that the
    answer does not depend on the order either.
    """
    result, bound = np.zeros(dimensions, np.int64), 0
    for vector in vectors:
        bound += max(abs(int(vector.max(initial=0))), abs(int(vector.min(initial=0))))
        if bound > LARGEST_COUNT:
            raise RunError(
                f"a sum on the noise's grid may reach {bound} steps, and {LARGEST_COUNT} is the limit: lower the clip "
                "beside the noise, or let fewer nodes take part in a round"
            )
        result += vector
    return result
