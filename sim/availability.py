"""When nodes are there, on the simulated clock: always, for a share of each day, or as a trace says.

Times are whole microseconds since the start of the run, so that no rounding depends on how the clock got there.
"""

import json
from bisect import bisect_left
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Protocol, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..protocols.errors import DataError
from ..protocols.keys import generator

SECOND = 10**6
DAY = 86_400 * SECOND
FOREVER = 2**62

LONGEST_SECONDS = 1e9
"""Thirty years: up to here a float of seconds is exact to the microsecond, and further on nobody waits."""

MOST_LINES, LONGEST_LINE = 10**7, 1000
"""Of a trace; a line in characters."""

Times = np.ndarray[Any, np.dtype[np.int64]]


def microseconds(seconds: float) -> int:
    """The clock's unit, of LONGEST_SECONDS at most."""
    return round(min(seconds, LONGEST_SECONDS) * SECOND)


class Availability(Protocol):
    """Who is there, and when."""

    def nodes(self, at: int) -> Sequence[int]:
        """The nodes that are there, in a fixed order."""

    def until(self, node: int, at: int) -> int:
        """When a node leaves that is there at `at`; `at` itself for one that is not."""

    def back(self, node: int, at: int) -> int:
        """The first moment from `at` on at which a node is there; FOREVER: it never is."""

    def when(self, at: int, least: int) -> int | None:
        """The first moment from `at` on at which `least` nodes are there together; None: there is none."""


