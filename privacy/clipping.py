"""Clipping: what one update may weigh at most, whatever is in it."""

from dataclasses import dataclass, replace
from math import exp, fsum, isfinite, sqrt
from typing import Any, TypeVar

import numpy as np

from ..protocols.errors import PrivacyError

Float = TypeVar("Float", np.float32, np.float64)

BIT_NOISE = 1 / 20
"""Adaptive clipping: standard deviation of the noise on the sum of bits ÷ expected number of updates (σ_b = m/20)."""

LEAST_CLIP, MOST_CLIP = 2.0**-100, 2.0**60
"""Where fp32 is neither too coarse nor full: a clip that adapts stays between them, whatever the updates are."""

_SLACK = 2.0**-22  # more than float32 rounds an entry by (2⁻²⁴) and a float64 sum of 2²⁹ squares is off by (2⁻²⁴)


def clip(change: np.ndarray[Any, np.dtype[Float]], bound: float) -> tuple[np.ndarray[Any, np.dtype[Float]], bool]:
    """`change` (d,) scaled down to an L2 norm of `bound` where it is longer, and whether it was changed.

    See `clip_rows`, of which this is one row.
    """
    clipped, changed = clip_rows(change[None], bound)
    return clipped[0], bool(changed[0])


def clip_rows(
    changes: np.ndarray[Any, np.dtype[Float]], bound: float
) -> tuple[np.ndarray[Any, np.dtype[Float]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Each row of `changes` (K, d) clipped to the L2 norm `bound`: (K, d) in the same dtype, and bool (K,), which changed.

    A row is the whole of what one unit contributes, float32 or float64; norms are taken in float64. A row with a NaN or
    an infinity becomes zeros, and counts as changed. Rows well within the bound stay as they are, to the bit.
    PrivacyError where `bound` is below 2⁻¹⁰⁰, where float32 gets too coarse; infinity clips nothing.

    Formal guarantees: the exact norm of every returned row is at most `bound`, rounding included, for d ≤ 2²⁹.
    """
    if not bound >= LEAST_CLIP:
        raise PrivacyError(f"the clip is {bound}, and a positive number of at least 2^-100 is needed")
    limit = bound * (1 - _SLACK)
    finite = np.isfinite(changes).all(axis=1)
    wide = np.where(finite[:, None], changes, 0).astype(np.float64, copy=False)
    scale = np.abs(wide).max(axis=1, initial=1)  # so that squares cannot overflow
    unit = wide / scale[:, None]
    norms = np.sqrt(np.einsum("kd,kd->k", unit, unit))
    long = norms > limit / scale
    clipped = wide.astype(changes.dtype)
    clipped[long] = unit[long] * (limit / norms[long])[:, None]
    return clipped, long | ~finite


def clip_reference(change: np.ndarray[Any, np.dtype[Float]], bound: float) -> tuple[list[float], bool]:
    """`clip` in plain Python, up to rounding."""
    entries = [float(entry) for entry in change]
    if not all(isfinite(entry) for entry in entries):
        return [0.0] * len(entries), True
    scale = max((abs(entry) for entry in entries if abs(entry) > 1), default=1.0)
    norm = sqrt(fsum((entry / scale) ** 2 for entry in entries))
    if norm <= bound / scale:
        return entries, False
    return [entry / scale * (bound / norm) for entry in entries], True


@dataclass(frozen=True)
class AdaptiveClip:
    """A clip that follows a quantile of the updates' norms (Andrew et al., arXiv 1905.03871, algorithm 1).

    `bound` is C; a fraction `quantile` (γ) of the updates should be within it; `rate` is η_C. Each update sends one bit
    more, +½ where its norm is within C and −½ where not, and only a noised sum s̃ of these is ever seen: with m updates
    expected, s̃/m + ½ is the noised fraction. Centred bits have a sensitivity of ½, which the mechanism charges together
    with the update (`BIT_NOISE`).

    Formal guarantees: `after` reads the noised fraction and nothing else, so it is post-processing.
    """

    bound: float
    quantile: float = 0.5
    rate: float = 0.2

    def __post_init__(self) -> None:
        if not (isfinite(self.bound) and self.bound > 0):
            raise PrivacyError(f"the clip is {self.bound}, and a positive number is needed")
        if not 0 <= self.quantile <= 1:
            raise PrivacyError(f"the clip's quantile is {self.quantile}, and 0 to 1 is needed")
        if not (isfinite(self.rate) and self.rate >= 0):
            raise PrivacyError(f"the clip's rate is {self.rate}, and a number of at least 0 is needed")

    def after(self, noised_fraction: float) -> "AdaptiveClip":
        """The next round's clip, C·exp(−η_C·(b̃ − γ)). b̃ = `noised_fraction` may lie outside of [0, 1]: it is noised."""
        bound = self.bound * exp(min(-self.rate * (noised_fraction - self.quantile), 100.0))
        return replace(self, bound=min(max(bound, LEAST_CLIP), MOST_CLIP))
