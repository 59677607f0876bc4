"""Calibration: the noise that a cap needs, and the rounds that it allows.

Both ask the accountant that will charge the run, so neither can disagree with it. They search on a grid ten times
coarser, which is fast and errs to the safe side, and finish on the exact one.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf, sqrt

from ..protocols.errors import PrivacyError
from .accounting import MOST_MULTIPLIER, headline
from .events import Event, GaussianEvent, Sampling, relation_of

EXACT, COARSE = 1.0, 10.0
TOLERANCE = 1e-3
MOST_ROUNDS = 1_000_000


@lru_cache(maxsize=256)
def noise_multiplier(epsilon: float, delta: float, sampling: Sampling, rounds: int) -> float:
    """The least noise_std / sensitivity with which `rounds` releases stay within (epsilon, delta).

    It is relative to the sensitivity under the relation of `sampling` (`privacy/events.py`): clipped to C, the noise
    is z·C for Poisson draws and z·2C for draws of fixed size.

    Formal guarantees: `spent` of `rounds` such releases is at most `epsilon`; with a multiplier smaller by 1e-3
    (relative) it is not, as long as ε does fall with the noise.

    Raises PrivacyError for ε ≤ 0 or infinite, rounds < 1, and a cap that no noise up to 1e6 can meet.
    """
    _check(epsilon)
    if rounds < 1:
        raise PrivacyError(f"rounds = {rounds}: noise is calibrated for at least 1 round")

    def within(coarseness: float) -> Callable[[float], bool]:
        return lambda z: headline([_releases(z, sampling, rounds)], delta, coarseness)[0] <= epsilon

    rough = _least(within(COARSE), guess=1.0, factor=2.0)
    return _least(within(EXACT), guess=rough, factor=1 + 3 * TOLERANCE)


def rounds_within(epsilon: float, delta: float, event: GaussianEvent, before: Sequence[Event] = ()) -> int:
    """How many releases like `event` fit under the cap after the events `before`; `event.count` is not read.

    0 where `before` has passed the cap already, and never more than 1,000,000. Raises PrivacyError for ε ≤ 0 or infinite, and as
    `spent` does for events that do not compose.
    """
    _check(epsilon)

    def within(coarseness: float) -> Callable[[int], bool]:
        return lambda count: headline([*before, replace(event, count=count)], delta, coarseness)[0] <= epsilon

    return _most(within(EXACT), guess=_most(within(COARSE), guess=0))


def _check(epsilon: float) -> None:
    if not 0 < epsilon < inf:
        raise PrivacyError(f"epsilon = {epsilon}: a cap must be finite and above 0; 1 to 10 is common")


def _releases(multiplier: float, sampling: Sampling, rounds: int) -> GaussianEvent:
    return GaussianEvent(
        unit="client",  # the unit does not enter ε
        relation=relation_of(sampling),
        noise_std=multiplier,
        sensitivity=1.0,
        secret=True,
        sampling=sampling,
        count=rounds,
    )


def _least(fits: Callable[[float], bool], guess: float, factor: float) -> float:
    """The least value that fits, from above and to 1e-3, for `fits` that turns true once as values rise."""
    low = high = guess
    if fits(guess):
        while fits(low := low / factor):
            high = low
    else:
        while not fits(high := high * factor):
            low = high
            if high > MOST_MULTIPLIER:
                raise PrivacyError(
                    f"no noise multiplier up to {MOST_MULTIPLIER:g} meets the cap: allow more ε, fewer rounds, or a "
                    "smaller sampling rate"
                )
    while high > low * (1 + TOLERANCE):
        middle = sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _most(fits: Callable[[int], bool], guess: int) -> int:
    """The largest count in [0, MOST_ROUNDS] that fits, for `fits` that turns false once; 0 is taken to fit."""
    step, low, high = 1, 0, MOST_ROUNDS + 1
    if fits(guess):
        low = guess
        while low + step < high and fits(low + step):
            low, step = low + step, 2 * step
        high = min(low + step, high)
    else:
        high = guess
        while high - step > 0 and not fits(high - step):
            high, step = high - step, 2 * step
        low = max(high - step, 0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