class Always:
    """All nodes, at all times."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self.everybody = nodes

    def nodes(self, at: int) -> Sequence[int]:
        return self.everybody

    def until(self, node: int, at: int) -> int:
        return FOREVER

    def back(self, node: int, at: int) -> int:
        return at

    def when(self, at: int, least: int) -> int | None:
        return at if len(self.everybody) >= least else None


class Daily:
    """Each node comes at its own moment of the day, and stays for a share of it.

    The moments are spread evenly over the day and dealt to the nodes by key. So those that are there are always
    neighbours in the order of coming: to count them, or to look at one, costs the same for ten nodes and for a million.
    """

    def __init__(self, nodes: Sequence[int], share: float, key: int) -> None:
        self.everybody, self.stay = nodes, max(1, round(share * DAY))
        self.order = generator(key).permutation(len(nodes))
        self.places = np.argsort(self.order)

    def nodes(self, at: int) -> Sequence[int]:
        first, last = self._came(at - self.stay) + 1, self._came(at)
        return _Turn(self.everybody, self.order, first, last + 1 - first)

    def until(self, node: int, at: int) -> int:
        return max(at, self._moment(self._place(node, at)) + self.stay)

    def back(self, node: int, at: int) -> int:
        return at if self.until(node, at) > at else self._moment(self._place(node, at) + len(self.everybody))

    def when(self, at: int, least: int) -> int | None:
        count = len(self.everybody)
        most = -(-self.stay * count // DAY) + 1
        for _ in range(count and count + 1 if least <= most else 0):
            if len(self.nodes(at)) >= least:
                return at
            at = self._moment(self._came(at) + 1)
        return None

    def _moment(self, place: int) -> int:
        """When the node at a place in the order comes; places go on from day to day, and back before the start."""
        return place * DAY // len(self.everybody)

    def _place(self, node: int, at: int) -> int:
        """The place at which a node has come last."""
        last, own = self._came(at), int(self.places[bisect_left(self.everybody, node)])
        return last - (last - own) % len(self.everybody)

    def _came(self, at: int) -> int:
        """The last place whose moment is not after `at`."""
        return ((at + 1) * len(self.everybody) - 1) // DAY


def looked_through(daily: Daily, at: int) -> set[int]:
    """Who is there of a Daily, found by looking at everybody: the plain reference of `Daily.nodes`."""
    found = set()
    for place, number in enumerate(daily.order):
        if (at - place * DAY // len(daily.order)) % DAY < daily.stay:
            found.add(daily.everybody[number])
    return found


class _Turn(Sequence[int]):
    """A stretch of the order of coming, looked up when it is asked for."""

    def __init__(self, everybody: Sequence[int], order: Times, first: int, count: int) -> None:
        self._everybody, self._order, self._first, self._count = everybody, order, first, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._everybody[int(self._order[(self._first + index % self._count) % len(self._order)])]


class Trace:
    """Nodes are there as lines of a file say. Raises DataError for the first line that is wrong."""

    def __init__(self, path: Path, nodes: Sequence[int], known: Container[int]) -> None:
        """`known` are the nodes that a line may name; those that are not among `nodes` have nothing to train on."""
        found = sorted(_lines(path, known))
        for (node, _, until, _), (other, start, _, number) in pairwise(found):
            if node == other and start < until:
                raise DataError(
                    f"{path}: line {number}: node {node} is there already until {until / SECOND:g}; make one line of both"
                )
        here = set(nodes)
        kept = [line[:3] for line in found if line[0] in here]
        self.node, self.start, self.end = np.array(kept, np.int64).reshape(-1, 3).T
        moments = np.concatenate([self.start, self.end])
        steps = np.repeat([1, -1], len(self.start))
        self.moments, places = np.unique(moments, return_inverse=True)
        self.counts = np.cumsum(np.bincount(places, steps, len(self.moments))).astype(np.int64)

    def nodes(self, at: int) -> Sequence[int]:
        found: list[int] = self.node[(self.start <= at) & (at < self.end)].tolist()
        return found

    def until(self, node: int, at: int) -> int:
        first, last = np.searchsorted(self.node, [node, node + 1])
        place = int(np.searchsorted(self.start[first:last], at, side="right")) - 1
        return max(at, int(self.end[first + place])) if place >= 0 else at

    def back(self, node: int, at: int) -> int:
        if self.until(node, at) > at:
            return at
        first, last = np.searchsorted(self.node, [node, node + 1])
        place = int(np.searchsorted(self.start[first:last], at, side="right"))
        return int(self.start[first + place]) if first + place < last else FOREVER

    def when(self, at: int, least: int) -> int | None:
        now = int(np.searchsorted(self.moments, at, side="right")) - 1
        enough = np.flatnonzero(self.counts[max(now, 0) :] >= least)
        return max(at, int(self.moments[max(now, 0) + enough[0]])) if len(enough) else None


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    node: Annotated[int, Field(ge=0, lt=2**63)]
    start: Annotated[float, Field(alias="from", ge=0, le=LONGEST_SECONDS)]
    until: Annotated[float, Field(ge=0, le=LONGEST_SECONDS)]


def _lines(path: Path, known: Container[int]) -> Iterator[tuple[int, int, int, int]]:
    """Node, from and until in microseconds, and the number of the line."""
    try:
        with path.open(encoding="utf-8") as file:
            number = 0
            while text := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(text) > LONGEST_LINE or number > MOST_LINES:
                    raise DataError(
                        f"{path}: line {number}: a trace has at most {MOST_LINES:,} lines of {LONGEST_LINE:,} characters"
                    )
                if text.strip():
                    yield *_line(path, number, text, known), number
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; fleet.trace names a .jsonl file of node, from and until") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _line(path: Path, number: int, text: str, known: Container[int]) -> tuple[int, int, int]:
    form = '{"node": 3, "from": 0, "until": 3600}'
    try:
        line = _Line.model_validate(json.loads(text))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise DataError(f"{path}: line {number}: {where}: {problem['msg']}; a line is like {form}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: line {number} is not JSON; a line is like {form}") from None
    if line.node not in known:
        raise DataError(f"{path}: line {number}: node {line.node}: the federation has none of this number")
    start, until = microseconds(line.start), microseconds(line.until)
    if start >= until:
        raise DataError(f"{path}: line {number}: from = {line.start:g} is not before until = {line.until:g}")
    return line.node, start, until
