"""Noise, draw, clip, denominator and event of DP-SGD come from one object, and agree."""

from math import inf, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chisquare

from fedapt.privacy.accounting import headline
from fedapt.privacy.clipping import clip_reference
from fedapt.privacy.events import GaussianEvent, Poisson
from fedapt.privacy.example_level import ExampleLevel, Sums, example_level_of
from fedapt.privacy.noise import Floats, Values
from fedapt.privacy.randomness import Integers, Randomness, SecretRandomness, SimulationRandomness
from fedapt.privacy.sampling import fixed_size
from fedapt.protocols.errors import PrivacyError
from fedapt.protocols.spec import RunSpec

SECRET = SecretRandomness()

FAR = 6
"""Standard errors. Secret noise is another one in each run of the tests, so what is rare would still be seen: 4 is, once in
some thousand runs. The planted bug is 20 away."""


def gradients_of(count: int, dimensions: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_cauchy((count, dimensions)).astype(np.float32)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(1, 12), st.floats(0.1, 10), st.integers(0, 2**32))
def test_without_noise_it_is_the_clipped_sum_over_a_constant(
    first: int, second: int, dimensions: int, bound: float, seed: int
) -> None:
    mechanism = ExampleLevel(bound, 0.0, 4, 100, dimensions)
    parts = [gradients_of(first, dimensions, seed), gradients_of(second, dimensions, seed + 1)]
    expected = (
        sum((np.array(clip_reference(row, bound)[0]) for part in parts for row in part), np.zeros(dimensions)) / 4
    )
    released = mechanism.release([mechanism.bounded(part) for part in parts], SECRET)
    assert released == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(st.integers(0, 6), st.integers(1, 12), st.floats(0.1, 10), st.floats(0.3, 3), st.integers(0, 2**32))
def test_one_example_moves_the_sum_by_no_more_than_its_sensitivity(
    count: int, dimensions: int, bound: float, multiplier: float, seed: int
) -> None:
    mechanism = ExampleLevel(bound, multiplier, 4, 100, dimensions)
    assert mechanism.grid is not None
    rows = gradients_of(count + 1, dimensions, seed)
    moved = mechanism.grid.values(mechanism.bounded(rows) - mechanism.bounded(rows[:-1]))
    assert np.linalg.norm(moved) <= mechanism.sensitivity * (1 + 1e-12)
    assert bound < mechanism.sensitivity <= 1.01 * bound


def test_gradients_that_are_not_finite_count_as_zeros() -> None:
    mechanism = ExampleLevel(1.0, 1.0, 4, 100, 5)
    rows = gradients_of(4, 5, 0)
    rows[1, 2], rows[2] = np.nan, np.inf
    assert np.array_equal(mechanism.bounded(rows), mechanism.bounded(rows[[0, 3]]))


def test_the_event_says_what_is_done() -> None:
    mechanism = ExampleLevel(2.0, 0.7, 32, 800, 50)
    assert mechanism.event(13, secret=True) == GaussianEvent(
        unit="example",
        relation="add-remove",
        noise_std=mechanism.noise_std,
        sensitivity=mechanism.sensitivity,
        secret=True,
        sampling=Poisson(0.04),
        count=13,
    )
    assert mechanism.event(1, secret=False).noise_multiplier == pytest.approx(0.7, rel=1e-12)
    assert mechanism.expected == 32


def test_a_node_with_less_than_a_batch_takes_all_of_it_and_claims_no_amplification() -> None:
    mechanism = ExampleLevel(1.0, 1.0, 32, 5, 3)
    assert (mechanism.rate, mechanism.expected) == (1.0, 5)
    assert mechanism.event(1, secret=True).sampling == Poisson(1.0)
    assert mechanism.draw(SECRET).tolist() == [0, 1, 2, 3, 4]


