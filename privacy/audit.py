"""Statistics of an audit: what the outcomes of a mechanism say against what it claims.

| function             | its question                                                       | reference                     |
|----------------------|--------------------------------------------------------------------|-------------------------------|
| `mu_lower_bound`     | how well can one client's presence be told, at least?              | arXiv 1905.02383, §2          |
| `one_run_bound`      | the same in ε, of trials that may depend on each other             | arXiv 2305.08846, appendix D  |
| `variance_p_value`   | does the noise have the variance that is charged?                  | chi-square                    |
| `sizes_p_value`      | do cohorts have the sizes of a Poisson draw?                       | chi-square, Pearson           |
| `inclusion_p_value`  | is everybody drawn equally often?                                  | chi-square                    |
| `dependence_p_value` | does the noise follow from something that others can compute?      | Fisher's z                    |
| `overlap_p_value`    | do the cohorts?                                                    | binomial                      |

Pure functions of what was observed. A p-value is the probability of an outcome at least this bad if the claim holds;
a bound with a `level` is wrong with at most that probability. An audit can refute a claim, and never prove one.
"""

from math import ceil, exp, inf, log
from typing import Any

import numpy as np
from scipy import stats

from .randomness import Integers

Values = np.ndarray[Any, np.dtype[np.float64]]

FITTED = 0.1
"""The part of the trials on which a threshold is chosen; the others are judged by it."""

MOST_GUESSES = 1_000_000
"""Of a one-run audit: an ε above about 11.9 is out of its reach."""

_CANDIDATES = np.linspace(0.02, 0.98, 33)
_LEAST_EXPECTED = 5.0  # of draws in a cell, for Pearson's statistic to be near its law
_LEAST_SPREAD = 25.0  # variance of the draws of a group of nodes, for the same reason
_MOST_EPSILON = 40.0


def mu_lower_bound(present: Values, absent: Values, level: float) -> float:
    """The largest μ that these trials refute: a lower bound of μ, and 0 where they refute none.

    `present` and `absent` (float64, 1-D, at least 10 each) are scores of trials with the canary and without it, the
    higher the more it seems to be there. The first tenth of each chooses a threshold, the rest is counted against it:
    μ ≥ Φ⁻¹(true positives) − Φ⁻¹(false positives), each at its Clopper-Pearson limit.

    Formal guarantees: for independent trials of a μ-GDP mechanism the bound is above μ with probability `level` at most.
    """
    parts = [int(FITTED * len(scores)) for scores in (present, absent)]
    fitting, judging = (present[: parts[0]], absent[: parts[1]]), (present[parts[0] :], absent[parts[1] :])
    candidates = np.quantile(np.concatenate(fitting), _CANDIDATES)
    threshold = candidates[int(np.argmax(_mu_at(candidates, *fitting, level)))]
    return max(0.0, float(_mu_at(np.array([threshold]), *judging, level)[0]))


def _mu_at(thresholds: Values, present: Values, absent: Values, level: float) -> Values:
    """The bound at each threshold (−∞ where it says nothing)."""
    hits, misses = _above(thresholds, present), _above(thresholds, absent)
    low, _ = clopper_pearson(hits, len(present), level / 2)
    _, high = clopper_pearson(misses, len(absent), level / 2)
    return np.asarray(stats.norm.ppf(low) - stats.norm.ppf(high))


def _above(thresholds: Values, scores: Values) -> Integers:
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="right")


def clopper_pearson(successes: Integers, trials: int, level: float) -> tuple[Values, Values]:
    """The exact lower and upper limit of a probability, float64, each wrong with probability `level` at most.

    `successes` is int64, any shape, from 0 to `trials` ≥ 1.
    """
    with np.errstate(invalid="ignore"):  # the two ends, which are put in by hand
        low = stats.beta.ppf(level, successes, trials - successes + 1)
        high = stats.beta.isf(level, successes + 1, trials - successes)
    return np.where(successes == 0, 0.0, low), np.where(successes == trials, 1.0, high)


