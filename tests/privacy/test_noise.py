import random
from collections.abc import Callable
from itertools import permutations
from math import ceil, sqrt
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import logsumexp, ndtr
from scipy.stats import chisquare

from fedapt.privacy import discrete, karney
from fedapt.privacy.discrete import LARGEST_DEVIATION, discrete_gaussian, discrete_gaussian_reference
from fedapt.privacy.noise import LARGEST_CHARGE, LARGEST_COUNT, Grid, total
from fedapt.privacy.randomness import Integers, Randomness, SecretRandomness, SimulationRandomness
from fedapt.protocols.errors import PrivacyError, RunError
from fedapt.protocols.keys import generator

Law = np.ndarray[Any, np.dtype[np.float64]]

SAMPLES = 200_000
steps = st.integers(-40, 60).map(lambda exponent: 2.0**exponent)
vectors = arrays(np.float64, st.integers(0, 40), elements=st.floats(-1e3, 1e3))


class Tape:
    """Given octets, then keyed ones: the same sequence in pieces of any size."""

    secret = False

    def __init__(self, octets: bytes = b"", key: int = 0) -> None:
        self._octets, self._more = octets, generator(key)

    def octets(self, count: int) -> bytes:
        while len(self._octets) < count:
            self._octets += self._more.bytes(1024)
        taken, self._octets = self._octets[:count], self._octets[count:]
        return taken


def law_of(deviation: float, reach: int) -> Law:
    """The probabilities of −reach … reach."""
    weights: Law = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * deviation**2))
    weights /= weights.sum()
    return weights


def fit(samples: Integers, deviation: float) -> float:
    """The p-value of a chi-square test that `samples` are discrete Gaussian: forty bins, or fewer for a small σ."""
    edges = np.unique(np.rint(deviation * np.linspace(-2.5, 2.5, 39)))  # a bin begins at its edge
    if deviation < 1000:
        reach = ceil(12 * deviation)
        below = np.concatenate([[0], law_of(deviation, reach).cumsum()])[edges.astype(int) + reach]
    else:
        below = ndtr((edges - 0.5) / deviation)
    expected = np.diff(below, prepend=0, append=1) * len(samples)
    observed = np.bincount(np.searchsorted(edges, samples, side="right"), minlength=len(expected))
    return float(chisquare(observed, expected).pvalue)


@given(
    st.one_of(st.integers(1, 40), st.integers(1, LARGEST_DEVIATION), st.just(LARGEST_DEVIATION)),
    st.integers(0, 12),
    st.one_of(st.binary(max_size=60), st.lists(st.sampled_from([0, 1, 127, 128, 255]), max_size=60).map(bytes)),
    st.integers(0, 2**64),
    st.integers(1, 700),
)
def test_the_compiled_sampler_equals_the_reference(
    deviation: int, count: int, octets: bytes, key: int, block: int
) -> None:
    """Also where a block ends within a sample: it must go on with the octets that it has read, or long ones get rare."""
    with patch.object(discrete, "_BLOCK", block):
        fast = discrete_gaussian(deviation, count, Tape(octets, key))
    plain = discrete_gaussian_reference(deviation, count, Tape(octets, key))
    assert fast.dtype == plain.dtype == np.int64
    assert fast.tolist() == plain.tolist()


@pytest.mark.parametrize("bound", [1, 3, 2**31 + 1, 2**32 - 1, 2**32])
@pytest.mark.parametrize("word", [0, 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1])
def test_the_incomplete_run_of_a_uniform_integer_is_refused(bound: int, word: int) -> None:
    octets = np.frombuffer(word.to_bytes(4) + (5).to_bytes(4), np.uint8)
    expected = (word % bound, 4) if word // bound < 2**32 // bound else (5 % bound, 8)
    assert karney._below(octets, 0, bound) == expected
    assert discrete._below(iter(octets.tolist()), bound) == expected[0]


@pytest.mark.parametrize("draw", [discrete_gaussian, discrete_gaussian_reference])
@pytest.mark.parametrize("deviation", [0, -1, LARGEST_DEVIATION + 1])
def test_a_deviation_beyond_the_sampler(draw: Callable[[int, int, Randomness], Integers], deviation: int) -> None:
    with pytest.raises(ValueError, match=f"deviation is {deviation}"):
        draw(deviation, 1, SecretRandomness())


@pytest.mark.parametrize("deviation", [1, 2, 7, 100, 2**20 - 1, 2**20, LARGEST_DEVIATION])
def test_the_law_of_secret_noise(deviation: int) -> None:
    samples = discrete_gaussian(deviation, SAMPLES, SecretRandomness())
    assert fit(samples, deviation) > 1e-7
    assert fit(samples, 0.95 * deviation) < 1e-9
    assert fit(samples, 1.05 * deviation) < 1e-9


