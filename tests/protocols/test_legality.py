"""Every refusal names the value, why, and the nearest legal choice, which is legal itself."""

import pytest

from fedapt.protocols.errors import SpecError
from fedapt.protocols.legality import ON_ENTRIES, WEIGHED, illegal, initial_a, rank_for, rank_of, recipe_of
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.recipes import Recipe
from fedapt.protocols.spec import RunSpec

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
REPLACED = ("flexlora", "flora", "fedex", "lora-fair", "hetlora")
"""Recipes whose aggregate is the next adapter."""

BOTH_FACTORS = (*REPLACED, "fedit", "diloco")
REMOVED = "(the key is removed)"


def spec_of(recipe: str, *overrides: str) -> RunSpec:
    """With weights that no node states, which every aggregator may have."""
    spec = RunSpec.parse('[model]\nbase = "m"\ntask = "causal-lm"')
    return spec.set(f"recipe.name={recipe}", "recipe.weighting=uniform", *overrides)


def refusals(recipe: str, key: str, refused: dict[str, str]) -> list[tuple[str, str, str, str]]:
    return [(recipe, key, value, way_out) for value, way_out in refused.items()]


ILLEGAL = [
    ("fedsvd", "recipe.optimizer", "adam", "recipe.optimizer=novograd"),
    ("fedsvd", "recipe.initial_a", "kaiming", "recipe.initial_a=orthonormal"),
    ("refresh", "recipe.initial_a", "kaiming", "recipe.initial_a=orthonormal"),
    *((name, "recipe.initial_a", "orthonormal", "recipe.initial_a=kaiming") for name in (*BOTH_FACTORS, "rolora")),
    *(
        (name, "recipe.optimizer", optimizer, "recipe.optimizer=sgd")
        for name in (*REPLACED, "rolora")
        for optimizer in ("nesterov", "novograd", "adam")
    ),
    *((name, "recipe.learning_rate", "0.5", "recipe.learning_rate=1.0") for name in REPLACED),
    *(
        (name, "adapter.method", method, "recipe.name=fedit")
        for name in RECIPES
        if name not in ("fedit", "diloco")
        for method in ("dora", "ia3", "bottleneck", "head")
    ),
    *(
        (name, "adapter.ranks", "[4, 8]", way_out)
        for name, recipe in RECIPES.items()
        if not recipe.mixes_ranks
        for way_out in ("recipe.name=flexlora", "adapter.ranks=[]")
    ),
    *((name, "recipe.initial_a", "eva", f"recipe.initial_a={r.initial_a[0]}") for name, r in RECIPES.items()),
    *((name, "adapter.public", "public.jsonl", REMOVED) for name in RECIPES),
    ("refresh", "adapter.start", "warm", "recipe.name=ffa"),
    ("fedex", "adapter.start", "warm", "recipe.name=flexlora"),
    *(
        (name, "recipe.aggregator", rule, f"recipe.aggregator={'geometric-median' if rule in WEIGHED else 'mean'}")
        for name in BOTH_FACTORS
        if name != "hetlora"
        for rule in ON_ENTRIES
    ),
    *((name, "recipe.aggregator", "greedy-soup", "recipe.aggregator=mean") for name in REPLACED[:-1]),
    *((name, "recipe.aggregator", "clip", "recipe.aggregator=geometric-median") for name in REPLACED[:-1]),
    *(
        ("hetlora", "recipe.aggregator", rule, "recipe.aggregator=mean")
        for rule in (*ON_ENTRIES, "clip", "krum", "multi-krum", "geometric-median", "greedy-soup")
    ),
    *((name, "wire.codec", "top-k", "wire.codec=fp4") for name in (*REPLACED, "rolora", "refresh", "diloco")),
    ("diloco", "recipe.optimizer", "novograd", "recipe.optimizer=adam"),
    *(
        (name, f"recipe.{key}", value, REMOVED)
        for name in RECIPES
        if name != "diloco"
        for key, value in (("fragments", "2"), ("mixing", "0.5"), ("delay", "1"))
    ),
    *((name, "recipe.period", "3", REMOVED) for name in RECIPES if name not in ("fedsvd", "refresh")),
    *((name, "recipe.budget", "16", REMOVED) for name in RECIPES if name not in ("refresh", "fedex", "flora")),
    ("refresh", "recipe.budget", "7", "recipe.budget=8"),
]
IDS = [f"{name}-{key}-{value}" for name, key, value, _ in ILLEGAL]

