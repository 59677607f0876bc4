"""The site's policy: what its data may be used for, whatever a task asks. It is the `[policy]` table of `client.toml`.

| clause                               | holds a task to                              | checked                      |
|--------------------------------------|----------------------------------------------|------------------------------|
| `units`, `recipes`, `public`, `base` | what the site chose                          | before anything is computed  |
| `most_clip`, `delta`                 | what the spec states                         | before anything is computed  |
| `most_steps`, `most_epochs`,         |                                              |                              |
| `most_batch`, `most_length`,         |                                              |                              |
| `most_rounds`                        | what the spec states                         | before anything is computed  |
| `hub`                                | what this machine may download               | before anything is fetched   |
| `least_noise`                        | what the spec states, and what is solved for | before a round is trained    |
| `most_epsilon_per_run`               | the site's ledger, rows of the run           | in the transaction that      |
| `most_epsilon`                       | the site's ledger, all rows                  | charges a round              |

A clause on privacy that is not there allows everything. Those on the work have limits by default that are far above what
anybody means, so that no server keeps this machine busy without end, and nothing is fetched that the site has not named.
A table that is not there is an error, because a misspelt `[polcy]` would allow everything too.
"""

import logging
import tomllib
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from ..privacy.accounting import LEAST_DELTA
from ..protocols.errors import PrivacyError, SpecError
from ..protocols.recipes import RECIPES, recipe_named
from ..protocols.spec import Positive, PositiveFloat, Privacy, RunSpec, Section
from ..protocols.update import Assignment

logger = logging.getLogger(__name__)

Unit = Literal["none", "example", "client"]
# Strict: `true` is no number here, and neither is "1".
Bound = Annotated[PositiveFloat, Field(strict=True)]
Whole = Annotated[Positive, Field(strict=True)]

MOST_NOISE = 250_000.0
"""The most noise that a run can state: more has no exact grid (`privacy/noise.py`), even for one number and a clip of 1."""

MOST_EPSILON = 1e6
"""A larger cap would hold nothing: one step with the least noise that accountants know costs half of it."""

Cap = Annotated[Bound, Field(le=MOST_EPSILON)]

MOST_STEPS = 100_000
"""Of one round, where the site does not say: days of work."""

LEAST_CLIP = 2.0**-100
"""The smallest clip that a spec can state."""

UNTOLD = "this round's privacy cannot be accounted for at this site, whose operator finds the reason in its log"
"""What the server is told of an error that was not written for it."""


class RefusalError(PrivacyError):
    """A clause that a round would not keep. Its text is for the site; `told` is for the server.

    `told` names clause and limit, and nothing that depends on the data or on other runs: what was spent is of all
    servers' runs, and noise that was solved for gives away how many examples there are.
    """

    def __init__(self, text: str, *, told: str) -> None:
        super().__init__(text)
        self.told = told


def told(error: PrivacyError, asked: Assignment) -> str:
    """What the server may read of why a round was refused; all of it goes to the site's log."""
    logger.warning("node %d refuses round %d of run %s: %s", asked.node, asked.round, asked.run, error)
    return error.told if isinstance(error, RefusalError) else UNTOLD


def _known(name: str) -> str:
    try:
        return recipe_named(name).name
    except SpecError as error:
        raise ValueError(str(error)) from None


