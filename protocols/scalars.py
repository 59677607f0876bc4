"""One number in one byte: a projected gradient as a signed code, unbiased, of an exact range (DESIGN §8).

A code is a place in a table of integers, symmetric about 0, that everybody knows. An entry counts steps of 2^scale, and
the coordinator announces the scale; so what nodes add up are integers. A number between two entries becomes one of them by
chance, such that its mean is right; one beyond the ends is clipped.

| code  | entries                             | bits | range ÷ smallest step |
|-------|-------------------------------------|------|-----------------------|
| int8  | −127 … 127                          | 8    | 127                   |
| log8  | 16 to each octave, as in G.711      | 8    | 3952                  |
| 1-bit | −42 and 42: a third of int8's range | 1    | 1                     |

JustOneByte (arXiv 2306.10015) meant 255 magnitudes and a sign, which are 9 bits, and sent text; `log8` is its idea in 8.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, frexp, log2
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import PayloadError
from .keys import generator

Counts = np.ndarray[Any, np.dtype[np.int64]]
Octets = np.ndarray[Any, np.dtype[np.uint8]]

SCALES = range(-60, 41)
"""Exponents that are announced: a step is 2⁻⁶⁰ to 2⁴⁰."""


@dataclass(frozen=True)
class ScalarCode:
    """How one number becomes one code. `entries` ascend, are symmetric, and are two (one bit) or 255 (one byte)."""

    name: str
    entries: tuple[int, ...]

    @property
    def largest(self) -> int:
        """The largest count that one code stands for: however a sender lies, it says no more."""
        return self.entries[-1]

    @cached_property
    def packs(self) -> bool:
        """Whether eight codes share a byte."""
        return len(self.entries) == 2

    @cached_property
    def table(self) -> Counts:
        return np.array(self.entries, np.int64)

    def size(self, count: int) -> int:
        """Bytes of `count` codes."""
        return -(-count // 8) if self.packs else count

    def encode(self, values: npt.ArrayLike, scale: int, key: int) -> bytes:
        """Codes of `values` (float, (K,)) in steps of 2^scale, rounded up or down by a draw that `key` names.

        A value that is not finite is sent as 0 where the table has one: a loss that overflowed says nothing.

        Formal guarantees: the mean of `decode` over the keys is the value, clipped to `largest` steps.
        """
        steps = np.ldexp(np.asarray(values, np.float64), -scale)
        steps = np.clip(np.nan_to_num(steps, nan=0.0, posinf=0.0, neginf=0.0), -self.largest, self.largest)
        above = np.clip(np.searchsorted(self.table, steps), 1, len(self.table) - 1)
        low, high = self.table[above - 1], self.table[above]
        up = generator(key).random(steps.shape) < (steps - low) / (high - low)
        places = above - 1 + up
        if self.packs:
            bits: bytes = np.packbits(places.astype(np.uint8), bitorder="little").tobytes()
            return bits
        octets: bytes = (places - 127).astype(np.int8).tobytes()
        return octets

    def decode(self, payload: bytes, count: int) -> Counts:
        """The counts of `count` codes, int64 (count,). PayloadError for another length, for −128, and for bits unused."""
        if len(payload) != self.size(count):
            raise PayloadError(f"{count} codes in {self.name} take {self.size(count)} bytes, and {len(payload)} came")
        (counts,) = self.decode_rows(np.frombuffer(payload, np.uint8)[None], count)
        return np.asarray(counts)

    def decode_rows(self, payloads: Octets, count: int) -> Counts:
        """`decode` of many at once: int64 (J, count) from uint8 (J, size(count))."""
        if self.packs:
            bits = np.unpackbits(payloads, axis=1, bitorder="little")
            if bits[:, count:].any():
                raise PayloadError(f"{count} codes in {self.name}: a bit behind the last one is set")
            entries: Counts = self.table[bits[:, :count]]
            return entries
        if (payloads == 128).any():
            raise PayloadError(f"a code in {self.name} is −128; −127 to 127 are codes")
        return self.table[(payloads + np.uint8(127)).astype(np.int64)]

    def scale_of(self, clip: float) -> int:
        """The scale whose range is `clip`, or just wider: 2^scale · largest ≥ clip."""
        mantissa, exponent = frexp(clip / self.largest)
        return min(max(exponent - (mantissa == 0.5), SCALES[0]), SCALES[-1])

    def clip_of(self, scale: int) -> float:
        """The largest number that a code stands for."""
        return float(np.ldexp(self.largest, scale))

    def next_scale(self, scale: int, counts: Counts) -> int:
        """The public rule: the scale for the next exchange, from the codes of this one that everybody saw.

        It follows the root mean square of the counts by factors of 2, so that it stays between an eighth and a half of
        the range. One bit says nothing of a size, so there the scale stays.
        """
        if self.packs or counts.size == 0:
            return scale
        squares, room = int((counts * counts).sum()), counts.size * self.largest**2
        move = (4 * squares > room) - (64 * squares < room)
        return min(max(scale + move, SCALES[0]), SCALES[-1])


def _octaves() -> tuple[int, ...]:
    """0 … 15, then 16 entries to each octave: ((16 + m) << e) − 16 for m in 0 … 15 and e in 0 … 7, less the last."""
    magnitudes = [((16 + m) << e) - 16 for e in range(8) for m in range(16)]
    return (*(-m for m in reversed(magnitudes[1:])), *magnitudes)


SCALAR_CODES: dict[str, ScalarCode] = {
    code.name: code
    for code in (
        ScalarCode("int8", tuple(range(-127, 128))),
        ScalarCode("log8", _octaves()),
        ScalarCode("1-bit", (-42, 42)),
    )
}


def rounded_power(value: float) -> tuple[int, int]:
    """(m, e) with m·2^e ≈ value > 0 and m in 4 … 8: a factor that keeps integers integers, within an eighth."""
    exponent = ceil(log2(value)) - 3
    return round(float(np.ldexp(value, -exponent))), exponent
