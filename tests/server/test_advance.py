"""Rounds one after another: what is exact in one must stay so over several."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedapt.protocols.layout import AdapterLayout, Flat
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.recipes import Recipe
from fedapt.protocols.shared import SharedAdapter
from fedapt.protocols.spec import Recipe as Settings
from fedapt.server.advance import RESIDUAL, advance
from fedapt.server.aggregation import residual_layout
from fedapt.server.optimizers import Buffers
from fedapt.server.rounds import Contribution

from .dense import Matrix, close, deltas, frozen_product, layout_of, product, size, start_of, values

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
LAYOUT = layout_of((8, 12, 3), (6, 9, 3))
WEIGHTS = (0.5, 0.3, 0.2)
Nodes = Callable[[SharedAdapter, Flat, int], list[Contribution]]


def shared_of(name: str, layout: AdapterLayout = LAYOUT, **given: Any) -> SharedAdapter:
    """B and the frozen B zero; every A orthonormal."""
    recipe, chosen = RECIPES[name], Settings(name=name, **given)
    layout = layout.with_frozen(recipe.budget(layout, chosen)) if recipe.has_frozen else layout
    start = start_of(layout, 0)
    tensors = layout.split(start)
    for pair in layout.pairs:
        tensors[pair.b.name][...] = 0
        if recipe.has_frozen:
            b, a = (tensors[name] for name in pair.frozen)
            b[...] = 0
            a[...] = np.concatenate([np.linalg.qr(part.T)[0].T for part in np.split(a, len(a) // pair.rank)])
    return SharedAdapter(recipe, chosen, layout, start)


def wandering(shared: SharedAdapter, adapter: Flat, number: int) -> list[Contribution]:
    """Nodes that go anywhere."""
    trained = shared.sent(number)
    return [Contribution(w, 0.3 * values(trained, 10 * number + k)) for k, w in enumerate(WEIGHTS)]


def of_mixed_ranks(shared: SharedAdapter, adapter: Flat, number: int) -> list[Contribution]:
    contributions = []
    for rank, c in zip((1, 2, 3), wandering(shared, adapter, number), strict=True):
        own = c.change, shared.sent(number), shared.sent(number, rank)
        contributions.append(Contribution(c.weight, own[1].pad(own[1].cut(own[0], own[2]), own[2]), rank))
    return contributions


def descending(shared: SharedAdapter, adapter: Flat, number: int) -> list[Contribution]:
    """A gradient step of each node on its own `‖ΔW − T_k‖²/2`, in the factors that it trains."""
    trained, contributions = shared.sent(number), []
    tensors = shared.layout.split(adapter)
    for node, weight in enumerate(WEIGHTS):
        change = np.zeros(trained.size, np.float32)
        changes = trained.split(change)
        rate = 0.05 if "A" in {t.role for t in trained.tensors} else 0.2  # B has the size of ΔW, and A is orthonormal
        for index, pair in enumerate(shared.layout.pairs):
            shape = pair.b.shape[0], pair.a.shape[1]
            target = np.random.default_rng([node, index]).standard_normal(shape)
            missed = product(pair, tensors) + frozen_product(pair, tensors) - target
            if pair.b.name in changes:
                changes[pair.b.name][...] = -rate * missed @ tensors[pair.a.name].T
            if pair.a.name in changes:
                changes[pair.a.name][...] = -rate * tensors[pair.b.name].T @ missed
        contributions.append(Contribution(weight, change))
    return contributions


def ended(shared: SharedAdapter, adapter: Flat, contribution: Contribution, number: int) -> list[Matrix]:
    """A node's ΔW after its training, frozen part included: of its own components alone where A is its own."""
    tensors = {name: t.astype(np.float64) for name, t in shared.layout.split(adapter).items()}
    for name, change in shared.sent(number).split(contribution.change).items():
        tensors[name] = tensors[name] + change
    cut = contribution.rank or 99
    return [
        tensors[p.b.name][:, :cut] @ tensors[p.a.name][:cut] + frozen_product(p, tensors) for p in shared.layout.pairs
    ]


def run(shared: SharedAdapter, nodes: Nodes, rounds: int) -> list[tuple[Flat, Buffers, float]]:
    """The state that each round begins with, its buffers, and the error of the round before."""
    state, buffers = shared.initial_state(), Buffers()
    seen = [(state, buffers, 0.0)]
    for number in range(1, rounds + 1):
        contributions = nodes(shared, shared.whole(state, number), number)
        state, buffers, error = advance(shared, state, state, buffers, contributions, number=number)
        assert error is not None
        seen.append((state, buffers, error))
    return seen


def distance(shared: SharedAdapter, state: Flat, number: int) -> float:
    """How far ΔW is from the mean of all targets."""
    missed = []
    for index, found in enumerate(deltas(shared, state, number)):
        targets = [np.random.default_rng([node, index]).standard_normal(found.shape) for node in range(3)]
        missed.append(found - np.average(targets, axis=0, weights=WEIGHTS))
    return size(*missed)


@recipes
def test_every_recipe_comes_nearer_to_the_mean_target(recipe: Recipe) -> None:
    shared = shared_of(recipe.name, period=5 if recipe.refreshes else None)
    seen = run(shared, descending, 20)
    assert distance(shared, seen[-1][0], 21) < 0.9 * distance(shared, seen[0][0], 1)


def test_a_fresh_start_reaches_what_one_row_space_cannot() -> None:
    """ffa holds A, so ΔW has its row space; refresh adds another every ten rounds."""
    ffa, fresh = shared_of("ffa"), shared_of("refresh")
    reached = [distance(shared, run(shared, descending, 40)[-1][0], 41) for shared in (ffa, fresh)]
    assert reached[1] < 0.7 * reached[0]


