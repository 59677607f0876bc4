"""Every recipe's aggregate beside dense references: means of whole `out × in` products, formed outright."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.kernels.lowrank import LowRank
from fedapt.protocols.layout import Flat
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.recipes import Recipe
from fedapt.protocols.spec import Recipe as Settings
from fedapt.server.aggregation import RIDGE, Aggregate, aggregate, residual_layout
from fedapt.server.rounds import Contribution

from .dense import Case, case_of, cases, frozen_product, layout_of, product, size, sum_of

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
mixing = pytest.mark.parametrize("recipe", [r for r in RECIPES.values() if r.mixes_ranks], ids=lambda r: r.name)
TRUNCATES = ("flexlora", "flora")


def aggregated(case: Case, residual: Flat | None = None) -> Aggregate:
    return aggregate(case.recipe, case.settings, case.updates, residual, number=case.number)


def error_of(result: Aggregate) -> float:
    """The error of an aggregate over pairs of factors."""
    assert result.error is not None
    return result.error


def after(case: Case, change: Flat) -> dict[str, Any]:
    return case.moved(change, case.recipe.stepped(case.layout, case.number))


def whole_mean(case: Case) -> dict[str, Any]:
    """What the error is measured against: what nodes were not sent counts where it is not forgotten."""
    unsent = case.unsent() if case.recipe.name == "flora" else {}
    return {module: mean + unsent.get(module, 0.0) for module, mean in case.means().items()}


def dense_error(case: Case, change: Flat) -> float:
    tensors, missed = after(case, change), []
    before = case.layout.split(case.updates.adapter)
    for pair in case.layout.pairs:
        lost = whole_mean(case)[pair.module] - product(pair, tensors)
        missed.append(lost - (frozen_product(pair, tensors) - frozen_product(pair, before)))
    wanted = size(*whole_mean(case).values())
    return size(*missed) / wanted if wanted else 0.0


def off(case: Case, change: Flat) -> float:
    """How far the products after the change are from what they should be, relative to the mean.

    A truncation is unique only where there is a gap: all that counts is that no other is nearer.
    """
    expected, tensors, means = case.expected(), after(case, change), whole_mean(case)
    distances = []
    for pair in case.layout.pairs:
        found, wanted, mean = product(pair, tensors), expected[pair.module], means[pair.module]
        nearer = np.linalg.norm(found - mean) - np.linalg.norm(wanted - mean)
        distances.append(abs(nearer) if case.recipe.name in TRUNCATES else np.linalg.norm(found - wanted))
    return float(np.linalg.norm(distances)) / (size(*means.values()) or 1.0)


def check(case: Case) -> None:
    result = aggregated(case)
    assert result.change.dtype == np.float32
    assert result.change.shape == (case.recipe.stepped(case.layout, case.number).size,)
    assert off(case, result.change) <= 1e-5
    assert error_of(result) == pytest.approx(dense_error(case, result.change), rel=1e-5, abs=1e-5)
    if case.recipe.residual == "none":
        assert error_of(result) <= 1e-6


@recipes
@settings(max_examples=25)
@given(data=st.data())
def test_the_aggregate_is_the_dense_one(recipe: Recipe, data: st.DataObject) -> None:
    check(data.draw(cases(recipe)))


@mixing
@settings(max_examples=25)
@given(data=st.data())
def test_the_aggregate_of_mixed_ranks_is_the_dense_one(recipe: Recipe, data: st.DataObject) -> None:
    check(data.draw(cases(recipe, mixed=True)))


@recipes
def test_shuffled_weights_would_be_caught(recipe: Recipe) -> None:
    """The negative control of both: the same updates under other weights are another aggregate."""
    case = case_of(recipe, layout_of((5, 6, 2), (4, 7, 3)), 1)
    if recipe.name == "hetlora":  # its weights are the norms: take another node's
        given_ = [replace(c, change=2 * c.change) if k else c for k, c in enumerate(case.updates.contributions)]
    else:
        weights = case.weights[1:] + case.weights[:1]
        given_ = [replace(c, weight=w) for c, w in zip(case.updates.contributions, weights, strict=True)]
    other = replace(case, updates=replace(case.updates, contributions=given_))
    assert off(case, aggregated(case).change) <= 1e-5
    assert off(case, aggregated(other).change) > 1e-3


@recipes
@settings(max_examples=15)
@given(data=st.data())
def test_mean_products_in_float64_lose_nothing(recipe: Recipe, data: st.DataObject) -> None:
    case = data.draw(cases(recipe, mixed=recipe.mixes_ranks))
    means = case.means()
    for pair in case.layout.pairs:
        mean = case.updates.module(pair).mean()
        assert np.linalg.norm(mean.b @ mean.a - means[pair.module]) <= 1e-12 * (1 + size(means[pair.module]))
        if recipe.residual == "none" and "A" not in recipe.trains:
            assert mean.rank == pair.rank, "over one A no factor grows"


def test_averaging_both_factors_misses_the_mean_product() -> None:
    """The error that FedIT makes is seen; with one node, or equal updates, it makes none."""
    layout = layout_of((5, 6, 2), (4, 7, 3))
    for seed in range(5):
        assert error_of(aggregated(case_of(RECIPES["fedit"], layout, seed))) > 1e-2
        assert error_of(aggregated(case_of(RECIPES["fedit"], layout, seed, ranks=[0]))) <= 1e-6
        assert error_of(aggregated(case_of(RECIPES["fedit"], layout, seed, equal=True))) <= 1e-6


@recipes
@settings(max_examples=15)
@given(data=st.data())
def test_heads_are_averaged_by_weight(recipe: Recipe, data: st.DataObject) -> None:
    case = data.draw(cases(recipe, mixed=recipe.mixes_ranks))
    tensors, ended = after(case, aggregated(case).change), case.nodes()
    for name in ("score.weight", "score.bias"):
        mean = sum_of(case.weights, [t[name] for t in ended])
        np.testing.assert_allclose(tensors[name], mean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("budget", "exact"), [(None, True), (6, True), (1, False)])
def test_fedex_is_the_dense_mean_where_the_budget_holds_the_residual(budget: int | None, exact: bool) -> None:
    """Three nodes of rank 2 leave a residual of rank 4 at most; the frozen part has rank 0 before the first round."""
    recipe, layout = RECIPES["fedex"], layout_of((7, 6, 2), (5, 7, 2))
    case = case_of(recipe, layout, 3, settings=Settings(name="fedex", budget=budget))
    start = case.layout.split(case.updates.adapter)
    for pair in case.layout.pairs:
        start[pair.frozen[0]][...] = 0
    result = aggregated(case)
    tensors = after(case, result.change)
    for pair, mean in zip(case.layout.pairs, case.means().values(), strict=True):
        delta = product(pair, tensors) + frozen_product(pair, tensors)
        assert (size(delta - mean) <= 1e-6 * size(mean)) == exact
    assert (error_of(result) <= 1e-6) == exact


def test_fedex_adds_to_what_is_frozen_already() -> None:
    case = case_of(RECIPES["fedex"], layout_of((5, 6, 2), (3, 4, 1)), 5)
    before, result = case.layout.split(case.updates.adapter), aggregated(case)
    tensors = after(case, result.change)
    for pair, mean in zip(case.layout.pairs, case.means().values(), strict=True):
        whole = mean + frozen_product(pair, before)
        assert size(product(pair, tensors) + frozen_product(pair, tensors) - whole) <= 1e-5 * size(whole)
    assert error_of(result) <= 1e-5


@settings(max_examples=25)
@given(data=st.data())
def test_what_fedex_loses_is_the_least_that_its_budget_must_lose(data: st.DataObject) -> None:
    case = data.draw(cases(RECIPES["fedex"]))
    before, result, least = case.layout.split(case.updates.adapter), aggregated(case), []
    for pair in case.layout.pairs:
        b, a = case.averaged(pair, case.weights)
        total = frozen_product(pair, before) + case.means()[pair.module] - b @ a
        least.append(np.linalg.svd(total, compute_uv=False)[before[pair.frozen[1]].shape[0] :])
    wanted = size(*case.means().values())
    assert error_of(result) * wanted == pytest.approx(size(*least), abs=1e-5 * (1 + wanted))


@settings(max_examples=25)
@given(data=st.data())
def test_what_flora_sends_and_keeps_is_all_that_there_is(data: st.DataObject) -> None:
    """Also what was kept before, and what nodes of a small rank were never sent."""
    case = data.draw(cases(RECIPES["flora"], mixed=True))
    case = replace(case, settings=Settings(name="flora", budget=40))
    kept = residual_layout(case.recipe, case.settings, case.layout)
    before = case_of(RECIPES["flora"], case.layout, 9, ranks=[0], settings=case.settings)
    residual = aggregated(before).residual
    result = aggregated(case, residual.copy())
    old, new, tensors = kept.split(residual), kept.split(result.residual), after(case, result.change)
    for pair in case.layout.pairs:
        total = case.means()[pair.module] + case.unsent()[pair.module] + frozen_product(pair, old)
        sent = product(pair, tensors)
        assert size(sent + frozen_product(pair, new) - total) <= 1e-5 * (1 + size(total))
        least = size(np.linalg.svd(total, compute_uv=False)[pair.rank :])
        assert size(total - sent) == pytest.approx(least, abs=1e-5 * (1 + size(total)))


def test_a_budget_bounds_what_flora_keeps() -> None:
    recipe, layout = RECIPES["flora"], layout_of((9, 9, 2))
    sizes = []
    for budget in (1, 3, None):
        chosen = Settings(name="flora", budget=budget)
        case = case_of(recipe, layout, 2, ranks=[0] * 5, settings=chosen)
        result, kept = aggregated(case), residual_layout(recipe, chosen, layout)
        (pair,) = layout.pairs
        assert kept.split(result.residual)[pair.frozen[1]].shape == (budget or 8, 9)
        (mean,) = case.means().values()
        rest = mean - product(pair, after(case, result.change)) - frozen_product(pair, kept.split(result.residual))
        sizes.append(size(rest) / size(mean))
    assert sizes[0] > sizes[1] > 1e-3
    assert sizes[2] < 1e-6


@recipes
def test_only_flora_keeps_something_at_the_server(recipe: Recipe) -> None:
    result = aggregated(case_of(recipe, layout_of((5, 4, 2)), 1))
    assert bool(result.residual.size) == (recipe.name == "flora")


@settings(max_examples=25)
@given(data=st.data())
def test_the_b_of_lora_fair_is_where_the_ridge_objective_is_flat(data: st.DataObject) -> None:
    """`‖M − B·Ā‖² + λ‖B − B̄‖²` has gradient 0 in B, and no step aside is lower; the distance is no larger than FedIT's."""
    case = data.draw(cases(RECIPES["lora-fair"], least=1))
    result = aggregated(case)
    tensors = after(case, result.change)
    for pair, mean in zip(case.layout.pairs, case.means().values(), strict=True):
        (averaged, _), b, a = case.averaged(pair, case.weights), tensors[pair.b.name], tensors[pair.a.name]
        ridge = RIDGE * np.trace(a @ a.T) / pair.rank
        gradient = (b @ a - mean) @ a.T + ridge * (b - averaged)
        assert size(gradient) <= 1e-5 * (1 + size(mean)) * (1 + size(a))

        def objective(b: Any, mean: Any = mean, a: Any = a, ridge: float = ridge, averaged: Any = averaged) -> float:
            return float(size(mean - b @ a) ** 2 + ridge * size(b - averaged) ** 2)

        aside = 0.1 * np.random.default_rng(0).standard_normal(b.shape)
        assert objective(b) <= min(objective(b + aside), objective(averaged)) + 1e-9 * (1 + size(mean) ** 2)
    plain = replace(case, recipe=RECIPES["fedit"])
    assert error_of(result) <= error_of(aggregated(plain)) + 1e-6


