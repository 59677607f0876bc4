"""`fedapt audit`: what the mechanism of a spec claims, beside what can be measured of it through the real path."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .presentation import table
from .protocols.errors import PrivacyError, SpecError
from .protocols.legality import recipe_of
from .protocols.spec import RunSpec
from .server.audited import AuditedPath
from .server.auditing import FALSE_ALARM, Finding, findings


@dataclass(frozen=True)
class Audit:
    """The findings for one spec; `private` is False where its noise is that of a simulation."""

    recipe: str
    codec: str
    population: int
    noise_multiplier: float
    private: bool
    findings: Sequence[Finding]

    @property
    def sound(self) -> bool:
        """Whether nothing that was measured contradicts the claim."""
        return not any(finding.contradicts for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"false_alarm": FALSE_ALARM, "sound": self.sound}

    def text(self) -> str:
        titles = ["test", "quantity", "claimed", "measured", "verdict"]
        clients = f"{self.population:,} clients, noise multiplier {self.noise_multiplier:.4g}"
        lines = [
            f"Client-level privacy of {self.recipe} over {self.codec}, {clients}",
            table(titles, [_cells(finding) for finding in self.findings]),
            "\n".join(f"{finding.name}: {finding.detail}" for finding in self.findings),
            self._conclusion(),
        ]
        return "\n\n".join(lines)

    def _conclusion(self) -> str:
        rate = f"A right mechanism fails a test with probability {FALSE_ALARM:g} at most."
        if not self.sound:
            names = ", ".join(finding.name for finding in self.findings if finding.contradicts)
            return f"CONTRADICTED by {names}: do not rely on the ε of a run with this mechanism. {rate}"
        line = f"Nothing contradicts the claim, which is no proof of it. {rate}"
        return line if self.private else f"{line}\nNOT private (simulation noise), as the spec says."


def audit(spec: RunSpec, trials: int) -> Audit:
    """Audit the mechanism of a spec: no model is loaded and nothing is trained. About 20 seconds for 200,000 trials.

    Releases are of a small adapter of its own with the spec's recipe, codec, clip, noise and draws. Raises SpecError
    for a spec without client-level privacy or a public number of clients, PrivacyError for one that is example-level
    and for a cap that no noise can meet.
    """
    recipe = recipe_of(spec)
    if spec.privacy.unit == "example":
        raise PrivacyError(
            'privacy.unit = "example": an audit is offered for unit = "client" alone, and not for this one yet'
        )
    if spec.privacy.unit == "none":
        raise SpecError('privacy.unit = "none": nothing is claimed that could be audited; set unit = "client"')
    path = AuditedPath(spec, _population(spec))
    found = list(findings(path, trials))
    multiplier = path.event.noise_multiplier
    return Audit(recipe.name, spec.wire.codec, path.population, multiplier, path.event.secret, found)


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
