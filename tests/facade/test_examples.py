"""Every recipe has an example spec, and every example spec is a legal one."""

from pathlib import Path

import pytest

from fedapt.protocols.legality import recipe_of
from fedapt.protocols.recipes import RECIPES
from fedapt.protocols.spec import RunSpec

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.toml")), ids=lambda path: path.stem)
def test_it_is_legal(path: Path) -> None:
    if path.name not in ("pyproject.toml", "client.toml"):  # neither is a spec
        recipe_of(RunSpec.load(path))


def test_every_recipe_has_one() -> None:
    assert {path.stem for path in (EXAMPLES / "recipes").glob("*.toml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_of_its_recipe(name: str) -> None:
    assert RunSpec.load(EXAMPLES / "recipes" / f"{name}.toml").recipe.name == name
