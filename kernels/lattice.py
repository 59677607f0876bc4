"""The exact state of the zeroth-order mode: fp32 parameters on an integer lattice, w = w0 + unit·acc (DESIGN §8).

An update adds q·z to `acc`: integers times signs (`kernels/signs.py`). Sums of integers have no order, so nodes that
received the same bytes hold the same bits, however the bytes were ordered, grouped or replayed. In fp32 the update of
MeZO (arXiv 2305.17333) and of JustOneByte (arXiv 2306.10015) drifts instead.

`unit` is a power of two and |acc| stays below 2²⁴, so unit·acc is exact in fp32, and w is the exact sum w0 + unit·acc
rounded once, to nearest even: with or without a fused multiply-add. A new unit (another learning rate), weight decay,
or more steps than 2²⁴ allows need a new segment, which starts from the fp32 parameters of the one before. That is where
rounding enters, so every node must change segments after the same exchange.

| here     | meaning                                                        |
|----------|----------------------------------------------------------------|
| `start`  | w0: fp32 (n,), the parameters when the segment began           |
| `unit`   | 2^exponent: how far one count moves a parameter                |
| `acc`    | Σ q·z over the updates of this segment: int32 (n,)             |
| `reach`  | Σ abs(q) over the same updates: no abs(acc) is larger          |
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..protocols.errors import RunError, SpecError
from .directions import Directions, Floats, Integers
from .signs import accumulate, accumulate_reference, as_codes

LIMIT = 2**24
"""fp32 holds every integer below."""

EXPONENTS = range(-126, 100)
"""Of units: unit·acc is never subnormal and never overflows."""


def longest_segment(largest_change: int) -> int:
    """Exchanges that fit one segment whatever happens, if one changes a parameter by `largest_change` counts at most.

    That is the sum of abs(q) over the directions of all nodes: 8 nodes × 16 directions × 127, say.
    """
    return (LIMIT - 1) // max(largest_change, 1)


def check_plan(largest_change: int, exchanges: int) -> None:
    """SpecError unless `exchanges` exchanges fit one segment: largest change × exchanges < 2²⁴."""
    worst, most = largest_change * exchanges, longest_segment(largest_change)
    if worst >= LIMIT:
        way_out = f"open a new segment every {most} exchanges or sooner" if most else "use fewer nodes or directions"
        raise SpecError(
            f"{exchanges} exchanges of at most {largest_change} counts each may reach {worst}, and a segment must stay "
            f"below 2^24 = {LIMIT}, up to which fp32 holds every integer: {way_out}"
        )


@dataclass(frozen=True, eq=False)
class Segment:
    """What stays the same between two changes of the learning rate.

    `number` counts segments from 0. SpecError where `exponent` is outside `EXPONENTS`.
    """

    number: int
    exponent: int
    start: Floats

    def __post_init__(self) -> None:
        if self.exponent not in EXPONENTS:
            raise SpecError(
                f"the unit 2^{self.exponent} has an exponent outside {EXPONENTS[0]} to {EXPONENTS[-1]}, in which fp32 is "
                "exact: choose a learning rate, clip and probe size nearer to 1"
            )
        object.__setattr__(self, "start", _frozen(self.start, np.float32))

    @property
    def unit(self) -> np.float32:
        """2^exponent."""
        return np.float32(2.0**self.exponent)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over number, exponent, length and the bits of `start`, little-endian."""
        constants = np.array([self.number, self.exponent, self.start.size], "<i8")
        return hashlib.sha256(b"fedapt segment 1\n" + constants.tobytes() + self.start.astype("<f4").tobytes()).digest()


@dataclass(frozen=True, eq=False)
class Lattice:
    """One state of the run; every change gives a new one.

    Formal guarantees: states that took the same updates in one segment have equal hashes, whatever the order and the
    grouping; `weights` is the correctly rounded fp32 value of start + unit·acc, the same on every machine.
    """

    segment: Segment
    acc: Integers
    reach: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "acc", _frozen(self.acc, np.int32))
        if self.acc.shape != self.segment.start.shape:
            raise ValueError(f"acc has the shape {self.acc.shape}, and start {self.segment.start.shape}")

    @classmethod
    def begin(cls, start: Floats, exponent: int, number: int = 0) -> Self:
        """The first state of a segment at the fp32 parameters `start`, in steps of 2^exponent."""
        return cls(Segment(number, exponent, start), np.zeros(start.shape, np.int32))

    def advance(self, directions: Directions, codes: npt.ArrayLike) -> Self:
        """The state after acc += Σ_k codes[k]·z_k, for any number of directions; codes are integers (K,).

        RunError where the segment is full: a plan that passed `check_plan` never gets there.
        """
        numbers = as_codes(codes, directions)
        reach = self.reach + int(np.abs(numbers.astype(np.int64)).sum())
        if reach >= LIMIT:
            raise RunError(
                f"the codes of segment {self.segment.number} sum up to {reach}, and must stay below 2^24 = {LIMIT}: "
                "open a new segment sooner"
            )
        acc = self.acc.copy()
        accumulate(acc, directions, numbers)
        return replace(self, acc=acc, reach=reach)

    def next_segment(self, exponent: int, keep: float = 1.0) -> Self:
        """The first state of the next segment: start = keep·weights, in steps of 2^exponent.

        `keep` is 1 less the weight decay, and like the product is rounded to fp32.
        """
        return self.begin(self.weights() * np.float32(keep), exponent, self.segment.number + 1)

    def weights(self) -> Floats:
        """w = start + unit·acc, fp32 (n,)."""
        product = self.acc.astype(np.float32)
        product *= self.segment.unit
        product += self.segment.start
        return product

    def state_hash(self) -> str:
        """SHA-256, in hex, over the constants of the segment and `acc`: equal where the states are equal."""
        return hashlib.sha256(
            b"fedapt lattice 1\n" + self.segment.digest + self.acc.astype("<i4").tobytes()
        ).hexdigest()


def advance_reference(state: Lattice, directions: Directions, codes: npt.ArrayLike) -> Lattice:
    """`Lattice.advance` in NumPy alone, without its bound."""
    acc = state.acc.copy()
    accumulate_reference(acc, directions, codes)
    return replace(state, acc=acc)


def _frozen(values: npt.ArrayLike, dtype: type[np.generic]) -> np.ndarray[Any, Any]:
    """A copy that cannot be written to, so that a hash stays true."""
    array = np.array(values, dtype)
    array.setflags(write=False)
    return array