CHOICES = {
    "recipe.optimizer": ["sgd", "nesterov", "novograd", "adam"],
    "recipe.initial_a": ["kaiming", "orthonormal", "eva"],
    "adapter.public": ["public.jsonl"],
    "recipe.learning_rate": ["0.5", "1.0"],
    "adapter.method": ["lora", "dora", "ia3", "bottleneck", "head"],
    "adapter.ranks": ["[]", "[4, 8]"],
    "adapter.start": ["warm"],
    "recipe.aggregator": ["mean", "krum", "multi-krum", "geometric-median", "clip", "greedy-soup", *ON_ENTRIES],
    "wire.codec": ["fp32", "bf16", "int8", "fp4", "top-k", "seed-projection"],
    "recipe.period": ["3"],
    "recipe.budget": ["7", "8", "16"],
    "recipe.fragments": ["2"],
    "recipe.mixing": ["0.5"],
    "recipe.delay": ["1"],
}


@pytest.mark.parametrize(("recipe", "key", "value", "way_out"), ILLEGAL, ids=IDS)
def test_a_refusal_names_the_value_and_the_nearest_legal_one(recipe: str, key: str, value: str, way_out: str) -> None:
    with pytest.raises(SpecError) as caught:
        recipe_of(spec_of(recipe, f"{key}={value}"))
    line = str(caught.value)
    assert "\n" not in line
    assert key in line
    assert value in line
    if way_out == REMOVED:
        assert "remove the key" in line
        return
    other_key, _, nearest = way_out.partition("=")
    assert (nearest.strip("[]") or "no ranks") in line.partition("Nearest legal: ")[2]
    if other_key != key:
        assert line.startswith((f"{key} = ", f"{other_key} = "))


@pytest.mark.parametrize(("recipe", "key", "value", "way_out"), ILLEGAL, ids=IDS)
def test_the_nearest_legal_choice_is_legal(recipe: str, key: str, value: str, way_out: str) -> None:
    given = [] if way_out == REMOVED else [f"{key}={value}", way_out]
    spec = spec_of(recipe, *given)
    assert recipe_of(spec).name == spec.recipe.name


@recipes
def test_the_illegal_table_is_whole(recipe: Recipe) -> None:
    """What is refused is what the table says, and all else that the spec offers is legal."""
    refused = {
        (key, value)
        for key, values in CHOICES.items()
        for value in values
        if illegal(spec_of(recipe.name, f"{key}={value}"), recipe)
    }
    expected = {(key, value) for name, key, value, _ in ILLEGAL if name == recipe.name}
    if recipe.name not in ("refresh", "fedex", "flora"):
        expected |= {("recipe.budget", "7"), ("recipe.budget", "8")}
    assert refused == expected


def test_every_problem_is_named() -> None:
    unit = ("privacy.epsilon=3", "privacy.unit=client")
    spec = spec_of("flexlora", "recipe.optimizer=adam", "recipe.learning_rate=0.5", *unit)
    assert len(illegal(spec, RECIPES["flexlora"])) == 3


@recipes
@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_unit_is_for_recipes_whose_aggregate_is_a_linear_sum(recipe: Recipe, unit: str) -> None:
    given = (f"privacy.unit={unit}", "privacy.epsilon=3", "recipe.weighting=uniform")
    problems = illegal(spec_of(recipe.name, *given), recipe)
    assert (problems == []) == (unit in recipe.units)
    if problems:
        assert f'privacy.unit = "{unit}" is illegal with {recipe.name}' in problems[0]
        assert recipe_of(spec_of(recipe.name, *given, "recipe.name=fedsvd")).name == "fedsvd"