def test_the_correction_of_lora_fair_is_worth_something() -> None:
    layout = layout_of((5, 6, 2), (4, 7, 3))
    fair, plain = (error_of(aggregated(case_of(RECIPES[name], layout, 1))) for name in ("lora-fair", "fedit"))
    assert fair < 0.95 * plain


def test_hetlora_pads_with_zeros_and_weighs_by_the_norm() -> None:
    """By hand: a node of rank 1 with twice the norm has weight 2/3, and no part in the second component."""
    recipe, layout = RECIPES["hetlora"], layout_of((2, 2, 2))
    case = case_of(recipe, layout, 0, ranks=[1, 2])
    case.updates.adapter[...] = 0
    ended: list[dict[str, Any]] = [
        {"b": np.array([[2.0, 0], [0, 0]]), "a": np.eye(2)},
        {"b": np.eye(2) / np.sqrt(2), "a": np.eye(2)},
    ]
    given_ = []
    for rank, factors in zip((1, 2), ended, strict=True):
        tensors = layout.split(np.zeros(layout.size, np.float32))
        tensors["m0.lora_B.weight"][:, :rank] = factors["b"][:, :rank]
        tensors["m0.lora_A.weight"][:rank] = factors["a"][:rank]
        given_.append(Contribution(0.5, layout.join(tensors), rank))
    case = replace(case, updates=replace(case.updates, contributions=given_))
    padded = after(case, aggregated(case).change)
    b = np.array([[2 * 2 / 3 + np.sqrt(0.5) / 3, 0], [0, np.sqrt(0.5) / 3]])
    np.testing.assert_allclose(padded["m0.lora_B.weight"], b, atol=1e-6)
    np.testing.assert_allclose(padded["m0.lora_A.weight"], np.diag([1, 1 / 3]), atol=1e-6)


