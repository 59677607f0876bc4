"""The statistics of an audit: each accepts what is right, and refutes what is a little wrong."""

from math import exp, inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedapt.privacy.accounting import spent
from fedapt.privacy.audit import (
    Values,
    clopper_pearson,
    dependence_p_value,
    guesses_needed,
    inclusion_p_value,
    mu_lower_bound,
    one_run_bound,
    one_run_p_value,
    overlap_p_value,
    right_guesses,
    sizes_p_value,
    variance_p_value,
)
from fedapt.privacy.events import Everyone, GaussianEvent

ALARM = 1e-3


@given(st.integers(1, 60), st.data(), st.sampled_from([0.05, 1e-3]))
def test_clopper_pearson_inverts_the_binomial(trials: int, data: st.DataObject, level: float) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = clopper_pearson(np.array([successes]), trials, level)
    if successes == 0:
        assert low[0] == 0
    else:
        assert stats.binom.sf(successes - 1, trials, low[0]) == pytest.approx(level)
    if successes == trials:
        assert high[0] == 1
    else:
        assert stats.binom.cdf(successes, trials, high[0]) == pytest.approx(level)


@pytest.mark.parametrize("mu", [0.0, 0.2, 1.0, 3.0])
def test_mu_is_bounded_from_below_and_tightly(mu: float) -> None:
    random = np.random.default_rng(0)
    bounds = [
        mu_lower_bound(random.standard_normal(100_000) + mu, random.standard_normal(100_000), 0.05) for _ in range(5)
    ]
    assert max(bounds) <= mu
    assert min(bounds) > 0.95 * mu - 0.02


def test_mu_sees_a_tenth_less_noise_but_not_less_than_it_can() -> None:
    random = np.random.default_rng(0)
    present, absent = random.standard_normal(100_000) * 0.9 + 1, random.standard_normal(100_000) * 0.9
    assert mu_lower_bound(present, absent, ALARM) > 1
    assert mu_lower_bound(present[:100], absent[:100], ALARM) < 1


def test_mu_errs_as_seldom_as_it_says() -> None:
    random, runs = np.random.default_rng(0), 400
    above = sum(
        mu_lower_bound(random.standard_normal(500) + 1, random.standard_normal(500), 0.1) > 1 for _ in range(runs)
    )
    assert stats.binom.sf(above - 1, runs, 0.1) > ALARM


@pytest.mark.parametrize(
    ("scores", "finite"), [((np.ones(50), np.zeros(50)), True), ((np.zeros(50), np.ones(50)), True)]
)
def test_mu_without_any_noise(scores: tuple[Values, Values], finite: bool) -> None:
    bound = mu_lower_bound(*scores, 0.05)
    assert np.isfinite(bound) == finite
    assert (bound > 2) == bool(scores[0][0])


def test_one_run_knows_the_paper_s_example() -> None:
    """Appendix D: 75 of 100 guesses right, 1000 canaries, δ = 1e-4, 95 %."""
    assert one_run_bound(75, 100, 1000, 1e-4, 0.05) == pytest.approx(0.673, abs=5e-4)


@given(st.integers(1, 30), st.data(), st.floats(0, 3), st.sampled_from([0.0, 1e-3]))
def test_one_run_p_value_is_the_sum_of_the_paper(
    guesses: int, data: st.DataObject, epsilon: float, delta: float
) -> None:
    correct, canaries = data.draw(st.integers(0, guesses)), 2 * guesses
    law = stats.binom(guesses, 1 / (1 + exp(-epsilon)))
    slopes = [law.pmf(range(correct - i, correct)).sum() / i for i in range(1, correct + 1)]
    expected = law.pmf(range(correct, guesses + 1)).sum() + 2 * canaries * delta * max(slopes, default=0.0)
    assert one_run_p_value(correct, guesses, canaries, epsilon, delta) == pytest.approx(min(1.0, expected))


