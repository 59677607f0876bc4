import pytest

from fedapt.protocols.errors import SpecError
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.recipes import RECIPES, Recipe, illegal, initial_a, recipe_of
from fedapt.protocols.spec import RunSpec

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())

LAYOUT = AdapterLayout(
    [
        TensorSpec("q.lora_A.weight", (2, 5), "A"),
        TensorSpec("q.lora_B.weight", (4, 2), "B"),
        TensorSpec("score.bias", (3,), "other"),
    ]
)


def spec_of(recipe: str, *overrides: str) -> RunSpec:
    spec = RunSpec.parse('[model]\nbase = "m"\ntask = "causal-lm"')
    return spec.set(f"recipe.name={recipe}", *overrides)


@recipes
def test_the_table_agrees_with_itself(recipe: Recipe) -> None:
    """What is exact is a linear sum of B's over one common A; what sends A as well, or truncates, is not."""
    assert RECIPES[recipe.name] is recipe
    assert recipe.exact == ("A" not in recipe.trains)
    assert recipe.linear == (recipe.averages == "tensors")
    if recipe.averages == "products":
        assert "A" in recipe.trains
        assert recipe.server_optimizers == ("sgd",)
    if recipe.refactorizes:
        assert recipe.linear
        assert recipe.exact
        assert recipe.initial_a == ("orthonormal",), "the cheap refactorization holds for an orthonormal A alone"
        assert "adam" not in recipe.server_optimizers, "elementwise state does not rotate with A"
    assert "other" in recipe.trains, "a new head must be trained"
    assert "none" in recipe.units
    assert recipe.summary
    assert "arXiv" in recipe.paper


@recipes
def test_a_bare_spec_is_legal(recipe: Recipe) -> None:
    assert recipe_of(spec_of(recipe.name)) is recipe
    assert initial_a(spec_of(recipe.name)) == recipe.initial_a[0]


@recipes
def test_what_the_table_offers_is_legal(recipe: Recipe) -> None:
    for optimizer in recipe.server_optimizers:
        assert illegal(spec_of(recipe.name, f"recipe.optimizer={optimizer}"), recipe) == []
    for start in recipe.initial_a:
        spec = spec_of(recipe.name, f"recipe.initial_a={start}")
        assert illegal(spec, recipe) == []
        assert initial_a(spec) == start


ILLEGAL = [
    ("fedsvd", "recipe.optimizer=adam", '"novograd"'),
    ("fedsvd", "recipe.initial_a=kaiming", '"orthonormal"'),
    ("flexlora", "recipe.optimizer=adam", '"sgd"'),
    ("flexlora", "recipe.optimizer=nesterov", '"sgd"'),
    ("flexlora", "recipe.optimizer=novograd", '"sgd"'),
    ("flexlora", "recipe.learning_rate=0.5", "1.0"),
    ("flexlora", "recipe.initial_a=orthonormal", '"kaiming"'),
    ("fedit", "recipe.initial_a=orthonormal", '"kaiming"'),
    *((name, f"privacy.unit={unit}", '"none"') for name in RECIPES for unit in ("example", "client")),
]


@pytest.mark.parametrize(("recipe", "override", "nearest"), ILLEGAL)
def test_an_illegal_combination_names_the_nearest_legal_one(recipe: str, override: str, nearest: str) -> None:
    with pytest.raises(SpecError) as caught:
        recipe_of(spec_of(recipe, override))
    line = str(caught.value)
    key, _, value = override.partition("=")
    assert "\n" not in line
    assert line.startswith(f"{key} = ")
    assert value in line
    assert f"Nearest legal: {nearest}" in line


@pytest.mark.parametrize(("recipe", "override", "nearest"), ILLEGAL)
def test_the_nearest_legal_choice_is_legal(recipe: str, override: str, nearest: str) -> None:
    key = override.partition("=")[0]
    assert recipe_of(spec_of(recipe, override, f"{key}={nearest}")).name == recipe


@recipes
def test_the_illegal_table_is_whole(recipe: Recipe) -> None:
    """Every choice of the spec that the recipe does not offer is refused."""
    choices = {
        "recipe.optimizer": ({"sgd", "nesterov", "novograd", "adam"}, recipe.server_optimizers),
        "recipe.initial_a": ({"kaiming", "orthonormal"}, recipe.initial_a),
        "privacy.unit": ({"none", "example", "client"}, recipe.units),
    }
    refused = {
        (recipe.name, f"{key}={value}")
        for key, (offered, legal) in choices.items()
        for value in offered - set(legal)
        if illegal(spec_of(recipe.name, f"{key}={value}"), recipe)
    }
    expected = {(name, o) for name, o, _ in ILLEGAL if name == recipe.name and "learning_rate" not in o}
    assert refused == expected


def test_every_problem_is_named() -> None:
    spec = spec_of("flexlora", "recipe.optimizer=adam", "recipe.learning_rate=0.5", "privacy.unit=client")
    assert len(illegal(spec, RECIPES["flexlora"])) == 3


def test_an_unknown_recipe_names_the_nearest_one() -> None:
    with pytest.raises(SpecError, match=r"recipe.name = 'fed-svd': no such recipe; did you mean \"fedsvd\"\?"):
        recipe_of(spec_of("fed-svd"))
    with pytest.raises(SpecError, match="there are fedsvd, ffa, flexlora, fedit"):
        recipe_of(spec_of("zzzzzz"))


@pytest.mark.parametrize(
    ("recipe", "up", "down"),
    [
        ("fedsvd", {"q.lora_B.weight", "score.bias"}, {"q.lora_B.weight", "q.rotation", "score.bias"}),
        ("ffa", {"q.lora_B.weight", "score.bias"}, {"q.lora_B.weight", "score.bias"}),
        ("flexlora", {t.name for t in LAYOUT.tensors}, {t.name for t in LAYOUT.tensors}),
        ("fedit", {t.name for t in LAYOUT.tensors}, {t.name for t in LAYOUT.tensors}),
    ],
)
def test_what_travels(recipe: str, up: set[str], down: set[str]) -> None:
    assert {t.name for t in RECIPES[recipe].trained(LAYOUT).tensors} == up
    assert {t.name for t in RECIPES[recipe].downlink(LAYOUT).tensors} == down
