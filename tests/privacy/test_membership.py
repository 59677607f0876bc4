"""The statistics of membership inference, on scores whose law is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from fedapt.privacy.membership import area_under_curve, confidence, judged, likelihood_ratios


def simulated(mu: float, runs: int = 16, canaries: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fits with unit variance that are `mu` higher for a canary that is in; each canary has a level of its own."""
    random = np.random.default_rng(seed)
    present = random.random((runs, canaries)) < 0.5
    level = 5 * random.standard_normal(canaries)
    return level + mu * present + random.standard_normal((runs, canaries)), present


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=12))
def test_the_area_is_that_of_all_pairs(rows: list[tuple[int, bool]]) -> None:
    inside, outside = ([float(x) for x, there in rows if there is wanted] for wanted in (True, False))
    pairs = [(x > y) + 0.5 * (x == y) for x in inside for y in outside]
    area = area_under_curve(np.array([float(x) for x, _ in rows]), np.array([there for _, there in rows], bool))
    assert area == pytest.approx(np.mean(pairs) if pairs else 0.5)


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.0])
def test_shadows_come_near_the_best_attack(mu: float) -> None:
    """With known means the best area is Φ(μ/√2); a threshold for all canaries at once sees next to nothing."""
    fits, present = simulated(mu, runs=40)
    best = float(norm.cdf(mu / np.sqrt(2)))
    assert area_under_curve(likelihood_ratios(fits, present), present) == pytest.approx(best, abs=0.03)
    assert area_under_curve(fits, present) < 0.5 + 0.2 * mu / 2 + 0.03


def test_what_no_shadow_has_shown_says_nothing() -> None:
    fits, present = simulated(3.0, runs=5, canaries=10)
    present[:, 0], present[:, 1] = True, False
    scores = likelihood_ratios(fits, present)
    assert np.isfinite(scores).all()
    assert not scores[:, :2].any()
    assert np.isfinite(likelihood_ratios(np.zeros((4, 3)), np.ones((4, 3), bool))).all()


def test_confidence_is_the_logit_of_the_probability() -> None:
    p = np.array([0.01, 0.3, 0.5, 0.99])
    assert confidence(-np.log(p)) == pytest.approx(np.log(p / (1 - p)))
    extremes = confidence(np.array([0.0, 1e-300, 1e6, np.inf]))
    assert np.isfinite(extremes).all()
    assert (np.diff(extremes) <= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_guessing_is_reported_as_guessing(seed: int) -> None:
    found = judged(*simulated(0.0, seed=seed), delta=1e-8, level=1e-3, claimed=0.0)
    assert found.interval[0] < 0.52
    assert found.interval[1] > 0.48
    assert found.epsilon == 0
    assert found.hits < 0.04
    assert not found.contradicts


def test_an_attack_refutes_a_claim_that_is_too_small_and_no_true_one() -> None:
    """μ = 2 is ε = 12.9 at δ = 1e-8 (about): 1 is refuted, and 13 is not."""
    fits, present = simulated(2.0, canaries=1000)
    assert judged(fits, present, 1e-8, 1e-3, claimed=1.0).contradicts
    found = judged(fits, present, 1e-8, 1e-3, claimed=13.0)
    assert 1 < found.epsilon < 13
    assert not found.contradicts
    assert found.hits > 0.2
    assert not judged(fits, present, 1e-8, 1e-3, claimed=None).contradicts
