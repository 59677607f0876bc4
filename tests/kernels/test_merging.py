from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.kernels.lowrank import Matrix
from fedapt.kernels.merging import (
    breadcrumbs,
    breadcrumbs_reference,
    fisher,
    fisher_reference,
    greedy_soup,
    pcb,
    pcb_reference,
    shares,
    ties,
    ties_reference,
    weighted_mean,
    weighted_mean_reference,
)
from fedapt.protocols.layout import Flat

densities = st.sampled_from([0.05, 0.1, 0.2, 0.5, 0.7, 1.0])
scales = st.sampled_from([0.3, 1.0, 2.0])
Rule = Callable[[Matrix, Matrix], Flat]


@st.composite
def changes(draw: st.DrawFn) -> Matrix:
    """(K, n) fp32, n from 0: real values, or small whole numbers with many ties and zeros."""
    shape = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        return random.integers(-2, 3, shape).astype(np.float32)
    return random.standard_normal(shape).astype(np.float32)


@st.composite
def weighted(draw: st.DrawFn) -> tuple[Matrix, list[float]]:
    values = draw(changes())
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 4.0]), min_size=len(values), max_size=len(values)))
    return values, weights if any(weights) else [1.0] * len(values)


def close(left: Matrix, right: Matrix | list[float]) -> bool:
    return bool(np.allclose(left, np.asarray(right), rtol=1e-6, atol=1e-6))


def information_of(values: Matrix) -> Matrix:
    """Fisher information that goes with a change, some of it zero."""
    return np.asarray(np.maximum(values + 0.5, 0) ** 2)


