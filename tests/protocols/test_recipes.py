import pytest

from fedapt.protocols.errors import SpecError
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.legality import initial_a, recipe_of
from fedapt.protocols.recipes import BUDGET, FIRST_ORDER, RECIPES, Recipe, recipe_named
from fedapt.protocols.spec import Recipe as Settings
from fedapt.protocols.spec import RunSpec

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
first_order = pytest.mark.parametrize("recipe", FIRST_ORDER.values(), ids=FIRST_ORDER.keys())
A, B, HEAD = "q.lora_A.weight", "q.lora_B.weight", "score.bias"
FROZEN_A, FROZEN_B = "q.frozen_A.weight", "q.frozen_B.weight"

LAYOUT = AdapterLayout([TensorSpec(A, (2, 5), "A"), TensorSpec(B, (4, 2), "B"), TensorSpec(HEAD, (3,), "other")])


def spec_of(recipe: str, *overrides: str) -> RunSpec:
    spec = RunSpec.parse('[model]\nbase = "m"\ntask = "causal-lm"')
    return spec.set(f"recipe.name={recipe}", *overrides)


def names(layout: AdapterLayout) -> set[str]:
    return {t.name for t in layout.tensors}


@first_order
def test_the_table_agrees_with_itself(recipe: Recipe) -> None:
    """A mean of tensors loses nothing where one factor is common to all nodes, or where the residual goes somewhere."""
    assert RECIPES[recipe.name] is recipe
    one_factor = "A" not in recipe.trains or recipe.alternates
    assert recipe.exact == (one_factor or recipe.residual in ("server", "frozen"))
    assert (recipe.residual == "none") == one_factor
    assert recipe.linear == (recipe.averages == "tensors" and recipe.residual != "frozen")
    assert recipe.replaces == (not recipe.linear)
    if recipe.replaces or recipe.alternates:
        assert recipe.server_optimizers == ("sgd",)
    if recipe.refactorizes or recipe.refreshes:
        assert one_factor
        assert recipe.initial_a == ("orthonormal",), "a rotation, and a row space, of its own"
    if recipe.refactorizes:
        assert "adam" not in recipe.server_optimizers, "elementwise state does not rotate with A"
    if recipe.mixes_ranks:
        assert recipe.averages != "tensors" or recipe.refactorizes
        assert not recipe.has_frozen
    assert "other" in recipe.trains, "a new head must be trained"
    assert "none" in recipe.units
    assert recipe.summary
    assert "arXiv" in recipe.paper


@recipes
def test_a_bare_spec_is_legal(recipe: Recipe) -> None:
    assert recipe_of(spec_of(recipe.name)) is recipe
    assert initial_a(spec_of(recipe.name)) == recipe.initial_a[0]


@recipes
def test_what_sends_codes_moves_one_lattice(recipe: Recipe) -> None:
    """It is exact and linear, needs no factors of its own, and hides somebody only where all probe the same."""
    assert recipe.zeroth == (recipe.name in ("onebyte", "kseed", "dpzo"))
    assert recipe.zeroth == (recipe.name not in FIRST_ORDER)
    if recipe.zeroth:
        assert recipe.exact
        assert recipe.linear
        assert not any((recipe.mixes_ranks, recipe.has_frozen, recipe.refactorizes, recipe.streams))
        assert (recipe.units == ("none",)) == (recipe.directions != "shared")


def test_an_unknown_recipe_names_the_nearest_one() -> None:
    with pytest.raises(SpecError, match=r"recipe.name = 'fed-svd': no such recipe; did you mean \"fedsvd\"\?"):
        recipe_named("fed-svd")
    with pytest.raises(SpecError, match="there are fedsvd, ffa, refresh, rolora, flexlora, "):
        recipe_named("zzzzzz")


UP = {"fedsvd": {B, HEAD}, "ffa": {B, HEAD}, "refresh": {B, HEAD}, "rolora": {B, HEAD}}
DOWN = {
    "fedsvd": {B, "q.rotation", HEAD},
    "ffa": {B, HEAD},
    "refresh": {B, FROZEN_B, HEAD},
    "fedex": {A, B, FROZEN_A, FROZEN_B, HEAD},
}


@recipes
def test_what_travels_and_what_moves_in_round_1(recipe: Recipe) -> None:
    layout = LAYOUT.with_frozen(4) if recipe.has_frozen else LAYOUT
    up, both = UP.get(recipe.name, {A, B, HEAD}), {A, B, HEAD}
    assert names(recipe.trained(layout, 1)) == up
    assert names(recipe.stepped(layout, 1)) == (both | {FROZEN_A, FROZEN_B} if recipe.name == "fedex" else up)
    assert names(recipe.downlink(layout, 1, Settings())) == DOWN.get(recipe.name, both)


def test_rolora_trains_b_in_odd_rounds_and_a_in_even_ones() -> None:
    recipe = RECIPES["rolora"]
    assert [names(recipe.trained(LAYOUT, round_)) for round_ in (1, 2, 3)] == [{B, HEAD}, {A, HEAD}, {B, HEAD}]
    assert names(recipe.stepped(LAYOUT, 2)) == {A, HEAD}


@pytest.mark.parametrize(("budget", "of_fedex", "of_refresh"), [(None, 2 * BUDGET, 2 * BUDGET), (2, 2, 2), (5, 5, 4)])
def test_a_budget_is_a_rank_and_for_refresh_whole_starts_of_it(
    budget: int | None, of_fedex: int, of_refresh: int
) -> None:
    found = [RECIPES[name].budget(LAYOUT, Settings(budget=budget)) for name in ("fedex", "flora", "refresh")]
    assert found == [of_fedex, of_fedex, of_refresh]


def test_a_layout_without_factors_has_no_budget_and_no_fresh_start() -> None:
    heads = LAYOUT.select({"other"})
    assert RECIPES["refresh"].budget(heads, Settings()) == 0
    assert RECIPES["refresh"].refreshed(heads, 99, Settings()) == 0
    assert RECIPES["fedsvd"].downlink(heads, 1, Settings()) == heads
