"""What recipes of codes may not be combined with."""

import pytest

from fedapt.protocols.errors import SpecError
from fedapt.protocols.legality import recipe_of
from fedapt.protocols.spec import RunSpec


def spec_of(recipe: str, *overrides: str) -> RunSpec:
    return RunSpec.parse('[model]\nbase = "m"\ntask = "causal-lm"').set(f"recipe.name={recipe}", *overrides)


@pytest.mark.parametrize(
    ("recipe", "overrides", "problem"),
    [
        ("fedsvd", ["zeroth.directions=8"], "zeroth.directions: read by onebyte, kseed and dpzo alone"),
        ("onebyte", ["zeroth.pool=8"], "zeroth.pool = 8 is illegal with onebyte: only kseed has a pool"),
        ("onebyte", ["local.steps=4"], "an exchange is one batch"),
        ("onebyte", ["adapter.dropout=0.1"], "probes of one loss must see one model"),
        ("onebyte", ["wire.codec=int8"], "zeroth.code is what nodes send in"),
        ("onebyte", ["recipe.learning_rate=0.5"], "local.learning_rate is the step"),
        ("onebyte", ["recipe.optimizer=adam"], "every node moves its lattice by the same integers"),
        ("onebyte", ["adapter.rank=8", "adapter.ranks=[4,8]"], "it needs one rank"),
        ("onebyte", ["recipe.initial_a=eva", "adapter.public=p"], "two machines may compute another A"),
        ("onebyte", ["recipe.aggregator=trimmed-mean"], "nodes probe different directions"),
        ("dpzo", ["recipe.aggregator=krum"], 'codes are of directions, not of tensors. Nearest legal: "trimmed-mean"'),
        ("kseed", ["privacy.unit=client", "privacy.epsilon=6"], 'Nearest legal: recipe.name = "dpzo"'),
        ("dpzo", ["privacy.unit=client", "privacy.epsilon=6"], 'Nearest legal: "uniform"'),
        (
            "dpzo",
            ["privacy.unit=client", "privacy.epsilon=6", "recipe.weighting=uniform", "privacy.clipping=adaptive"],
            "three constants",
        ),
        (
            "dpzo",
            ["privacy.unit=client", "privacy.epsilon=6", "recipe.weighting=uniform", "recipe.aggregator=trimmed-mean"],
            "clipping and noise are of a plain sum",
        ),
    ],
)
def test_it_is_refused_with_the_way_out(recipe: str, overrides: list[str], problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as raised:
        recipe_of(spec_of(recipe, *overrides))
    assert "Nearest legal" in str(raised.value) or "remove the key" in str(raised.value)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bias", "head", "full", "bottleneck", "prompt"])
@pytest.mark.parametrize("recipe", ["onebyte", "kseed", "dpzo"])
def test_any_small_set_of_trainables_will_do(recipe: str, method: str) -> None:
    assert recipe_of(spec_of(recipe, f"adapter.method={method}")).zeroth


def test_what_is_legal() -> None:
    assert recipe_of(spec_of("dpzo", "recipe.aggregator=trimmed-mean"))
    for unit in ("client", "example"):
        private = [f"privacy.unit={unit}", "privacy.epsilon=6", "recipe.weighting=uniform"]
        assert recipe_of(spec_of("dpzo", *private))