def test_no_noise_is_an_infinite_epsilon_and_no_clip_no_event() -> None:
    assert headline([ExampleLevel(1.0, 0.0, 4, 100, 5).event(1, secret=True)], 1e-5)[0] == inf
    with pytest.raises(PrivacyError, match="sensitivity"):
        ExampleLevel(inf, 0.0, 4, 100, 5).event(1, secret=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((0.0, 1.0, 4, 100), "clip is 0"),
        ((float("nan"), 1.0, 4, 100), "clip is nan"),
        ((1.0, -1.0, 4, 100), "noise multiplier is -1"),
        ((1.0, inf, 4, 100), "noise multiplier is inf"),
        ((inf, 1.0, 4, 100), "infinite clip"),
        ((1.0, 1.0, 0, 100), "batch size is 0"),
        ((1.0, 1.0, 4, 0), "number of examples is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: tuple[float, float, int, int], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        ExampleLevel(*wrong, dimensions=5)


def test_of_a_spec() -> None:
    raw = {
        "model": {"base": "tiny", "task": "sequence-classification", "labels": 2},
        "recipe": {"name": "ffa"},
        "local": {"batch_size": 10},
        "privacy": {"unit": "example", "epsilon": 3.0, "delta": 1e-5, "clip": 0.5},
    }
    mechanism = example_level_of(RunSpec.check(raw), 200, 7, 40)
    assert (mechanism.clip, mechanism.rate, mechanism.expected, mechanism.dimensions) == (0.5, 0.05, 10, 7)
    assert 2.95 <= headline([mechanism.event(40, secret=True)], 1e-5)[0] <= 3.0
    stated = RunSpec.check(raw).set("privacy.noise_multiplier=1.25")
    assert example_level_of(stated, 200, 7, 40).noise_multiplier == 1.25


class FixedBatches(ExampleLevel):
    """A planted bug: batches of one size behind a Poisson event."""

    def draw(self, source: Randomness) -> Integers:
        return np.array(fixed_size(range(self.examples), self.batch_size, source))


class FullBatches(ExampleLevel):
    """A planted bug: a Poisson draw that is made again until it has something in it."""

    def draw(self, source: Randomness) -> Integers:
        drawn = super().draw(source)
        return drawn if drawn.size else self.draw(source)


@pytest.mark.parametrize(("kind", "honest"), [(ExampleLevel, True), (FixedBatches, False), (FullBatches, False)])
def test_sizes_of_batches_are_those_of_a_poisson_draw(kind: type[ExampleLevel], honest: bool) -> None:
    mechanism, source = kind(1.0, 1.0, 3, 40, 2), SimulationRandomness(5)
    draws = [mechanism.draw(source) for _ in range(3000)]
    sizes = np.minimum([len(drawn) for drawn in draws], 8)
    expected = [*binom.pmf(np.arange(8), 40, mechanism.rate), binom.sf(7, 40, mechanism.rate)]
    p_value = chisquare(np.bincount(sizes, minlength=9), 3000 * np.array(expected)).pvalue
    assert (p_value > 1e-4) == honest
    drawn = np.bincount(np.concatenate(draws), minlength=40)  # and every example as often
    assert np.abs(drawn / 3000 - mechanism.rate).max() < (5 * sqrt(mechanism.rate / 3000) if honest else 1)


class LessNoise(ExampleLevel):
    """A planted bug: nine tenths of the noise."""

    def release(self, sums: object, source: Randomness) -> Values:
        return 0.9 * super().release([], source)


class ClippedSum(ExampleLevel):
    """A planted bug: the clip bounds the sum, and one example may move it by twice as much."""

    def bounded(self, gradients: Floats) -> Sums:
        return super().bounded(gradients.sum(0, keepdims=True))


@pytest.mark.parametrize(("kind", "honest"), [(ExampleLevel, True), (LessNoise, False)])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_noise_has_the_moments_that_are_charged(kind: type[ExampleLevel], honest: bool, count: int) -> None:
    mechanism = kind(2.0, 0.8, 4, 40, 30_000)
    sums = [mechanism.bounded(np.zeros((count, 30_000), np.float32))]
    noise = mechanism.release(sums, SECRET) * mechanism.expected / mechanism.event(1, secret=True).noise_std
    assert abs(noise.mean()) < FAR / sqrt(noise.size)
    assert (abs(noise.var() - 1) < FAR * sqrt(2 / noise.size)) == honest


def test_a_clip_of_the_sum_would_be_seen() -> None:
    rows = np.array([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]], np.float32)
    right, wrong = (kind(1.0, 0.0, 1, 1, 2) for kind in (ExampleLevel, ClippedSum))
    assert right.bounded(rows) == pytest.approx([2.0, 1.0], rel=1e-6)
    assert wrong.bounded(rows) != pytest.approx([2.0, 1.0], rel=1e-2)