def test_one_run_holds_for_randomized_response() -> None:
    """It is tight for it: what is refuted lies below its ε, and not far."""
    random, epsilon, guesses = np.random.default_rng(0), 1.5, 20_000
    right = int((random.random(guesses) < 1 / (1 + exp(-epsilon))).sum())
    assert 0.95 * epsilon < one_run_bound(right, guesses, guesses, 0.0, ALARM) < epsilon
    assert one_run_bound(guesses // 2, guesses, guesses, 0.0, ALARM) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("multiplier", [1.0, 2.0, 5.0])
def test_the_guesses_needed_are_what_it_takes(multiplier: float) -> None:
    event = GaussianEvent(
        unit="client",
        relation="add-remove",
        noise_std=multiplier,
        sensitivity=1.0,
        secret=True,
        sampling=Everyone(),
    )
    epsilon = spent([event], 1e-8).epsilon
    guesses = int(guesses_needed(epsilon, 1e-8, 4, ALARM))
    assert guesses >= 3 * exp(epsilon)
    assert one_run_bound(guesses, guesses, 4 * guesses, 1e-8, ALARM) > epsilon, "noise off is caught"
    fewer = int(3 * exp(epsilon)) // 2
    assert one_run_bound(fewer, fewer, 4 * fewer, 1e-8, ALARM) < epsilon, "and is not with fewer"


def test_an_epsilon_that_no_guesses_can_refute() -> None:
    assert guesses_needed(50.0, 1e-8, 4, ALARM) == inf
    assert guesses_needed(8.0, 1e-4, 4, ALARM) == inf, "δ·e^ε is above 4e-4"


def test_guesses_are_of_the_ends() -> None:
    scores, present = np.array([3.0, -2.0, 0.1, 5.0, -4.0]), np.array([True, False, False, True, True])
    assert right_guesses(scores, present, 4) == 3
    assert right_guesses(scores, ~present, 4) == 1


@pytest.mark.parametrize(("factor", "right"), [(0.99, False), (1.0, True), (1.01, False)])
def test_a_million_numbers_resolve_a_hundredth_of_the_noise(factor: float, right: bool) -> None:
    samples = factor * np.random.default_rng(0).standard_normal(1_000_000)
    assert (variance_p_value(float(samples @ samples), samples.size, 1.0) > ALARM) == right
    assert variance_p_value(0.0, 1000, 1.0) == 0


@pytest.mark.parametrize(("nodes", "rate"), [(200, 0.1), (1000, 0.002), (10, 0.5), (1, 0.3), (5, 1.0)])
def test_cohort_sizes_of_poisson_draws(nodes: int, rate: float) -> None:
    drawn = np.random.default_rng(1).random((2000, nodes)) < rate
    assert sizes_p_value(drawn.sum(1), nodes, rate) > ALARM
    assert inclusion_p_value(drawn.sum(0), 2000, rate, fixed=False) > ALARM
    if nodes > 5:
        assert sizes_p_value(np.full(2000, round(rate * nodes)), nodes, rate) < ALARM, "a fixed size"
        assert sizes_p_value(np.maximum(drawn.sum(1), rate * nodes).astype(int), nodes, rate) < ALARM, "filled up"
        assert sizes_p_value(np.full(2000, nodes + 1), nodes, rate) == 0, "more than there are"
        drawn[:, : nodes // 2] = drawn[:, nodes // 2 : nodes // 2 * 2][:, ::-1] | drawn[:, : nodes // 2]
        assert inclusion_p_value(drawn.sum(0), 2000, rate, fixed=False) < ALARM, "some more often than others"


def test_inclusion_in_draws_of_fixed_size() -> None:
    random = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([random.choice(50, 5, replace=False) for _ in range(2000)]), minlength=50)
    assert inclusion_p_value(counts, 2000, 0.1, fixed=True) > ALARM
    assert inclusion_p_value(np.where(np.arange(50) < 5, 2000, 0), 2000, 0.1, fixed=True) < ALARM, "always the same"
    assert inclusion_p_value(np.full(50, 200), 2000, 0.1, fixed=True) < ALARM, "in turn, which is no draw"
    assert inclusion_p_value(np.array([2000]), 2000, 1.0, fixed=True) == 1
    assert inclusion_p_value(np.array([1999]), 2000, 1.0, fixed=True) == 0


def test_p_values_of_right_samples_are_spread_evenly() -> None:
    """Below 0.1 in a tenth of the runs: the false alarms are those that are promised."""
    random, runs = np.random.default_rng(0), 1000
    small = np.zeros(4, np.int64)
    for _ in range(runs):
        drawn = random.random((300, 40)) < 0.2
        noise, guess = random.standard_normal((2, 50))
        p_values = (
            sizes_p_value(drawn.sum(1), 40, 0.2),
            inclusion_p_value(drawn.sum(0), 300, 0.2, fixed=False),
            variance_p_value(float(noise @ noise), 50, 1.0),
            dependence_p_value(noise, guess)[1],
        )
        small += np.array(p_values) < 0.1
    assert (stats.binom.sf(small - 1, runs, 0.1) > ALARM).all(), small
    assert (stats.binom.cdf(small, runs, 0.1) > ALARM).all(), small


def test_dependence() -> None:
    noise, other = np.random.default_rng(0).standard_normal((2, 10_000))
    assert dependence_p_value(noise, other)[1] > ALARM
    assert dependence_p_value(noise, noise)[0] == pytest.approx(1)
    assert dependence_p_value(noise, noise)[1] == 0
    assert dependence_p_value(noise, -0.1 * noise + other)[1] < ALARM
    assert dependence_p_value(np.zeros(5), other[:5]) == (1.0, 0.0)


def test_overlap() -> None:
    own, other = np.random.default_rng(0).random((2, 10_000)) < 0.1
    guessed = int(other.sum())
    correlation, p_value = overlap_p_value(int((own & other).sum()), guessed, 0.1)
    assert abs(correlation) < 0.05
    assert p_value > ALARM
    assert overlap_p_value(guessed, guessed, 0.1) == pytest.approx((1, 0), abs=1e-300)
    assert overlap_p_value(0, guessed, 0.1)[1] < ALARM, "cohorts that keep away from the guess follow from it too"
    assert overlap_p_value(0, 0, 0.1) == (0.0, 1.0)
