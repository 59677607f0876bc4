"""Updates of a round ⇒ one change of the adapter, and the error that this way of aggregating makes.

What a federation wants is the mean of the nodes' products, `mean(B_k·A_k)`. Averaging A and B each for itself gives
something else; how far off it is, is reported for every round. The recipes differ in what is averaged, what rank is
kept, and where the rest goes (`protocols/recipes.py`); the algebra is `kernels/lowrank.py`.

Sums run in the order given (node-id order) and in float64, so equal updates give equal bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..kernels.lowrank import LowRank, Matrix, weighted_sum
from ..protocols.layout import AdapterLayout, Flat, Pair
from ..protocols.recipes import Recipe
from ..protocols.spec import Recipe as Settings
from .combining import combined, weighed
from .rounds import Module, Round

RIDGE = 0.01
"""LoRA-FAIR's λ, relative to the mean square norm of A's rows."""

STACKED, SETTLED = 256, 1e-6
"""Stacked ranks up to which a truncation is by QR; beyond, by subspace iteration where its residual comes so low."""


@dataclass(frozen=True)
class Aggregate:
    """`change` is fp32 over the layout that the recipe steps; `error` is relative, and of `change` as it is, before the
    server's own step (None: there is no pair of factors); `residual` is what the server keeps for the next round (fp32,
    over `residual_layout`; of size 0 for most recipes)."""

    change: Flat
    error: float | None
    residual: Flat


def aggregate(
    recipe: Recipe, settings: Settings, updates: Round, residual: Flat | None = None, *, number: int = 1
) -> Aggregate:
    """The change of round `number`, its error, and the residual that the server keeps for the next one.

    `residual` is what the last round left (None before the first). The error is
    `‖mean(B_k·A_k) − B̂·Â‖ / ‖mean(B_k·A_k)‖` over all modules together (Frobenius), where what the recipe sends as
    frozen factors counts as not lost, and what stays at the server counts as lost until it is sent; 0 where nothing
    was learned, None where there is no pair of factors, and so no product to miss. It is the error of averaging: `B̂·Â` is the adapter after the change alone, before the server's own step,
    whose learning rate and momentum (`optimizers.py`) have no part in it. Under a rule on distances the mean has the
    rule's weights.
    """
    layout, updates = updates.layout, weighed(updates, settings)
    stepped, kept = recipe.stepped(layout, number), residual_layout(recipe, settings, layout)
    change = stepped.pad(combined(updates, settings), updates.trained)
    left: Flat = np.zeros(kept.size, np.float32) if residual is None else residual.copy()
    start, step, rest = layout.split(updates.adapter), stepped.split(change), kept.split(left)
    shares = _norm_shares(updates) if recipe.averages == "by-norm" else []
    missed = wanted = 0.0
    for pair in layout.pairs:
        module = updates.module(pair)
        mean = module.mean()
        match recipe.averages:
            case "products" if recipe.residual == "server":
                mean = _truncate_and_keep(module, mean, step, rest)
            case "products":
                _move_to(_best(mean, pair.rank), module, step)
            case "corrected":
                _correct(mean, module, step)
            case "by-norm":
                _move_to(_padded_mean(module, shares), module, step)
        if recipe.residual == "frozen":
            length, distance = mean.norm(), _freeze(mean.minus(_moved(module, step)), pair, start, step).norm()
        else:
            length, distance = mean.norm_and_distance(_moved(module, step))
        wanted += length**2
        missed += distance**2
    error = float(np.sqrt(missed / wanted)) if wanted > 0 else 0.0
    return Aggregate(change, error if layout.pairs else None, left)


def residual_layout(recipe: Recipe, settings: Settings, layout: AdapterLayout) -> AdapterLayout:
    """The factors that the server keeps from round to round beside the adapter's own: of the budget's rank."""
    if recipe.residual != "server":
        return AdapterLayout([])
    return layout.with_frozen(recipe.budget(layout, settings)).select({"frozen"})


def _moved(module: Module, step: dict[str, Matrix]) -> LowRank:
    """The module's factors after the step."""
    b, a = (step.get(spec.name, np.zeros(1)) for spec in (module.pair.b, module.pair.a))
    return LowRank(module.start.b + b, module.start.a + a)