@pytest.mark.parametrize("name", ["ffa", "fedsvd", "refresh", "rolora", "fedex"])
def test_the_next_adapter_is_the_dense_mean(name: str) -> None:
    """Over rounds on end: in fedex all the residuals so far are in the frozen factors, and the budget holds them."""
    given: dict[str, Any] = {"fedex": {"budget": 12}, "refresh": {"period": 2}}.get(name, {})
    shared = shared_of(name, **given)
    state, buffers = shared.initial_state(), Buffers()
    for number in range(1, 8):
        adapter = shared.whole(state, number)
        contributions = wandering(shared, adapter, number)
        nodes = [ended(shared, adapter, c, number) for c in contributions]
        mean = [np.average(term, axis=0, weights=WEIGHTS) for term in zip(*nodes, strict=True)]
        state, buffers, error = advance(shared, state, state, buffers, contributions, number=number)
        assert close(deltas(shared, state, number + 1), mean) <= 1e-5
        assert error is not None
        assert error <= 1e-5


def test_a_budget_that_is_too_small_is_an_error_that_is_seen() -> None:
    shared = shared_of("fedex", budget=3)
    assert run(shared, wandering, 3)[-1][2] > 1e-2


@pytest.mark.parametrize("nodes", [wandering, of_mixed_ranks], ids=["one rank", "mixed ranks"])
def test_what_flora_has_sent_and_kept_is_the_sum_of_all_changes(nodes: Nodes) -> None:
    """Nothing of a change is lost where the budget holds it, whoever was sent how little of the adapter."""
    shared = shared_of("flora", budget=9)
    kept = residual_layout(shared.recipe, shared.settings, shared.layout)
    state, buffers = shared.initial_state(), Buffers()
    total = [np.zeros((p.b.shape[0], p.a.shape[1])) for p in shared.layout.pairs]
    for number in range(1, 7):
        adapter = shared.whole(state, number)
        before = shared.layout.split(adapter)
        contributions = nodes(shared, adapter, number)
        for c in contributions:
            for index, (pair, after) in enumerate(
                zip(shared.layout.pairs, ended(shared, adapter, c, number), strict=True)
            ):
                own = c.rank or 99
                total[index] += c.weight * (after - before[pair.b.name][:, :own] @ before[pair.a.name][:own])
        state, buffers, error = advance(shared, state, state, buffers, contributions, number=number)
        assert list(buffers) == [RESIDUAL]
        rest = [frozen_product(pair, kept.split(buffers[RESIDUAL])) for pair in shared.layout.pairs]
        found = [sent + left for sent, left in zip(deltas(shared, state, number + 1), rest, strict=True)]
        assert close(found, total) <= 1e-5
        assert error == pytest.approx(size(*rest) / size(*total), rel=1e-3)


def test_without_a_pair_of_factors_no_round_has_an_error() -> None:
    shared = shared_of("fedit", layout_of())
    state = shared.initial_state()
    for contributions in ([], wandering(shared, state, 1)):
        assert advance(shared, state, state, {}, contributions, number=1)[2] is None


@recipes
def test_without_a_contribution_no_product_moves_and_nothing_kept_is_lost(recipe: Recipe) -> None:
    shared = shared_of(recipe.name, period=1 if recipe.refreshes else None)
    state, buffers, _ = run(shared, wandering, 1)[-1]
    before = deltas(shared, state, 2)
    after, left, error = advance(shared, state, state, buffers, [], number=2)
    assert close(deltas(shared, after, 3), before) <= 1e-6
    assert error == 0.0
    if not recipe.refreshes:
        assert set(left) == set(buffers)
        assert all(np.array_equal(left[name], buffers[name]) for name in buffers)


@recipes
def test_what_goes_in_is_left_alone(recipe: Recipe) -> None:
    shared = shared_of(recipe.name)
    (state, buffers, _) = run(shared, wandering, 1)[-1]
    contributions = wandering(shared, shared.whole(state, 2), 2)
    given = [state.copy(), *(b.copy() for b in buffers.values()), *(c.change.copy() for c in contributions)]
    advance(shared, state, state, buffers, contributions, number=2)
    now = [state, *buffers.values(), *(c.change for c in contributions)]
    assert all(np.array_equal(a, b) for a, b in zip(given, now, strict=True))


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "novograd"])
def test_fedsvd_is_ffa_with_an_orthonormal_a(optimizer: str, period: int) -> None:
    """Under local SGD the products agree (only the basis differs), because the momentum turns with A."""
    turning, plain = shared_of("fedsvd", optimizer=optimizer, period=period), shared_of("ffa", optimizer=optimizer)
    ends = [deltas(shared, run(shared, descending, 30)[-1][0], 31) for shared in (turning, plain)]
    assert close(*ends) <= 2e-5


def test_a_momentum_that_does_not_turn_is_seen() -> None:
    """The control: the momentum of the round before is put back, unturned."""
    plain, shared = shared_of("ffa", optimizer="nesterov"), shared_of("fedsvd", optimizer="nesterov")
    state, buffers = shared.initial_state(), Buffers()
    momentum = np.zeros(shared.sent(1).size, np.float32)
    for number in range(1, 11):
        contributions = descending(shared, shared.whole(state, number), number)
        mean = sum(c.weight * c.change for c in contributions)
        momentum = np.asarray(np.float32(0.9) * momentum + mean, np.float32)
        state, buffers, _ = advance(shared, state, state, buffers, contributions, number=number)
        buffers = {"momentum": momentum}
    expected = run(plain, descending, 10)[-1][0]
    assert close(deltas(shared, state, 11), deltas(plain, expected, 11)) > 1e-2
