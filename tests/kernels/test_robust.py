from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.kernels import robust
from fedapt.kernels.lowrank import LowRank, Matrix
from fedapt.kernels.robust import (
    clip,
    coordinate_median,
    coordinate_median_reference,
    geometric_median,
    geometric_median_reference,
    gram,
    gram_reference,
    krum,
    krum_reference,
    product_change,
    squared_distances,
    trimmed_mean,
    trimmed_mean_reference,
)

seeds = st.integers(0, 2**32)
Node = list[LowRank]


@st.composite
def nodes(draw: st.DrawFn) -> list[Node]:
    """K nodes of up to three modules; each module of each node has a rank of its own, also 0."""
    count, random = draw(st.integers(1, 5)), np.random.default_rng(draw(seeds))
    shapes = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=3))

    def factors(out: int, inputs: int) -> LowRank:
        rank = int(random.integers(0, 5))
        return LowRank(random.standard_normal((out, rank)), random.standard_normal((rank, inputs)))

    return [[factors(*shape) for shape in shapes] for _ in range(count)]


@st.composite
def points(draw: st.DrawFn, least: int = 1) -> Matrix:
    """K dense updates (K, n): real values, or small whole numbers with many equal ones."""
    shape = draw(st.integers(least, 9)), draw(st.integers(0, 6))
    random = np.random.default_rng(draw(seeds))
    return random.integers(-2, 3, shape) * 1.0 if draw(st.booleans()) else random.standard_normal(shape)


@st.composite
def weighted(draw: st.DrawFn) -> tuple[Matrix, list[float]]:
    values = draw(points())
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=len(values), max_size=len(values)))
    return values, weights if any(weights) else [1.0] * len(values)


def mean_distance(values: Matrix, weights: Sequence[float], point: Matrix) -> float:
    return float(np.average(np.linalg.norm(values - point, axis=1), weights=weights))


# The Gram matrix


@given(nodes(), seeds)
def test_gram_equals_its_reference(updates: list[Node], seed: int) -> None:
    others = list(np.random.default_rng(seed).standard_normal((len(updates), 3)).astype(np.float32))
    assert np.allclose(gram(updates), gram_reference(updates), atol=1e-9)
    assert np.allclose(gram(updates, others), gram_reference(updates, others), atol=1e-9)
    assert np.allclose(gram([], others), gram_reference([], others), atol=1e-9)


def test_gram_does_not_depend_on_the_size_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    updates = [[LowRank(random.standard_normal((5, 4)), random.standard_normal((4, 6)))] for _ in range(7)]
    whole = gram(updates)
    monkeypatch.setattr(robust, "ROWS", 3)
    assert np.allclose(gram(updates), whole, atol=1e-12)


@given(nodes(), seeds)
def test_gram_does_not_see_the_gauge(updates: list[Node], seed: int) -> None:
    random = np.random.default_rng(seed)

    def turned(term: LowRank) -> LowRank:
        gauge = np.linalg.qr(random.standard_normal((term.rank, term.rank)))[0] * random.uniform(0.1, 10, term.rank)
        return LowRank(term.b @ gauge, np.linalg.solve(gauge, term.a))

    other = [[turned(term) for term in node] for node in updates]
    assert np.allclose(gram(other), gram(updates), atol=1e-9)


def test_distances_of_factors_do_see_the_gauge() -> None:
    """The negative control: the same product, in two gauges, is far from itself factor by factor."""
    term = LowRank(np.eye(3), np.eye(3))
    turned = LowRank(10 * np.eye(3), np.eye(3) / 10)
    assert np.allclose(squared_distances(gram([[term], [turned]])), 0)
    assert np.linalg.norm(term.b - turned.b) > 10


@given(seeds, st.integers(1, 3), st.sampled_from([1.0, 1e-6]))
def test_a_product_change_is_the_difference_of_products(seed: int, rank: int, size: float) -> None:
    random = np.random.default_rng(seed)
    b, a = random.standard_normal((4, rank)), random.standard_normal((rank, 5))
    more_b, more_a = size * random.standard_normal((4, rank)), size * random.standard_normal((rank, 5))
    change = product_change(b, a, b + more_b, a + more_a)
    exact = more_b @ a + b @ more_a + more_b @ more_a
    assert change.rank == 2 * rank
    assert np.allclose(change.b @ change.a, exact, rtol=0, atol=1e-9 * size)


def test_gram_holds_the_largest_fp32_values() -> None:
    huge = np.full((4, 4), np.finfo(np.float32).max, np.float32)
    assert np.isfinite(gram([[LowRank(huge, huge)]], [huge])).all()


def test_gram_refuses_nodes_that_do_not_fit() -> None:
    term = LowRank(np.ones((2, 1)), np.ones((1, 2)))
    with pytest.raises(ValueError, match="at least one"):
        gram([])
    with pytest.raises(ValueError, match="nodes differ"):
        gram([[term], [term, term]])
    with pytest.raises(ValueError, match="nodes differ"):
        gram([[term], [term]], [np.ones(3)])