@recipes
def test_nothing_learned_is_no_error(recipe: Recipe) -> None:
    case = case_of(recipe, layout_of((5, 4, 2)), 0, ranks=[0])
    start = case.layout.split(case.updates.adapter)
    for name in ("m0.lora_B.weight", "m0.frozen_B.weight"):
        if name in start:
            start[name][...] = 0
    nothing = [replace(c, change=np.zeros_like(c.change)) for c in case.updates.contributions]
    result = aggregated(replace(case, updates=replace(case.updates, contributions=nothing)))
    assert result.error == 0.0
    assert not np.isnan(result.change).any()
    assert np.abs(product(case.layout.pairs[0], after(case, result.change))).max() == 0


def test_without_a_pair_of_factors_there_is_no_error_to_report() -> None:
    """Nothing was averaged as a product: that is not the same as products that were averaged without an error."""
    result = aggregated(case_of(RECIPES["fedit"], layout_of(), 0))
    assert result.error is None
    assert np.abs(result.change).max() > 0


@recipes
def test_equal_updates_give_equal_bytes(recipe: Recipe) -> None:
    layout = layout_of((5, 4, 2), (3, 6, 3))
    once, again = (aggregated(case_of(recipe, layout, 1)) for _ in range(2))
    assert once.change.tobytes() == again.change.tobytes()
    assert once.residual.tobytes() == again.residual.tobytes()
    assert once.error == again.error


@pytest.mark.parametrize("name", ["fedit", "flexlora", "flora", "fedex", "lora-fair", "hetlora"])
def test_many_nodes_take_the_shorter_way_to_the_same(name: str) -> None:
    """70 nodes of rank 4 stack beyond what is truncated by QR, and norms come from Gram matrices."""
    case = case_of(RECIPES[name], layout_of((24, 20, 4)), 1, ranks=[0] * 70)
    check(case)


def test_a_single_node_of_rank_one_is_taken_as_it_is() -> None:
    for recipe in RECIPES.values():
        case = case_of(recipe, layout_of((4, 5, 1)), 2, ranks=[0])
        (pair,), tensors = case.layout.pairs, after(case, aggregated(case).change)
        (mean,) = case.means().values()
        found = LowRank(tensors[pair.b.name], tensors[pair.a.name])
        assert size(found.b @ found.a - mean) <= 1e-5 * size(mean)
