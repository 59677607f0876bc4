"""Accounting: from events to the ε that they have spent.

| bound               | what it is                                          | used as                             |
|---------------------|-----------------------------------------------------|-------------------------------------|
| PLD (dp-accounting) | privacy loss distribution, rounded to the safe side | headline                            |
| RDP (dp-accounting) | Rényi divergences at fixed orders                   | crosscheck; headline of fixed size  |
| PRV (Opacus)        | PLD's idea in an implementation of its own          | crosscheck, from above within 0.015 |

The accountants get one number from an event, its noise multiplier under its own relation, and PLD is always asked as
ADD_OR_REMOVE_ONE: whatever replace-one costs is in the event's sensitivity already. PLD has no event for a draw of
fixed size. There both bounds hold, RDP with amplification and PLD without, and the smaller one is the headline.

Opacus' third accountant, the central-limit one, is used nowhere: it is an approximation and not a bound, and lies
below the true ε for most subsampled runs (0.76 for 1.38 at worst). A test reads the imports.
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..protocols.errors import PrivacyError
from .events import Event, Everyone, FixedSize, GaussianEvent, MatrixEvent, Poisson, Sampling

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Crosscheck = Literal["PRV", "RDP"]
Method = Literal["PLD", "RDP", "PLD without amplification", "matrix bound"]
Charges = Counter[tuple[float, Sampling]]
"""(noise multiplier, sampling) ⇒ how often."""

LEAST_DELTA = 1e-12
"""Below, the PLD's own truncation (1e-15 in a composition) would begin to show."""
LEAST_MULTIPLIER, MOST_MULTIPLIER = 1e-3, 1e6
"""Less noise than the least is charged as none (its ε is above 500,000), more than the most as the most."""
MOST_RELEASES = 10_000_000
"""Releases in one account: the library composes a billion tiny losses for minutes."""
PRV_TOLERANCE = 0.015
MOST_PRV_EPSILON = 100.0


@dataclass(frozen=True)
class Account:
    """What a list of events has spent: (epsilon, delta)-DP for the unit and under the relation of the events.

    `method` names the bound that gave ε. "matrix bound": the list holds a MatrixEvent, so ε holds only for the
    participation that this event states. `private` is False where any noise was not secret, and where ε is infinite:
    epsilon is then what it would have been, and no promise. `crosschecks` are other bounds' ε, of those asked for that
    exist for these events.
    """

    epsilon: float
    delta: float
    method: Method
    private: bool
    crosschecks: Mapping[Crosscheck, float] = field(default_factory=dict)

    @property
    def consistent(self) -> bool:
        """Whether the crosschecks stand where they must: 0 ≤ PRV − ε ≤ 0.015, and RDP not below ε.

        Always True without crosschecks. 1e-3 is allowed for the grids.
        """
        prv, rdp = self.crosschecks.get("PRV"), self.crosschecks.get("RDP")
        return (prv is None or -1e-3 <= prv - self.epsilon <= PRV_TOLERANCE) and (
            rdp is None or rdp >= self.epsilon - 1e-3
        )


def spent(events: Iterable[Event], delta: float, crosschecks: Collection[Crosscheck] = ()) -> Account:
    """The ε at `delta` of all events together, in any order; 0 for no events and infinite for one without noise.

    Equal releases are merged, so a run of 1000 rounds costs one self-composition (under a second).

    Formal guarantees: the mechanism that the events describe is (ε, δ)-DP under their relation and for their unit
    (PLD: Koskela et al. 2020, arXiv 1906.03049; grid: Doroshenko et al. 2022, arXiv 2207.04380; RDP without
    replacement: Wang et al. 2019, arXiv 1808.00087, Theorem 27). What is summed in a release may depend on those
    before it; multipliers, samplings and counts may not.

    Raises PrivacyError for a δ outside [1e-12, 1), for more than 10,000,000 releases, for events of two units, and for
    events of two relations: ε against adding one and ε against replacing one are promises about different things, and
    do not add up.
    """
    released = _released(events)
    epsilon, method = headline(released, delta)
    charges = _charges(released)
    found: dict[Crosscheck, float] = {}
    if "RDP" in crosschecks:
        found["RDP"] = _rdp(charges, delta)
    if "PRV" in crosschecks and epsilon <= MOST_PRV_EPSILON and (prv := _prv(charges, delta)) is not None:
        found["PRV"] = prv
    private = math.isfinite(epsilon) and all(event.secret for event in released)
    return Account(epsilon, delta, method, private, found)


def too_large(delta: float, units: int, of: str) -> str:
    """Why δ promises nothing to so many units (`of` names them, "clients" for one); empty where it does."""
    if delta * units < 1:
        return ""
    return (
        f"privacy.delta = {delta:g} is not below 1 / {units:,}, one over the number of {of}: publishing one of them outright "
        "would keep that promise. Choose a smaller delta"
    )


def headline(events: Iterable[Event], delta: float, coarseness: float = 1.0) -> tuple[float, Method]:
    """ε and the name of its bound; `spent` is this with the rest of the account.

    A grid that is coarser by `coarseness` is faster, and its ε is larger: for searching, never for reporting.
    Raises PrivacyError as `spent` does.
    """
    released = _released(events)
    _check(released, delta)
    charges = _charges(released)
    bounds: dict[Method, float]
    if _is_drawn(charges):
        bounds = {"RDP": _rdp(charges, delta), "PLD without amplification": _gaussian(charges, delta)}
    else:
        bounds = {"PLD": _pld(charges, delta, coarseness)}
    method: Method = min(bounds, key=bounds.__getitem__)
    return bounds[method], "matrix bound" if any(isinstance(event, MatrixEvent) for event in released) else method


