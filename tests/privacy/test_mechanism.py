"""The client-level mechanism: what it releases is what its event says, whoever answers and whatever they send."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedapt.privacy.accounting import spent
from fedapt.privacy.clipping import AdaptiveClip
from fedapt.privacy.events import Everyone, FixedSize, Poisson, Sampling
from fedapt.privacy.mechanism import Mechanism, mechanism_of
from fedapt.privacy.randomness import SecretRandomness, SimulationRandomness
from fedapt.protocols.errors import PrivacyError, RunError
from fedapt.protocols.layout import Flat
from fedapt.protocols.spec import RunSpec

SAMPLINGS: list[Sampling] = [Poisson(0.1), FixedSize(5, 50), Everyone()]
DIMENSIONS = 40


def mechanism(sampling: Sampling = SAMPLINGS[0], *, multiplier: float = 1.0, **given: object) -> Mechanism:
    made = Mechanism(AdaptiveClip(0.5), multiplier, DIMENSIONS, sampling, 5.0)
    return replace(made, **given)  # type: ignore[arg-type]


def spec_of(*overrides: str) -> RunSpec:
    raw = {
        "model": {"base": "m", "task": "causal-lm"},
        "privacy": {"unit": "client", "epsilon": 6.0, "clip": 0.5},
        "participation": {"sampling": "poisson", "rate": 0.1},
    }
    return RunSpec.check(raw).set(*overrides)


def changes_of(count: int, seed: int = 0, size: float = 1.0) -> list[Flat]:
    random = np.random.default_rng(seed)
    return [(size * random.standard_normal(DIMENSIONS)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("adapts", [False, True])
def test_noise_has_the_size_that_the_event_charges(sampling: Sampling, adapts: bool) -> None:
    """Of an adaptive clip the sum alone has more noise: the bits take their share of the same event."""
    one = mechanism(sampling, multiplier=0.7, adapts=adapts)
    event, released = one.event(secret=True), []
    for _ in range(300):
        mean, _ = one.release([], SecretRandomness())
        released.append(mean * one.expected)
    measured = np.concatenate(released).astype(np.float64)
    changed = 1 if isinstance(sampling, Poisson) else 2
    assert event.noise_multiplier == pytest.approx(0.7, rel=1e-9)
    assert event.sensitivity == pytest.approx(0.5 * changed, rel=0.01)
    assert event.sensitivity >= 0.5 * changed
    assert (one.noise_std > event.noise_std) == adapts
    inside = stats.chi2.interval(1 - 1e-6, len(measured))
    assert inside[0] <= float(np.sum((measured / one.noise_std) ** 2)) <= inside[1]
    assert not inside[0] <= float(np.sum((measured / (0.95 * one.noise_std)) ** 2)) <= inside[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_release_is_the_clipped_sum_over_a_constant(count: int, seed: int, size: float) -> None:
    """With the noise of one key taken away, what is left is the sum of clipped changes ÷ the expected number."""
    one, changes = mechanism(), changes_of(count, seed, size)
    with_changes, _ = one.release(changes, SimulationRandomness(seed))
    noise, _ = one.release([], SimulationRandomness(seed))
    wanted = sum((c * min(1.0, 0.5 / float(np.linalg.norm(c))) for c in changes), np.zeros(DIMENSIONS)) / 5.0
    assert np.allclose(with_changes - noise, wanted, atol=1e-6)


def test_one_more_node_moves_the_sum_by_the_sensitivity_at_most() -> None:
    one, changes = mechanism(), changes_of(4, size=100.0)
    more, less = (one.release(c, SimulationRandomness(1))[0].astype(np.float64) for c in (changes, changes[:-1]))
    moved = np.linalg.norm(more - less) * one.expected
    assert 0.49 <= moved <= one.event(secret=True).sensitivity + 1e-6


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf, 1e38])
def test_an_odd_update_has_no_more_effect_than_any_other(bad: float) -> None:
    one, changes = mechanism(), changes_of(2)
    odd = np.full(DIMENSIONS, bad, np.float32)
    with_odd, without = (one.release(c, SimulationRandomness(3))[0] for c in ([*changes, odd], changes))
    moved = np.linalg.norm((with_odd - without).astype(np.float64)) * one.expected
    assert np.isfinite(with_odd).all()
    assert moved <= 0.5 + 1e-5
    if not np.isfinite(bad) or bad == 0:
        assert moved == 0.0


def test_an_empty_round_is_noise_and_no_less() -> None:
    mean, _ = mechanism().release([], SecretRandomness())
    assert np.count_nonzero(mean) == DIMENSIONS


def test_order_does_not_matter() -> None:
    changes = changes_of(7)
    one, two = (mechanism().release(c, SimulationRandomness(9))[0] for c in (changes, changes[::-1]))
    assert np.array_equal(one, two)


def test_the_draw_is_the_one_that_is_accounted() -> None:
    nodes = range(50)
    sizes = [len(mechanism(Poisson(0.1)).draw(nodes, SecretRandomness())) for _ in range(400)]
    counts = np.bincount(sizes, minlength=12)
    expected = 400 * stats.binom.pmf(np.arange(len(counts)), 50, 0.1)
    kept = expected > 4
    assert stats.chisquare(counts[kept], expected[kept] * counts[kept].sum() / expected[kept].sum()).pvalue > 1e-6
    assert {len(mechanism(FixedSize(5, 50)).draw(nodes, SecretRandomness())) for _ in range(20)} == {5}
    assert mechanism(Everyone()).draw([3, 1, 2], SecretRandomness()) == (1, 2, 3)
    with pytest.raises(RunError, match="49 nodes are there, and the draw is accounted as 5 of 50"):
        mechanism(FixedSize(5, 50)).draw(range(49), SecretRandomness())


def test_an_adaptive_clip_goes_to_the_median_norm_and_costs_one_event() -> None:
    one = replace(mechanism(Poisson(0.5), multiplier=1.0, adapts=True), expected=200.0)
    changes = [c * 4 / np.linalg.norm(c) for c in changes_of(200)]
    for _ in range(40):
        _, one = one.release(changes, SecretRandomness())
        assert one.event(secret=True).noise_multiplier == pytest.approx(1.0, rel=1e-9)
    assert 3.0 < one.clip.bound < 5.5


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["poisson", "fixed", "all"])
def test_the_noise_that_is_solved_for_meets_the_cap(sampling: str) -> None:
    spec = spec_of(f"participation.sampling={sampling}", "run.rounds=20")
    one = mechanism_of(spec, 100, DIMENSIONS)
    events = [one.event(secret=True)] * 20
    assert 0.9 * 6.0 < spent(events, 1e-5).epsilon <= 6.0
    weaker = replace(one, noise_multiplier=0.98 * one.noise_multiplier)
    assert spent([weaker.event(secret=True)] * 20, 1e-5).epsilon > 6.0


def test_stated_noise_is_taken_as_stated() -> None:
    one = mechanism_of(spec_of("privacy.noise_multiplier=2.5"), 100, DIMENSIONS)
    assert (one.noise_multiplier, one.expected, one.sampling) == (2.5, 10.0, Poisson(0.1))


def test_a_cap_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(PrivacyError):
        mechanism_of(spec_of("privacy.epsilon=1e-9", "privacy.delta=1e-11"), 100, DIMENSIONS)


def test_seeded_noise_is_marked() -> None:
    assert not spent([mechanism().event(secret=False)], 1e-5).private
    assert spent([mechanism().event(secret=True)], 1e-5).private
