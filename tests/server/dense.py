"""A round of random updates, and what each recipe makes of it on whole `out × in` matrices, formed outright."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fedapt.protocols.layout import A_SUFFIX, B_SUFFIX, AdapterLayout, Flat, Pair, TensorSpec
from fedapt.protocols.recipes import Recipe
from fedapt.protocols.shared import SharedAdapter
from fedapt.protocols.spec import Recipe as Settings
from fedapt.server.aggregation import RIDGE
from fedapt.server.rounds import Contribution, Round

Matrix = np.ndarray[Any, np.dtype[Any]]
Products = dict[str, Matrix]
seeds = st.integers(0, 2**32 - 1)


def layout_of(*modules: tuple[int, int, int]) -> AdapterLayout:
    """One pair for each (out, in, rank), and a head."""
    tensors = [TensorSpec("score.weight", (3, 4), "other"), TensorSpec("score.bias", (3,), "other")]
    for number, (outputs, inputs, rank) in enumerate(modules):
        tensors.append(TensorSpec(f"m{number}{A_SUFFIX}", (rank, inputs), "A"))
        tensors.append(TensorSpec(f"m{number}{B_SUFFIX}", (outputs, rank), "B"))
    return AdapterLayout(tensors)


@st.composite
def layouts(draw: st.DrawFn, least: int = 0) -> AdapterLayout:
    """Ranks from `least` to 4, never above the inputs: A must be able to have orthonormal rows."""
    modules = []
    for _ in range(draw(st.integers(1, 3))):
        inputs = draw(st.integers(1, 7))
        modules.append((draw(st.integers(1, 7)), inputs, draw(st.integers(least, min(4, inputs)))))
    return layout_of(*modules)


def values(layout: AdapterLayout, seed: int) -> Flat:
    return np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)


def start_of(layout: AdapterLayout, seed: int) -> Flat:
    """An adapter with orthonormal A's, and frozen factors of any values."""
    flat = values(layout, seed)
    for pair in layout.pairs:
        a = layout.split(flat)[pair.a.name]
        a[...] = np.linalg.qr(a.T)[0].T
    return flat


@dataclass(frozen=True)
class Case:
    """One round of a recipe: `layout` has its frozen factors."""

    recipe: Recipe
    settings: Settings
    layout: AdapterLayout
    updates: Round
    number: int

    def moved(self, change: Flat, layout: AdapterLayout) -> dict[str, Matrix]:
        """The whole adapter with a change of some of its tensors added, by name, float64."""
        changes = layout.split(change)
        start = self.layout.split(self.updates.adapter)
        return {name: t.astype(np.float64) + changes.get(name, 0.0) for name, t in start.items()}

    def nodes(self) -> list[dict[str, Matrix]]:
        """Each node's tensors after training; its factors cut at its rank, unless all share one A."""
        ended = [self.moved(c.change, self.updates.trained) for c in self.updates.contributions]
        for tensors, c in zip(ended, self.updates.contributions, strict=True):
            for pair in self.layout.pairs if c.rank and "A" in self.recipe.trains else ():
                tensors[pair.b.name] = tensors[pair.b.name][:, : c.rank]
                tensors[pair.a.name] = tensors[pair.a.name][: c.rank]
        return ended

    @property
    def weights(self) -> list[float]:
        return [c.weight for c in self.updates.contributions]

    def means(self) -> Products:
        """`Σ w_k·B_k·A_k`."""
        ended = self.nodes()
        return {
            pair.module: sum_of(self.weights, [t[pair.b.name] @ t[pair.a.name] for t in ended])
            for pair in self.layout.pairs
        }

    def unsent(self) -> Products:
        """The mean of those parts of the start's products that nodes were not sent."""
        start = {name: t.astype(np.float64) for name, t in self.layout.split(self.updates.adapter).items()}
        cuts = [c.rank or 99 for c in self.updates.contributions]
        return {
            p.module: sum_of(self.weights, [start[p.b.name][:, cut:] @ start[p.a.name][cut:] for cut in cuts])
            for p in self.layout.pairs
        }

    def averaged(self, pair: Pair, weights: Sequence[float]) -> tuple[Matrix, Matrix]:
        """The factors, padded with zeros, each averaged for itself: (out, r) and (r, in)."""
        b, a = np.zeros(pair.b.shape), np.zeros(pair.a.shape)
        for weight, t in zip(weights, self.nodes(), strict=True):
            b[:, : t[pair.b.name].shape[1]] += weight * t[pair.b.name]
            a[: len(t[pair.a.name])] += weight * t[pair.a.name]
        return b, a

    def by_norm(self) -> list[float]:
        """HetLoRA's weights."""
        norms = [
            np.sqrt(sum(np.linalg.norm(t[p.b.name] @ t[p.a.name]) ** 2 for p in self.layout.pairs))
            for t in self.nodes()
        ]
        return [norm / sum(norms) for norm in norms] if sum(norms) else self.weights

    def expected(self) -> Products:
        """What the adapter's products (without frozen factors) should be: any nearest one, where it is a truncation."""
        means, found = self.means(), {}
        for pair in self.layout.pairs:
            b, a = self.averaged(pair, self.by_norm() if self.recipe.name == "hetlora" else self.weights)
            match self.recipe.name:
                case "flexlora":
                    found[pair.module] = truncated(means[pair.module], pair.rank)
                case "flora":
                    found[pair.module] = truncated(means[pair.module] + self.unsent()[pair.module], pair.rank)
                case "lora-fair":
                    ridge = RIDGE * np.trace(a @ a.T) / max(1, pair.rank) * np.eye(pair.rank)
                    correction = (means[pair.module] - b @ a) @ a.T @ np.linalg.pinv(a @ a.T + ridge)
                    found[pair.module] = (b + correction) @ a
                case "fedit" | "diloco" | "hetlora" | "fedex":
                    found[pair.module] = b @ a
                case _:
                    found[pair.module] = means[pair.module]
        return found


