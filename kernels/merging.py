"""Rules that merge K changes of one base into one: the mean, and what the literature on model merging offers.

A *change* (task vector) is an adapted model minus its base, flat: `changes` is (K, n) fp32. All rules compute in
float64 and return fp32, (n,). The order of the changes plays no part (up to the rounding of sums), and a rule applied
to changes that are all `c` times as long gives a result that is `c` times as long.

A LoRA module must come here as its dense `B·A`: factors are known only up to an invertible r×r matrix between them,
so a rule for single entries means nothing on them.

| here      | papers            | meaning                                              |
|-----------|-------------------|------------------------------------------------------|
| `density` | k, 1−β−(1−γ), r   | share of the entries that a rule keeps               |
| `scale`   | λ, α              | length of the step from the base                     |
| `weights` | λ_k               | relative weights, equal where they are not given     |

Each rule has its plain loop at the end of the file; the tests hold the two equal.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..protocols.layout import Flat
from .lowrank import Matrix

SLACK = 1e-9  # so that floor(0.1·10 entries) is 1 whatever the last bit of 0.1·10


def shares(weights: Sequence[float] | Matrix | None, count: int) -> Matrix:
    """`weights` divided by their sum: float64, (count,). None gives equal shares.

    Raises ValueError where there is nothing to weigh: no change, another number of weights than changes, a negative
    or non-finite weight, or none above zero.
    """
    if count == 0:
        raise ValueError("there is nothing to merge: give at least one change")
    values = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if values.shape != (count,):
        raise ValueError(f"{values.size} weights for {count} changes: give one for each")
    if not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise ValueError(f"weights {values.tolist()}: they must be finite, not negative, and not all zero")
    scaled = values / values.max()  # a sum of huge weights would overflow
    return np.asarray(scaled / scaled.sum())


def weighted_mean(changes: Matrix, weights: Sequence[float] | Matrix | None = None) -> Flat:
    """`Σ w_k·τ_k / Σ w_k`. With equal weights this is the uniform soup (arXiv 2203.05482 §2, Recipe 1)."""
    return _fp32(shares(weights, len(changes)) @ _wide(changes))


def fisher(
    changes: Matrix,
    information: Matrix,
    weights: Sequence[float] | Matrix | None = None,
    *,
    floor: float = 1e-6,
) -> Flat:
    """`Σ w_k·F_k·τ_k / Σ w_k·F_k` entry by entry (Matena & Raffel, arXiv 2111.09832 §3).

    `information` is (K, n): each model's diagonal Fisher information, not negative. Entries below `floor` count as
    `floor`, as in the paper's code; so an entry that no model cares about becomes their weighted mean. The rule is
    written for parameters; on changes of one base it gives the same model, because its weights sum to 1.
    """
    if information.shape != changes.shape or not (information >= 0).all() or floor <= 0:
        raise ValueError(
            f"Fisher information {information.shape} for changes {changes.shape}: the shapes must be equal, "
            f"no value negative, and floor = {floor} above 0"
        )
    pull = shares(weights, len(changes))[:, None] * np.maximum(_wide(information), floor)
    return _fp32((pull * changes).sum(axis=0) / pull.sum(axis=0))


def greedy_soup(changes: Matrix, score: Callable[[Flat], float]) -> tuple[Flat, tuple[int, ...]]:
    """The soup that takes a model in only where that does not lower the score (arXiv 2203.05482 §2, Recipe 1).

    `score` judges one change, (n,) fp32: higher is better, on data held out. Models are tried in the order of their
    own scores, equal ones as given. Returns the mean of those taken, and their numbers. It asks for 2K − 1 scores.

    Formal guarantees: the soup scores at least as high as the best single model, where `score` is a function.
    """
    shares(None, len(changes))
    own = [score(_fp32(change)) for change in changes]
    first, *rest = sorted(range(len(changes)), key=lambda k: -own[k])
    soup, best, taken = _fp32(changes[first]), own[first], [first]
    for candidate in rest:
        attempt = weighted_mean(changes[[*taken, candidate]])
        if (reached := score(attempt)) >= best:
            soup, best, taken = attempt, reached, [*taken, candidate]
    return soup, tuple(taken)


def ties(
    changes: Matrix,
    weights: Sequence[float] | Matrix | None = None,
    *,
    density: float = 0.2,
    scale: float = 1.0,
) -> Flat:
    """Trim, elect a sign, average those who agree (Yadav et al., arXiv 2306.01708 §4, Algorithm 1).

    Of each change the `density` of largest magnitude is kept (over all n entries together); the sign of an entry is
    that of the weighted sum of what was kept; the result is `scale` times the weighted mean of the kept entries of
    that sign. Where the sum is exactly zero no sign wins, and the result is 0; the paper leaves this open. With
    density 1 a single change comes back as it was.
    """
    part, changes = shares(weights, len(changes))[:, None], _wide(changes)
    kept = np.stack([change * _middle(np.abs(change), _bottom(density), 0.0) for change in changes])
    elected = np.sign((part * kept).sum(axis=0))
    agreeing = part * (kept * elected > 0)
    return _fp32(scale * _ratio((agreeing * kept).sum(axis=0), agreeing.sum(axis=0)))


def breadcrumbs(
    changes: Matrix,
    sizes: Sequence[int],
    weights: Sequence[float] | Matrix | None = None,
    *,
    density: float = 0.1,
    top: float = 0.01,
    scale: float = 1.0,
) -> Flat:
    """The sum of changes without both their tails (Davari & Belilovsky, arXiv 2312.06795 §3).

    In each tensor of each change, the `top` share of largest magnitude (outliers) and the smallest magnitudes beyond
    the next `density` become 0. `sizes` are the entries of the tensors in the order in which they lie in a change.
    The result is `scale` times the *sum*, as in the paper (a `scale` of 1/K gives a mean); unequal weights, which the
    paper does not have, are taken relative to their mean. With density 1 and top 0 a single change comes back.
    """
    if sum(sizes) != changes.shape[1] or min(sizes, default=0) < 0:
        raise ValueError(f"tensors of {sum(sizes)} entries in all for changes of {changes.shape[1]}")
    part, bottom = shares(weights, len(changes)), _bottom(density, top)
    total, bounds = np.zeros(changes.shape[1]), np.cumsum(sizes)[:-1]
    for share, change in zip(part, _wide(changes), strict=True):
        masks = [_middle(tensor, bottom, top) for tensor in np.split(np.abs(change), bounds)]
        total += len(changes) * share * change * np.concatenate([np.zeros(0, bool), *masks])
    return _fp32(scale * total)


def pcb(
    changes: Matrix,
    weights: Sequence[float] | Matrix | None = None,
    *,
    density: float = 0.1,
    scale: float = 1.0,
) -> Flat:
    """Parameter competition balancing (Du et al., arXiv 2410.02396 §3; details from the authors' code).

    An entry's score is its strength within its change, `exp(K·Norm(|τ_k|)²)`, times its agreement with the others,
    `τ_k·Σ_j w_j·τ_j`. Of each change the `density` of highest scores is kept; the scores kept are brought to [0, 1],
    and the result is `scale` times the mean of the changes weighted by them. `Norm` is the min-max normalization over
    a change. The paper leaves the second factor's normalization open and its code takes a tanh, which is the identity
    for changes of usual size but makes the rule depend on units: here there is none. Neither is the code's clamping
    of the outermost 0.01 %, of which the paper says nothing. The lowest score kept counts as 0, as in the code; but
    where the scores kept are all equal they tell nothing apart, and count as 1 if they are above 0.
    """
    part, changes = shares(weights, len(changes)), _wide(changes)
    pull = part @ changes
    strength = np.stack([np.exp(len(changes) * (_unit(np.abs(change)) ** 2 - 1)) for change in changes])
    scores = np.stack([_competition(score, density) for score in strength * changes * pull])
    return _fp32(scale * _ratio(part @ (scores * changes), part @ scores))


def _competition(score: Matrix, density: float) -> Matrix:
    """Scores in [0, 1]: 0 at and below the threshold of `density`, 1 at the highest."""
    bottom = _bottom(density)
    if not score.size:
        return score
    place = _dropped(bottom, score.size)
    border = np.partition(score, place)[place]
    alike = (score >= border) & (score > 0)
    return _unit(np.maximum(score, border)) if score.max() > border else alike.astype(np.float64)


def _middle(magnitudes: Matrix, bottom: float, top: float) -> Matrix:
    """True between the tails: without the smallest ⌊bottom·n⌋ and the largest ⌊top·n⌋; equals of a border stay."""
    if not magnitudes.size:
        return np.zeros(0, bool)
    high = magnitudes.size - 1 - _dropped(top, magnitudes.size)
    low = min(_dropped(bottom, magnitudes.size), high)
    ordered = np.partition(magnitudes, (low, high))
    return np.asarray((magnitudes >= ordered[low]) & (magnitudes <= ordered[high]))


def _dropped(share: float, size: int) -> int:
    return min(math.floor(share * size + SLACK), size - 1)


def _bottom(density: float, top: float = 0.0) -> float:
    """The share that falls away below. Raises ValueError for shares that no tensor has."""
    if not (0 < density <= 1 and 0 <= top < 1 and density + top <= 1 + SLACK):
        raise ValueError(f"density {density} and top {top}: density must lie in (0, 1], top in [0, 1 − density]")
    return max(0.0, 1 - density - top)


def _unit(values: Matrix) -> Matrix:
    """Min-max normalization to [0, 1]; 0 where all are equal."""
    low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
    return np.asarray((values - low) / (high - low)) if high > low else np.zeros_like(values)


def _ratio(numerator: Matrix, denominator: Matrix) -> Matrix:
    """`numerator / denominator`, 0 where nothing was kept."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _wide(values: Matrix) -> Matrix:
    return np.asarray(values, np.float64)


def _fp32(values: Matrix) -> Flat:
    return np.asarray(values).astype(np.float32)


def weighted_mean_reference(changes: Matrix, weights: Sequence[float]) -> list[float]:
    """`weighted_mean`, one entry at a time."""
    return [_mean(column, weights) for column in changes.T.tolist()]


def fisher_reference(changes: Matrix, information: Matrix, weights: Sequence[float], floor: float) -> list[float]:
    """`fisher`, one entry at a time."""
    return [
        _mean(column, [w * max(f, floor) for w, f in zip(weights, facts, strict=True)])
        for column, facts in zip(changes.T.tolist(), information.T.tolist(), strict=True)
    ]


def ties_reference(changes: Matrix, weights: Sequence[float], density: float, scale: float) -> list[float]:
    """`ties`, one entry at a time."""
    kept = [_kept(change, 1 - density, 0.0) for change in changes.tolist()]
    merged = []
    for column in zip(*kept, strict=True):
        total = sum(w * x for w, x in zip(weights, column, strict=True))
        agreeing = [(x, w) for x, w in zip(column, weights, strict=True) if x * total > 0]
        merged.append(scale * _mean([x for x, _ in agreeing], [w for _, w in agreeing]))
    return merged


def breadcrumbs_reference(
    changes: Matrix, sizes: Sequence[int], weights: Sequence[float], *, density: float, top: float, scale: float
) -> list[float]:
    """`breadcrumbs`, one tensor and one entry at a time."""
    merged, start = [], 0
    for size in sizes:
        tensors = [_kept(change[start : start + size], 1 - density - top, top) for change in changes.tolist()]
        columns = zip(*tensors, strict=True)
        merged += [scale * len(changes) * _mean(column, weights) for column in columns]
        start += size
    return merged


def pcb_reference(changes: Matrix, weights: Sequence[float], density: float, scale: float) -> list[float]:
    """`pcb`, one change and one entry at a time."""
    total = [sum(w * x for w, x in zip(weights, column, strict=True)) for column in changes.T.tolist()]
    scores = []
    for change in changes.tolist():
        low, high = min(map(abs, change), default=0), max(map(abs, change), default=0)
        norm = [(abs(x) - low) / (high - low) if high > low else 0.0 for x in change]
        score = [math.exp(len(changes) * n * n) * x * t for n, x, t in zip(norm, change, total, strict=True)]
        border = sorted(score)[_dropped(1 - density, len(score))] if score else 0.0
        span = max(score, default=0.0) - border
        scores.append([max(0.0, s - border) / span if span > 0 else float(s >= border and s > 0) for s in score])
    return [
        scale * _mean(column, [w * s for w, s in zip(weights, balance, strict=True)])
        for column, balance in zip(changes.T.tolist(), zip(*scores, strict=True), strict=True)
    ]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(w * x for w, x in zip(weights, values, strict=True)) / total if total > 0 else 0.0


def _kept(values: Sequence[float], bottom: float, top: float) -> list[float]:
    if not values:
        return []
    ordered = sorted(map(abs, values))
    high = ordered[len(values) - 1 - _dropped(top, len(values))]
    low = min(ordered[_dropped(bottom, len(values))], high)
    return [x if low <= abs(x) <= high else 0.0 for x in values]
