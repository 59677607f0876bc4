"""Every aggregation beside dense references: means of whole `out × in` products, formed outright."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.protocols.downlink import initial_state, whole_adapter
from fedapt.protocols.layout import A_SUFFIX, B_SUFFIX, ROTATION_SUFFIX, AdapterLayout, Flat, Pair, TensorSpec
from fedapt.protocols.recipes import RECIPES, Recipe
from fedapt.protocols.spec import Recipe as Settings
from fedapt.server.aggregation import Contribution, aggregate, settle
from fedapt.server.optimizers import Buffers, step

Matrix = np.ndarray[Any, np.dtype[Any]]
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
seeds = st.integers(0, 2**32 - 1)


def layout_of(*modules: tuple[int, int, int]) -> AdapterLayout:
    """One pair for each (out, in, rank), and a head."""
    tensors = [TensorSpec("score.weight", (3, 4), "other"), TensorSpec("score.bias", (3,), "other")]
    for number, (outputs, inputs, rank) in enumerate(modules):
        tensors.append(TensorSpec(f"m{number}{A_SUFFIX}", (rank, inputs), "A"))
        tensors.append(TensorSpec(f"m{number}{B_SUFFIX}", (outputs, rank), "B"))
    return AdapterLayout(tensors)


@st.composite
def layouts(draw: st.DrawFn) -> AdapterLayout:
    modules = []
    for _ in range(draw(st.integers(1, 3))):
        inputs = draw(st.integers(1, 7))
        modules.append((draw(st.integers(1, 7)), inputs, draw(st.integers(1, min(4, inputs)))))
    return layout_of(*modules)


def values(layout: AdapterLayout, seed: int) -> Flat:
    return np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)


def start_of(layout: AdapterLayout, seed: int) -> Flat:
    """An adapter with orthonormal A's."""
    flat = values(layout, seed)
    for pair in layout.pairs:
        a = layout.split(flat)[pair.a.name]
        a[...] = np.linalg.qr(a.T)[0].T
    return flat


def contributions(recipe: Recipe, layout: AdapterLayout, count: int, seed: int) -> list[Contribution]:
    trained = recipe.trained(layout)
    weights = np.random.default_rng(seed).dirichlet(np.ones(count))
    return [Contribution(float(weight), values(trained, seed + k)) for k, weight in enumerate(weights, 1)]


def product(pair: Pair, layout: AdapterLayout, adapter: Flat) -> Matrix:
    tensors = layout.split(adapter)
    return np.asarray(tensors[pair.b.name].astype(np.float64) @ tensors[pair.a.name].astype(np.float64))


def moved(recipe: Recipe, layout: AdapterLayout, adapter: Flat, change: Flat) -> Flat:
    """The whole adapter with a change of its trained tensors added."""
    after, changes = adapter.copy(), recipe.trained(layout).split(change)
    for name, tensor in layout.split(after).items():
        tensor[...] += changes.get(name, 0)
    return after


def dense_means(
    recipe: Recipe, layout: AdapterLayout, adapter: Flat, given_: Sequence[Contribution]
) -> dict[str, Matrix]:
    return {
        pair.module: np.sum(
            [c.weight * product(pair, layout, moved(recipe, layout, adapter, c.change)) for c in given_], axis=0
        )
        for pair in layout.pairs
    }


def dense_error(
    recipe: Recipe, layout: AdapterLayout, adapter: Flat, given_: Sequence[Contribution], change: Flat
) -> float:
    means, after = dense_means(recipe, layout, adapter, given_), moved(recipe, layout, adapter, change)
    missed = sum(np.linalg.norm(means[p.module] - product(p, layout, after)) ** 2 for p in layout.pairs)
    return float((missed / sum(np.linalg.norm(mean) ** 2 for mean in means.values())) ** 0.5)


counts = st.integers(1, 5)


@recipes
@settings(max_examples=20)
@given(layout=layouts(), count=counts, seed=seeds)
def test_the_reported_error_is_the_dense_one(recipe: Recipe, layout: AdapterLayout, count: int, seed: int) -> None:
    adapter, given_ = start_of(layout, seed), contributions(recipe, layout, count, seed)
    change, error = aggregate(recipe, layout, adapter, given_)
    assert change.dtype == np.float32
    assert change.shape == (recipe.trained(layout).size,)
    assert error == pytest.approx(dense_error(recipe, layout, adapter, given_, change), rel=1e-5, abs=2e-6)
    if recipe.exact or (count == 1 and recipe.averages == "tensors"):
        assert error <= 1e-6


