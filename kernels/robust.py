"""Aggregation that a minority of bad nodes cannot steer, for updates whose factors have no fixed gauge.

A node changes a LoRA module by `ΔW = B'·A' − B·A`. The factors are known only up to an invertible r×r matrix G:
`(B·G)·(G⁻¹·A)` is the same update. So distances between factors mean nothing, and a coordinate of a factor has no
median; distances between the *products* are what a robust rule has to look at. All of them follow from the K×K Gram
matrix of inner products, which comes from the factors alone: `⟨B_i·A_i, B_j·A_j⟩ = Σ ((A_i·A_jᵀ) ∘ (B_iᵀ·B_j))`.

The rules on a Gram matrix turn it into K weights of a sum of updates, so that every recipe that takes a weighted
mean can use them. The rules on coordinates are for tensors that all nodes hold in one gauge (recipes that train B
alone over a shared A; heads).

| here        | papers | meaning                                    |
|-------------|--------|--------------------------------------------|
| `gram`      | G      | inner products of the updates, (K, K)      |
| `byzantine` | f      | nodes that may send anything               |
| `share`     | β      | weight cut off at each end of a coordinate |

NumPy alone, float64: updates up to the largest fp32 values do not overflow. Plain references stand at the end.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .lowrank import LowRank, Matrix
from .merging import shares

ROWS = 1024  # stacked rank components per block: the block of inner products stays in the cache
COLUMNS = 1 << 16  # coordinates sorted at a time
ROUNDING = 1e-12  # of a total weight of 1
SMOOTHING, TOLERANCE, STEPS = 1e-6, 1e-10, 1000


def product_change(b: Matrix, a: Matrix, new_b: Matrix, new_a: Matrix) -> LowRank:
    """`new_b·new_a − b·a` as factors of twice the rank, float64, without cancellation when the change is small."""
    start_b, start_a, end_b, end_a = (np.asarray(factor, np.float64) for factor in (b, a, new_b, new_a))
    return LowRank(np.concatenate([end_b - start_b, start_b], axis=1), np.concatenate([end_a, end_a - start_a], axis=0))


def gram(updates: Sequence[Sequence[LowRank]], others: Sequence[Matrix] = ()) -> Matrix:
    """Inner products of whole updates, float64, (K, K), summed over modules and plain tensors.

    `updates[k]` holds node k's modules, in the same order for all nodes; ranks may differ. `others[k]`, if given, is
    all else that node k changed, flat (n,). No `out × in` matrix is formed: with R rank components in all, a module
    costs `O((out + in)·R²)` and `O((out + in + 1024)·R)` memory. Raises ValueError for no node, or nodes that differ
    in their modules.

    Formal guarantees: the result does not depend on the gauge of any factor.
    """
    count = len(updates) or len(others)
    if count == 0:
        raise ValueError("there is no update to compare: robust aggregation needs at least one")
    modules = {len(node) for node in updates}
    if len(modules) > 1 or (len(updates) and len(others) not in (0, count)):
        raise ValueError(
            f"nodes differ: {sorted(modules)} modules, {len(updates)} updates, {len(others)} other tensors"
        )
    total = np.zeros((count, count))
    for terms in zip(*updates, strict=True):
        total += _module_gram(terms)
    if len(others):
        stacked = np.stack([np.ravel(values) for values in others]).astype(np.float64)
        total += stacked @ stacked.T
    return (total + total.T) / 2


def krum(gram: Matrix, byzantine: int, keep: int = 1) -> Matrix:
    """Weights of Krum, float64, (K,): 1/keep for the `keep` updates with the lowest scores, 0 for all others.

    A score is the sum of the squared distances to the K − f − 2 nearest other updates (Blanchard et al., arXiv
    1703.02757 §3); equal scores are taken in the order given. `keep` above 1 is Multi-Krum (§5), at most K − f of
    them. The weights that nodes claim play no part: one update, one vote; leave empty updates out beforehand. Raises
    ValueError for K < 2f + 3, where Krum promises nothing.
    """
    gram = _checked(gram)
    count = len(gram)
    if byzantine < 0 or count < 2 * byzantine + 3:
        most = max(0, (count - 3) // 2)
        raise ValueError(
            f"Krum against {byzantine} bad nodes needs at least {2 * max(byzantine, 0) + 3} updates, and there are "
            f"{count}: let more nodes answer, or " + (f"ask for at most {most}" if count >= 3 else "use another rule")
        )
    if not 1 <= keep <= count - byzantine:
        raise ValueError(f"Multi-Krum cannot keep {keep} of {count} updates: keep 1 to {count - byzantine}")
    distances = squared_distances(gram)
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, : count - byzantine - 2].sum(axis=1)
    weights = np.zeros(count)
    weights[np.argsort(scores, kind="stable")[:keep]] = 1 / keep
    return weights


def geometric_median(gram: Matrix, weights: Sequence[float] | Matrix | None = None) -> Matrix:
    """Weights (sum 1, float64, (K,)) of the point with the least weighted sum of distances to all updates.

    The smoothed Weiszfeld iteration (Pillutla et al., arXiv 1912.13445 §3, Algorithm 2) on the weights themselves.
    It starts from the clipped mean, because a mean with one huge update in it drowns all others in rounding.
    Distances below 1e-6 of the weighted median norm count as that: the paper's 1e-6 is absolute, and here units play
    no part. It stops when the weights move by less than 1e-10 in all, or after 1000 steps; the weighted mean distance
    is then within 2e-6 median norms of the least. One update gives itself, two of equal weight a point between them
    (all are medians), identical updates their mean, an update of weight 0 the weight 0.

    Formal guarantees: bad nodes of less than half the weight cannot move the median arbitrarily far (breakdown 1/2).
    """
    gram = _checked(gram)
    given = shares(weights, len(gram))
    norms = np.sqrt(np.diag(gram).clip(0))
    if not norms.any():
        return given
    floor = SMOOTHING * float(coordinate_median(norms[:, None], given)[0] or norms[norms > 0].min())
    point = clip(gram, given)
    point /= point.sum()
    for _ in range(STEPS):
        pull = given / np.maximum(_distances_to(gram, point), floor)
        following = pull / pull.sum()
        if np.abs(following - point).sum() <= TOLERANCE:
            return np.asarray(following)
        point = following
    return point


def clip(gram: Matrix, weights: Sequence[float] | Matrix | None = None, limit: float | None = None) -> Matrix:
    """Weights, float64, (K,), under which no update counts for more than `limit` (Sun et al., arXiv 1911.07963 §4).

    `w_k·min(1, limit/‖update_k‖)` with weights that sum to 1 before; after clipping their sum may be below 1. Without
    a `limit` it is the weighted median of the norms, so that less than half the weight cannot choose it. Raises
    ValueError for a limit that is not above zero.
    """
    gram = _checked(gram)
    given = shares(weights, len(gram))
    norms = np.sqrt(np.diag(gram).clip(0))
    if limit is None:
        limit = float(coordinate_median(norms[:, None], given)[0])
    elif not limit > 0:
        raise ValueError(f"a clipping limit of {limit} leaves nothing of an update: give one above 0")
    return np.asarray(given * limit / np.maximum(norms, limit)) if limit > 0 else np.where(norms > 0, 0.0, given)


def coordinate_median(values: Matrix, weights: Sequence[float] | Matrix | None = None) -> Matrix:
    """The weighted median of each coordinate (Yin et al., arXiv 1803.01498 §4): `values` (K, n) ⇒ float64, (n,).

    Half the weight lies on either side; where two values share that place, their mean. Equal weights give
    `np.median`; a value of weight 0 plays no part. Only for tensors in one gauge.
    """
    given = shares(weights, len(values))

    def medians(block: Matrix) -> Matrix:
        ordered, _, reached = _ordered(block, given)
        low = (reached >= 0.5 - ROUNDING).argmax(axis=0)[None]
        high = (reached > 0.5 + ROUNDING).argmax(axis=0)[None]
        ends = np.take_along_axis(ordered, low, 0) + np.take_along_axis(ordered, high, 0)
        return np.asarray(ends[0] / 2)

    return _by_columns(medians, values)


def trimmed_mean(values: Matrix, weights: Sequence[float] | Matrix | None = None, share: float = 0.1) -> Matrix:
    """The mean of each coordinate without the lowest and highest `share` of the weight (arXiv 1803.01498 §4).

    `values` (K, n) ⇒ float64, (n,). With equal weights and a whole number `share·K` this is the paper's rule; in
    between, the value at the border counts in part. `share` 0 is the mean. Raises ValueError unless 0 ≤ share < 1/2
    (near 1/2 use `coordinate_median`). Only for tensors in one gauge.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"a trimmed share of {share} leaves nothing: give 0 ≤ share < 0.5, or use the median")
    given = shares(weights, len(values))

    def means(block: Matrix) -> Matrix:
        ordered, own, reached = _ordered(block, given)
        inside = reached.clip(share, 1 - share) - (reached - own).clip(share, 1 - share)
        inside[inside < ROUNDING] = 0  # a last bit of weight times a huge value would be a hole in the rule
        return np.asarray((inside * ordered).sum(axis=0) / inside.sum(axis=0))

    return _by_columns(means, values)