@st.composite
def cases(draw: st.DrawFn, recipe: Recipe, least: int = 0, mixed: bool = False) -> Case:
    """One node or several, of equal or different updates; of mixed ranks where the recipe takes them."""
    plain, seed = draw(layouts(least)), draw(seeds)
    chosen = Settings(name=recipe.name, budget=draw(st.sampled_from([None, 1, 3])) if plain.rank <= 1 else None)
    count, equal = draw(st.integers(1, 5)), draw(st.booleans())
    ranks = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)) if mixed else [0] * count
    return case_of(recipe, plain, seed, ranks=ranks, equal=equal, settings=chosen, number=draw(st.sampled_from([1, 2])))


def case_of(
    recipe: Recipe,
    plain: AdapterLayout,
    seed: int,
    *,
    ranks: Sequence[int] = (0, 0, 0),
    equal: bool = False,
    settings: Settings | None = None,
    number: int = 1,
) -> Case:
    """A node for each of `ranks` (0: the adapter's own), each with a change of its own unless they are `equal`."""
    chosen = settings or Settings(name=recipe.name)
    layout = plain.with_frozen(recipe.budget(plain, chosen)) if recipe.has_frozen else plain
    trained = recipe.trained(layout, number)
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(ranks)))
    contributions = []
    for k, (weight, rank) in enumerate(zip(weights, ranks, strict=True), 1):
        own = trained.at_rank(rank)
        change = trained.pad(trained.cut(values(trained, seed + (1 if equal else k)), own), own)
        contributions.append(Contribution(float(weight), change, rank))
    return Case(recipe, chosen, layout, Round(layout, trained, start_of(layout, seed), contributions), number)


def product(pair: Pair, tensors: dict[str, Matrix]) -> Matrix:
    """ΔW of a module without its frozen part, float64."""
    return np.asarray(tensors[pair.b.name].astype(np.float64) @ tensors[pair.a.name].astype(np.float64))


def frozen_product(pair: Pair, tensors: dict[str, Matrix]) -> Matrix:
    """The frozen part, float64; zero where there is none."""
    if pair.frozen[0] not in tensors:
        return np.zeros((pair.b.shape[0], pair.a.shape[1]))
    return np.asarray(tensors[pair.frozen[0]].astype(np.float64) @ tensors[pair.frozen[1]].astype(np.float64))


def deltas(shared: SharedAdapter, state: Flat, number: int) -> list[Matrix]:
    """ΔW of every module at the start of a round, frozen part included."""
    tensors = shared.layout.split(shared.whole(state, number))
    return [product(pair, tensors) + frozen_product(pair, tensors) for pair in shared.layout.pairs]


def sum_of(weights: Sequence[float], terms: Sequence[Matrix]) -> Matrix:
    return np.asarray(np.sum([weight * term for weight, term in zip(weights, terms, strict=True)], axis=0))


def truncated(matrix: Matrix, rank: int) -> Matrix:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


def size(*matrices: Matrix) -> float:
    """The Frobenius norm of all of them together."""
    return float(np.sqrt(sum(np.linalg.norm(matrix) ** 2 for matrix in matrices)))


def close(found: Sequence[Matrix], expected: Sequence[Matrix]) -> float:
    """The largest relative difference."""
    return max(float(np.linalg.norm(f - e) / np.linalg.norm(e)) for f, e in zip(found, expected, strict=True))