@settings(max_examples=20)
@given(layouts(), st.integers(2, 5), seeds)
def test_averaging_both_factors_misses_the_mean_product(layout: AdapterLayout, count: int, seed: int) -> None:
    """The negative control: the error that FedIT makes is seen."""
    recipe = RECIPES["fedit"]
    adapter, given_ = start_of(layout, seed), contributions(recipe, layout, count, seed)
    assert aggregate(recipe, layout, adapter, given_)[1] > 1e-4


@recipes
@settings(max_examples=15)
@given(layout=layouts(), count=counts, seed=seeds)
def test_tensors_are_averaged_by_weight(recipe: Recipe, layout: AdapterLayout, count: int, seed: int) -> None:
    """All of them, or the heads alone where the factors' products are averaged."""
    given_, trained = contributions(recipe, layout, count, seed), recipe.trained(layout)
    change, _ = aggregate(recipe, layout, start_of(layout, seed), given_)
    mean = np.sum([c.weight * c.change.astype(np.float64) for c in given_], axis=0).astype(np.float32)
    for tensor in trained.tensors:
        if recipe.averages == "tensors" or tensor.role == "other":
            np.testing.assert_allclose(
                trained.split(change)[tensor.name], trained.split(mean)[tensor.name], atol=1e-6, rtol=1e-6
            )


@settings(max_examples=25)
@given(layouts(), counts, seeds)
def test_flexlora_gives_the_nearest_product_of_its_rank(layout: AdapterLayout, count: int, seed: int) -> None:
    recipe = RECIPES["flexlora"]
    adapter, given_ = start_of(layout, seed), contributions(recipe, layout, count, seed)
    after = moved(recipe, layout, adapter, aggregate(recipe, layout, adapter, given_)[0])
    for pair in layout.pairs:
        mean = dense_means(recipe, layout, adapter, given_)[pair.module]
        u, s, vt = np.linalg.svd(mean, full_matrices=False)
        kept = min(pair.rank, len(s))
        best = (u[:, :kept] * s[:kept]) @ vt[:kept]
        assert np.linalg.norm(product(pair, layout, after) - best) <= 1e-5 * np.linalg.norm(mean)


@recipes
def test_nothing_learned_is_no_error(recipe: Recipe) -> None:
    layout = layout_of((5, 4, 2))
    adapter, nothing = start_of(layout, 0), np.zeros(recipe.trained(layout).size, np.float32)
    layout.split(adapter)["m0" + B_SUFFIX][...] = 0
    change, error = aggregate(recipe, layout, adapter, [Contribution(1.0, nothing)])
    assert error == 0.0
    assert not np.isnan(change).any()


@recipes
def test_equal_updates_give_equal_bytes(recipe: Recipe) -> None:
    layout = layout_of((5, 4, 2), (3, 6, 3))
    given_ = contributions(recipe, layout, 4, 1)
    once, again = (aggregate(recipe, layout, start_of(layout, 0), given_) for _ in range(2))
    assert once[0].tobytes() == again[0].tobytes()
    assert once[1] == again[1]


@pytest.mark.parametrize("name", ["ffa", "flexlora", "fedit"])
def test_only_fedsvd_needs_settling(name: str) -> None:
    layout = layout_of((5, 4, 2))
    state, buffers = values(RECIPES[name].downlink(layout), 0), {"momentum": values(RECIPES[name].trained(layout), 1)}
    after, turned = settle(RECIPES[name], layout, state, buffers)
    assert np.array_equal(after, state)
    assert turned == buffers


FEDSVD = RECIPES["fedsvd"]


def products(layout: AdapterLayout, start: Flat, state: Flat) -> list[Matrix]:
    whole = whole_adapter(FEDSVD, layout, start, state)
    return [product(pair, layout, whole) for pair in layout.pairs]


def close(found: Sequence[Matrix], expected: Sequence[Matrix]) -> float:
    """The largest relative difference."""
    return max(float(np.linalg.norm(f - e) / np.linalg.norm(e)) for f, e in zip(found, expected, strict=True))