@pytest.mark.parametrize("bad", [np.zeros((0, 0)), np.zeros((2, 3)), np.zeros(2)])
def test_rules_refuse_what_is_no_gram_matrix(bad: Matrix) -> None:
    for rule in (lambda g: krum(g, 0), geometric_median, clip):
        with pytest.raises(ValueError, match="Gram matrix of shape"):
            rule(bad)
    with pytest.raises(ValueError, match="not finite"):
        clip(np.array([[np.nan]]))


# Krum


@given(points(least=3), st.data())
def test_krum_equals_its_reference(values: Matrix, data: st.DataObject) -> None:
    byzantine = data.draw(st.integers(0, (len(values) - 3) // 2))
    keep = data.draw(st.integers(1, len(values) - byzantine))
    if not np.array_equal(values, np.round(values)) or keep == len(values):
        assert np.allclose(krum(values @ values.T, byzantine, keep), krum_reference(values, byzantine, keep))
    else:  # whole numbers: scores are exact, so equal scores are equal
        assert np.array_equal(krum(values @ values.T, byzantine, keep), krum_reference(values, byzantine, keep))


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.sampled_from([10.0, 1e30]))
def test_krum_takes_no_outlier(seed: int, byzantine: int, more: int, size: float) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal((2 * byzantine + 2 + more, 4))
    values[:byzantine] = size * (10 + random.standard_normal((byzantine, 4)))
    for keep in (1, len(values) - byzantine):
        weights = krum(values @ values.T, byzantine, keep)
        assert not weights[:byzantine].any()
        assert np.isclose(weights.sum(), 1)


def test_krum_of_identical_updates_takes_the_first() -> None:
    assert np.array_equal(krum(np.ones((5, 5)), 1), [1, 0, 0, 0, 0])
    assert np.array_equal(krum(np.ones((5, 5)), 1, keep=2), [0.5, 0.5, 0, 0, 0])


@pytest.mark.parametrize(
    ("count", "byzantine", "keep", "message"),
    [
        (1, 0, 1, "at least 3 updates, and there are 1: .* use another rule"),
        (2, 0, 1, "at least 3 updates, and there are 2: .* use another rule"),
        (6, 2, 1, "at least 7 updates, and there are 6: let more nodes answer, or ask for at most 1"),
        (5, -1, 1, "against -1 bad nodes"),
        (5, 1, 5, "keep 1 to 4"),
        (5, 1, 0, "keep 1 to 4"),
    ],
)
def test_krum_refuses_what_it_cannot_promise(count: int, byzantine: int, keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        krum(np.eye(count), byzantine, keep)


# The geometric median


@settings(max_examples=15)  # a thousand steps of the plain loop each
@given(weighted())
def test_the_geometric_median_equals_its_reference(case: tuple[Matrix, list[float]]) -> None:
    """They start from different points, so what they reach is compared, and not the steps."""
    values, weights = case
    norms = np.linalg.norm(values, axis=1)
    floor = 1e-6 * (coordinate_median(norms[:, None], weights)[0] or min(norms[norms > 0], default=1.0))
    mine = geometric_median(values @ values.T, weights)
    expected = geometric_median_reference(values, weights, floor, robust.STEPS)
    assert np.isclose(mine.sum(), 1)
    assert (mine >= 0).all()
    distance = mean_distance(values, weights, mine @ values)
    assert abs(distance - mean_distance(values, weights, expected)) <= 4e-6 * norms.max()


@given(weighted(), seeds)
def test_no_point_is_nearer_than_the_geometric_median(case: tuple[Matrix, list[float]], seed: int) -> None:
    values, weights = case
    found = geometric_median(values @ values.T, weights) @ values
    least = mean_distance(values, weights, found)
    allowed = 2e-6 * max(np.linalg.norm(values, axis=1))
    random = np.random.default_rng(seed)
    near = found + random.standard_normal((20, values.shape[1])) * 10.0 ** random.uniform(-6, 0, (20, 1))
    for other in (*values, *near, np.average(values, axis=0, weights=weights)):
        assert least <= mean_distance(values, weights, other) + allowed


@pytest.mark.parametrize("size", [1e2, 1e8, 1e30])
def test_a_minority_cannot_move_the_geometric_median_far(size: float) -> None:
    random = np.random.default_rng(0)
    honest, bad = 1 + 0.1 * random.standard_normal((6, 20)), -size * np.ones((4, 20))
    values = np.concatenate([honest, bad])
    found = geometric_median(values @ values.T) @ values
    centre = honest.mean(axis=0)
    radius = max(np.linalg.norm(honest - centre, axis=1))
    assert np.linalg.norm(found - centre) < 5 * radius
    assert np.linalg.norm(values.mean(axis=0) - centre) > 50 * radius  # the negative control: the mean is moved
    majority = geometric_median(values @ values.T, [1.0] * 6 + [3.0] * 4) @ values
    assert np.linalg.norm(majority - centre) > 50 * radius  # so is the median, by more than half the weight


def test_geometric_medians_that_are_known() -> None:
    random = np.random.default_rng(1)
    one, two = random.standard_normal((1, 3)), random.standard_normal((2, 3))
    assert np.array_equal(geometric_median(one @ one.T), [1.0])
    between = mean_distance(two, [1, 1], geometric_median(two @ two.T) @ two)
    assert np.isclose(between, np.linalg.norm(two[0] - two[1]) / 2)
    assert np.allclose(geometric_median(two @ two.T, [1, 3]) @ two, two[1], atol=1e-5)
    same = np.repeat(one, 4, axis=0)
    assert np.allclose(geometric_median(same @ same.T, [1, 2, 3, 4]), [0.1, 0.2, 0.3, 0.4], atol=1e-6)
    assert np.allclose(geometric_median(np.zeros((3, 3))), 1 / 3)
    cross = np.array([[1.0, 0], [-1, 0], [0, 5], [0, -0.1], [7, 7]])
    weights = geometric_median(cross @ cross.T, [1, 1, 1, 1, 0])
    assert weights[4] == 0
    assert np.allclose(weights @ cross, 0, atol=1e-6)  # the point where the two diagonals meet


# Clipping


@given(weighted(), st.sampled_from([None, 0.5, 2.0]))
def test_no_update_counts_for_more_than_the_limit(case: tuple[Matrix, list[float]], limit: float | None) -> None:
    values, weights = case
    norms, given_weights = np.linalg.norm(values, axis=1), np.array(weights) / sum(weights)
    clipped = clip(values @ values.T, weights, limit)
    if limit is None:
        limit = float(coordinate_median(norms[:, None], weights)[0])
    for weight, before, norm in zip(clipped, given_weights, norms, strict=True):
        expected = before * min(1.0, limit / norm) if norm > 0 else before
        assert np.isclose(weight, expected, atol=1e-7)


def test_clipping_needs_a_limit_above_zero() -> None:
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="give one above 0"):
            clip(np.eye(2), limit=limit)


def test_one_loud_update_is_clipped_and_one_alone_is_not() -> None:
    values = np.array([[1.0], [1.0], [100.0]])
    assert np.allclose(clip(values @ values.T), [1 / 3, 1 / 3, 1 / 300])
    assert np.array_equal(clip(values[2:] @ values[2:].T), [1.0])
    assert np.array_equal(clip(values @ values.T, limit=1e9), [1 / 3, 1 / 3, 1 / 3])


# Coordinates


@given(weighted())
def test_the_coordinate_median_equals_its_reference(case: tuple[Matrix, list[float]]) -> None:
    assert np.allclose(coordinate_median(*case), coordinate_median_reference(*case))


@given(points())
def test_equal_weights_give_numpys_median(values: Matrix) -> None:
    assert np.allclose(coordinate_median(values), np.median(values, axis=0))


@given(weighted(), st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.49]))
def test_the_trimmed_mean_equals_its_reference(case: tuple[Matrix, list[float]], share: float) -> None:
    values, weights = case
    assert np.allclose(trimmed_mean(values, weights, share), trimmed_mean_reference(values, weights, share))


