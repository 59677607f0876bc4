"""What travels and what is rebuilt, for every recipe: the two sides must agree on the whole adapter."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.protocols.errors import PayloadError, SpecError
from fedapt.protocols.layout import A_SUFFIX, B_SUFFIX, ROTATION_SUFFIX, AdapterLayout, Flat, Pair, TensorSpec
from fedapt.protocols.legality import illegal
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.recipes import RECIPES as ALL
from fedapt.protocols.recipes import Recipe
from fedapt.protocols.shared import SharedAdapter, require_pairs, works_on_factors
from fedapt.protocols.spec import Recipe as Settings
from fedapt.protocols.spec import RunSpec

recipes = st.sampled_from(list(RECIPES.values()))
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
seeds = st.integers(0, 2**32 - 1)
Matrix = np.ndarray[Any, np.dtype[Any]]

SMALL = AdapterLayout(
    [
        TensorSpec("q" + A_SUFFIX, (2, 9), "A"),
        TensorSpec("q" + B_SUFFIX, (3, 2), "B"),
        TensorSpec("score.weight", (4, 3), "other"),
    ]
)


def values(layout: AdapterLayout, seed: int) -> Flat:
    return np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)


def orthogonal(rank: int, random: np.random.Generator) -> Matrix:
    return np.linalg.qr(random.standard_normal((rank, rank)))[0] if rank else np.zeros((0, 0))


def shared_of(recipe: Recipe, layout: AdapterLayout, seed: int, **given_: Any) -> SharedAdapter:
    """As a run begins: the frozen factors are there, and every frozen B is zero."""
    chosen = Settings(name=recipe.name, **given_)
    if recipe.has_frozen:
        layout = layout.with_frozen(recipe.budget(layout, chosen))
    start = values(layout, seed)
    for pair in layout.pairs if recipe.has_frozen else ():
        layout.split(start)[pair.frozen[0]][...] = 0
    return SharedAdapter(recipe, chosen, layout, start)


def orthonormal(rows: Matrix) -> Matrix:
    return np.asarray(np.linalg.qr(rows.T)[0].T)


def product(pair: Pair, layout: AdapterLayout, adapter: Flat) -> Matrix:
    """ΔW of a module, frozen factors included, float64."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in layout.split(adapter).items()}
    delta = tensors[pair.b.name] @ tensors[pair.a.name]
    if pair.frozen[0] in tensors:
        delta = delta + tensors[pair.frozen[0]] @ tensors[pair.frozen[1]]
    return np.asarray(delta)


@given(recipes, st.from_type(AdapterLayout), seeds)
def test_the_initial_state_stands_for_the_start(recipe: Recipe, layout: AdapterLayout, seed: int) -> None:
    shared = shared_of(recipe, layout, seed)
    state, kept = shared.initial_state(), shared.start.copy()
    assert state.dtype == np.float32
    assert state.shape == (shared.received(1).size,)
    whole = shared.whole(state, 1)
    assert np.array_equal(shared.start, kept)
    if not recipe.refreshes:
        assert np.array_equal(whole, shared.start)
        return
    before, after = shared.layout.split(shared.start), shared.layout.split(whole)
    assert all(np.array_equal(after[t.name], before[t.name]) for t in shared.layout.tensors if t.role != "frozen")
    for pair in shared.layout.pairs:
        assert np.array_equal(product(pair, shared.layout, whole), product(pair, shared.layout, shared.start))


@given(st.sampled_from([r for r in RECIPES.values() if not r.refreshes]), st.from_type(AdapterLayout), seeds)
def test_what_travels_is_taken_and_the_rest_stays(recipe: Recipe, layout: AdapterLayout, seed: int) -> None:
    shared = shared_of(recipe, layout, seed)
    state, kept = values(shared.received(1), seed + 1), shared.start.copy()
    sent, started = shared.received(1).split(state), shared.layout.split(shared.start)
    for name, tensor in shared.layout.split(shared.whole(state, 1)).items():
        module = name.removesuffix(A_SUFFIX)
        if name in sent:
            expected = sent[name]
        elif module + ROTATION_SUFFIX in sent:
            expected = sent[module + ROTATION_SUFFIX] @ started[name]
        else:
            expected = started[name]
        assert np.array_equal(tensor, expected)
    assert np.array_equal(shared.start, kept)


