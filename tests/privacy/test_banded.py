"""Correlated noise: what C·x can differ by, by brute force; the streamed noise against the dense matrix; the noise itself."""

from itertools import combinations, pairwise, product
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from fedapt.privacy import banded
from fedapt.privacy.accounting import spent
from fedapt.privacy.audit import variance_p_value
from fedapt.privacy.banded import Banded, banded_of, coefficients, correlated, encoded_norm, encoder
from fedapt.privacy.randomness import Integers, SimulationRandomness
from fedapt.privacy.sampling import in_turn
from fedapt.protocols.errors import PrivacyError, SpecError
from fedapt.protocols.spec import RunSpec


def banded_run(rounds: int = 9, separation: int = 3, dimensions: int = 40, noise: float = 2.0) -> Banded:
    return Banded(0.5, noise, dimensions, rounds, separation, 7.0)


def patterns(rounds: int, separation: int) -> list[tuple[int, ...]]:
    """Every way to take part with at least so many rounds from one turn to the next."""
    everything = (turns for count in range(1, rounds + 1) for turns in combinations(range(rounds), count))
    return [turns for turns in everything if all(b - a >= separation for a, b in pairwise(turns))]


def largest(rounds: int, separation: int, bands: int) -> float:
    """‖C·x‖ at its largest, over all patterns and signs (with one coordinate, signs are the directions)."""
    c, found = encoder(rounds, bands), 0.0
    for turns in patterns(rounds, separation):
        for signs in product((1.0, -1.0), repeat=len(turns)):
            x = np.zeros(rounds)
            x[list(turns)] = signs
            found = max(found, float(np.linalg.norm(c @ x)))
    return found


@pytest.mark.parametrize("rounds", [1, 2, 5, 8])
@pytest.mark.parametrize("separation", [1, 2, 3, 4, 8, 11])
def test_the_sensitivity_is_that_of_brute_force(rounds: int, separation: int) -> None:
    for bands in range(1, min(separation, rounds) + 1):
        assert encoded_norm(rounds, separation, bands) == pytest.approx(largest(rounds, separation, bands), rel=1e-12)


def test_more_bands_than_rounds_between_turns_would_not_be_covered() -> None:
    assert largest(8, 2, 4) > 1.2 * encoded_norm(8, 2, 4)
    assert all(banded_run(n, b).bands <= b for n in (1, 4, 9) for b in (1, 2, 9, 20))


def test_the_coefficients_are_a_square_root_of_the_sum_over_rounds() -> None:
    column = coefficients(12)
    assert column == pytest.approx([comb(2 * j, j) / 4**j for j in range(12)], rel=1e-14)
    assert encoder(12, 12) @ encoder(12, 12) == pytest.approx(np.tril(np.ones((12, 12))))
    assert coefficients(1).tolist() == [1.0]


@pytest.mark.parametrize(("rounds", "bands"), [(12, 4), (24, 6)])
def test_the_coefficients_are_nearly_the_best(rounds: int, bands: int) -> None:
    """A search over all coefficients finds none with which sums have less than 0.95 of the noise."""

    def cost(column: np.ndarray) -> float:
        c = sum(x * np.eye(rounds, k=-j) for j, x in enumerate([1.0, *column]))
        norm = sqrt(sum(float((c[:, turn] ** 2).sum()) for turn in range(0, rounds, bands)))
        return norm * float(np.linalg.norm(np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(c)))

    ours, best = cost(coefficients(bands)[1:]), minimize(cost, np.zeros(bands - 1)).fun
    assert best <= ours <= best / 0.95
    assert cost(np.zeros(bands - 1)) > 1.2 * ours, "independent noise is worse"


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**32))
def test_streamed_noise_is_that_of_the_dense_matrix(rounds: int, bands: int, dimensions: int, seed: int) -> None:
    fresh = np.random.default_rng(seed).integers(-(2**24), 2**24, (rounds, dimensions))
    past: Integers = np.zeros((0, dimensions), np.int64)
    noise = []
    for own in fresh:
        noise.append(correlated(own, past, coefficients(bands)))
        past = np.concatenate([noise[-1][None], past])[: bands - 1]
    c = encoder(rounds, bands)
    assert np.abs(c @ np.array(noise, np.float64) - fresh).max(initial=0) <= 0.5 + 1e-6, "only rounding is between them"
    # A half of a step in each round, through C⁻¹, whose entries are at most 1.
    assert np.abs(np.array(noise) - np.linalg.solve(c, fresh.astype(np.float64))).max(initial=0) <= 0.5 * rounds


def run(mechanism: Banded, changes: list[list[np.ndarray]], key: int) -> np.ndarray:
    """C·x̂ of a run in which these changes arrive, float64 (rounds, dimensions)."""
    past: Integers = np.zeros((0, mechanism.dimensions), np.int64)
    sums = []
    for round_, own in enumerate(changes):
        mean, past = mechanism.release(own, past, SimulationRandomness(1000 * key + round_))
        sums.append(mean.astype(np.float64) * mechanism.expected)
    return np.asarray(encoder(mechanism.rounds, mechanism.bands) @ np.stack(sums))


