import random
from collections.abc import Callable, Sequence
from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chisquare

from fedapt.privacy.randomness import Randomness, SecretRandomness, SimulationRandomness
from fedapt.privacy.sampling import everybody, fixed_size, poisson, poisson_batch
from fedapt.protocols.errors import PrivacyError

NODES, RATE, DRAWS = 40, 0.3, 4000
Cohorts = list[tuple[int, ...]]

ids = st.sets(st.integers(0, 2**63), max_size=30)


def drawn(draw: Callable[[Randomness], tuple[int, ...]], times: int = DRAWS) -> Cohorts:
    source = SecretRandomness()
    return [draw(source) for _ in range(times)]


def poisson_cohorts() -> Cohorts:
    return drawn(lambda source: poisson(range(NODES), RATE, source))


def fixed_cohorts() -> Cohorts:
    return drawn(lambda source: fixed_size(range(NODES), round(RATE * NODES), source))


def fit_of_sizes(cohorts: Cohorts, rate: float = RATE) -> float:
    """The p-value of a chi-square test that sizes are binomial; both tails in one bin each."""
    low, high = binom.ppf([0.002, 0.998], NODES, rate).astype(int)
    sizes = np.clip([len(cohort) for cohort in cohorts], low, high)
    below = binom.cdf(np.arange(low, high), NODES, rate)
    expected = np.diff(below, prepend=0, append=1) * len(cohorts)
    return float(chisquare(np.bincount(sizes - low, minlength=high - low + 1), expected).pvalue)


def fit_of_members(cohorts: Cohorts) -> float:
    """The p-value of a chi-square test that each node is as likely as any other, given the sizes."""
    counts = np.bincount([node for cohort in cohorts for node in cohort], minlength=NODES)
    return float(chisquare(counts).pvalue)


def test_sizes_of_poisson_cohorts_are_binomial() -> None:
    cohorts = poisson_cohorts()
    assert fit_of_sizes(cohorts) > 1e-7
    assert fit_of_sizes(cohorts, 1.1 * RATE) < 1e-9


def test_a_fixed_size_is_not_poisson() -> None:
    assert fit_of_sizes(fixed_cohorts()) < 1e-9


def test_filling_up_to_a_minimum_is_not_poisson() -> None:
    filled = [cohort + (0,) * (9 - len(cohort)) for cohort in poisson_cohorts()]
    assert fit_of_sizes(filled) < 1e-9


@pytest.mark.parametrize("cohorts", [poisson_cohorts, fixed_cohorts])
def test_every_node_is_as_likely(cohorts: Callable[[], Cohorts]) -> None:
    fair = cohorts()
    assert fit_of_members(fair) > 1e-7
    assert fit_of_members([cohort[1:] for cohort in fair]) < 1e-9, "always leaving out the first"


def test_every_subset_is_as_likely() -> None:
    source, subsets = SecretRandomness(), list(combinations(range(5), 2))
    counts = dict.fromkeys(subsets, 0)
    for _ in range(DRAWS):
        counts[fixed_size(range(5), 2, source)] += 1  # type: ignore[index]
    assert chisquare(list(counts.values())).pvalue > 1e-7


def test_poisson_members_are_independent() -> None:
    member = np.zeros((DRAWS, NODES))
    for row, cohort in zip(member, poisson_cohorts(), strict=True):
        row[list(cohort)] = 1

    def largest_correlation(columns: np.ndarray) -> float:
        correlations = np.corrcoef(columns.T)[np.triu_indices(NODES, 1)]
        return float(np.abs(correlations).max() * np.sqrt(DRAWS))

    assert largest_correlation(member) < 7
    member[:, 1] = member[:, 0]
    assert largest_correlation(member) > 7


