"""What a run promises of its releases, in one line: for the report, the plan's reader and the adapter's folder."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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


def promise(spec: RunSpec, rows: Sequence[Row]) -> Promise:
    """Of all rounds that are committed: the last row that states what has been spent has stated it for all before."""
    spent = [row for row in rows if "epsilon" in row]
    if spec.privacy.unit == "none" or not spent:
        return Promise(spec.privacy.unit)
    return Promise(spec.privacy.unit, spent[-1]["epsilon"], spec.privacy.delta, spent[-1]["private"])