@pytest.mark.parametrize(
    ("recipe", "overrides", "way_out"),
    [
        ("fedsvd", ["adapter.ranks=[2, 8]", "recipe.aggregator=median"], "recipe.aggregator=geometric-median"),
        ("fedsvd", ["adapter.ranks=[2, 8]", "recipe.aggregator=fisher"], "recipe.aggregator=mean"),
        *(
            ("ffa", [f"wire.codec={codec}", f"recipe.aggregator={rule}"], "wire.codec=fp4")
            for codec in ("top-k", "seed-projection")
            for rule in ON_ENTRIES
        ),
        *(
            ("fedsvd", ["wire.codec=top-k", f"recipe.aggregator={rule}"], "wire.codec=fp4")
            for rule in ("krum", "multi-krum", "greedy-soup")
        ),
        (
            "fedsvd",
            ["wire.codec=top-k", "participation.sampling=fixed", "participation.spare=0.5"],
            "wire.codec=fp4",
        ),
        *(
            ("ffa", ["recipe.weighting=examples", f"recipe.aggregator={rule}"], "recipe.weighting=uniform")
            for rule in WEIGHED
        ),
        ("diloco", ["adapter.method=ia3", "recipe.aggregator=fisher"], "recipe.aggregator=mean"),
        ("fedsvd", ["adapter.ranks=[2, 8]", "wire.codec=top-k"], "wire.codec=fp4"),
        ("flexlora", ["adapter.ranks=[2, 8]", "adapter.start=warm"], "adapter.ranks=[]"),
        ("fedit", ["adapter.ranks=[2, 8]", "adapter.method=dora"], "adapter.ranks=[]"),
        ("diloco", ["recipe.fragments=2", "participation.sampling=fixed"], "participation.sampling=all"),
        ("diloco", ["recipe.delay=4", "local.steps=4"], "recipe.delay=3"),
        ("fedit", ["adapter.layers=[0]", "adapter.start=warm"], "adapter.layers=[]"),
    ],
)
def test_two_legal_choices_that_do_not_go_together(recipe: str, overrides: list[str], way_out: str) -> None:
    with pytest.raises(SpecError, match=r"^[^\n]+Nearest legal: [^\n]+$"):
        recipe_of(spec_of(recipe, *overrides))
    assert recipe_of(spec_of(recipe, *overrides, way_out)).name == recipe


@pytest.mark.parametrize("rule", ["mean", "krum", "multi-krum", "greedy-soup", "ties", "breadcrumbs", "pcb", "fisher"])
def test_a_node_may_state_its_weight_where_it_plays_no_part_or_nobody_is_taken_to_be_bad(rule: str) -> None:
    assert recipe_of(spec_of("ffa", "recipe.weighting=examples", f"recipe.aggregator={rule}")).name == "ffa"


@pytest.mark.parametrize("rule", ["mean", "clip", "geometric-median"])
def test_what_top_k_may_stand_beside(rule: str) -> None:
    """Aggregators that leave no update out, and a fixed share without spares."""
    whole = ("participation.sampling=fixed", "participation.rate=0.5")
    assert recipe_of(spec_of("fedsvd", "wire.codec=top-k", f"recipe.aggregator={rule}", *whole)).name == "fedsvd"


@pytest.mark.parametrize("rule", ON_ENTRIES)
def test_rules_on_entries_are_for_what_is_trained_in_one_basis(rule: str) -> None:
    for name in ("fedsvd", "ffa", "refresh", "rolora"):
        assert recipe_of(spec_of(name, f"recipe.aggregator={rule}")).name == name
    assert recipe_of(spec_of("fedit", f"recipe.aggregator={rule}", "adapter.method=ia3")).name == "fedit"