RULES: dict[str, Rule] = {
    "weighted_mean": weighted_mean,
    "fisher": lambda x, w: fisher(x, information_of(np.sign(x)), w),
    "ties": lambda x, w: ties(x, w, density=0.5),
    "breadcrumbs": lambda x, w: breadcrumbs(x, [x.shape[1]], w, density=0.5, top=0.2),
    "pcb": lambda x, w: pcb(x, w, density=0.5),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


@given(weighted())
def test_weighted_mean_equals_its_reference(case: tuple[Matrix, list[float]]) -> None:
    assert close(weighted_mean(*case), weighted_mean_reference(*case))


@given(weighted(), st.sampled_from([1e-6, 0.1]))
def test_fisher_equals_its_reference(case: tuple[Matrix, list[float]], floor: float) -> None:
    values, weights = case
    information = information_of(values)
    expected = fisher_reference(values, information, weights, floor)
    assert close(fisher(values, information, weights, floor=floor), expected)


@given(weighted(), densities, scales)
def test_ties_equals_its_reference(case: tuple[Matrix, list[float]], density: float, scale: float) -> None:
    assert close(ties(*case, density=density, scale=scale), ties_reference(*case, density, scale))


@given(weighted(), densities, st.sampled_from([0.0, 0.1, 0.3]), scales, st.data())
def test_breadcrumbs_equals_its_reference(
    case: tuple[Matrix, list[float]], density: float, top: float, scale: float, data: st.DataObject
) -> None:
    values, weights = case
    top = min(top, 1 - density)
    first = data.draw(st.integers(0, values.shape[1]))
    sizes = [first, 0, values.shape[1] - first]
    expected = breadcrumbs_reference(values, sizes, weights, density=density, top=top, scale=scale)
    assert close(breadcrumbs(values, sizes, weights, density=density, top=top, scale=scale), expected)


@given(weighted(), densities, scales)
def test_pcb_equals_its_reference(case: tuple[Matrix, list[float]], density: float, scale: float) -> None:
    assert close(pcb(*case, density=density, scale=scale), pcb_reference(*case, density, scale))


@rules
@given(case=weighted(), seed=st.integers(0, 2**32))
def test_the_order_of_the_changes_plays_no_part(rule: Rule, case: tuple[Matrix, list[float]], seed: int) -> None:
    """Where nothing ties: of values that are equal but for the order of a sum, a rule may keep either."""
    values, weights = case
    random = np.random.default_rng(seed)
    values = (values + 0.01 * random.standard_normal(values.shape)).astype(np.float32)
    order = random.permutation(len(values))
    assert close(rule(values[order], np.array(weights)[order]), rule(values, np.array(weights)))


@rules
@given(case=weighted(), factor=st.sampled_from([-2.0, 0.5, 4.0, 1024.0]))
def test_a_longer_change_gives_a_longer_result(rule: Rule, case: tuple[Matrix, list[float]], factor: float) -> None:
    values, weights = case
    if rule is RULES["fisher"] and factor < 0:
        return  # this test's Fisher information follows the sign
    assert np.array_equal(
        rule(np.float32(factor) * values, np.array(weights)), factor * rule(values, np.array(weights))
    )


@given(changes())
def test_one_change_alone_comes_back(values: Matrix) -> None:
    one = values[:1]
    assert np.array_equal(weighted_mean(one), one[0])
    assert np.array_equal(fisher(one, np.abs(one)), one[0])
    assert np.array_equal(ties(one, density=1.0), one[0])
    assert np.array_equal(breadcrumbs(one, [one.shape[1]], density=1.0, top=0.0), one[0])
    assert np.array_equal(greedy_soup(one, lambda _: 0.0)[0], one[0])


@rules
@given(values=changes())
def test_a_change_without_weight_plays_no_part(rule: Rule, values: Matrix) -> None:
    if rule in (RULES["breadcrumbs"], RULES["pcb"]):
        return  # a sum counts its terms, and the strength of a score grows with their number: both as in the papers
    weights = np.array([1.0, 2.0, 4.0, 8.0, 16.0])[: len(values)]
    spoiled = np.concatenate([values, np.full((1, values.shape[1]), 1e30, np.float32)])
    assert close(rule(spoiled, np.append(weights, 0.0)), rule(values, weights))


def test_ties_by_hand() -> None:
    """Two agree on the first entry against one; of the third only the last change keeps its value; the fourth is a tie."""
    values = np.array([[4, 3, 0.1, 5], [2, -9, 0.2, -5], [-5, 3, 0.1, 0.0]], np.float32)
    assert np.allclose(ties(values, density=0.75), [3, -9, 0.1, 0])
    assert np.allclose(ties(values, density=0.5), [-5, -9, 0, 0])


def test_breadcrumbs_drops_both_tails_in_each_tensor() -> None:
    values = np.array([[1, 2, 3, 100, 0.1, 0.2, 0.3, 0.4]], np.float32)
    merged = breadcrumbs(values, [4, 4], density=0.5, top=0.25, scale=0.5)
    assert np.allclose(merged, [0, 1, 1.5, 0, 0, 0.1, 0.15, 0])
    together = breadcrumbs(values, [8], density=0.5, top=0.25, scale=0.5)
    assert not np.allclose(merged, together)  # the negative control: the tensors' bounds do matter


def test_breadcrumbs_adds_where_the_mean_divides() -> None:
    values = np.ones((4, 3), np.float32)
    assert np.array_equal(breadcrumbs(values, [3], density=1.0, top=0.0), np.full(3, 4, np.float32))
    assert np.array_equal(weighted_mean(values), np.ones(3, np.float32))


def test_fisher_follows_the_model_that_cares() -> None:
    values = np.array([[1.0, 5.0], [3.0, 7.0]], np.float32)
    merged = fisher(values, np.array([[3.0, 0.0], [1.0, 0.0]]))
    assert np.allclose(merged, [1.5, 6.0])  # nobody cares about the second entry: the mean


def test_pcb_lets_agreement_win() -> None:
    """Two changes agree on entry 0, a third goes against them: its score is negative, and its share is 0."""
    values = np.array([[2.0, 0.1, 0.0], [2.0, 0.0, 0.1], [-1.0, 0.5, 0.4]], np.float32)
    merged = pcb(values, density=0.4)
    assert np.isclose(merged[0], 2.0)
    assert weighted_mean(values)[0] == 1.0


def test_pcb_takes_many_changes() -> None:
    """exp(K) overflows from K = 710 on."""
    assert np.isfinite(pcb(np.random.default_rng(0).standard_normal((800, 3)).astype(np.float32))).all()


def test_a_greedy_soup_refuses_what_lowers_the_score() -> None:
    target = np.array([1.0, 1.0], np.float32)
    values = np.array([[1.0, 0.6], [9.0, 9.0], [0.8, 1.2]], np.float32)
    calls: list[Flat] = []

    def score(change: Flat) -> float:
        calls.append(change)
        return -float(np.linalg.norm(change - target))

    soup, members = greedy_soup(values, score)
    assert members == (2, 0)
    assert np.allclose(soup, [0.9, 0.9])
    assert len(calls) == 2 * len(values) - 1
    assert score(weighted_mean(values)) < score(soup)  # the uniform soup takes the bad one in


@given(changes(), st.integers(0, 2**32))
def test_a_greedy_soup_is_never_worse_than_the_best_alone(values: Matrix, seed: int) -> None:
    target = np.random.default_rng(seed).standard_normal(values.shape[1])

    def score(change: Flat) -> float:
        return -float(np.linalg.norm(change - target))

    soup, members = greedy_soup(values, score)
    assert score(soup) >= max(map(score, values))
    assert close(soup, weighted_mean(values[list(members)]))


@given(st.lists(st.floats(0, 1e308), min_size=1, max_size=5).filter(any))
def test_shares_sum_to_one(weights: list[float]) -> None:
    assert np.isclose(shares(weights, len(weights)).sum(), 1)


@pytest.mark.parametrize(
    ("weights", "count", "message"),
    [
        (None, 0, "nothing to merge"),
        ([1.0], 2, "1 weights for 2 changes"),
        ([0.0, 0.0], 2, "not all zero"),
        ([-1.0, 2.0], 2, "not negative"),
        ([np.nan, 1.0], 2, "finite"),
        ([np.inf, 1.0], 2, "finite"),
    ],
)
def test_weights_that_weigh_nothing_are_refused(weights: list[float] | None, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shares(weights, count)


def test_what_no_rule_can_use_is_refused() -> None:
    values = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="density 0"):
        ties(values, density=0.0)
    with pytest.raises(ValueError, match=r"density 1.5"):
        pcb(values, density=1.5)
    with pytest.raises(ValueError, match=r"density 0.9 and top 0.2"):
        breadcrumbs(values, [3], density=0.9, top=0.2)
    with pytest.raises(ValueError, match="tensors of 4 entries"):
        breadcrumbs(values, [4])
    with pytest.raises(ValueError, match="shapes must be equal"):
        fisher(values, np.ones((2, 2)))
    with pytest.raises(ValueError, match="no value negative"):
        fisher(values, -values)
    with pytest.raises(ValueError, match="nothing to merge"):
        greedy_soup(values[:0], lambda _: 0.0)