def squared_distances(gram: Matrix) -> Matrix:
    """`‖u_i − u_j‖²` of all pairs, (K, K), never below 0."""
    norms = np.diag(gram)
    return np.asarray(np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0))


def _module_gram(terms: Sequence[LowRank]) -> Matrix:
    """The Gram matrix of one module: factors stacked once, so that the work is three large matrix products."""
    a = np.concatenate([term.a for term in terms], axis=0).astype(np.float64)
    b = np.concatenate([term.b for term in terms], axis=1).astype(np.float64)
    owner = np.repeat(np.eye(len(terms)), [term.rank for term in terms], axis=0)
    rows = (slice(start, start + ROWS) for start in range(0, len(a), ROWS))
    blocks = [((a[part] @ a.T) * (b[:, part].T @ b)) @ owner for part in rows]
    return np.asarray(owner.T @ np.concatenate([np.zeros((0, len(terms))), *blocks]))


def _distances_to(gram: Matrix, point: Matrix) -> Matrix:
    """Distances (K,) of all updates to the sum of updates with the weights `point`."""
    towards = gram @ point
    return np.asarray(np.sqrt(np.maximum(np.diag(gram) - 2 * towards + point @ towards, 0.0)))


def _checked(gram: Matrix) -> Matrix:
    gram = np.asarray(gram, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"a Gram matrix of shape {gram.shape}: it must be (K, K) with K of at least 1")
    if not np.isfinite(gram).all():
        raise ValueError("an update is not finite: refuse it before it is aggregated")
    return gram