@settings(max_examples=25)
@given(st.from_type(AdapterLayout), seeds)
def test_a_rotation_and_its_inverse_in_b_leave_every_product(layout: AdapterLayout, seed: int) -> None:
    shared, random = shared_of(RECIPES["fedsvd"], layout, seed), np.random.default_rng(seed)
    state = shared.initial_state()
    tensors = shared.received(1).split(state)
    for pair in layout.pairs:
        rotation = orthogonal(pair.rank, random)
        tensors[pair.module + ROTATION_SUFFIX][...] = rotation
        tensors[pair.b.name][...] = tensors[pair.b.name] @ rotation.T
    after = shared.whole(state, 1)
    for pair in layout.pairs:
        np.testing.assert_allclose(
            product(pair, layout, after), product(pair, layout, shared.start), atol=1e-5, rtol=1e-5
        )


A, B, ROTATION, FROZEN_A, FROZEN_B, HEAD = (
    "q" + A_SUFFIX,
    "q" + B_SUFFIX,
    "q" + ROTATION_SUFFIX,
    "q.frozen_A.weight",
    "q.frozen_B.weight",
    "score.weight",
)
DOWN = {
    "fedsvd": {B: (3, 2), ROTATION: (2, 2), HEAD: (4, 3)},
    "ffa": {B: (3, 2), HEAD: (4, 3)},
    "refresh": {B: (3, 2), FROZEN_B: (3, 0), HEAD: (4, 3)},
    "fedex": {A: (2, 9), B: (3, 2), FROZEN_A: (8, 9), FROZEN_B: (3, 8), HEAD: (4, 3)},
}
BOTH = {A: (2, 9), B: (3, 2), HEAD: (4, 3)}


@each_recipe
def test_the_downlink_of_each_recipe(recipe: Recipe) -> None:
    shared = shared_of(recipe, SMALL, 0)
    assert {t.name: t.shape for t in shared.received(1).tensors} == DOWN.get(recipe.name, BOTH)


@each_recipe
def test_the_uplink_of_each_recipe(recipe: Recipe) -> None:
    """One factor a round where it alternates, and B alone where the mean is exact because A stays."""
    shared = shared_of(recipe, SMALL, 0)
    sent = [{t.name for t in shared.sent(round_).tensors} for round_ in (1, 2, 3)]
    if recipe.name == "rolora":
        assert sent == [{B, HEAD}, {A, HEAD}, {B, HEAD}]
    else:
        assert sent == [{B, HEAD} if "A" not in recipe.trains else {A, B, HEAD}] * 3


@each_recipe
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_state_of_another_size_is_refused(recipe: Recipe, extra: int) -> None:
    shared = shared_of(recipe, SMALL, 0)
    wrong = np.zeros(shared.received(1).size + extra, np.float32)
    with pytest.raises(PayloadError, match="does not fit a layout"):
        shared.whole(wrong, 1)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.mixes_ranks])
@pytest.mark.parametrize("rank", [0, 1, 2, 5])
def test_a_node_of_a_small_rank_holds_the_leading_components_alone(name: str, rank: int) -> None:
    shared = shared_of(RECIPES[name], SMALL, 0)
    whole_state = values(shared.received(1), 1)
    own = shared.received(1, rank)
    state = shared.received(1).pad(shared.received(1).cut(whole_state, own), own)
    full, small = (shared.layout.split(shared.whole(s, 1)) for s in (whole_state, state))
    kept = min(rank or 2, 2)
    assert own.size == shared.received(1).size or rank == 1
    assert {t.name: t.shape for t in shared.sent(1, rank).tensors}[B] == (3, kept)
    np.testing.assert_array_equal(small[B][:, :kept], full[B][:, :kept])
    np.testing.assert_allclose(small[A][:kept], full[A][:kept], rtol=1e-6)
    assert not small[A][kept:].any()
    assert not small[B][:, kept:].any()
    np.testing.assert_array_equal(small[HEAD], full[HEAD])