def one_run_p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The probability of at least `correct` right guesses of `guesses`, if the mechanism is (epsilon, delta)-DP.

    Each of `canaries` ≥ `guesses` was in or out by a fair coin of its own, in ONE run; the others were not guessed
    (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, theorem 5.2 and appendix D).

    Formal guarantees: holds for any (ε, δ)-DP mechanism, however its outcomes for different canaries depend on each
    other.
    """
    right = 1 / (1 + exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, right))
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    slope = float((below / np.arange(1, correct + 1)).max(initial=0.0))
    return min(1.0, tail + 2 * canaries * delta * slope)


def one_run_bound(correct: int, guesses: int, canaries: int, delta: float, level: float) -> float:
    """The largest ε that so many right guesses refute at `level`, to 1e-6; 0 where they refute none."""
    low, high = 0.0, _MOST_EPSILON
    while high - low > 1e-6:
        middle = (low + high) / 2
        refuted = one_run_p_value(correct, guesses, canaries, middle, delta) < level
        low, high = (middle, high) if refuted else (low, middle)
    return low


def guesses_needed(epsilon: float, delta: float, canaries_a_guess: int, level: float) -> float:
    """The fewest guesses (to a quarter) with which an audit can refute `epsilon` at all: those that are all right.

    At least 3·e^ε; infinite above `MOST_GUESSES`, and where δ forbids it, which happens from about δ·e^ε = level / 4 on.
    With fewer guesses an audit passes whatever the mechanism does, also without any noise.
    """
    guesses = max(3.0, log(1 / level)) * exp(min(epsilon, _MOST_EPSILON))
    while guesses <= MOST_GUESSES:
        count = ceil(guesses)
        if one_run_p_value(count, count, canaries_a_guess * count, epsilon, delta) < level:
            return count
        guesses *= 1.25
    return inf


def right_guesses(scores: Values, present: np.ndarray[Any, np.dtype[np.bool_]], guesses: int) -> int:
    """How many guesses are right, where the highest half of `guesses` scores is called in and the lowest half out."""
    half, order = guesses // 2, np.argsort(scores, kind="stable")
    return int(np.count_nonzero(present[order[len(order) - half :]]) + np.count_nonzero(~present[order[:half]]))


def variance_p_value(sum_of_squares: float, count: int, std: float) -> float:
    """Two-sided, of so many samples with mean 0 whose standard deviation should be `std`: Σx²/σ² is χ² of `count`."""
    statistic = sum_of_squares / std**2
    return float(min(1.0, 2 * min(stats.chi2.cdf(statistic, count), stats.chi2.sf(statistic, count))))


def sizes_p_value(sizes: Integers, nodes: int, rate: float) -> float:
    """Whether cohorts of these `sizes` (int64, one a draw) were drawn from `nodes` by independent coins of `rate`.

    Pearson's chi-square on cells of sizes, of which neighbours are one until 5 draws are expected in each.
    """
    expected = len(sizes) * stats.binom.pmf(np.arange(nodes + 1), nodes, rate)
    observed = np.bincount(sizes, minlength=nodes + 1)
    if len(observed) > nodes + 1:
        return 0.0
    starts = _cells(expected)
    wanted, found = np.add.reduceat(expected, starts), np.add.reduceat(observed, starts)
    statistic = float(((found - wanted) ** 2 / wanted).sum())
    return float(stats.chi2.sf(statistic, len(starts) - 1)) if len(starts) > 1 else 1.0


def _cells(expected: Values) -> list[int]:
    """Where each cell starts; the last one takes what is left."""
    starts, filled = [0], 0.0
    for size, mass in enumerate(expected):
        if filled >= _LEAST_EXPECTED:
            starts, filled = [*starts, size], 0.0
        filled += mass
    return starts[:-1] if len(starts) > 1 and filled < _LEAST_EXPECTED else starts


def inclusion_p_value(counts: Integers, draws: int, rate: float, *, fixed: bool) -> float:
    """Whether each node, drawn `counts` (int64, one a node) times of `draws`, is drawn with probability `rate`.

    Chi-square, two-sided, of groups of nodes that are large enough for their counts to be nearly normal. `fixed`: all
    draws had the same size, so the counts have a fixed sum, and one degree of freedom less.
    """
    if rate >= 1:
        return float((counts == draws).all())
    nodes, spread = len(counts), draws * rate * (1 - rate)
    starts = np.arange(0, nodes, ceil(_LEAST_SPREAD / spread))
    sizes = np.diff(np.append(starts, nodes))
    freedom = len(starts) - fixed
    if freedom < 1:
        return 1.0
    distances = np.add.reduceat(counts, starts) - draws * rate * sizes
    statistic = float((distances**2 / sizes).sum()) / spread * ((nodes - 1) / nodes if fixed else 1.0)
    return float(min(1.0, 2 * min(stats.chi2.cdf(statistic, freedom), stats.chi2.sf(statistic, freedom))))


def dependence_p_value(noise: Values, guess: Values) -> tuple[float, float]:
    """The correlation of `noise` with a `guess` of it (both (n,), n > 3), and its p-value if they have no relation.

    Noise that does not vary is known to everybody: a correlation of 1.
    """
    if not (np.ptp(noise) and np.ptp(guess)):
        return 1.0, 0.0
    correlation = float(np.corrcoef(noise, guess)[0, 1])
    distance = np.arctanh(min(abs(correlation), 1 - 1e-16)) * (len(noise) - 3) ** 0.5
    return correlation, float(2 * stats.norm.sf(distance))


def overlap_p_value(common: int, guessed: int, rate: float) -> tuple[float, float]:
    """The correlation of cohorts with a guess of them, and its two-sided p-value if they have no relation.

    Of `guessed` nodes, counted over all draws, `common` were drawn; each is with probability `rate`, 0 < rate < 1. The
    correlation is 1 where all were, and 0 where nobody was guessed. The p-value is exact for independent coins; draws of
    a fixed size have a smaller spread.
    """
    if guessed == 0:
        return 0.0, 1.0
    p_value = 2 * min(stats.binom.cdf(common, guessed, rate), stats.binom.sf(common - 1, guessed, rate))
    return (common / guessed - rate) / (1 - rate), float(min(1.0, p_value))
