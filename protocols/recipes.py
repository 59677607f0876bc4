"""Recipes: named, legal combinations of what trains, how it is aggregated, and what may stand beside it.

Pure data. The client, the server, `fedapt plan` and `fedapt recipes` all read this one table. What a spec may not
combine is in `legality.py`.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

from .errors import SpecError
from .layout import AdapterLayout, Role
from .spec import Recipe as Settings

BUDGET = 4
"""The rank that may be kept beside the adapter, in multiples of its own, where the spec does not say."""

STEPS = ("sgd", "nesterov", "novograd", "adam")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to federate low-rank adapters.

    `trains` are the roles that nodes train and send; where it `alternates`, B in odd rounds and A in even ones.
    `averages`: each tensor for itself; the products `B·A`, truncated back to a rank; tensors, with B corrected
    towards the mean product; or tensors weighted by the norm of their product. `residual` is where that goes which
    the average of this rank cannot hold: it is lost, kept at the server for the next round, or sent to nodes as
    `frozen` factors beside the trained ones. `refactorizes`: every `period` rounds `B·A` is rewritten with an
    orthonormal A by an SVD, and nodes receive A as an r×r rotation of the A they started from. `refreshes`: every
    `period` rounds `B·A` moves to the frozen factors, and training starts anew in another row space. `streams`: nodes go
    on from tensors of their own, and each round synchronizes one fragment of them in turn. `linear`: the
    aggregate is a linear sum of what nodes send. `exact`: it is the mean product itself, but for a rank budget.
    `directions`: along which random directions nodes send slopes in place of tensors: each along its `own`, along some of
    a `pool`, or all along the same (`shared`); a round is then one exchange (`protocols/exchange.py`).
    """

    name: str
    summary: str
    paper: str
    trains: frozenset[Role]
    alternates: bool = False
    averages: Literal["tensors", "products", "corrected", "by-norm"] = "tensors"
    residual: Literal["none", "lost", "server", "frozen"] = "none"
    refactorizes: bool = False
    refreshes: bool = False
    streams: bool = False
    period: int = 1
    mixes_ranks: bool = False
    initial_a: tuple[Literal["kaiming", "orthonormal"], ...] = ("kaiming",)
    server_optimizers: tuple[str, ...] = STEPS
    linear: bool = True
    exact: bool = True
    units: tuple[str, ...] = ("none",)
    directions: Literal["none", "own", "pool", "shared"] = "none"

    @property
    def zeroth(self) -> bool:
        """Whether nodes send slopes along random directions, one code each, and not tensors."""
        return self.directions != "none"

    @property
    def has_frozen(self) -> bool:
        """Whether nodes hold frozen factors beside those that they train."""
        return self.refreshes or self.residual == "frozen"

    @property
    def replaces(self) -> bool:
        """Whether the aggregate is the next adapter itself, not a step towards it."""
        return self.averages != "tensors" or self.residual == "frozen"

    def trained(self, layout: AdapterLayout, round_: int) -> AdapterLayout:
        """The tensors that a node trains and sends in a round (counted from 1)."""
        if not self.alternates:
            return layout.select(self.trains)
        return layout.select(self.trains - {"A" if round_ % 2 else "B"})

    def stepped(self, layout: AdapterLayout, round_: int) -> AdapterLayout:
        """The tensors that the server's step moves: the trained ones, and frozen factors that take the residual."""
        trained = self.trained(layout, round_)
        return layout.select({*self.trains, "frozen"}) if self.residual == "frozen" else trained

    def downlink(self, layout: AdapterLayout, round_: int, settings: Settings) -> AdapterLayout:
        """The tensors that a node receives for a round: all that changed since the start, in their smallest form.

        Under EVA the A's of the start are among them: no two machines compute the same ones (`client/eva.py`).
        """
        changed = self._changed(layout, round_, settings)
        starts = layout.select({"A"}) if settings.initial_a == "eva" else AdapterLayout([])
        return AdapterLayout({tensor.name: tensor for tensor in (*changed.tensors, *starts.tensors)}.values())

    def _changed(self, layout: AdapterLayout, round_: int, settings: Settings) -> AdapterLayout:
        if self.refactorizes:
            return layout.with_rotations()
        received = layout.select({*self.trains, "frozen"})
        if not self.refreshes:
            return received
        # Frozen A's are drawn by key and never travel; of the frozen B's, those that are filled.
        filled = received.frozen_at(self.refreshed(layout, round_, settings) * layout.rank)
        return AdapterLayout(t for t in filled.tensors if not t.name.endswith(".frozen_A.weight"))

    def refreshed(self, layout: AdapterLayout, round_: int, settings: Settings) -> int:
        """How many fresh starts there were before a round; the budget of the frozen factors bounds them."""
        if not self.refreshes or layout.rank == 0:
            return 0
        return min((round_ - 1) // self.every(settings), self.budget(layout, settings) // layout.rank)

    def every(self, settings: Settings) -> int:
        """Rounds from one refactorization, or fresh start, to the next."""
        return settings.period or self.period

    def budget(self, layout: AdapterLayout, settings: Settings) -> int:
        """The rank that may be kept beside the adapter; whole starts of it for `refresh`."""
        rank = settings.budget or BUDGET * layout.rank
        return rank - rank % max(1, layout.rank) if self.refreshes else rank


B_ONLY: frozenset[Role] = frozenset({"B", "other"})
BOTH: frozenset[Role] = frozenset({"A", "B", "other"})
REPLACED = ("sgd",)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="fedsvd",
            summary="train B; after each round rewrite B·A with an orthonormal A by SVD",
            paper="FedSVD, arXiv 2505.12805",
            trains=B_ONLY,
            refactorizes=True,
            mixes_ranks=True,
            initial_a=("orthonormal",),
            server_optimizers=("sgd", "nesterov", "novograd"),
            units=("none", "example", "client"),
        ),
        Recipe(
            name="ffa",
            summary="train B; A stays as it was drawn, so the mean of B is exact",
            paper="FFA-LoRA, arXiv 2403.12313",
            trains=B_ONLY,
            initial_a=("kaiming", "orthonormal"),
            units=("none", "example", "client"),
        ),
        Recipe(
            name="refresh",
            summary="train B; every few rounds freeze B·A as factors and start anew in another row space",
            paper="ours; FFA-LoRA (arXiv 2403.12313) between two fresh starts",
            trains=B_ONLY,
            refreshes=True,
            period=10,
            initial_a=("orthonormal",),
            units=("none", "example", "client"),
        ),
        Recipe(
            name="rolora",
            summary="train B in odd rounds and A in even ones, so that each mean is exact",
            paper="RoLoRA, arXiv 2502.01755",
            trains=BOTH,
            alternates=True,
            server_optimizers=REPLACED,
        ),
        Recipe(
            name="flexlora",
            summary="train A and B; average the products B·A and truncate to the rank by SVD",
            paper="FlexLoRA, arXiv 2402.11505",
            trains=BOTH,
            averages="products",
            residual="lost",
            mixes_ranks=True,
            server_optimizers=REPLACED,
            linear=False,
            exact=False,
        ),
        Recipe(
            name="flora",
            summary="train A and B; stack the products, send their best part, keep the rest at the server",
            paper="FLoRA, arXiv 2409.05976",
            trains=BOTH,
            averages="products",
            residual="server",
            mixes_ranks=True,
            server_optimizers=REPLACED,
            linear=False,
        ),
        Recipe(
            name="fedex",
            summary="train A and B; average each for itself, and send what that misses as frozen factors",
            paper="FedEx-LoRA, arXiv 2410.09432",
            trains=BOTH,
            residual="frozen",
            server_optimizers=REPLACED,
            linear=False,
        ),
        Recipe(
            name="lora-fair",
            summary="train A and B; average each for itself, and correct B towards the mean product",
            paper="LoRA-FAIR, arXiv 2411.14961",
            trains=BOTH,
            averages="corrected",
            residual="lost",
            server_optimizers=REPLACED,
            linear=False,
            exact=False,
        ),
        Recipe(
            name="hetlora",
            summary="train A and B; pad to the largest rank with zeros, weight by the norm of B·A",
            paper="HetLoRA, arXiv 2401.06432",
            trains=BOTH,
            averages="by-norm",
            residual="lost",
            mixes_ranks=True,
            server_optimizers=REPLACED,
            linear=False,
            exact=False,
        ),
        Recipe(
            name="diloco",
            summary="nodes keep their own A and B; each round averages one fragment, mixed in after a delay",
            paper="Streaming DiLoCo, arXiv 2501.18512",
            trains=BOTH,
            residual="lost",
            streams=True,
            server_optimizers=("sgd", "nesterov", "adam"),
            exact=False,
        ),
        Recipe(
            name="fedit",
            summary="train A and B; average each for itself (the mean of products is not the product of means)",
            paper="FedIT, arXiv 2305.05644",
            trains=BOTH,
            residual="lost",
            exact=False,
            units=("none", "example", "client"),
        ),
        Recipe(
            name="onebyte",
            summary="send one byte for the slope along each of a node's own random directions; all apply all",
            paper="Just One Byte, arXiv 2306.10015",
            trains=BOTH,
            server_optimizers=REPLACED,
            directions="own",
        ),
        Recipe(
            name="kseed",
            summary="as onebyte, along a pool of directions: a late joiner gets one sum for each of them",
            paper="FedKSeed, arXiv 2312.06353",
            trains=BOTH,
            server_optimizers=REPLACED,
            directions="pool",
        ),
        Recipe(
            name="dpzo",
            summary="all nodes probe the same directions; slopes are one vector, clipped once, noised as a sum",
            paper="DPZero, arXiv 2310.09639; DP-ZO, arXiv 2401.04343",
            trains=BOTH,
            server_optimizers=REPLACED,
            units=("none", "example", "client"),
            directions="shared",
        ),
    )
}

FIRST_ORDER = {name: recipe for name, recipe in RECIPES.items() if not recipe.zeroth}
"""Those whose nodes send tensors, in rounds."""


def recipe_named(name: str) -> Recipe:
    """The recipe of this name. Raises SpecError that names the nearest one."""
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    way_out = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(RECIPES)}."
    raise SpecError(f"recipe.name = {name!r}: no such recipe; {way_out}")