@pytest.mark.parametrize(("budget", "starts"), [(None, 4), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_the_budget_bounds_the_fresh_starts(budget: int | None, starts: int) -> None:
    shared = shared_of(RECIPES["refresh"], SMALL, 0, period=3, budget=budget)
    counts = [shared.recipe.refreshed(shared.layout, round_, shared.settings) for round_ in range(1, 40)]
    assert counts == [min((round_ - 1) // 3, starts) for round_ in range(1, 40)]
    assert {t.name: t.shape for t in shared.layout.tensors}[FROZEN_B] == (3, 2 * starts)
    for round_, count in enumerate(counts, 1):
        received = {t.name: t.shape for t in shared.received(round_).tensors}
        assert received == {B: (3, 2), FROZEN_B: (3, 2 * count), HEAD: (4, 3)}, "no A ever travels"


def test_each_fresh_start_trains_in_another_row_space() -> None:
    shared = shared_of(RECIPES["refresh"], SMALL, 0, period=2)
    started = shared.layout.split(shared.start)
    drawn = [orthonormal(rows) for rows in (started[A], *np.split(started[FROZEN_A], 4))]
    started[A][...], started[FROZEN_A][...] = drawn[0], np.concatenate(drawn[1:])
    seen = []
    for start in range(5):
        round_ = 2 * start + 1
        tensors = shared.layout.split(shared.whole(values(shared.received(round_), start), round_))
        seen.append(tensors[A])
        np.testing.assert_array_equal(tensors[A], drawn[start])
        np.testing.assert_allclose(tensors[A] @ tensors[A].T, np.eye(2), atol=1e-6)
        np.testing.assert_array_equal(
            tensors[FROZEN_A][: 2 * start], np.concatenate([np.zeros((0, 9)), *drawn[:start]])
        )
        assert not tensors[FROZEN_B][:, 2 * start :].any(), "an A that is still to come adds nothing"
    for first in range(5):
        for second in range(first):
            assert np.linalg.matrix_rank(np.concatenate([seen[first], seen[second]])) == 4


@given(st.sampled_from([r for r in RECIPES.values() if not r.streams]), st.from_type(AdapterLayout), seeds)
def test_under_eva_no_node_counts_on_its_own_a(recipe: Recipe, layout: AdapterLayout, seed: int) -> None:
    """Machines compute other directions of the same data; what a node receives stands for one adapter all the same."""
    shared = shared_of(recipe, layout, seed, initial_a="eva")
    state, own = shared.initial_state(), shared.start.copy()
    for pair in shared.layout.pairs:
        shared.layout.view(own, pair.a.name)[...] += 1
    assert np.array_equal(replace(shared, start=own).whole(state, 1), shared.whole(state, 1))


@pytest.mark.parametrize("recipe", ALL.values(), ids=ALL.keys())
def test_what_works_on_factors_is_what_takes_plain_lora_alone(recipe: Recipe) -> None:
    raw = {"model": {"base": "m", "task": "causal-lm"}, "recipe": {"name": recipe.name}, "adapter": {"method": "ia3"}}
    refused = any("adapter.method" in problem for problem in illegal(RunSpec.check(raw), recipe))
    assert works_on_factors(recipe) == refused


def layout_with(*more: TensorSpec) -> AdapterLayout:
    return AdapterLayout([*SMALL.tensors, *more])


@pytest.mark.parametrize("recipe", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (layout_with(TensorSpec("v" + A_SUFFIX, (2, 9), "A")), r"v.lora_A.weight of shape \(2, 9\) is in no pair"),
        (layout_with(TensorSpec("v" + B_SUFFIX, (3, 2), "other")), r"v.lora_B.weight of shape \(3, 2\) is in no pair"),
        (SMALL.select({"B", "other"}), r"q.lora_B.weight of shape \(3, 2\) is in no pair"),
        (SMALL.select({"other"}), r"no pair .* among its 1 tensors, such as score.weight of shape \(4, 3\)"),
        (AdapterLayout([]), "no pair of plain LoRA factors among its 0 tensors, and recipe"),
    ],
)
def test_a_factor_without_its_other_is_refused(recipe: Recipe, layout: AdapterLayout, problem: str) -> None:
    require_pairs(recipe, SMALL, "model")
    require_pairs(recipe, SMALL.with_frozen(2), "model")
    if not works_on_factors(recipe):
        require_pairs(recipe, layout, "model")
        return
    with pytest.raises(SpecError, match=f"^model: {problem}.*fedit"):
        require_pairs(recipe, layout, "model")
