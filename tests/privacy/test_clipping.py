from fractions import Fraction
from math import exp
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedapt.privacy.clipping import AdaptiveClip, clip, clip_reference, clip_rows
from fedapt.protocols.errors import PrivacyError

Vector = np.ndarray[Any, np.dtype[np.float32]]  # or float64: a test that takes both says so

single = arrays(np.float32, st.integers(0, 30), elements=st.floats(width=32))
double = arrays(np.float64, st.integers(0, 30), elements=st.floats())
anything = st.one_of(single, double)
bounds = st.one_of(st.floats(2.0**-100, 1e300), st.floats(0.1, 10), st.just(float("inf")))


def within(vector: Vector, bound: float) -> bool:
    """‖vector‖ ≤ bound, in exact arithmetic."""
    return bound == float("inf") or sum(Fraction(float(entry)) ** 2 for entry in vector) <= Fraction(bound) ** 2


@given(anything, bounds)
def test_whatever_comes_the_norm_is_within_the_bound(vector: Vector, bound: float) -> None:
    clipped, changed = clip(vector, bound)
    assert clipped.dtype == vector.dtype
    assert clipped.shape == vector.shape
    assert np.isfinite(clipped).all()
    assert within(clipped, bound)
    assert changed != np.array_equal(clipped, vector)


def test_the_exact_norm_would_catch_plain_rounding() -> None:
    """The usual code, change·min(1, C/‖change‖) in float32, does pass the bound."""
    random = np.random.default_rng(0)
    vectors = [random.standard_normal(50).astype(np.float32) for _ in range(50)]
    usual = [vector * np.float32(min(1, 0.7 / float(np.linalg.norm(vector)))) for vector in vectors]
    assert not all(within(vector, 0.7) for vector in usual)
    assert all(within(clip(vector, 0.7)[0], 0.7) for vector in vectors)


@given(anything, bounds)
def test_as_the_reference(vector: Vector, bound: float) -> None:
    (clipped, changed), (plain, plainly) = clip(vector, bound), clip_reference(vector, bound)
    assert clipped == pytest.approx(plain, rel=1e-6, abs=1e-44)
    assert changed >= plainly


@given(st.integers(0, 5), st.integers(0, 20), st.integers(0, 2**32), st.floats(0.01, 100), st.data())
def test_rows_are_clipped_one_by_one(rows: int, size: int, seed: int, bound: float, data: st.DataObject) -> None:
    changes = np.random.default_rng(seed).standard_cauchy((rows, size)).astype(np.float32)
    if changes.size and data.draw(st.booleans()):
        changes[data.draw(st.integers(0, rows - 1)), 0] = data.draw(st.sampled_from([np.nan, np.inf, 1e38, 0]))
    original = changes.copy()
    clipped, changed = clip_rows(changes, bound)
    assert clipped.shape == changes.shape
    assert changed.dtype == np.bool_
    for row, result, flag in zip(changes, clipped, changed, strict=True):
        alone, alone_flag = clip(row, bound)
        assert result == pytest.approx(alone, rel=1e-6)
        assert flag == alone_flag
    assert np.array_equal(changes, original, equal_nan=True), "the input was written to"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_effect(dtype: type, bad: float) -> None:
    clipped, changed = clip(np.array([1, bad, 3], dtype), 10.0)
    assert clipped.tolist() == [0, 0, 0]
    assert changed


def test_large_tiny_and_zero_entries() -> None:
    assert clip(np.full(4, 1e38, np.float32), 1.0)[0] == pytest.approx([0.5] * 4, rel=1e-6)
    assert clip(np.full(4, -1.7e308), 1.0)[0] == pytest.approx([-0.5] * 4, rel=1e-6)
    for small in (0.0, 1e-45, 1e-38):
        vector = np.full(3, small, np.float32)
        clipped, changed = clip(vector, 1.0)
        assert np.array_equal(clipped, vector)
        assert not changed


@given(arrays(np.float32, st.integers(1, 30), elements=st.floats(-100, 100, width=32)))
def test_a_vector_within_the_bound_keeps_its_bits_and_a_long_one_its_direction(vector: Vector) -> None:
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    clipped, changed = clip(vector, 1.001 * norm + 1e-6)
    assert np.array_equal(clipped, vector)
    assert not changed
    if norm > 1e-3:
        clipped, changed = clip(vector, norm / 4)
        assert clipped == pytest.approx(vector / 4, rel=1e-6, abs=1e-40)
        assert changed


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), 1e-40])
def test_a_bound_that_is_none(bound: float) -> None:
    with pytest.raises(PrivacyError, match="the clip is"):
        clip(np.ones(3), bound)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_adaptive_clip_finds_its_quantile(quantile: float) -> None:
    random = np.random.default_rng(1)
    state, seen = AdaptiveClip(0.01, quantile), []
    for _ in range(400):
        norms = random.lognormal(size=200)
        state = state.after(float(np.mean(norms <= state.bound) + random.normal(0, 0.05)))
        seen.append(float(np.mean(random.lognormal(size=200) <= state.bound)))
    assert np.mean(seen[200:]) == pytest.approx(quantile, abs=0.03)


def test_one_step_of_the_adaptive_clip() -> None:
    state = AdaptiveClip(2.0)
    assert state.after(1.5).bound == pytest.approx(2 * exp(-0.2))
    assert state.after(-0.5).bound == pytest.approx(2 * exp(0.2))
    assert state.after(0.5) == state == AdaptiveClip(2.0, quantile=0.5, rate=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "clip is 0"),
        ((float("inf"),), "clip is inf"),
        ((1.0, 1.1), "quantile is 1.1"),
        ((1.0, 0.5, -1), "rate"),
    ],
)
def test_an_adaptive_clip_that_cannot_be(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        AdaptiveClip(*arguments)


@pytest.mark.parametrize("fraction", [1.0, -1e9, 1e9])
def test_a_clip_that_adapts_stays_one_whatever_the_updates_are(fraction: float) -> None:
    state = AdaptiveClip(1.0)
    for _ in range(1000):
        state = state.after(fraction)
    assert 2.0**-100 <= state.bound <= 2.0**60
    assert float(np.float32(state.bound)) == state.bound
    clip(np.zeros(3, np.float32), state.bound)


def test_a_fraction_that_is_not_a_number() -> None:
    with pytest.raises(PrivacyError, match="clip is nan"):
        AdaptiveClip(1.0).after(float("nan"))