class Policy(Section):
    """What a site allows; each clause holds whatever the spec says.

    `units`: whose privacy a run may promise. The default is all three, `none` too, because a site of public data needs
    no clause; a hospital writes ["example"]. Seeded noise protects nobody and counts as `none`.
    `recipes`: names; `public`: what may be read as `adapter.public` (by default anything, and nothing where `none` is
    not allowed: A would be made from it without noise); `base`: the SHA-256 that `AdaptedModel.base_digest` gives,
    which depends on `model.precision`.

    `most_steps`: of one round, which must then be stated; without it, `most_epochs` holds what is trained by passes over
    the data. `most_batch`: examples of one step; `most_length`: tokens of one; `most_rounds`: of one run.

    `hub`: names of bases and of public data that may be downloaded, or true for any. What `[model.bases]` and `public`
    have needs no entry. A pinned `base` is never downloaded, because its hash could only be looked at afterwards.

    `least_noise` (standard deviation ÷ sensitivity), `most_clip` (L2 norm of one example's gradient) and the caps on ε
    are on what this site adds and charges itself, so any of them leaves the unit `example` alone. `most_epsilon` is over
    all runs that share a ledger, of which a site's folder has one, `most_epsilon_per_run` over the rounds of one; both are at `delta`. A run may state
    a smaller δ, and is charged at its own: an ε that holds there holds at the site's.

    Formal guarantees: where a client obeys a policy with `most_epsilon`, the updates of a node, in all runs charged in
    its ledger, are together (most_epsilon, delta)-DP for one of its examples.
    """

    units: tuple[Unit, ...] = ("none", "example", "client")
    recipes: tuple[Annotated[str, AfterValidator(_known)], ...] = tuple(RECIPES)
    public: tuple[str, ...] | None = None
    base: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    hub: Annotated[bool, Field(strict=True)] | tuple[str, ...] = False
    most_steps: Whole | None = None
    most_epochs: Bound = 1000.0
    most_batch: Whole = 16_384
    most_length: Annotated[Whole, Field(ge=2)] = 65_536
    most_rounds: Whole = 1_000_000
    least_noise: Annotated[Bound, Field(le=MOST_NOISE)] | None = None
    most_clip: Bound | None = None
    most_epsilon_per_run: Cap | None = None
    most_epsilon: Cap | None = None
    delta: Annotated[float, Field(strict=True, ge=LEAST_DELTA, lt=1)] = 1e-5

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read the `[policy]` table of a TOML file; other tables are not looked at. Logs `warnings()`.

        Raises SpecError naming file, key, value and way out, also for a policy that no spec can meet.
        """
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SpecError(f"{path}: no such file. An empty [policy] table in it allows everything.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: cannot be read ({error}).") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise SpecError(f"{path}: not TOML: {error}.") from None
        policy = cls.read(raw, where=str(path))
        for warning in policy.warnings():
            logger.warning("%s: [policy] %s", path, warning)
        return policy

    @classmethod
    def read(cls, raw: dict[str, Any], *, where: str = "client.toml") -> "Policy":
        """The policy in a `client.toml` given as nested dictionaries. Raises SpecError as `load`."""
        if "policy" not in raw:
            there = ", ".join(f"[{table}]" for table in raw) or "none"
            raise SpecError(
                f"{where}: [policy] is missing (the tables there are {there}): without it nobody knows what is "
                "allowed. Way out: write the table; an empty one allows everything."
            )
        return _File.check(raw, where=where).policy

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if not self.admitted:
            because = f", with {_listed(self.bounds)}, which needs the unit example" if self.units else ""
            raise ValueError(f'units = {list(self.units)}{because}: no run can meet it. Way out: units = ["example"]')
        if not any(set(RECIPES[name].units) & set(self.admitted) for name in self.recipes):
            able = [name for name, recipe in RECIPES.items() if set(recipe.units) & set(self.admitted)]
            raise ValueError(
                f"recipes = {list(self.recipes)}: none of them can give the units {list(self.admitted)}, so no run can "
                f"meet it. Way out: one of {', '.join(able)}"
            )
        if self.most_clip is not None and self.most_clip < LEAST_CLIP:
            raise ValueError(f"most_clip = {self.most_clip:g}: no run can meet it. Way out: {LEAST_CLIP:g} or more")
        if "delta" in self.model_fields_set and self.most_epsilon is None and self.most_epsilon_per_run is None:
            raise ValueError(
                f"delta = {self.delta:g} has no meaning without a cap on epsilon. Way out: set most_epsilon, or remove it"
            )
        return self

    def warnings(self) -> list[str]:
        """What is legal, and hardly meant."""
        per_run, in_all = self.most_epsilon_per_run, self.most_epsilon
        if per_run is not None and in_all is None:
            return [f"most_epsilon_per_run = {per_run:g} without most_epsilon: run after run may spend as much again"]
        if per_run is not None and in_all is not None and per_run > in_all:
            return [f"most_epsilon_per_run = {per_run:g} is never reached: most_epsilon = {in_all:g} is smaller"]
        return []

    @property
    def bounds(self) -> dict[str, float]:
        """The clauses on what this site adds and charges itself, as far as they are there."""
        names = ("least_noise", "most_clip", "most_epsilon_per_run", "most_epsilon")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def admitted(self) -> tuple[Unit, ...]:
        """The units that are left of `units`: beside a bound only `example`."""
        return tuple(unit for unit in self.units if unit == "example" or not self.bounds)

    def problems(self, spec: RunSpec, base: str | None) -> list[str]:
        """Why this site does not take part in the run: value, limit and way out of each clause that is not kept.

        `base` is the digest of the model; None before one is loaded: then a pinned base is not looked at.
        """
        return [
            *self._of_unit(spec.privacy),
            *self._of_recipe(spec),
            *self._of_steps(spec),
            *self._of_work(spec),
            *self._of_public(spec),
            *self._of_base(spec, base),
        ]

    def of_download(self, key: str, name: str) -> list[str]:
        """Why `name`, which a spec has under `key` and which is not on this machine, is not to be downloaded."""
        if key == "model.base" and self.base is not None:
            refused = "is not here, and the site pins the SHA-256 of its base, which nobody knows before it is here"
            return [_problem(f'{key} = "{name}" {refused}', "`fedapt client import` of a folder that holds it")]
        if self.hub is True or (isinstance(self.hub, tuple) and name in self.hub):
            return []
        refused = "would be downloaded, and the site's policy does not name it"
        return [
            _problem(f'{key} = "{name}" {refused}', f'`fedapt client import` where it is a base, or hub = ["{name}"]')
        ]

    def require_noise(self, multiplier: float) -> None:
        """Raises RefusalError where a noise multiplier, perhaps one that was solved for, is below `least_noise`."""
        if self.least_noise is not None and not multiplier >= self.least_noise:
            below = (
                f"is below the site's least_noise = {self.least_noise:g}. "
                f"Way out: privacy.noise_multiplier = {self.least_noise:g} or more, or a smaller privacy.epsilon"
            )
            raise RefusalError(
                f"a noise multiplier of {multiplier:.6g} {below}",
                told=f"the noise that follows from privacy.epsilon {below}",
            )

    def require_evaluation(self) -> None:
        """Raises PrivacyError where nothing may leave without noise: scores are exact."""
        if "none" not in self.admitted:
            raise PrivacyError(
                f"exact scores on this site's examples are refused: its policy allows only {_quoted(self.admitted)}, "
                "and no noise is added to scores. Way out: evaluate on data that nobody has to hide"
            )

    def caps(self, privacy: Privacy) -> tuple[float, float]:
        """The largest ε of one run, the smaller of the spec's and the site's, and of all runs; at `privacy.delta`."""
        limits = (privacy.epsilon, self.most_epsilon_per_run)
        return min(limit for limit in (*limits, inf) if limit is not None), self.most_epsilon or inf

    def _of_unit(self, privacy: Privacy) -> list[str]:
        seeded = privacy.noise == "simulation"
        if ("none" if seeded else privacy.unit) not in self.admitted:
            asked = f'privacy.unit = "{privacy.unit}"'
            if seeded:
                asked = 'privacy.noise = "simulation" (whoever knows the seed can take it off)'
            because = f"; {_listed(self.bounds)}" if self.bounds else ""
            secret = ' with privacy.noise = "secret"' if seeded else ""
            refused = f"{asked} is refused: the site's policy allows the units {_quoted(self.admitted)}{because}"
            return [_problem(refused, f'privacy.unit = "{self.admitted[0]}"{secret}')]
        return self._of_example(privacy) if self.bounds else []

    def _of_example(self, privacy: Privacy) -> list[str]:
        """Noise, clip and δ as they are stated, of the unit `example`."""
        problems = []
        if privacy.noise_multiplier is not None:
            try:
                self.require_noise(privacy.noise_multiplier)
            except PrivacyError as error:
                problems.append(f"{error}.")
        if self.most_clip is not None and not privacy.clip <= self.most_clip:
            above = f"privacy.clip = {privacy.clip:g} is above the site's most_clip = {self.most_clip:g}"
            problems.append(_problem(above, f"privacy.clip = {self.most_clip:g} or less"))
        if {"most_epsilon", "most_epsilon_per_run"} & set(self.bounds) and not privacy.delta <= self.delta:
            above = f"privacy.delta = {privacy.delta:g} is above the site's delta = {self.delta:g}"
            problems.append(_problem(above, f"privacy.delta = {self.delta:g} or less"))
        return problems

    def _of_recipe(self, spec: RunSpec) -> list[str]:
        if spec.recipe.name in self.recipes:
            return []
        refused = f'recipe.name = "{spec.recipe.name}" is refused: the site\'s policy allows {_quoted(self.recipes)}'
        return [_problem(refused, f'recipe.name = "{self.recipes[0]}"')]

    def _of_steps(self, spec: RunSpec) -> list[str]:
        if recipe_named(spec.recipe.name).zeroth:  # an exchange is one batch, and its spec can state no steps
            return []
        most, steps = self.most_steps, spec.local.steps
        if most is None and steps is None:
            return _above("local.epochs", spec.local.epochs or 1.0, "most_epochs", self.most_epochs)
        most = most or MOST_STEPS
        if steps is not None and steps <= most:
            return []
        asked = f"local.steps = {steps} is above"
        if steps is None:  # a refusal after counting would tell how much is held here
            asked = "local.steps is not set, so the size of the data decides, beside"
        return [_problem(f"{asked} the site's most_steps = {most}", f"local.steps = {most} or less")]

    def _of_work(self, spec: RunSpec) -> list[str]:
        return [
            *_above("local.batch_size", spec.local.batch_size, "most_batch", self.most_batch),
            *_above("model.max_length", spec.model.max_length, "most_length", self.most_length),
            *_above("run.rounds", spec.run.rounds, "most_rounds", self.most_rounds),
        ]

    def _of_public(self, spec: RunSpec) -> list[str]:
        source = spec.adapter.public
        allowed = () if self.public is None and "none" not in self.admitted else self.public
        if source is None or allowed is None or source in allowed:
            return []
        unlisted = f"it is read without noise, and the site's policy has public = [{_quoted(allowed)}]"
        way_out = "another recipe.initial_a, or a source that the site lists"
        return [_problem(f'adapter.public = "{source}" is refused: {unlisted}', way_out)]

    def _of_base(self, spec: RunSpec, base: str | None) -> list[str]:
        if self.base is None or base is None or base == self.base:
            return []
        other = f'model.base = "{spec.model.base}" in {spec.model.precision} has SHA-256 {base}, not {self.base}'
        return [_problem(other, "the base that the site pins, in its precision")]


class _File(Section):
    """What is read here of a `client.toml`."""

    model_config = ConfigDict(extra="ignore")
    policy: Policy


def _above(key: str, asked: float, clause: str, most: float) -> list[str]:
    if asked <= most:
        return []
    return [
        _problem(f"{key} = {asked:.12g} is above the site's {clause} = {most:.12g}", f"{key} = {most:.12g} or less")
    ]


def _problem(what: str, way_out: str) -> str:
    return f"{what}. Way out: {way_out}."


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _listed(clauses: dict[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in clauses.items())
