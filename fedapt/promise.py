"""What a run promises of its releases, in one line: for the report, the plan's reader and the adapter's folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .privacy.ledger import Ledger
from .protocols.spec import RunSpec
from .server.store import Row

NOT_PRIVATE = "NOT private"


def marked(line: str, private: bool) -> str:
    """A statement of ε, and that it is none where the noise was seeded."""
    return line if private else f"{NOT_PRIVATE} (simulation noise); with secret noise: {line}"


@dataclass(frozen=True)
class Promise:
    """(epsilon, delta) for one unit; epsilon is None where none is promised. `private` is False for seeded noise."""

    unit: str
    epsilon: float | None = None
    delta: float | None = None
    private: bool = False

    def text(self) -> str:
        if self.unit == "none" or self.epsilon is None:
            return "no formal guarantee"
        line = f"{self.unit}-level, ε = {self.epsilon:.3g} at δ = {self.delta:g}"
        return marked(line, self.private)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def promise(spec: RunSpec, rows: Sequence[Row], ledger: Ledger) -> Promise:
    """Of all that was released, whichever rounds were evaluated.

    Of clients it is what the run's `ledger` has been charged. Of examples it is the cap: each node's own ledger keeps its
    examples within it, and what nodes report of themselves lacks those that did not answer of late.
    """
    privacy = spec.privacy
    if privacy.unit == "none" or rows[-1]["round"] == 0:
        return Promise(privacy.unit)
    if privacy.unit == "client":
        account = ledger.spent(privacy.delta)
        return Promise(privacy.unit, account.epsilon, privacy.delta, account.private)
    private = privacy.noise == "secret" and all(row.get("private", True) for row in rows)
    return Promise(privacy.unit, privacy.epsilon, privacy.delta, private)
