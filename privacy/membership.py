"""Membership inference: how well one can tell from a released adapter who was in its training (LiRA).

Many runs are made, each with every canary in or out by a coin of its own. For one of them the others are shadows: they
tell how the adapter fits a canary that was in, and one that was out. The ratio of the two likelihoods of what the run
shows is the score of its canary (Carlini et al. 2022, arXiv 2112.03570, §V, with one variance for all canaries, which
few shadows need).

An attack that fails proves nothing; one that succeeds tells what is the matter better than any ε.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ..protocols.keys import derive, generator
from .audit import Values, one_run_bound, right_guesses

Coins = np.ndarray[Any, np.dtype[np.bool_]]

RESAMPLED = 300
LOW = 0.01
"""The rate of false alarms at which hits are counted: an attack that is right about a few is an attack."""


def confidence(losses: Values) -> Values:
    """log(p / (1 − p)) of p = exp(−loss): nearly normal over runs, as a loss is not. Any shape; losses ≥ 0."""
    bounded = np.clip(losses, 1e-9, 700.0)
    return np.asarray(-bounded - np.log(-np.expm1(-bounded)))


def likelihood_ratios(fits: Values, present: Coins) -> Values:
    """The log likelihood ratio of in against out, for each run with the others as shadows: float64 (runs, canaries).

    `fits` (float64) and `present` (bool) are (runs, canaries), `fits` the higher the better a canary is known. 0 where
    no shadow shows a canary in, or none shows it out.
    """
    scores = np.zeros(fits.shape)
    for run in range(len(fits)):
        others = np.arange(len(fits)) != run
        means, variances = zip(
            *(_normal(fits[others], present[others] == there) for there in (True, False)), strict=True
        )
        logs = [-((fits[run] - m) ** 2) / (2 * v) - np.log(v) / 2 for m, v in zip(means, variances, strict=True)]
        scores[run] = np.nan_to_num(logs[0] - logs[1])
    return scores


def _normal(fits: Values, chosen: Coins) -> tuple[Values, float]:
    """Each canary's mean over the `chosen` shadows (NaN where there is none), and the variance that they share."""
    counts = chosen.sum(axis=0)
    with np.errstate(invalid="ignore"):
        means = np.where(chosen, fits, 0.0).sum(axis=0) / counts
    squares = np.where(chosen, fits - np.nan_to_num(means), 0.0) ** 2
    freedom = max(1, int((counts - 1).clip(min=0).sum()))
    return means, max(float(squares.sum()) / freedom, 1e-12)


def area_under_curve(scores: Values, present: Coins) -> float:
    """The probability that somebody who was in scores above somebody who was not; ½ where one of them is missing."""
    inside = int(present.sum())
    outside = present.size - inside
    if inside == 0 or outside == 0:
        return 0.5
    ranks = rankdata(scores.ravel())[present.ravel()].sum()
    return float((ranks - inside * (inside + 1) / 2) / (inside * outside))


@dataclass(frozen=True)
class Membership:
    """What an attack has reached. `area` is that under the curve of hits over false alarms, ½ for guessing, with its
    95 % interval over canaries; `hits` is the rate of hits at a rate LOW of false alarms. `epsilon` is an ε that the
    attack refutes at `delta` (0: none); `claimed` is what the run says that it has spent, None where it says nothing.
    """

    runs: int
    canaries: int
    area: float
    interval: tuple[float, float]
    hits: float
    epsilon: float
    delta: float
    claimed: float | None

    @property
    def contradicts(self) -> bool:
        """Whether the attack has done what the claimed ε makes (almost) impossible."""
        return self.claimed is not None and self.epsilon > self.claimed


def judged(fits: Values, present: Coins, delta: float, level: float, claimed: float | None) -> Membership:
    """The report of `fits` and `present` as in `likelihood_ratios`.

    Formal guarantees: if each run is (ε, δ)-DP against one canary more or less and its coins are fair, `epsilon` is
    above ε with probability `level` at most. Each run is judged for itself, because shadows share their coins.
    """
    scores = likelihood_ratios(fits, present)
    runs, canaries = fits.shape
    guesses = 2 * (canaries // 4)  # of the half that is surest
    bounds = [
        one_run_bound(right_guesses(own, there, guesses), guesses, canaries, delta, level / runs)
        for own, there in zip(scores, present, strict=True)
    ]
    low, high = _interval(scores, present)
    outside = scores[~present]
    threshold = np.quantile(outside, 1 - LOW) if outside.size else 0.0
    hits = float((scores[present] > threshold).mean()) if present.any() else 0.0
    area = area_under_curve(scores, present)
    return Membership(runs, canaries, area, (low, high), hits, max(bounds), delta, claimed)


def _interval(scores: Values, present: Coins) -> tuple[float, float]:
    """95 % of the area, by drawing canaries with replacement: what the runs show of one canary goes together."""
    random = generator(derive(0, "resampled canaries"))
    canaries = scores.shape[1]
    drawn = (random.integers(0, canaries, canaries) for _ in range(RESAMPLED))
    areas = [area_under_curve(scores[:, own], present[:, own]) for own in drawn]
    low, high = np.quantile(areas, [0.025, 0.975])
    return float(low), float(high)
