import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.spec import Participation
from fedapt.server.participation import cohort_size, draw, wanted, with_spare

ROUNDS = 3000
LIMIT = 1e-4
"""Chance of a false alarm of one chi-square test, were the draws not keyed."""


def chi_square(observed: Any, expected: Any) -> float:
    """The chance of a statistic as large (Wilson–Hilferty's approximation is good to a few percent here)."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1
    spread = 2 / (9 * freedom)
    return 0.5 * math.erfc((((statistic / freedom) ** (1 / 3)) - (1 - spread)) / math.sqrt(2 * spread))


def cohorts(count: int, seed: int = 0, rounds: int = ROUNDS, **settings: Any) -> list[tuple[int, ...]]:
    participation = Participation(**settings)
    return [draw(range(count), participation, seed, round_) for round_ in range(rounds)]


def binomial(count: int, rate: float) -> list[float]:
    return [math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(count + 1)]


participations = st.builds(
    Participation,
    sampling=st.sampled_from(["all", "fixed", "poisson"]),
    rate=st.floats(0.01, 1.0),
    minimum=st.integers(0, 6),
)
node_lists = st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=12)


@given(node_lists, participations, st.integers(0, 2**63 - 1), st.integers(1, 1000), st.randoms())
def test_a_cohort_is_sorted_keyed_and_large_enough(
    nodes: list[int], participation: Participation, seed: int, round_: int, shuffler: Any
) -> None:
    cohort = draw(nodes, participation, seed, round_)
    assert list(cohort) == sorted(set(cohort) & set(nodes))
    assert len(cohort) >= min(participation.minimum, len(nodes))
    shuffled = nodes.copy()
    shuffler.shuffle(shuffled)
    assert draw(shuffled, participation, seed, round_) == cohort
    if participation.sampling != "poisson":
        assert len(cohort) == cohort_size(len(nodes), participation) or participation.minimum > len(nodes)
    if participation.sampling == "all":
        assert cohort == tuple(sorted(nodes))


@pytest.mark.parametrize(
    ("nodes", "rate", "minimum", "size"),
    [
        (10, 0.5, 1, 5),
        (10, 0.01, 1, 1),
        (10, 0.01, 0, 1),
        (10, 0.1, 4, 4),
        (10, 1.0, 1, 10),
        (3, 0.5, 8, 3),
        (0, 0.5, 1, 0),
    ],
)
def test_a_fixed_share_has_its_size(nodes: int, rate: float, minimum: int, size: int) -> None:
    participation = Participation(sampling="fixed", rate=rate, minimum=minimum)
    assert cohort_size(nodes, participation) == size
    assert {len(c) for c in cohorts(nodes, rounds=20, sampling="fixed", rate=rate, minimum=minimum)} == {size}


def test_rounds_and_seeds_differ() -> None:
    settings: dict[str, Any] = {"sampling": "fixed", "rate": 0.5}
    assert len(set(cohorts(12, rounds=50, **settings))) > 40
    assert cohorts(12, seed=0, rounds=50, **settings) != cohorts(12, seed=1, rounds=50, **settings)
    assert cohorts(12, rounds=50, **settings) == cohorts(12, rounds=50, **settings)


@pytest.mark.parametrize(
    "settings", [{"sampling": "fixed", "rate": 0.3}, {"sampling": "poisson", "rate": 0.3, "minimum": 0}]
)
def test_every_node_is_equally_likely(settings: dict[str, Any]) -> None:
    """Counts of nodes that are drawn without replacement vary less than chi-square has it: a test against bias alone."""
    drawn = np.bincount(np.concatenate(cohorts(10, **settings)).astype(int), minlength=10)
    assert chi_square(drawn, np.full(10, drawn.sum() / 10)) > LIMIT
    assert drawn.sum() == pytest.approx(ROUNDS * 3, rel=0.05)
    biased = drawn.copy()
    biased[:2] += [150, -150]
    assert chi_square(biased, np.full(10, drawn.sum() / 10)) < LIMIT, "a bias of a sixth is seen"


def test_poisson_sizes_are_binomial() -> None:
    count, rate = 8, 0.3
    sizes = [len(cohort) for cohort in cohorts(count, sampling="poisson", rate=rate, minimum=0)]

    def chance(sizes: list[int], expected: list[float]) -> float:
        """Sizes from 6 on are one class, so that each has enough draws."""
        observed = np.bincount(sizes, minlength=count + 1)
        pooled = [*observed[:6], observed[6:].sum()]
        return chi_square(pooled, ROUNDS * np.array([*expected[:6], sum(expected[6:])]))

    assert chance(sizes, binomial(count, rate)) > LIMIT
    assert 0 in sizes, "an empty draw happens"
    assert chance(sizes, binomial(count, 0.33)) < LIMIT, "another rate is seen"
    filled = [len(cohort) for cohort in cohorts(count, sampling="poisson", rate=rate, minimum=1)]
    assert chance(filled, binomial(count, rate)) < LIMIT, "a filled-up draw is no Poisson draw"


def correlations(drawn: Any) -> Any:
    """Between each two nodes."""
    return np.asarray(np.corrcoef(drawn.T))[np.triu_indices(drawn.shape[1], 1)]


def test_poisson_draws_are_independent_between_nodes() -> None:
    drawn = np.zeros((ROUNDS, 6))
    for row, cohort in zip(drawn, cohorts(6, sampling="poisson", rate=0.4, minimum=0), strict=True):
        row[list(cohort)] = 1
    assert np.abs(correlations(drawn)).max() < 4.5 / ROUNDS**0.5
    fixed = np.zeros((ROUNDS, 6))
    for row, cohort in zip(fixed, cohorts(6, sampling="fixed", rate=0.4), strict=True):
        row[list(cohort)] = 1
    assert correlations(fixed).mean() < -4.5 / ROUNDS**0.5, "a fixed share is not independent"


def test_poisson_fills_up_to_the_minimum() -> None:
    sizes = [len(cohort) for cohort in cohorts(5, rounds=200, sampling="poisson", rate=0.05, minimum=3)]
    assert min(sizes) == 3
    assert max(len(c) for c in cohorts(2, rounds=50, sampling="poisson", rate=0.05, minimum=3)) == 2


@given(size=st.integers(0, 500), spare=st.floats(0, 3))
def test_spares_are_drawn_on_top_and_not_waited_for(size: int, spare: float) -> None:
    participation = Participation(sampling="fixed", rate=1.0, spare=spare)
    drawn = with_spare(size, participation)
    assert drawn >= size
    assert wanted(drawn, participation) <= drawn
    assert with_spare(wanted(drawn, participation), participation) >= drawn
    if drawn:
        assert with_spare(wanted(drawn, participation) - 1, participation) < drawn, "no smaller share draws as many"


def test_a_spare_is_taken_from_those_who_are_there() -> None:
    participation = Participation(sampling="fixed", rate=0.5, spare=0.5)
    assert len(draw(range(10), participation, 0, 1)) == 8
    assert wanted(8, participation) == 5
    assert len(draw(range(2), Participation(sampling="fixed", rate=0.5, spare=9.0), 0, 1)) == 2


def test_without_spares_all_are_waited_for() -> None:
    for sampling in ("all", "fixed", "poisson"):
        assert wanted(7, Participation(sampling=sampling)) == 7