@settings(max_examples=25)
@given(layouts(), seeds)
def test_settling_keeps_the_product_and_the_heads(layout: AdapterLayout, seed: int) -> None:
    start, downlink = start_of(layout, seed), FEDSVD.downlink(layout)
    state = initial_state(FEDSVD, layout, start)
    before, given_state = products(layout, start, state), state.copy()
    settled, _ = settle(FEDSVD, layout, state, {})
    assert np.array_equal(state, given_state)
    assert close(products(layout, start, settled), before) <= 1e-6
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
    start, downlink, random = start_of(layout, 0), FEDSVD.downlink(layout), np.random.default_rng(0)
    state = initial_state(FEDSVD, layout, start)
    for _ in range(200):
        for pair in layout.pairs:
            downlink.split(state)[pair.b.name][...] += random.standard_normal(pair.b.shape)
        before = products(layout, start, state)
        state, _ = settle(FEDSVD, layout, state, {})
        assert close(products(layout, start, state), before) <= 1e-6
    whole = layout.split(whole_adapter(FEDSVD, layout, start, state))
    for pair in layout.pairs:
        rotation = downlink.split(state)[pair.module + ROTATION_SUFFIX].astype(np.float64)
        a = whole[pair.a.name].astype(np.float64)
        assert np.abs(rotation @ rotation.T - np.eye(pair.rank)).max() <= 1e-6
        assert np.abs(a @ a.T - np.eye(pair.rank)).max() <= 2e-6


def test_a_start_from_zero_settles() -> None:
    layout = layout_of((5, 4, 2), (2, 6, 4))
    start, downlink = start_of(layout, 0), FEDSVD.downlink(layout)
    for pair in layout.pairs:
        layout.split(start)[pair.b.name][...] = 0
    state, _ = settle(FEDSVD, layout, initial_state(FEDSVD, layout, start), {})
    for pair in layout.pairs:
        rotation = downlink.split(state)[pair.module + ROTATION_SUFFIX]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(pair.rank), atol=1e-6)
        assert not downlink.split(state)[pair.b.name].any()


def descend(recipe: Recipe, settings_: Settings, rounds: int, turn: bool = True) -> list[Matrix]:
    """Products after rounds of local gradient steps on ‖B·A − T_k‖², whose gradient for B sees only the product."""
    layout = layout_of((8, 6, 3))
    (pair,), start = layout.pairs, start_of(layout, 0)
    layout.split(start)[pair.b.name][...] = 0
    targets = np.random.default_rng(1).standard_normal((3, 8, 6))
    state, buffers = initial_state(recipe, layout, start), Buffers()
    downlink, trained, seen = recipe.downlink(layout), recipe.trained(layout), []
    for _ in range(rounds):
        adapter = whole_adapter(recipe, layout, start, state)
        given_ = []
        for target in targets:
            change = np.zeros(trained.size, np.float32)
            gradient = (product(pair, layout, adapter) - target) @ layout.split(adapter)[pair.a.name].T
            trained.split(change)[pair.b.name][...] = -0.05 * gradient
            given_.append(Contribution(1 / 3, change))
        moved_, buffers = step(aggregate(recipe, layout, adapter, given_)[0], buffers, settings_, trained)
        for name, value in trained.split(moved_).items():
            downlink.split(state)[name][...] += value
        state, turned = settle(recipe, layout, state, buffers)
        buffers = turned if turn else buffers
        seen.append(product(pair, layout, whole_adapter(recipe, layout, start, state)))
    return seen


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "novograd"])
def test_fedsvd_is_ffa_with_an_orthonormal_a(optimizer: Any) -> None:
    """Under local SGD the products agree (notes: only the basis differs), because the momentum turns with A."""
    chosen = Settings(optimizer=optimizer)
    found, expected = (descend(RECIPES[name], chosen, 30) for name in ("fedsvd", "ffa"))
    assert close(found, expected) <= 1e-5


def test_a_momentum_that_does_not_turn_is_seen() -> None:
    chosen = Settings(optimizer="nesterov")  # and Adam, whose second moment cannot turn, is refused by the recipe
    found, expected = descend(FEDSVD, chosen, 30, turn=False), descend(RECIPES["ffa"], chosen, 30)
    assert close(found, expected) > 1e-2