def test_the_law_of_noise_on_a_grid() -> None:
    grid = Grid.fitting(0.3, 1.0, SAMPLES)
    counts = {f: grid.noised(np.zeros(SAMPLES, np.int64), 0.3 * f, SecretRandomness()) for f in (0.95, 1.0)}
    assert fit(counts[1.0], 0.3 / grid.step) > 1e-7
    assert fit(counts[0.95], 0.3 / grid.step) < 1e-9


def test_the_low_bits_are_uniform_and_samples_independent() -> None:
    def flaws(samples: Integers) -> tuple[float, float]:
        """The p-value of the lowest four bits; the correlation of neighbours in standard deviations."""
        correlation = samples[1:] @ samples[:-1] / (deviation**2 * sqrt(len(samples) - 1))
        return float(chisquare(np.bincount(samples % 16)).pvalue), abs(float(correlation))

    deviation = 2**20
    samples = discrete_gaussian(deviation, SAMPLES, SecretRandomness())
    uniform, correlated = flaws(samples)
    assert uniform > 1e-7
    assert correlated < 6
    assert flaws(samples // 4 * 4)[0] < 1e-9
    assert flaws(np.repeat(samples[::100], 100))[1] > 6


def test_no_seed_reaches_secret_noise() -> None:
    def draw() -> list[int]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return list(discrete_gaussian(2**20, 64, SecretRandomness()))

    assert draw() != draw()


def test_nothing_but_the_operating_system_decides_secret_noise() -> None:
    with patch("os.urandom", Tape(key=5).octets):
        secret = discrete_gaussian(2**20, 64, SecretRandomness())
    assert secret.tolist() == discrete_gaussian(2**20, 64, Tape(key=5)).tolist()


def test_simulated_noise_follows_its_key_and_says_so() -> None:
    first, again, other = (SimulationRandomness(key) for key in (1, 1, 2))
    draws = [discrete_gaussian(1000, 64, source).tolist() for source in (first, again, other, first)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != draws[3], "a source gave the same octets twice"
    assert not first.secret
    assert SecretRandomness().secret


def test_a_machine_without_a_place_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(x: int) -> int:
        return 2 * x

    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [], raising=False)
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [], raising=False)
    assert karney._compiled(double)(4) == 8


@given(steps, vectors)
def test_rounding_moves_a_vector_by_no_more_than_is_charged(step: float, vector: Law) -> None:
    grid = Grid(step)
    rounded = grid.values(grid.rounded(vector))
    assert (np.abs(rounded - vector) <= step / 2).all()
    norm = float(np.linalg.norm(vector))
    assert np.linalg.norm(rounded) <= grid.sensitivity(norm, len(vector)) * (1 + 1e-12)
    assert np.array_equal(grid.rounded(rounded), grid.rounded(vector))


def test_the_charge_is_reached() -> None:
    """A smaller charge would be wrong: every entry just above the middle of two points goes up by half a step."""
    grid, vector = Grid(0.25), np.full(400, 0.125 + 1e-9)
    norm = float(np.linalg.norm(vector))
    assert np.linalg.norm(grid.values(grid.rounded(vector))) > 0.99999 * grid.sensitivity(norm, 400)


