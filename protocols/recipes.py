"""Recipes: named, legal combinations of what trains, how it is aggregated, and what may stand beside it.

Pure data. The client, the server, `fedapt plan` and `fedapt recipes` all read this one table.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

from .errors import SpecError
from .layout import AdapterLayout, Role
from .spec import RunSpec


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to federate low-rank adapters.

    `trains` are the roles that nodes train and send. `averages` says what is averaged: each tensor for itself, or
    the products `B·A`, truncated back to the adapter's rank. `refactorizes`: after each round `B·A` is rewritten
    with an orthonormal A by an SVD, and nodes receive A as an r×r rotation of the A they started from.
    `linear`: the aggregate is a linear sum of what nodes send.
    """

    name: str
    summary: str
    paper: str
    trains: frozenset[Role]
    averages: Literal["tensors", "products"] = "tensors"
    refactorizes: bool = False
    initial_a: tuple[Literal["kaiming", "orthonormal"], ...] = ("kaiming",)
    server_optimizers: tuple[str, ...] = ("sgd", "nesterov", "novograd", "adam")
    linear: bool = True
    exact: bool = True
    units: tuple[str, ...] = ("none",)

    def trained(self, layout: AdapterLayout) -> AdapterLayout:
        """The tensors that a node sends."""
        return layout.select(self.trains)

    def downlink(self, layout: AdapterLayout) -> AdapterLayout:
        """The tensors that a node receives: all that changed since the start, in their smallest form."""
        return layout.with_rotations() if self.refactorizes else self.trained(layout)


B_ONLY: frozenset[Role] = frozenset({"B", "other"})
BOTH: frozenset[Role] = frozenset({"A", "B", "other"})

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="fedsvd",
            summary="train B; after each round rewrite B·A with an orthonormal A by SVD",
            paper="FedSVD, arXiv 2505.12805",
            trains=B_ONLY,
            refactorizes=True,
            initial_a=("orthonormal",),
            server_optimizers=("sgd", "nesterov", "novograd"),
        ),
        Recipe(
            name="ffa",
            summary="train B; A stays as it was drawn, so the mean of B is exact",
            paper="FFA-LoRA, arXiv 2403.12313",
            trains=B_ONLY,
            initial_a=("kaiming", "orthonormal"),
        ),
        Recipe(
            name="flexlora",
            summary="train A and B; average the products B·A and truncate to the rank by SVD",
            paper="FlexLoRA, arXiv 2402.11505",
            trains=BOTH,
            averages="products",
            server_optimizers=("sgd",),
            linear=False,
            exact=False,
        ),
        Recipe(
            name="fedit",
            summary="train A and B; average each for itself (the mean of products is not the product of means)",
            paper="FedIT, arXiv 2305.05644",
            trains=BOTH,
            exact=False,
        ),
    )
}


def recipe_of(spec: RunSpec) -> Recipe:
    """The spec's recipe. Raises SpecError for an unknown name or a combination that would be wrong."""
    recipe = recipe_named(spec.recipe.name)
    problems = illegal(spec, recipe)
    if problems:
        raise SpecError("\n".join(problems))
    return recipe


def recipe_named(name: str) -> Recipe:
    """The recipe of this name. Raises SpecError that names the nearest one."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    way_out = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(RECIPES)}."
    raise SpecError(f"recipe.name = {name!r}: no such recipe; {way_out}")


def illegal(spec: RunSpec, recipe: Recipe) -> list[str]:
    """Every reason why `spec` may not run with `recipe`, each with the nearest legal choice."""
    problems = []
    if spec.recipe.optimizer not in recipe.server_optimizers:
        why = (
            "its state lives in A's basis, which rotates each round, and elementwise scaling does not rotate"
            if recipe.refactorizes
            else "the truncated product is the next adapter itself, not a step towards it"
        )
        problems.append(
            f'recipe.optimizer = "{spec.recipe.optimizer}" is illegal with {recipe.name}: {why}. '
            f'Nearest legal: "{recipe.server_optimizers[-1]}".'
        )
    if recipe.averages == "products" and spec.recipe.learning_rate != 1.0:
        problems.append(
            f"recipe.learning_rate = {spec.recipe.learning_rate} is illegal with {recipe.name}: a part of a step "
            "between two factorizations means nothing. Nearest legal: 1.0."
        )
    if spec.recipe.initial_a not in (None, *recipe.initial_a):
        problems.append(
            f'recipe.initial_a = "{spec.recipe.initial_a}" is illegal with {recipe.name}. '
            f'Nearest legal: "{recipe.initial_a[0]}".'
        )
    if spec.privacy.unit not in recipe.units:
        problems.append(
            f'privacy.unit = "{spec.privacy.unit}" is not offered by {recipe.name} in this version. '
            f'Nearest legal: "{recipe.units[0]}" (no formal guarantee).'
        )
    return problems


def initial_a(spec: RunSpec) -> Literal["kaiming", "orthonormal"]:
    """How A is drawn at the start of the run."""
    return spec.recipe.initial_a or recipe_of(spec).initial_a[0]