def _released(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, GaussianEvent) or event.count > 0]


def _check(events: Collection[Event], delta: float) -> None:
    if not LEAST_DELTA <= delta < 1:
        raise PrivacyError(f"delta = {delta}: it must lie in [{LEAST_DELTA}, 1), and below 1 / the number of units")
    releases = sum(event.count for event in events if isinstance(event, GaussianEvent))
    if releases > MOST_RELEASES:
        raise PrivacyError(f"{releases} releases in one account: {MOST_RELEASES} at most; release less often")
    for name in ("unit", "relation"):
        values = sorted({getattr(event, name) for event in events})
        if len(values) > 1:
            raise PrivacyError(f"events of {name} {' and '.join(values)} in one account: account for each on its own")


def _charges(events: Iterable[Event]) -> Charges:
    """Events as multipliers and counts, so that equal releases become one self-composition."""
    charges: Charges = Counter()
    for event in events:
        sampling, count = (event.sampling, event.count) if isinstance(event, GaussianEvent) else (Everyone(), 1)
        charges[_rounded(event.noise_multiplier), sampling] += count
    return charges


def _rounded(multiplier: float) -> float:
    """The multiplier to ten digits and a hair less: under an adaptive clip, zC / C differs in its last bits."""
    return min(float(f"{multiplier:.9e}") * (1 - 1e-9), MOST_MULTIPLIER)


def _is_drawn(charges: Charges) -> bool:
    """Whether a fixed-size draw leaves somebody out: the releases for which there is no PLD."""
    return any(isinstance(drawn, FixedSize) and drawn.size < drawn.population for _, drawn in charges)


def _dp_event(multiplier: float, sampling: Sampling) -> "DpEvent":
    """The event in dp-accounting's terms."""
    import dp_accounting as dp

    gaussian = dp.GaussianDpEvent(multiplier)
    match sampling:
        case Poisson(rate) if rate < 1:
            return dp.PoissonSampledDpEvent(rate, gaussian)
        case FixedSize(size, population) if size < population:
            return dp.SampledWithoutReplacementDpEvent(population, size, gaussian)
    return gaussian


def _pld(charges: Charges, delta: float, coarseness: float) -> float:
    """ε by privacy loss distributions, for charges without a fixed-size draw."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    if not any(isinstance(sampling, Poisson) and sampling.rate < 1 for _, sampling in charges):
        return _gaussian(charges, delta)
    if _is_bare(charges):
        return math.inf
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, coarseness * _grid_step(charges))
    for (multiplier, sampling), count in charges.items():
        accountant.compose(_dp_event(multiplier, sampling), count)
    return max(0.0, float(accountant.get_epsilon(delta)))


def _grid_step(charges: Charges) -> float:
    """The step to which the PLD rounds losses: a 100,000th of their spread.

    The library's own 1e-4 would double the ε of a million tiny losses, and fill the memory where losses are in the
    thousands.
    """
    # A few orders suffice for the size of what the loss passes with a probability below the PLD's own truncation.
    spread = _rdp(charges, math.exp(-50), orders=(1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256))
    return max(spread / 1e5, 1e-6)


def _gaussian(charges: Charges, delta: float) -> float:
    """ε of the releases if all are over everyone, exactly and without a grid; never below their ε if they are not.

    Together they are one Gaussian mechanism of z⁻² = Σ zᵢ⁻² (Dong et al. 2022, arXiv 1905.02383, Corollary 3.3), whose
    privacy loss is normal, and whose δ is in closed form (Balle & Wang 2018, arXiv 1805.06530, Theorem 8).
    """
    import numpy as np
    from dp_accounting import get_epsilon_gaussian

    if _is_bare(charges):
        return math.inf
    precision = sum(count / multiplier**2 for (multiplier, _), count in charges.items())
    with np.errstate(divide="ignore"):  # log 0, for noise so large that δ rounds to 0
        return float(get_epsilon_gaussian(precision**-0.5, delta)) if precision else 0.0


def _rdp(charges: Charges, delta: float, orders: Sequence[float] | None = None) -> float:
    """ε by Rényi divergences (at the library's own orders): looser than PLD, but there for a draw of fixed size."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    if _is_bare(charges):
        return math.inf
    # The library defines a draw without replacement for REPLACE_ONE alone, and takes the multiplier as it stands:
    # there is no second halving inside, and the event's sensitivity must be the one under replace-one.
    relation = NeighboringRelation.REPLACE_ONE if _is_drawn(charges) else NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = RdpAccountant(orders, relation)
    with _without_absl_warnings():
        for (multiplier, sampling), count in charges.items():
            accountant.compose(_dp_event(multiplier, sampling), count)
    return max(0.0, float(accountant.get_epsilon(delta)))


def _prv(charges: Charges, delta: float) -> float | None:
    """Opacus' PRV upper bound; None for a fixed-size draw, and where its numerics give up."""
    if not charges or _is_bare(charges) or _is_drawn(charges):
        return None
    from opacus.accountants import PRVAccountant  # loads torch: the server must not come by here

    accountant = PRVAccountant()
    accountant.history = [
        (multiplier, sampling.rate if isinstance(sampling, Poisson) else 1.0, count)
        for (multiplier, sampling), count in charges.items()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # log(0) at rate 1, and the orders of its inner RDP
        try:
            return max(0.0, float(accountant.get_epsilon(delta)))
        except (RuntimeError, ValueError, IndexError):
            return None


def _is_bare(charges: Charges) -> bool:
    return any(multiplier < LEAST_MULTIPLIER for multiplier, _ in charges)


@contextmanager
def _without_absl_warnings() -> Iterator[None]:
    """Silence one line for each order whose series does not converge: leaving it out keeps the bound valid."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