def test_a_batch_of_many_examples() -> None:
    source, examples = SecretRandomness(), 100_000
    batches = [poisson_batch(examples, 0.01, source) for _ in range(50)]
    assert all((np.diff(batch) > 0).all() for batch in batches)
    assert all(batch.dtype == np.int64 and batch[0] >= 0 and batch[-1] < examples for batch in batches)
    sizes = np.array([len(batch) for batch in batches])
    assert abs(sizes.mean() - 1000) < 7 * np.sqrt(990 / 50)
    places = np.bincount(np.concatenate(batches) // 1000, minlength=100)
    assert chisquare(places).pvalue > 1e-7


def test_a_rare_and_a_sure_event() -> None:
    assert poisson_batch(1000, 0, SecretRandomness()).tolist() == []
    assert poisson_batch(3, 1, SecretRandomness()).tolist() == [0, 1, 2]
    assert poisson_batch(0, 0.5, SecretRandomness()).tolist() == []
    assert poisson_batch(0, 1, SecretRandomness()).tolist() == []
    assert poisson_batch(1000, 1e-30, SecretRandomness()).tolist() == []
    assert poisson([], 0.5, SecretRandomness()) == ()


class Words:
    """Given words, again and again in lists of any length."""

    secret = False

    def __init__(self, *calls: Sequence[int]) -> None:
        self._calls = list(calls)

    def octets(self, count: int) -> bytes:
        octets = np.array(self._calls.pop(0), np.uint64).tobytes()
        assert len(octets) == count
        return octets


@pytest.mark.parametrize("rate", [0.5, 0.3, 1e-6, np.nextafter(1, 0)])
def test_the_rate_is_exact(rate: float) -> None:
    """Of all 2⁶⁴ words, those below rate·2⁶⁴ take part: 0.3 is the float that is written so."""
    numerator, denominator = float(rate).as_integer_ratio()
    words = numerator * 2**64 // denominator
    assert poisson_batch(3, rate, Words([words - 1, words, 0])).tolist() == [0, 2]


def test_equal_ranks_are_drawn_again() -> None:
    assert fixed_size([5, 6, 7], 1, Words([4, 4, 9], [3, 2, 1])) == (7,)


@given(ids, st.floats(0, 1), st.data())
def test_draws_are_ascending_members(nodes: set[int], rate: float, data: st.DataObject) -> None:
    source, size = SecretRandomness(), data.draw(st.integers(0, len(nodes)))
    for cohort in (poisson(nodes, rate, source), fixed_size(nodes, size, source), everybody(nodes)):
        assert list(cohort) == sorted(set(cohort) & nodes)
    assert len(fixed_size(nodes, size, source)) == size
    assert set(everybody(nodes)) == nodes
    assert fixed_size(nodes, len(nodes), source) == everybody(nodes)


DRAW = [
    lambda source: poisson(range(200), 0.5, source),
    lambda source: fixed_size(range(200), 100, source),
    lambda source: tuple(poisson_batch(200, 0.5, source)),
]


@pytest.mark.parametrize("draw", DRAW)
def test_no_seed_reaches_a_secret_draw(draw: Callable[[Randomness], tuple[int, ...]]) -> None:
    def after_seeding() -> tuple[int, ...]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return draw(SecretRandomness())

    assert after_seeding() != after_seeding()


@pytest.mark.parametrize("draw", DRAW)
def test_a_simulated_draw_follows_its_key(draw: Callable[[Randomness], tuple[int, ...]]) -> None:
    assert draw(SimulationRandomness(1)) == draw(SimulationRandomness(1)) != draw(SimulationRandomness(2))
    with patch("os.urandom", SimulationRandomness(1).octets):
        assert draw(SecretRandomness()) == draw(SimulationRandomness(1)), "it is the same code"


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability(rate: float) -> None:
    with pytest.raises(PrivacyError, match="the sampling rate is"):
        poisson(range(3), rate, SecretRandomness())


@pytest.mark.parametrize("size", [-1, 4])
def test_a_size_that_is_not_there(size: int) -> None:
    with pytest.raises(PrivacyError, match=f"{size} nodes are asked for, and there are 3"):
        fixed_size(range(3), size, SecretRandomness())
