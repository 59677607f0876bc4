"""Events: what a noised release was, stated so fully that an accountant needs nothing else.

A ledger stores events and never an ε: ε is computed from them, and can be computed again by anybody. An event says
who is protected (`unit`), against which change of the data (`relation`), how much noise was added to how large a
largest change (`noise_std`, `sensitivity`), who was drawn (`sampling`), and whether the noise was secret.

| sampling    | relation    | why                                                                                    |
|-------------|-------------|----------------------------------------------------------------------------------------|
| `Poisson`   | add-remove  | presence of one is an independent coin; under replace-one its composition is not proven |
| `FixedSize` | replace-one | a draw of fixed size tells the population's size, which add-remove would change         |
| `Everyone`  | either      | nothing is drawn                                                                       |
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..protocols.errors import PayloadError, PrivacyError

Unit = Literal["example", "client"]
Relation = Literal["add-remove", "replace-one"]


@dataclass(frozen=True)
class Poisson:
    """Each one takes part with probability `rate` in (0, 1], independently. Raises PrivacyError outside."""

    rate: float

    def __post_init__(self) -> None:
        _require(0 < self.rate <= 1, f"a Poisson rate of {self.rate}: it must lie in (0, 1]")


@dataclass(frozen=True)
class FixedSize:
    """`size` of `population` are drawn uniformly without replacement. Raises PrivacyError for an impossible draw."""

    size: int
    population: int

    def __post_init__(self) -> None:
        _require(
            1 <= self.size <= self.population,
            f"a draw of {self.size} from {self.population}: at least 1 and at most the population can be drawn",
        )


@dataclass(frozen=True)
class Everyone:
    """Nothing is drawn, so nothing is amplified."""


Sampling = Poisson | FixedSize | Everyone


def relation_of(sampling: Sampling) -> Relation:
    """Under which relation a mechanism of ours states a draw (the table above); without one, the stricter."""
    return "add-remove" if isinstance(sampling, Poisson) else "replace-one"


@dataclass(frozen=True, kw_only=True)
class _Noised:
    """What every event states.

    `noise_std` (per coordinate) and `sensitivity` (L2, under this event's own relation) are in the same units. A sum
    of vectors clipped to C has sensitivity C under add-remove, and 2C under replace-one. `secret` is False for the
    seeded noise of a simulation: such a release is NOT private, whatever its ε would be.
    """

    unit: Unit
    relation: Relation
    noise_std: float
    sensitivity: float
    secret: bool

    def __post_init__(self) -> None:
        _one_of("unit", self.unit, get_args(Unit))
        _one_of("relation", self.relation, get_args(Relation))
        _require(
            math.isfinite(self.noise_std) and self.noise_std >= 0,
            f"noise_std = {self.noise_std}: it must be finite and not negative (0 means no noise, and an infinite ε)",
        )
        _require(
            math.isfinite(self.sensitivity) and self.sensitivity > 0,
            f"sensitivity = {self.sensitivity}: it must be finite and above 0; clip, so that one change is bounded",
        )
        _require(isinstance(self.secret, bool), f"secret = {self.secret!r}: say True or False")

    @property
    def noise_multiplier(self) -> float:
        """z = noise_std / sensitivity under the event's own relation.

        This is the only place where noise is set against sensitivity. Libraries disagree here: asked for replace-one,
        dp-accounting's PLD halves z, and its RDP does not.
        """
        return self.noise_std / self.sensitivity


@dataclass(frozen=True, kw_only=True)
class GaussianEvent(_Noised):
    """`count` releases of a sum with Gaussian noise, each over its own draw of `sampling`.

    The discrete Gaussian on a grid is charged as this event, with the rounding's effect inside `sensitivity`: a few
    steps of the grid in `noise_std`, and its difference from the continuous one is below e^(−2π²·steps²). The bits of a private quantile are charged together with the sum as one event: see `sum_multiplier`.

    Raises PrivacyError for a value out of bounds, and where `sampling` is not accounted under `relation`.
    """

    sampling: Sampling
    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.count >= 0, f"count = {self.count}: an event happens 0 times or more")
        match self.sampling:
            case Poisson():
                _require(
                    self.relation == "add-remove",
                    "Poisson sampling under replace-one has no proven composition here: state it under add-remove, "
                    "or claim no amplification (Everyone) with twice the sensitivity",
                )
            case FixedSize():
                _require(
                    self.relation == "replace-one",
                    "a fixed-size draw under add-remove: the population's size is public, so state it under "
                    "replace-one, with twice the sensitivity",
                )


@dataclass(frozen=True, kw_only=True)
class MatrixEvent(_Noised):
    """All `rounds` of one run of a tree or banded matrix mechanism (DP-FTRL): noise correlated over the rounds.

    `sensitivity` is that of the whole encoder matrix, for one who takes part at most `participations` times, at least
    `separation` rounds apart (Choquette-Choo et al. 2023, arXiv 2306.08153, §2). Nothing is sampled. It is charged
    whole before the first round, and its promise ends where somebody takes part more often.

    Raises PrivacyError for a value out of bounds.
    """

    rounds: int
    separation: int
    participations: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "separation", "participations"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} = {value}: it must be at least 1")


Event = GaussianEvent | MatrixEvent


def sum_multiplier(noise_multiplier: float, quantile_std: float) -> float:
    """The noise multiplier left for the sum, where a private quantile is released with it as ONE event of `z`.

    The quantile is the sum of the bits 1[‖Δ‖ ≤ C] − ½, with noise of `quantile_std` (s_b). Together they cost what one
    Gaussian release of z = `noise_multiplier` costs: z_Δ = (z⁻² − (2·s_b)⁻²)^(−½), which is above z (Andrew et al.
    2021, arXiv 1905.03871, Theorem 1). Both sensitivities double under replace-one, so the split is the same there.

    Raises PrivacyError where the bits alone cost more than z allows.
    """
    _require(noise_multiplier > 0, f"a noise multiplier of {noise_multiplier} cannot be split: it must be above 0")
    _require(
        2 * quantile_std > noise_multiplier,
        f"noise of {quantile_std} on the quantile's bits costs more than the whole release may "
        f"(noise multiplier {noise_multiplier}): raise it above {noise_multiplier / 2}",
    )
    return float((noise_multiplier**-2 - (2 * quantile_std) ** -2) ** -0.5)


def to_json(event: Event) -> str:
    """The canonical JSON of an event: sorted keys, no spaces, numbers as Python writes them. Equal events, equal text."""
    row: dict[str, Any] = {
        "unit": event.unit,
        "relation": event.relation,
        "noise_std": float(event.noise_std),
        "sensitivity": float(event.sensitivity),
        "secret": event.secret,
    }
    match event:
        case GaussianEvent():
            row |= {"kind": "gaussian", "count": int(event.count), "sampling": _sampling_row(event.sampling)}
        case MatrixEvent():
            row |= {"kind": "matrix"}
            row |= {name: int(getattr(event, name)) for name in ("rounds", "separation", "participations")}
    return json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> Event:
    """The event of a canonical JSON text.

    Raises PayloadError for anything that `to_json` would not have written: a type, bound, missing, unknown or
    repeated key, or another spelling of the same event, because a ledger hashes the text.
    """
    try:
        event = _event(json.loads(text))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, PrivacyError) as error:
        raise PayloadError(f"not a privacy event: {error}") from error
    if to_json(event) != text:
        raise PayloadError(f"not a privacy event in canonical form: {text[:200]!r} should read {to_json(event)!r}")
    return event


def _event(row: Mapping[str, Any]) -> Event:
    noised: dict[str, Any] = {
        "unit": row["unit"],
        "relation": row["relation"],
        "noise_std": float(row["noise_std"]),
        "sensitivity": float(row["sensitivity"]),
        "secret": row["secret"],
    }
    match row["kind"]:
        case "gaussian":
            return GaussianEvent(**noised, count=int(row["count"]), sampling=_sampling(row["sampling"]))
        case "matrix":
            noised |= {name: int(row[name]) for name in ("rounds", "separation", "participations")}
            return MatrixEvent(**noised)
    raise ValueError(f"kind = {row['kind']!r} is neither gaussian nor matrix")


def _sampling_row(sampling: Sampling) -> dict[str, Any]:
    match sampling:
        case Poisson(rate):
            return {"kind": "poisson", "rate": float(rate)}
        case FixedSize(size, population):
            return {"kind": "fixed-size", "size": int(size), "population": int(population)}
        case Everyone():
            return {"kind": "everyone"}


def _sampling(row: Mapping[str, Any]) -> Sampling:
    match row["kind"]:
        case "poisson":
            return Poisson(float(row["rate"]))
        case "fixed-size":
            return FixedSize(int(row["size"]), int(row["population"]))
        case "everyone":
            return Everyone()
    raise ValueError(f"sampling kind = {row['kind']!r} is none of poisson, fixed-size, everyone")


def _one_of(name: str, value: str, legal: tuple[str, ...]) -> None:
    _require(value in legal, f"{name} = {value!r}: it must be one of {', '.join(legal)}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise PrivacyError(otherwise)