@given(arrays(np.float32, st.integers(0, 20), elements=st.floats(-100, 100, width=32)))
def test_float32_and_float64_are_rounded_alike(vector: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    grid = Grid(2.0**-10)
    assert np.array_equal(grid.rounded(vector), grid.rounded(vector.astype(np.float64)))


@given(st.floats(1e-6, 1e6), st.floats(1e-3, 30), st.integers(0, 10**7))
def test_a_fitting_grid(clip: float, multiplier: float, dimensions: int) -> None:
    noise_std = multiplier * clip
    grid = Grid.fitting(noise_std, clip, dimensions)
    assert clip < grid.sensitivity(clip, dimensions) <= (1 + LARGEST_CHARGE) * clip
    assert LARGEST_DEVIATION // 2 < grid.deviation(noise_std) <= LARGEST_DEVIATION
    assert grid.deviation(noise_std) * grid.step >= noise_std


@pytest.mark.parametrize("noise_std", [1.0, np.nextafter(1.0, 2), np.nextafter(1.0, 0), 1 / 3])
def test_noise_at_a_power_of_two_stays_within_the_sampler(noise_std: float) -> None:
    assert Grid.fitting(float(noise_std), 1.0, 10).deviation(float(noise_std)) <= LARGEST_DEVIATION


@pytest.mark.parametrize(
    ("noise_std", "clip", "message"),
    [
        (0, 1, "noise is 0"),
        (-1, 1, "noise is -1"),
        (float("inf"), 1, "noise is inf"),
        (1, 0, "clip is 0"),
        (1, float("nan"), "clip is nan"),
        (1, float("inf"), "clip is inf"),
        (1e4, 1, "would add 154.4% to the clip of 1; the limit is 1%. The noise is 1e[+]04 times the clip"),
    ],
)
def test_a_grid_that_cannot_be(noise_std: float, clip: float, message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        Grid.fitting(noise_std, clip, 10**7)


@pytest.mark.parametrize("step", [0.0, -1.0, 0.3, 3.0, float("inf"), float("nan")])
def test_a_step_that_is_no_power_of_two(step: float) -> None:
    with pytest.raises(ValueError, match="step is"):
        Grid(step)


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf"), 1e38, 1e308])
def test_an_entry_that_is_off_the_grid(entry: float) -> None:
    with pytest.raises(RunError, match="clip the update first"):
        Grid(2.0**-30).rounded(np.array([0, entry]))


@given(st.lists(arrays(np.int64, 3, elements=st.integers(-(2**50), 2**50)), min_size=1, max_size=4), steps)
def test_sums_are_exact_and_free_of_order(parts: list[Integers], step: float) -> None:
    grid, exact = Grid(step), [sum(column) for column in zip(*(part.tolist() for part in parts), strict=True)]
    for order in permutations(parts):
        assert total(order, 3).tolist() == exact
    values = grid.values(total(parts, 3))
    assert values.dtype == np.float64
    assert [value / step for value in values.tolist()] == exact


def test_sums_of_nothing() -> None:
    assert total([], 3).tolist() == [0, 0, 0]
    assert total([np.empty(0, np.int64)], 0).shape == (0,)
    assert Grid(1.0).noised(np.empty(0, np.int64), 5.0, SecretRandomness()).shape == (0,)


@pytest.mark.parametrize("large", [LARGEST_COUNT, -LARGEST_COUNT, -(2**63)])
def test_a_sum_that_would_not_be_exact(large: int) -> None:
    parts = [np.array([large, 0]), np.array([0, -1])]
    for order in permutations(parts):
        with pytest.raises(RunError, match="may reach"):
            total(order, 2)


@given(steps, st.floats(1, 1000), st.integers(0, 2**32))
def test_noised_values_are_whole_steps(step: float, multiplier: float, key: int) -> None:
    grid, counts = Grid(step), np.arange(10)
    noised = grid.noised(counts, multiplier * step, SimulationRandomness(key))
    noise = discrete_gaussian(ceil(multiplier), 10, SimulationRandomness(key))
    assert (grid.values(noised) / step).tolist() == (counts + noise).tolist()


@pytest.mark.parametrize("deviation", [1, 3, 20])
@pytest.mark.parametrize("order", [1.5, 2, 3.7, 4])
def test_the_privacy_of_the_law(deviation: int, order: float) -> None:
    """Rényi divergences of the law and a shifted one: at most α·Δ²/2σ², which is ρ-zCDP, and not less for a whole α."""
    points = np.arange(-60.0 * deviation, 60 * deviation + 1)
    log_sum = logsumexp(-(points**2) / (2 * deviation**2))
    for shift in (1, deviation, 3 * deviation):
        exponents = -(order * points**2 + (1 - order) * (points - shift) ** 2) / (2 * deviation**2)
        divergence = (logsumexp(exponents) - log_sum) / (order - 1)
        claimed = order * shift**2 / (2 * deviation**2)
        assert divergence <= claimed * (1 + 1e-9)
        if order == int(order):
            assert divergence >= claimed * (1 - 1e-9)


@pytest.mark.parametrize("deviation", [4, 16, 64, 256])
def test_the_distance_to_a_rounded_gaussian(deviation: int) -> None:
    """Kullback-Leibler of one coordinate is at most 1/576σ⁴; that of T·d adds up, and Pinsker gives √(T·d/1152)/σ²."""
    reach = 8 * deviation
    points, law = np.arange(-reach, reach + 1), law_of(deviation, reach)
    positive = np.abs(points)  # the upper tail has digits where the lower has none
    rounded = ndtr((0.5 - positive) / deviation) - ndtr((-0.5 - positive) / deviation)
    divergence = np.sum(law * np.log(law / rounded))
    assert divergence <= 1 / (576 * deviation**4) + 1e-14
    assert divergence > 0.9 / (576 * deviation**4) - 1e-14
