import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.privacy.accounting import spent
from fedapt.privacy.calibration import MOST_ROUNDS, _least, _most, noise_multiplier, rounds_within
from fedapt.privacy.events import Everyone, FixedSize, GaussianEvent, Poisson, Sampling
from fedapt.protocols.errors import PrivacyError

DELTA = 1e-5
CASES: list[Any] = [
    (3.0, Poisson(0.1), 300),
    (8.0, Everyone(), 10),
    (0.1, Everyone(), 1000),
    pytest.param(6.0, FixedSize(10, 1000), 100, marks=pytest.mark.slow),
]


def event(multiplier: float, sampling: Sampling, count: int = 1) -> GaussianEvent:
    return GaussianEvent(
        unit="client",
        relation="add-remove" if isinstance(sampling, Poisson) else "replace-one",
        noise_std=multiplier,
        sensitivity=1.0,
        secret=True,
        sampling=sampling,
        count=count,
    )


@pytest.mark.parametrize(("epsilon", "sampling", "rounds"), CASES)
def test_the_noise_meets_the_cap_and_a_little_less_does_not(epsilon: float, sampling: Sampling, rounds: int) -> None:
    multiplier = noise_multiplier(epsilon, DELTA, sampling, rounds)
    assert spent([event(multiplier, sampling, rounds)], DELTA).epsilon <= epsilon
    assert spent([event(0.99 * multiplier, sampling, rounds)], DELTA).epsilon > epsilon
    assert spent([event(multiplier / 1.0011, sampling, rounds)], DELTA).epsilon > epsilon


def test_the_noise_of_a_published_setting() -> None:
    """1000 clients, 100 a round, 300 rounds, δ = 1000^−1.1: RDP asks for 1.40 at ε = 6, PLD for less."""
    assert 1.25 < noise_multiplier(6.0, 1000**-1.1, Poisson(0.1), 300) < 1.40


def test_a_cap_that_no_noise_meets() -> None:
    with pytest.raises(PrivacyError, match="no noise multiplier up to 1e"):
        noise_multiplier(1e-9, 1e-12, Everyone(), 10)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_cap_is_refused(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match="a cap must be finite and above 0"):
        noise_multiplier(epsilon, DELTA, Everyone(), 1)
    with pytest.raises(PrivacyError, match="a cap must be finite and above 0"):
        rounds_within(epsilon, DELTA, event(1.0, Everyone()))


def test_no_rounds_are_refused() -> None:
    with pytest.raises(PrivacyError, match="rounds = 0"):
        noise_multiplier(1.0, DELTA, Everyone(), 0)


@pytest.mark.parametrize(
    ("epsilon", "once"),
    [(3.0, event(2.0, Poisson(0.1))), (8.0, event(2.0, Everyone()))],
)
def test_the_rounds_fit_and_one_more_does_not(epsilon: float, once: GaussianEvent) -> None:
    count = rounds_within(epsilon, DELTA, once)
    assert spent([replace(once, count=count)], DELTA).epsilon <= epsilon
    assert spent([replace(once, count=count + 1)], DELTA).epsilon > epsilon


@pytest.mark.slow
def test_what_was_spent_before_counts() -> None:
    once, before = event(2.0, Poisson(0.1)), event(4.0, Poisson(0.2), 20)
    afterwards = rounds_within(3.0, DELTA, once, [before])
    assert afterwards > 0
    assert spent([before, replace(once, count=afterwards)], DELTA).epsilon <= 3.0
    assert spent([before, replace(once, count=afterwards + 1)], DELTA).epsilon > 3.0


def test_the_rounds_left_add_up_to_the_rounds() -> None:
    once = event(2.0, Everyone())
    whole = rounds_within(8.0, DELTA, once)
    assert rounds_within(8.0, DELTA, once, [once, replace(once, count=2)]) == whole - 3
    assert rounds_within(8.0, DELTA, once, [replace(once, count=whole)]) == 0


def test_a_cap_that_is_passed_leaves_no_round() -> None:
    once = event(1.0, Everyone())
    assert rounds_within(1.0, DELTA, once, [replace(once, count=50)]) == 0
    assert rounds_within(1.0, DELTA, replace(once, noise_std=0.0)) == 0


def test_rounds_that_cost_next_to_nothing_end_at_a_million() -> None:
    assert rounds_within(8.0, DELTA, event(1e6, Everyone())) == MOST_ROUNDS


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.floats(1.002, 10))
def test_the_least_that_fits_is_found_from_anywhere(threshold: float, guess: float, factor: float) -> None:
    found = _least(lambda value: value >= threshold, guess, factor)
    assert threshold <= found <= threshold * 1.0011


@given(st.integers(0, MOST_ROUNDS) | st.integers(0, 5), st.integers(0, MOST_ROUNDS) | st.integers(0, 5))
def test_the_most_that_fits_is_found_from_anywhere(threshold: int, guess: int) -> None:
    assert _most(lambda count: count <= threshold, guess) == threshold