@pytest.mark.parametrize("rule", ["fisher", "greedy-soup"])
@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_merging_rule_beside_noise_is_refused(rule: str, unit: str) -> None:
    private = (f"privacy.unit={unit}", "privacy.epsilon=3", "recipe.weighting=uniform")
    with pytest.raises(SpecError, match=f'recipe.aggregator = "{rule}" is illegal with privacy.unit'):
        recipe_of(spec_of("ffa", f"recipe.aggregator={rule}", *private))


def test_how_a_is_drawn_and_what_the_spec_asks_for() -> None:
    assert initial_a(spec_of("ffa")) == "kaiming"
    assert initial_a(spec_of("ffa", "recipe.initial_a=orthonormal")) == "orthonormal"
    assert initial_a(spec_of("refresh")) == "orthonormal"


EVA = ("recipe.initial_a=eva", "adapter.public=public.jsonl")


@recipes
def test_every_recipe_whose_nodes_receive_their_start_may_have_it_from_public_data(recipe: Recipe) -> None:
    assert initial_a(spec_of(recipe.name, *EVA)) == "eva"
    problems = illegal(spec_of(recipe.name, *EVA), recipe)
    assert [problem.startswith('recipe.initial_a = "eva" is illegal') for problem in problems] == [
        True
    ] * recipe.streams


@pytest.mark.parametrize(
    ("recipe", "overrides", "way_out"),
    [
        ("fedit", ["adapter.method=dora"], ["recipe.initial_a=kaiming", "adapter.public=''"]),
        ("fedsvd", ["adapter.ranks=[2, 8]"], ["recipe.initial_a=orthonormal"]),
        ("fedsvd", ["adapter.ranks=[2, 8]"], ["adapter.ranks=[]"]),
        ("ffa", ["adapter.start=warm"], ["recipe.initial_a=kaiming"]),
        ("fedsvd", ["data.source=public.jsonl"], ["adapter.public=other.jsonl"]),
        ("fedsvd", ["data.source=a.jsonl", "data.evaluation=public.jsonl"], ["adapter.public=other.jsonl"]),
    ],
)
def test_what_public_data_may_not_stand_beside(recipe: str, overrides: list[str], way_out: list[str]) -> None:
    with pytest.raises(SpecError, match=r"^[^\n]+ is illegal[^\n]+Nearest legal: [^\n]+$"):
        recipe_of(spec_of(recipe, *EVA, *overrides))
    raw = spec_of(recipe, *EVA, *overrides, *way_out).model_dump(exclude_none=True)
    if raw["recipe"]["initial_a"] != "eva":
        raw["adapter"].pop("public")
    assert recipe_of(RunSpec.check(raw)).name == recipe


def test_mixed_ranks_may_start_from_public_data_where_no_basis_rotates() -> None:
    """Those of `fedsvd` may not, and so no node of such a run may be smaller either."""
    for name in ("flexlora", "flora", "hetlora"):
        assert recipe_of(spec_of(name, *EVA, "adapter.ranks=[2, 8]")).name == name
    assert rank_for(spec_of("fedsvd"), 4) == 4
    with pytest.raises(SpecError, match=r"this run needs rank 8: .+ the rotation of a round needs more rows"):
        rank_for(spec_of("fedsvd", *EVA), 4)


def test_ranks_are_drawn_by_key() -> None:
    spec = spec_of("flexlora", "adapter.ranks=[2, 4, 8]", "run.seed=3")
    drawn = [rank_of(spec, node) for node in range(300)]
    assert [rank_of(spec, node) for node in range(300)] == drawn
    assert {drawn.count(rank) > 60 for rank in (2, 4, 8)} == {True}
    assert [rank_of(spec.set("run.seed=4"), node) for node in range(300)] != drawn
    assert {rank_of(spec_of("flexlora"), node) for node in (0, 2**64 - 1)} == {0}