def _ordered(values: Matrix, given: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Each coordinate in rising order, with the weights of its values and the weight reached at each of them."""
    order = np.argsort(values, axis=0, kind="stable")
    own = given[order]
    return np.take_along_axis(values, order, 0), own, np.cumsum(own, axis=0)


def _by_columns(rule: Callable[[Matrix], Matrix], values: Matrix) -> Matrix:
    starts = range(0, values.shape[1], COLUMNS)
    blocks = [rule(values[:, start : start + COLUMNS].astype(np.float64)) for start in starts]
    return np.concatenate([np.zeros(0), *blocks])


def gram_reference(updates: Sequence[Sequence[LowRank]], others: Sequence[Matrix] = ()) -> Matrix:
    """`gram` by forming every dense update."""
    count = len(updates) or len(others)
    dense = [[np.ravel(term.b.astype(np.float64) @ term.a) for term in node] for node in updates]
    plain = [[np.ravel(values).astype(np.float64)] for values in others]
    whole = [
        np.concatenate([np.zeros(0), *(dense[k] if dense else []), *(plain[k] if plain else [])]) for k in range(count)
    ]
    return np.array([[float(np.sum(left * right)) for right in whole] for left in whole])


def krum_reference(points: Matrix, byzantine: int, keep: int) -> list[float]:
    """`krum` on dense updates (K, n), one pair at a time."""
    scores = []
    for i, point in enumerate(points):
        distances = sorted(float(np.sum((point - other) ** 2)) for j, other in enumerate(points) if j != i)
        scores.append(sum(distances[: len(points) - byzantine - 2]))
    chosen = sorted(range(len(points)), key=scores.__getitem__)[:keep]
    return [1 / keep if k in chosen else 0.0 for k in range(len(points))]


def geometric_median_reference(points: Matrix, weights: Sequence[float], floor: float, steps: int) -> Matrix:
    """The Weiszfeld iteration on dense updates (K, n): the median itself, (n,)."""
    median = np.average(points, axis=0, weights=weights)
    for _ in range(steps):
        pull = [w / max(float(np.linalg.norm(p - median)), floor) for w, p in zip(weights, points, strict=True)]
        median = np.average(points, axis=0, weights=pull)
    return np.asarray(median)


def coordinate_median_reference(values: Matrix, weights: Sequence[float]) -> list[float]:
    """`coordinate_median`: the middle of all points that leave at most half the weight on either side."""
    half, medians = sum(weights) / 2, []
    for column in values.T.tolist():
        pairs = [(x, w) for x, w in zip(column, weights, strict=True) if w > 0]
        middle = [
            x
            for x, _ in pairs
            if sum(w for y, w in pairs if y < x) <= half * (1 + 1e-9)
            and sum(w for y, w in pairs if y > x) <= half * (1 + 1e-9)
        ]
        medians.append((min(middle) + max(middle)) / 2)
    return medians


def trimmed_mean_reference(values: Matrix, weights: Sequence[float], share: float) -> list[float]:
    """`trimmed_mean`, cutting weight off each end value by value."""
    means = []
    for column in values.T.tolist():
        pairs = sorted([x, w / sum(weights)] for x, w in zip(column, weights, strict=True))
        for end in (pairs, pairs[::-1]):
            cut = share
            for pair in end:
                taken = min(cut, pair[1])
                pair[1], cut = pair[1] - taken, cut - taken
        pairs = [[x, w if w > ROUNDING else 0.0] for x, w in pairs]
        means.append(sum(x * w for x, w in pairs) / sum(w for _, w in pairs))
    return means
