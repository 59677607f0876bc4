"""What follows the step: FedSVD's refactorization, the fresh starts of `refresh`, and the rank that a round reports."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from fedapt.protocols.layout import ROTATION_SUFFIX, AdapterLayout, Flat
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.shared import SharedAdapter
from fedapt.protocols.spec import Recipe as Settings
from fedapt.server.settling import effective_rank, settle

from .dense import Matrix, close, deltas, layout_of, layouts, seeds, start_of, values


def fedsvd(layout: AdapterLayout, seed: int, period: int | None = None) -> SharedAdapter:
    chosen = Settings(name="fedsvd", period=period)
    return SharedAdapter(RECIPES["fedsvd"], chosen, layout, start_of(layout, seed))


def refreshing(layout: AdapterLayout, seed: int, **given_: Any) -> SharedAdapter:
    """All A's orthonormal, all B's zero."""
    recipe, chosen = RECIPES["refresh"], Settings(name="refresh", **given_)
    layout = layout.with_frozen(recipe.budget(layout, chosen))
    start = values(layout, seed)
    tensors = layout.split(start)
    for pair in layout.pairs:
        drawn = np.concatenate([tensors[pair.a.name], tensors[pair.frozen[1]]])
        drawn = np.concatenate([np.linalg.qr(part.T)[0].T for part in np.split(drawn, len(drawn) // pair.rank)])
        tensors[pair.a.name][...], tensors[pair.frozen[1]][...] = drawn[: pair.rank], drawn[pair.rank :]
        tensors[pair.b.name][...] = tensors[pair.frozen[0]][...] = 0
    return SharedAdapter(recipe, chosen, layout, start)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("fedsvd", "refresh")])
def test_most_recipes_need_no_settling(name: str) -> None:
    recipe, layout = RECIPES[name], layout_of((5, 4, 2))
    layout = layout.with_frozen(8) if recipe.has_frozen else layout
    shared = SharedAdapter(recipe, Settings(name=name), layout, start_of(layout, 0))
    for number in range(1, 30):
        state, buffers = values(shared.received(number), 0), {"momentum": values(shared.sent(number), 1)}
        after, turned = settle(shared, state, buffers, number)
        assert np.array_equal(after, state)
        assert turned == buffers


@settings(max_examples=25)
@given(layouts(1), seeds)
def test_refactoring_keeps_the_product_and_the_heads(layout: AdapterLayout, seed: int) -> None:
    shared = fedsvd(layout, seed)
    state, downlink = shared.initial_state(), shared.received(1)
    before, given_state = deltas(shared, state, 1), state.copy()
    settled, _ = settle(shared, state, {}, 1)
    assert np.array_equal(state, given_state)
    assert close(deltas(shared, settled, 2), before) <= 1e-6
    for name in ("score.weight", "score.bias"):
        assert np.array_equal(downlink.split(settled)[name], downlink.split(state)[name])
    for pair in layout.pairs:
        b = downlink.split(settled)[pair.b.name].astype(np.float64)
        norms = np.linalg.norm(b, axis=0)
        assert (np.diff(norms) <= 1e-6 * norms[0]).all(), "the columns of B fall"
        gram = b.T @ b
        assert np.abs(gram - np.diag(np.diag(gram))).max() <= 1e-5 * norms[0] ** 2, "and are orthogonal"


def test_rotations_stay_orthogonal_over_two_hundred_rounds() -> None:
    layout = layout_of((16, 12, 4), (3, 9, 4), (6, 5, 1))
    shared, random = fedsvd(layout, 0), np.random.default_rng(0)
    state, downlink = shared.initial_state(), shared.received(1)
    for number in range(1, 201):
        for pair in layout.pairs:
            downlink.split(state)[pair.b.name][...] += random.standard_normal(pair.b.shape)
        before = deltas(shared, state, number)
        state, _ = settle(shared, state, {}, number)
        assert close(deltas(shared, state, number + 1), before) <= 1e-6
    whole = layout.split(shared.whole(state, 201))
    for pair in layout.pairs:
        rotation = downlink.split(state)[pair.module + ROTATION_SUFFIX].astype(np.float64)
        a = whole[pair.a.name].astype(np.float64)
        assert np.abs(rotation @ rotation.T - np.eye(pair.rank)).max() <= 1e-6
        assert np.abs(a @ a.T - np.eye(pair.rank)).max() <= 2e-6


def test_a_start_from_zero_settles() -> None:
    layout = layout_of((5, 4, 2), (2, 6, 4))
    shared = fedsvd(layout, 0)
    for pair in layout.pairs:
        layout.split(shared.start)[pair.b.name][...] = 0
    state, _ = settle(shared, shared.initial_state(), {}, 1)
    for pair in layout.pairs:
        rotation = shared.received(1).split(state)[pair.module + ROTATION_SUFFIX]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(pair.rank), atol=1e-6)
        assert not shared.received(1).split(state)[pair.b.name].any()


def test_a_period_passes_between_two_refactorizations() -> None:
    layout = layout_of((5, 4, 2))
    shared = fedsvd(layout, 0, period=3)
    turned = []
    for number in range(1, 10):
        state = values(shared.received(number), number)
        turned.append(not np.array_equal(settle(shared, state, {}, number)[0], state))
    assert turned == [False, False, True] * 3


def test_the_product_never_jumps_at_a_fresh_start() -> None:
    layout = layout_of((8, 40, 2), (5, 30, 2))
    shared, random = refreshing(layout, 0, period=2, budget=6), np.random.default_rng(1)
    state, seen = shared.initial_state(), []
    for number in range(1, 12):
        received = shared.received(number)
        for pair in layout.pairs:
            received.split(state)[pair.b.name][...] += random.standard_normal(pair.b.shape)
        buffers = {"momentum": values(shared.sent(number), 1)}
        before = deltas(shared, state, number)
        state, left = settle(shared, state, buffers, number)
        assert state.shape == (shared.received(number + 1).size,)
        assert close(deltas(shared, state, number + 1), before) <= 1e-14
        fresh = number in (2, 4, 6)
        assert left == ({} if fresh else buffers), "the momentum of another basis means nothing in this one"
        tensors = shared.layout.split(shared.whole(state, number + 1))
        for pair in layout.pairs:
            assert (not tensors[pair.b.name].any()) == fresh
            a = tensors[pair.a.name].astype(np.float64)
            assert np.abs(a @ a.T - np.eye(2)).max() <= 1e-6
        seen.append(tensors[layout.pairs[0].a.name].copy())
    spaces = [seen[number] for number in (0, 2, 4, 6)]
    assert np.linalg.matrix_rank(np.concatenate(spaces)) == 8, "each start in a row space of its own"
    assert all(np.array_equal(a, seen[-1]) for a in seen[5:]), "where the budget is spent, the last start goes on"


def test_what_a_fresh_start_costs_on_the_way_down() -> None:
    """A column of B for each component that was frozen: out·rank values a start and module."""
    shared = refreshing(layout_of((8, 40, 2), (5, 30, 2)), 0, period=2)
    sizes = [shared.received(number).size for number in range(1, 20)]
    head, start = 15, (8 + 5) * 2
    assert sizes == [head + start * (1 + min((number - 1) // 2, 4)) for number in range(1, 20)]


def adapter_of(layout: AdapterLayout, singular: dict[str, list[float]]) -> Flat:
    """Orthogonal B columns of these norms, orthonormal A."""
    flat = start_of(layout, 0)
    for pair in layout.pairs:
        own = singular[pair.module]
        b: Matrix = np.zeros(pair.b.shape)
        b[: len(own), : len(own)] = np.diag(own)
        layout.split(flat)[pair.b.name][...] = b
    return flat


def test_the_effective_rank_of_a_round_is_the_mean_over_modules() -> None:
    layout = layout_of((5, 6, 4), (5, 6, 4), (4, 7, 2))
    flat = adapter_of(layout, {"m0": [2, 2, 2, 2], "m1": [3], "m2": []})
    assert effective_rank(layout, flat) == pytest.approx((4 + 1 + 0) / 3, rel=1e-5)


def test_without_a_pair_no_rank_is_measured() -> None:
    layout = layout_of((5, 6, 4))
    nothing = np.zeros(layout.size, np.float32)
    assert effective_rank(layout, nothing) == 0.0
    heads = layout.select({"other"})
    assert effective_rank(heads, nothing[: heads.size]) is None


def test_frozen_factors_count_for_the_effective_rank() -> None:
    layout = layout_of((6, 8, 2)).with_frozen(2)
    flat = np.zeros(layout.size, np.float32)
    tensors = layout.split(flat)
    (pair,) = layout.pairs
    for number, name in enumerate((pair.b.name, pair.frozen[0])):
        tensors[name][2 * number : 2 * number + 2] = np.eye(2)
    for number, name in enumerate((pair.a.name, pair.frozen[1])):
        tensors[name][:, 2 * number : 2 * number + 2] = np.eye(2)
    assert effective_rank(layout, flat) == pytest.approx(4, rel=1e-6)