@given(points(least=5))
def test_a_whole_share_is_the_papers_rule(values: Matrix) -> None:
    ordered = np.sort(values[:5], axis=0)
    assert np.allclose(trimmed_mean(values[:5], share=0.2), ordered[1:4].mean(axis=0))
    assert np.allclose(trimmed_mean(values, share=0.0), values.mean(axis=0))


@given(seeds, st.sampled_from([1e2, 1e30, -1e38]))
def test_outliers_do_not_leak_into_a_coordinate(seed: int, size: float) -> None:
    """With 3 of 10 bad, the last bits of a cumulated weight of 0.3 must not let 1e38 through."""
    values = np.random.default_rng(seed).standard_normal((10, 50))
    values[:3] = size
    assert np.abs(trimmed_mean(values, share=0.3)).max() < 5
    assert np.abs(coordinate_median(values)).max() < 5
    assert np.abs(values.mean(axis=0)).max() > 5


def test_coordinates_do_not_depend_on_the_size_of_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    whole = coordinate_median(values), trimmed_mean(values)
    monkeypatch.setattr(robust, "COLUMNS", 3)
    assert np.array_equal(coordinate_median(values), whole[0])
    assert np.array_equal(trimmed_mean(values), whole[1])
    assert coordinate_median(values[:, :0]).shape == (0,)


def test_coordinate_rules_of_few_values() -> None:
    for rule in (coordinate_median, trimmed_mean):
        assert np.allclose(rule(np.array([[3.0]])), [3.0])
        assert np.allclose(rule(np.array([[3.0], [5.0]])), [4.0])
        with pytest.raises(ValueError, match="nothing to merge"):
            rule(np.zeros((0, 4)))
        with pytest.raises(ValueError, match="not all zero"):
            rule(np.ones((2, 4)), [0, 0])
    assert np.array_equal(coordinate_median(np.array([[3.0], [5.0]]), [1, 2]), [5.0])
    with pytest.raises(ValueError, match=r"0 ≤ share < 0.5"):
        trimmed_mean(np.ones((2, 1)), share=0.5)
