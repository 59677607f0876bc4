"""Exact samples of the discrete Gaussian: no floating point decides one.

The law is P(x) ∝ exp(−x²/2σ²) on the integers (Canonne, Kamath, Steinke, "The discrete Gaussian for differential
privacy", arXiv 2004.00010). A float sampler only comes near its law, and its low bits can tell what was added (Mironov,
CCS 2012); here each decision compares random bits with a fraction of integers.

The rejection sampler is Karney's algorithm D ("Sampling exactly from the normal distribution", arXiv 1303.6257)
for a whole σ: propose x = ±(kσ + j) with geometric k and uniform 0 ≤ j < σ, and accept with what is left of the density,
a product of exp(−γ) with rational γ in [0, 1]. Such events need no exponential (von Neumann; arXiv 2004.00010,
algorithm 1).

Its running time depends on the samples: somebody who can measure single draws to the microsecond learns something.
"""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from .randomness import Integers, Randomness

LARGEST_DEVIATION = 2**24
"""The largest σ, so that the compiled sampler's integers stay far from overflow."""

_BLOCK = 2**16
_OCTETS_PER_SAMPLE = 26  # measured; a wrong guess costs one more block or a few unused octets


def discrete_gaussian(deviation: int, count: int, source: Randomness) -> Integers:
    """`count` independent samples with parameter σ = `deviation`: int64 (count,).

    1 ≤ `deviation` ≤ `LARGEST_DEVIATION`, ValueError otherwise. The first call compiles for some seconds and keeps the
    result beside the code. Bits are read in blocks, used once and forgotten; those of the last block that were not
    needed are thrown away.

    Formal guarantees: exact for ideal bits, and equal to `discrete_gaussian_reference` on the same bits.
    """
    from .karney import draw

    _check(deviation)
    samples = np.empty(count, np.int64)
    octets, filled = b"", 0
    while filled < count:
        octets += source.octets(min(_BLOCK, _OCTETS_PER_SAMPLE * (count - filled) + 256))
        whole, read = draw(np.frombuffer(octets, np.uint8), deviation, samples[filled:])
        filled, octets = filled + whole, octets[read:]  # the sample that broke off starts again from its first octet
    return samples


def discrete_gaussian_reference(deviation: int, count: int, source: Randomness) -> Integers:
    """`discrete_gaussian` with Python's integers and fractions alone."""
    _check(deviation)
    octets = _one_by_one(source)
    return np.array([_gaussian(octets, deviation) for _ in range(count)], np.int64)


def _check(deviation: int) -> None:
    if not 1 <= deviation <= LARGEST_DEVIATION:
        raise ValueError(f"deviation is {deviation}: a whole number between 1 and {LARGEST_DEVIATION} is needed")


def _one_by_one(source: Randomness) -> Iterator[int]:
    while True:
        yield from source.octets(1)


def _gaussian(octets: Iterator[int], deviation: int) -> int:
    while True:
        k = 0
        while _exponential(octets, Fraction(1, 2)):
            k += 1
        if not all(_exponential(octets, Fraction(1, 2)) for _ in range(k * (k - 1))):
            continue
        j, negative = divmod(_below(octets, 2 * deviation), 2)
        if negative and k == j == 0:
            continue
        if not all(_exponential(octets, Fraction(j, deviation)) for _ in range(k)):
            continue
        if _exponential(octets, Fraction(j, deviation) ** 2 / 2):
            return -(k * deviation + j) if negative else k * deviation + j


def _exponential(octets: Iterator[int], gamma: Fraction) -> bool:
    k = 1
    while _bernoulli(octets, gamma) and _bernoulli(octets, Fraction(1, k)):
        k += 1
    return k % 2 == 1


def _bernoulli(octets: Iterator[int], probability: Fraction) -> bool:
    for octet in octets:
        digit, probability = divmod(256 * probability, 1)
        if octet != digit:
            break
    return octet < digit


def _below(octets: Iterator[int], bound: int) -> int:
    while True:
        word = int.from_bytes(next(octets) for _ in range(4))
        if word < 2**32 // bound * bound:
            return word % bound
