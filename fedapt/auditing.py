"""`fedapt audit`: what the mechanism of a spec claims, beside what can be measured of it through the real path."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .presentation import table
from .privacy.example_level import example_level_of
from .privacy.membership import LOW, Membership
from .protocols.errors import SpecError
from .protocols.legality import recipe_of
from .protocols.spec import RunSpec
from .server.audited import AuditedClip, audited_path
from .server.auditing import (
    CROWD,
    DRAWN_NODES,
    FALSE_ALARM,
    Finding,
    canary_trials,
    clip_findings,
    findings,
    mu,
    noise,
    one_run,
    sampling,
    secrecy,
    sensitivity,
)

DRAWS_OF = 20
"""Batches that the examples of an audited node make, where a test is about how they are drawn."""


@dataclass(frozen=True)
class Audit:
    """The findings for one spec; `private` is False where its noise is that of a simulation.

    `population` are the clients of client-level privacy; None where it is of a node's examples. `membership` is what an
    attack on released adapters has reached, where one was asked for. `note` says why there are no findings, if so.
    """

    recipe: str
    codec: str
    unit: str
    population: int | None
    noise_multiplier: float
    private: bool
    findings: Sequence[Finding]
    membership: Membership | None = None
    note: str = ""

    @property
    def sound(self) -> bool:
        """Whether nothing that was measured contradicts the claim."""
        attacked = self.membership is not None and self.membership.contradicts
        return not attacked and not any(finding.contradicts for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"false_alarm": FALSE_ALARM, "sound": self.sound}

    def text(self) -> str:
        titles = ["test", "quantity", "claimed", "measured", "verdict"]
        title = f"{self.unit.capitalize()}-level privacy of {self.recipe}"
        if self.population is not None:
            title += f" over {self.codec}, {self.population:,} clients"
        lines = []
        if self.findings:
            lines = [
                f"{title}, noise multiplier {self.noise_multiplier:.4g}",
                table(titles, [_cells(finding) for finding in self.findings]),
                "\n".join(f"{finding.name}: {finding.detail}" for finding in self.findings),
            ]
        if self.membership is not None:
            lines.append(_told(self.membership, "clients" if self.unit == "client" else "examples"))
        if self.note:
            lines.append(self.note)
        return "\n\n".join([*lines, self._conclusion()])

    def _conclusion(self) -> str:
        rate = f"A right mechanism fails a test with probability {FALSE_ALARM:g} at most."
        if not self.sound:
            names = ", ".join(finding.name for finding in self.findings if finding.contradicts) or "membership"
            return f"CONTRADICTED by {names}: do not rely on the ε of a run with this mechanism. {rate}"
        if self.unit == "none":
            return "No privacy is claimed: the attack is all that there is to say."
        line = f"Nothing contradicts the claim, which is no proof of it. {rate}"
        return line if self.private else f"{line}\nNOT private (simulation noise), as the spec says."


def audit(spec: RunSpec, trials: int, shadows: int = 0) -> Audit:
    """Audit the mechanism of a spec: no model is loaded and nothing is trained. About 20 seconds for 200,000 trials.

    Releases are of a small adapter of its own with the spec's recipe, codec, clip, noise and draws. With `shadows`, the
    spec is also run so many times, and its adapters are attacked (`sim/membership.py`); then a spec that claims no
    privacy, or whose mechanism has no path here, has an audit too. Raises SpecError for such a spec without `shadows`
    and, client-level, for one without a public number of clients, PrivacyError for a cap that no noise can meet, and
    what a run raises.
    """
    reason = _without_a_path(spec)
    if reason and not shadows:
        raise SpecError(reason + ", or ask for --membership, which attacks any run")
    found = _attacked_alone(spec) if reason else _of_the_mechanism(spec, trials)
    if not shadows:
        return found
    from .sim.federation import build
    from .sim.membership import membership

    return replace(found, membership=membership(build(spec), shadows, FALSE_ALARM))


def _of_the_mechanism(spec: RunSpec, trials: int) -> Audit:
    recipe, privacy = recipe_of(spec), spec.privacy
    secret = privacy.noise == "secret"
    if privacy.unit == "example":
        found = list(step_findings(spec, trials))
        return Audit(recipe.name, spec.wire.codec, "example", None, _step_noise(spec), secret, found)
    path = audited_path(spec, _population(spec))
    found = list(findings(path, trials))
    if privacy.clipping == "adaptive":
        found += clip_findings(AuditedClip(spec, path.population))
    multiplier = path.event.noise_multiplier
    codec = spec.zeroth.code if recipe.zeroth else spec.wire.codec
    return Audit(recipe.name, codec, "client", path.population, multiplier, secret, found)


def _without_a_path(spec: RunSpec) -> str:
    """Why the mechanism of a spec has no tests, and what could be audited instead; empty where it has."""
    unit, recipe = spec.privacy.unit, recipe_of(spec)
    if unit == "none":
        return 'privacy.unit = "none": nothing is claimed that could be audited; set unit = "client"'
    if unit == "example" and recipe.zeroth:
        return (
            f'privacy.unit = "example" with {recipe.name}: an audit has no path through what a node does in an exchange. '
            'Audit the same clip and noise with unit = "client"'
        )
    return ""


def _attacked_alone(spec: RunSpec) -> Audit:
    """An audit without findings, of a spec whose mechanism has no tests."""
    recipe, privacy = recipe_of(spec), spec.privacy
    codec = spec.zeroth.code if recipe.zeroth else spec.wire.codec
    if privacy.unit == "none":
        return Audit(recipe.name, codec, "none", None, 0.0, False, [])
    note = (
        f"The mechanism was not tested: an audit has no path through what a node does in an exchange of {recipe.name}."
    )
    multiplier = privacy.noise_multiplier or 0.0
    return Audit(recipe.name, codec, privacy.unit, None, multiplier, privacy.noise == "secret", [], note=note)


def step_findings(spec: RunSpec, trials: int) -> Iterator[Finding]:
    """The tests of a step of private training, each at a node that lets it see most.

    Few examples make empty batches and batches of other sizes common; where all are drawn, each can be a canary.
    """
    from .client.audited import AuditedStep  # loads torch: the audit of a server's mechanism does without

    spec = spec.model_copy(update={"privacy": spec.privacy.model_copy(update={"noise_multiplier": _step_noise(spec)})})
    crowded, sparse = AuditedStep(spec, 2 * CROWD, CROWD), AuditedStep(spec, 2, 1)
    batch = min(spec.local.batch_size, DRAWN_NODES // DRAWS_OF)
    certain = AuditedStep(spec, crowded.size, crowded.size)
    yield sensitivity(crowded)
    outcomes = canary_trials(certain, trials)
    yield mu(certain, outcomes)
    yield one_run(certain, outcomes)
    yield noise(sparse, 5 * trials)
    yield sampling(AuditedStep(spec, DRAWS_OF * batch, batch))
    yield secrecy(crowded)


def _step_noise(spec: RunSpec) -> float:
    """The noise multiplier of a spec; where it is solved for, that of a node of DRAWS_OF batches, to have one."""
    steps = spec.run.rounds * (spec.local.steps or DRAWS_OF)
    return example_level_of(spec, DRAWS_OF * spec.local.batch_size, 1, steps).noise_multiplier


def _population(spec: RunSpec) -> int:
    """The public number of clients; a run without `privacy.population` takes the nodes that are there."""
    if spec.privacy.population is not None:
        return spec.privacy.population
    if spec.data is not None and spec.data.partition.kind not in ("by-column", "natural"):
        return spec.data.partition.clients
    raise SpecError("privacy.population: missing; an audit needs the public number of clients. Set it")


def _cells(finding: Finding) -> list[str]:
    measured = "–" if finding.measured is None else f"{finding.measured:.6g}"
    verdict = "CONTRADICTED" if finding.contradicts else "not made" if finding.measured is None else "holds"
    return [finding.name, finding.quantity, f"{finding.claimed:.6g}", measured, verdict]


def _told(found: Membership, who: str) -> str:
    low, high = found.interval
    line = (
        f"Membership of {found.canaries:,} {who} told from the adapters of {found.runs} runs (LiRA):\n"
        f"area under the curve {found.area:.3f} (95 % {low:.3f} to {high:.3f}; guessing gives 0.5), "
        f"{found.hits:.1%} found at {LOW:.0%} false alarms, ε ≥ {found.epsilon:.3g} at δ = {found.delta:g}"
    )
    if found.claimed is not None:
        line += f"; claimed {found.claimed:.3g}"
    return line
