"""The compiled half of `discrete`: numba is imported here alone, and this module by the first sample alone.

Every function reads octets (uint8 (n,), independent and uniform) from the place `at` on, and returns the place behind
the last one that it read. Where they run out, loops end and the result means nothing: `draw` then leaves the sample
out, and its caller has it drawn again from its first octet, with more octets behind. Thus a sample that needs many
octets is as likely as it should be. All arithmetic is on int64, where nothing overflows for σ ≤ 2²⁷.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

from .randomness import Integers

Octets = np.ndarray[Any, np.dtype[np.uint8]]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    try:
        return cast(_Function, njit(cache=True)(function))
    except RuntimeError:  # no folder for the cache can be written: this process compiles for itself, some five seconds
        return cast(_Function, njit(function))


@_compiled
def _below(octets: Octets, at: int, bound: int) -> tuple[int, int]:
    """A uniform integer in [0, bound), for a bound of at most 2³²."""
    while at + 4 <= octets.size:
        word = 0
        for _ in range(4):
            word = 256 * word + octets[at]
            at += 1
        value = word % bound
        if word - value + bound <= 2**32:  # else the word lies in the last run of `bound` integers, which is incomplete
            return value, at
    return 0, octets.size


@_compiled
def _bernoulli(octets: Octets, at: int, numerator: int, denominator: int) -> tuple[bool, int]:
    """True with probability numerator/denominator in [0, 1].

    Compares a uniform real with the fraction, digit by digit in base 256, and draws no digit more than that takes.
    """
    while at < octets.size:
        digit, numerator = divmod(256 * numerator, denominator)
        octet = octets[at]
        at += 1
        if octet != digit:
            return octet < digit, at
    return False, at


@_compiled
def _exponential(octets: Octets, at: int, numerator: int, denominator: int) -> tuple[bool, int]:
    """True with probability exp(−γ), γ = numerator/denominator in [0, 1].

    Of trials that succeed with γ/1, γ/2, γ/3, … the first to fail is an odd one.
    """
    k = 1
    while at < octets.size:
        happened, at = _bernoulli(octets, at, numerator, denominator)
        if happened:
            happened, at = _bernoulli(octets, at, 1, k)
        if not happened:
            return k % 2 == 1, at
        k += 1
    return False, at


@_compiled
def _exponentials(octets: Octets, at: int, numerator: int, denominator: int, times: int) -> tuple[bool, int]:
    """True with probability exp(−times·γ)."""
    for _ in range(times):
        happened, at = _exponential(octets, at, numerator, denominator)
        if not happened:
            return False, at
    return True, at


@_compiled
def _geometric(octets: Octets, at: int) -> tuple[int, int]:
    """k ≥ 0 with probability proportional to exp(−k/2)."""
    k = 0
    happened, at = _exponential(octets, at, 1, 2)
    while happened:
        k += 1
        happened, at = _exponential(octets, at, 1, 2)
    return k, at


@_compiled
def _gaussian(octets: Octets, at: int, deviation: int) -> tuple[int, int]:
    """±(kσ + j) with 0 ≤ j < σ, in proportion to exp(−(kσ + j)²/2σ²) = exp(−k²/2)·exp(−kj/σ)·exp(−j²/2σ²)."""
    while at < octets.size:
        k, at = _geometric(octets, at)
        accepted, at = _exponentials(octets, at, 1, 2, k * (k - 1))
        if not accepted:
            continue
        j, at = _below(octets, at, 2 * deviation)
        sign, j = 1 - 2 * (j % 2), j // 2
        if sign < 0 and k == 0 and j == 0:  # else zero would come twice as often
            continue
        accepted, at = _exponentials(octets, at, j, deviation, k)
        if not accepted:
            continue
        accepted, at = _exponential(octets, at, j * j, 2 * deviation * deviation)
        if accepted:
            return sign * (k * deviation + j), at
    return 0, at


@_compiled
def draw(octets: Octets, deviation: int, samples: Integers) -> tuple[int, int]:
    """Fills `samples` from the front: how many are there, and how many octets these have read."""
    read = 0
    for index in range(samples.size):
        sample, at = _gaussian(octets, read, deviation)
        if at >= octets.size:
            return index, read
        samples[index] = sample
        read = at
    return samples.size, read
