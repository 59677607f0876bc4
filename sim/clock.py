"""A simulated clock around a grid: who is there, who is lost, and when a round would have ended on the nodes' devices.

All of it is known before anything is trained, because a codec knows its size: the clock reads neither the time of day
nor what was computed, so a run has the same one on any machine, with any number of workers, and after a crash.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..client.batches import steps_of
from ..protocols.codecs import uplink_of
from ..protocols.errors import RunError
from ..protocols.keys import derive
from ..protocols.spec import Fleet, Local
from ..protocols.update import Assignment, Description, Update
from ..server.grid import Evaluated, Failure
from ..server.participation import wanted
from ..server.store import Row
from .availability import FOREVER, SECOND, Always, Availability, Daily, Trace, microseconds
from .fleet import Devices, fleet_of
from .grid import VirtualNodes

MOST_ATTEMPTS = 20
"""How often a round may pass its deadline with too few answers: a fleet that never makes it is a mistake in the spec."""

TIME = "simulated_seconds"
"""The key of a row: how long the run would have taken up to the end of this round."""

Back = Callable[[Sequence[int], int], int]
"""(nodes, now) ⇒ the first moment from now on at which one of them is there, FOREVER if none ever is."""

Journey = Callable[[int, int, int], int | None]
"""(node, attempt, when it is asked) ⇒ how long until its update is there, or None: it never will be."""


@dataclass(frozen=True)
class Course:
    """A round on the clock (µs): whose updates the server takes, how many nodes it has lost, and when it has ended.

    A spare that was not waited for is not lost.
    """

    arrived: frozenset[int]
    lost: int
    end: int


def course(
    cohort: Sequence[int], journey: Journey, back: Back, at: int, *, enough: int, least: int, deadline: int
) -> Course:
    """Ask all, take the first `enough` that come within `deadline` µs, and end with the last of them.

    With fewer, the round ends at its deadline. With fewer than `least`, those that have not answered are asked again as
    soon as one of them is there, as an operator who starts a stopped run would: MOST_ATTEMPTS times at most.
    """
    arrived: set[int] = set()
    lost = 0
    for attempt in range(1, MOST_ATTEMPTS + 1):
        waiting = [node for node in cohort if node not in arrived]
        if attempt > 1 and (at := back(waiting, at)) == FOREVER:
            break
        times = [(time, node) for node in waiting if (time := journey(node, attempt, at)) is not None]
        in_time = sorted(pair for pair in times if pair[0] <= deadline)
        taken = in_time[: enough - len(arrived)]
        lost = len(waiting) - len(in_time)
        arrived |= {node for _, node in taken}
        at += deadline if len(arrived) < enough else max((time for time, _ in taken), default=0)
        if len(arrived) >= least:
            break
    return Course(frozenset(arrived), lost, at)


class FleetGrid:
    """The nodes of a simulated grid as a fleet of devices (`server.grid.NodeGrid`, with a clock and without Flower).

    What a lost node would have computed is not computed, except where nodes keep something from round to round: a
    residual (top-k), tensors of their own (diloco), or a ledger (privacy of examples, charged before the training that is
    lost). There it trains, and its answer is dropped: it believes that it was heard.

    Under client-level privacy a round lasts for its whole deadline: when it ends would tell who was in it.
    """

    def __init__(self, grid: VirtualNodes, fleet: Fleet) -> None:
        self.grid, self.client, self.spec = grid, grid.client, grid.client.spec
        self.devices = Devices(fleet, self.spec.run.seed)
        self.availability = _availability(grid, fleet)
        self.now = 0
        self._arrived: frozenset[int] = frozenset()

    def begin(self, rows: Sequence[Row]) -> None:
        self.now = microseconds(rows[-1].get(TIME, 0.0))

    def nodes(self) -> Sequence[int]:
        """Those that are there. While they are fewer than `participation.minimum`, the clock goes on to when they are not.

        Raises RunError where that will never be.
        """
        least = max(1, self.spec.participation.minimum)
        found = self.availability.when(self.now, least)
        if found is None and least > 1:
            found = self.availability.when(self.now, 1)
        if found is None:
            raise RunError(
                f"nobody is there at {self.now / SECOND:g} s of the simulated clock, and nobody comes later: "
                "give fleet.trace lines that reach further, or let fleet.available be larger"
            )
        self.now = found
        return self.availability.nodes(found)

    population = nodes

    def rank(self, node: int) -> int:
        return self.grid.rank(node)

    def describe(self) -> Description:
        return self.grid.describe()

    def expect(self, assignments: Sequence[Assignment]) -> Row:
        asked = {assignment.node: assignment for assignment in assignments}
        settings, private = self.spec.participation, self.spec.privacy.unit == "client"
        least = min(settings.minimum if private else max(1, settings.minimum), len(asked))
        deadline = max(1, microseconds(settings.deadline_seconds))
        durations = {node: self._duration(assignment) for node, assignment in asked.items()}

        def journey(node: int, attempt: int, at: int) -> int | None:
            end, leaves = at + durations[node], self.availability.until(node, at)
            stays = at < leaves and end <= leaves
            return durations[node] if stays and not self.devices.drops(node, asked[node].round, attempt) else None

        def back(nodes: Sequence[int], at: int) -> int:
            return min(self.availability.back(node, at) for node in nodes)

        enough = wanted(len(asked), settings)
        found = course(list(asked), journey, back, self.now, enough=enough, least=least, deadline=deadline)
        if len(found.arrived) < least:
            raise RunError(
                f"round {assignments[0].round}: in {MOST_ATTEMPTS} attempts of {settings.deadline_seconds:g} s at most, "
                f"{len(found.arrived)} of {len(asked)} nodes would have delivered an update, and {least} are needed; the "
                f"median of them takes {sorted(durations.values())[len(durations) // 2] / SECOND:.3g} s. Raise "
                "participation.deadline_seconds, or change [fleet]"
            )
        deadlines = max(1, -(-(found.end - self.now) // deadline))
        end = self.now + deadlines * deadline if private else found.end
        self.now, self._arrived = end, found.arrived
        return {TIME: end / SECOND} | ({} if private else {"lost": found.lost})

    def part(self, assignments: Sequence[Assignment]) -> None:
        self.grid.part(assignments)

    def send(self, assignments: Sequence[Assignment]) -> None:
        """Train those whose updates arrive; before them, where nodes keep something, those whose updates do not."""
        lost = [asked for asked in assignments if asked.node not in self._arrived]
        kept = lost if self._keeps else []
        self.grid.send(kept + [asked for asked in assignments if asked.node in self._arrived])

    def replies(self, timeout: float) -> Iterator[Update | Failure]:
        for reply in self.grid.replies(timeout):
            if reply.node in self._arrived:
                yield reply

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated | Failure]:
        return self.grid.evaluate(assignments, timeout)

    @property
    def _keeps(self) -> bool:
        client = self.client
        return client.feedback is not None or client.replicas is not None or self.spec.privacy.unit == "example"

    def _duration(self, asked: Assignment) -> int:
        """Of a node that has nothing to send after all, as if it had."""
        up = uplink_of(self.spec).size(self.client.shared.sent(asked.round, asked.rank))
        examples = examples_of(len(self.client.sites.indices[asked.node]), self.spec.local)
        return self.devices.duration(asked.node, examples, len(asked.payload), up)


def examples_of(count: int, local: Local) -> float:
    """How many examples a node that holds `count` trains on in a round, those counted twice that it uses twice."""
    return count * steps_of(count, local) / max(1, -(-count // local.batch_size))


def with_clock(grid: VirtualNodes) -> VirtualNodes | FleetGrid:
    """The grid as the fleet of its spec; the grid itself, where the spec has none. Raises SpecError or DataError."""
    fleet = fleet_of(grid.client.spec)
    return grid if fleet is None else FleetGrid(grid, fleet)


def _availability(grid: VirtualNodes, fleet: Fleet) -> Availability:
    nodes, sites = grid.nodes(), grid.client.sites
    if fleet.trace is not None:
        return Trace(Path(fleet.trace), nodes, sites.indices)
    if fleet.available < 1:
        return Daily(nodes, fleet.available, derive(grid.client.spec.run.seed, "available"))
    return Always(nodes)