def _move_to(product: LowRank, module: Module, step: dict[str, Matrix]) -> None:
    step[module.pair.b.name][...] = product.b - module.start.b
    step[module.pair.a.name][...] = product.a - module.start.a


def _best(product: LowRank, rank: int) -> LowRank:
    """The truncation to `rank`: exactly, or to SETTLED where many factors are stacked.

    The changes came as fp32 and what is kept travels as fp32, so the iteration is in fp32 too; its residual is checked.
    """
    if product.rank > STACKED:
        narrow = LowRank(product.b.astype(np.float32), product.a.astype(np.float32))
        found, residual = narrow.dominant(rank, SETTLED)
        if residual <= SETTLED:
            return found
    return product.truncate(rank)


def _truncate_and_keep(module: Module, mean: LowRank, step: dict[str, Matrix], rest: dict[str, Matrix]) -> LowRank:
    """FLoRA (arXiv 2409.05976 §3) within a rank budget: nodes get the best part of all that was stacked so far.

    What their rank cannot hold stays at the server and is stacked again in the next round. Returns the whole sum.
    """
    b, a = (rest[name] for name in module.pair.frozen)
    total = weighted_sum([(1.0, mean), *module.unsent(), (1.0, LowRank(b.astype(np.float64), a.astype(np.float64)))])
    rank = module.pair.rank
    kept = _best(total, rank + a.shape[0])
    _move_to(LowRank(kept.b[:, :rank], kept.a[:rank]), module, step)
    b[...], a[...] = kept.b[:, rank:], kept.a[rank:]
    return total


def _correct(mean: LowRank, module: Module, step: dict[str, Matrix]) -> None:
    """LoRA-FAIR (arXiv 2411.14961): B moves so that `(B̄ + ΔB)·Ā` comes near to the mean product, and ΔB stays small.

    The paper descends on a similarity; of the squared distance the minimum is known:
    `ΔB = (M − B̄·Ā)·Āᵀ·(Ā·Āᵀ + λI)⁻¹`.
    """
    averaged = _moved(module, step)
    gram = averaged.a @ averaged.a.T
    ridge = RIDGE * np.trace(gram) / max(1, len(gram)) * np.eye(len(gram))
    lost = mean.minus(averaged)
    correction = lost.b @ np.linalg.lstsq(gram + ridge, averaged.a @ lost.a.T, rcond=None)[0].T
    step[module.pair.b.name][...] += correction


def _norm_shares(updates: Round) -> list[float]:
    """HetLoRA's weights (arXiv 2401.06432): in proportion to `‖B_k·A_k‖` of the whole adapter."""
    squares = np.zeros(len(updates.contributions))
    for pair in updates.layout.pairs:
        squares += [product.norm() ** 2 for product in updates.module(pair).ended]
    norms = np.sqrt(squares)
    return list(norms / norms.sum()) if norms.sum() > 0 else [c.weight for c in updates.contributions]


def _padded_mean(module: Module, shares: Sequence[float]) -> LowRank:
    """HetLoRA: factors padded with zeros to the largest rank, each averaged for itself."""
    b, a = np.zeros_like(module.start.b), np.zeros_like(module.start.a)
    for share, product in zip(shares, module.ended, strict=True):
        b[:, : product.rank] += share * product.b
        a[: product.rank] += share * product.a
    return LowRank(b, a)


def _freeze(lost: LowRank, pair: Pair, start: dict[str, Matrix], step: dict[str, Matrix]) -> LowRank:
    """FedEx-LoRA (arXiv 2410.09432 §4): what the means lost joins the frozen factors. Returns what their rank lost."""
    b, a = (start[name].astype(np.float64) for name in pair.frozen)
    total = weighted_sum([(1.0, LowRank(b, a)), (1.0, lost)])
    kept = _best(total, a.shape[0])
    for name, new, old in zip(pair.frozen, (kept.b, kept.a), (b, a), strict=True):
        step[name][...] = new - old
    return total.minus(kept)
