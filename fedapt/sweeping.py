"""Small grids: each combination is a run of its own in its own folder, so a sweep that was stopped goes on."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .progress import Watch
from .protocols.errors import SpecError
from .protocols.spec import RunSpec
from .server.coordinator import best_round
from .server.store import Row
from .simulation import run


@dataclass(frozen=True)
class Point:
    """One combination of a grid: its `--set` overrides and the spec that they give."""

    overrides: tuple[str, ...]
    spec: RunSpec

    @property
    def folder(self) -> str:
        """A name that stays the same whatever else is in the grid."""
        return "-".join(("point", hashlib.sha256(json.dumps(self.overrides).encode()).hexdigest()[:12]))


def grid(spec: RunSpec, axes: Sequence[str]) -> list[Point]:
    """All combinations of axes such as `local.learning_rate=1e-3,2e-3`. Raises SpecError, also for an illegal value."""
    choices = []
    for axis in axes:
        key, equals, values = axis.partition("=")
        if not equals or not values.strip():
            raise SpecError(f"--grid {axis!r}: write it as section.key=value,value,…")
        choices.append([f"{key.strip()}={value.strip()}" for value in values.split(",")])
    return [Point(tuple(chosen), spec.set(*chosen)) for chosen in itertools.product(*choices)]


def sweep(points: Sequence[Point], out: Path, watch: Watch) -> Iterator[tuple[Point, Row | None]]:
    """Run each point (or take it from its folder), yielding its best evaluated row; stops at Ctrl-C."""
    for number, point in enumerate(points, 1):
        watch.say(f"[{number}/{len(points)}] {' '.join(point.overrides)}")
        result = run(point.spec, out / point.folder, watch)
        if not result.outcome.complete:
            raise KeyboardInterrupt
        best = best_round(result.metrics)
        yield point, None if best is None else result.metrics[best]