@pytest.mark.parametrize(("rounds", "separation"), [(1, 1), (6, 1), (9, 3), (7, 3), (5, 8)])
def test_one_client_moves_a_run_by_no_more_than_is_charged(rounds: int, separation: int) -> None:
    mechanism = banded_run(rounds, separation)
    change = np.full(40, 1e3, np.float32)
    worlds = []
    for sign in (1, -1):
        turns = [[sign * change] if t % separation == 0 else [] for t in range(rounds)]
        worlds.append(run(mechanism, turns, 1))
    distance = float(np.linalg.norm(worlds[0] - worlds[1]))
    assert 0.9999 * mechanism.sensitivity < distance < mechanism.sensitivity * (1 + 1e-5)


def test_the_noise_of_a_run_is_what_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = banded_run(12, 4, 100)

    def p_value() -> float:
        noise = np.concatenate([run(mechanism, [[]] * 12, key).ravel() for key in range(10)])
        return variance_p_value(float(noise @ noise), len(noise), mechanism.noise_std)

    assert p_value() > 1e-3
    monkeypatch.setattr(banded, "correlated", lambda fresh, past, column: fresh)
    assert p_value() < 1e-6, "independent noise is another mechanism"


def test_sums_over_rounds_have_less_noise_than_independent_noise_would_leave() -> None:
    mechanism = banded_run(16, 8, 200)
    released = [np.linalg.solve(encoder(16, 8), run(mechanism, [[]] * 16, key)) for key in range(20)]
    square = np.mean([np.cumsum(own, axis=0) ** 2 for own in released])
    assert sqrt(square) == pytest.approx(mechanism.independent_std * sqrt(17 / 2), rel=0.05)
    independent = Banded(0.5, 2.0, 200, 16, 1, 7.0)  # a turn in each round, and no band to correlate
    assert independent.independent_std == pytest.approx(independent.noise_std)
    alike = 2.0 * 2 * 0.5 * sqrt(2)  # z · 2C · √turns: the same privacy by independent noise
    assert mechanism.independent_std < 0.7 * alike


@given(st.integers(1, 9), st.sets(st.integers(0, 2**64 - 1), max_size=20))
def test_turns_come_once_in_each_separation(separation: int, nodes: set[int]) -> None:
    cohorts = [in_turn(sorted(nodes), separation, round_) for round_ in range(1, 3 * separation + 1)]
    assert all(list(cohort) == sorted(cohort) for cohort in cohorts)
    for node in nodes:
        turns = [number for number, cohort in enumerate(cohorts) if node in cohort]
        assert [b - a for a, b in pairwise(turns)] == [separation] * 2
        assert [node] == list(in_turn([node], separation, turns[0] + 1)), "whoever else is there"


def test_clients_that_are_not_finite_count_as_zeros() -> None:
    mechanism = banded_run(1, 1)
    bad = [np.full(40, value, np.float32) for value in (np.nan, np.inf, -np.inf)]
    assert run(mechanism, [bad], 1) == pytest.approx(run(mechanism, [[]], 1))
    assert np.isfinite(run(mechanism, [[np.full(40, 1e38, np.float32)]], 1)).all()


def spec_of(*overrides: str) -> RunSpec:
    raw = {
        "run": {"rounds": 20},
        "model": {"base": "m", "task": "causal-lm"},
        "recipe": {"name": "ffa", "weighting": "uniform"},
        "privacy": {"unit": "client", "epsilon": 3.0, "mechanism": "banded", "separation": 5},
    }
    return RunSpec.check(raw).set(*overrides)


def test_noise_is_solved_for_the_whole_run() -> None:
    mechanism = banded_of(spec_of(), 100, 1000)
    account = spent([mechanism.event(secret=True)], 1e-5)
    assert 2.99 < account.epsilon <= 3
    assert account.method == "matrix bound"
    assert (mechanism.participations, mechanism.bands, mechanism.expected) == (4, 5, 20.0)
    assert banded_of(spec_of("privacy.noise_multiplier=1.5"), 100, 10).noise_multiplier == 1.5


def test_what_no_grid_can_carry_is_refused() -> None:
    with pytest.raises(PrivacyError, match="rounding 1000000 parameters in 1000 rounds"):
        _ = Banded(1.0, 30.0, 10**6, 1000, 500, 10.0).grid


def test_a_separation_belongs_to_a_banded_mechanism() -> None:
    with pytest.raises(SpecError, match="separation = 5 is of mechanism"):
        spec_of("privacy.mechanism=gaussian")
    with pytest.raises(SpecError, match="separation is missing"):
        RunSpec.check(
            {
                "model": {"base": "m", "task": "causal-lm"},
                "privacy": {"unit": "client", "epsilon": 1, "mechanism": "banded"},
            }
        )
