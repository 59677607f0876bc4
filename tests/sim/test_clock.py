"""The simulated clock: courses against plain cases, and whole runs whose bytes must not depend on it where nothing is lost."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.client.batches import plan_batches
from fedapt.client.client import Client
from fedapt.protocols.errors import RunError, SpecError
from fedapt.protocols.spec import Fleet, Local, Participation, RunSpec
from fedapt.protocols.update import Assignment, Update
from fedapt.server.clock import Clocked, Virtual
from fedapt.server.coordinator import Coordinator
from fedapt.server.grid import Failure, NodeGrid
from fedapt.server.participation import ORDERED, draw
from fedapt.server.store import MemoryStore, Row
from fedapt.sim import grid as grid_module
from fedapt.sim.availability import DAY, FOREVER, SECOND
from fedapt.sim.clock import MOST_ATTEMPTS, TIME, Course, FleetGrid, course, examples_of, with_clock
from fedapt.sim.federation import build
from fedapt.sim.fleet import Devices, fleet_of, seconds
from fedapt.sim.grid import LocalGrid, VirtualNodes
from fedapt.sim.workers import WorkerGrid

from ..server.fakes import FakeGrid
from ..server.fakes import spec_of as fake_spec
from .test_workers import Here

SpecOf = Callable[..., RunSpec]
PHONES = ["fleet.examples_per_second=2", "fleet.speed_spread=1", "fleet.uplink_mbps=0.1", "fleet.latency_seconds=0.5"]
STALE = {"seconds": 0}


class Alone:
    """One client of each recipe. It has chosen its forward, so that the clients that are made of it need not."""

    def __init__(self) -> None:
        self.clients: dict[str, Client] = {}

    def under(self, spec: RunSpec) -> Client:
        recipe = spec.recipe.name
        if recipe not in self.clients:
            self.clients[recipe] = build(spec).client
            self.clients[recipe]._trainer(spec.local, 1)
        return self.clients[recipe].under(spec)


@pytest.fixture(scope="module")
def alone() -> Alone:
    return Alone()


def trained(spec: RunSpec, grid: NodeGrid, store: MemoryStore | None = None) -> tuple[bytes, list[Row]]:
    coordinator = Coordinator(spec, grid, store or MemoryStore())
    rows = [{**row, **STALE} for row in coordinator.rounds()]
    return coordinator.adapter().tobytes(), rows


def simulated(alone: Alone, spec: RunSpec) -> tuple[bytes, list[Row]]:
    return trained(spec, with_clock(LocalGrid(alone.under(spec))))


class Counting(LocalGrid):
    """Which nodes have been trained."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self.trained: list[int] = []

    def send(self, assignments: Sequence[Assignment]) -> None:
        self.trained += [asked.node for asked in assignments]
        super().send(assignments)


# --------------------------------------------------------------------------------------------- the course of a round


def paths(times: dict[int, list[int | None]]) -> Callable[[int, int, int], int | None]:
    """Each node's time in each attempt; the last one stands for those after it."""
    return lambda node, attempt, at: times[node][min(attempt, len(times[node])) - 1]


def here(nodes: Sequence[int], at: int) -> int:
    return at


def test_a_round_ends_with_the_last_of_those_that_are_enough() -> None:
    times = paths({1: [30], 2: [10], 3: [20], 4: [None], 5: [99]})
    cohort = [1, 2, 3, 4, 5]
    assert course(cohort, times, here, 100, enough=3, least=1, deadline=50) == Course(frozenset({1, 2, 3}), 2, 130)
    assert course(cohort, times, here, 100, enough=2, least=1, deadline=50) == Course(frozenset({2, 3}), 2, 120)
    assert course(cohort, times, here, 100, enough=4, least=1, deadline=50) == Course(frozenset({1, 2, 3}), 2, 150)
    assert course(cohort, times, here, 100, enough=4, least=1, deadline=99) == Course(frozenset({1, 2, 3, 5}), 1, 199)
    assert course([], times, here, 100, enough=0, least=0, deadline=50) == Course(frozenset(), 0, 100)


def test_with_too_few_answers_the_rest_is_asked_again() -> None:
    times = paths({1: [10], 2: [None, None, 20], 3: [None]})
    assert course([1, 2, 3], times, here, 0, enough=3, least=2, deadline=50) == Course(frozenset({1, 2}), 1, 150)
    assert course([1, 2, 3], times, here, 0, enough=2, least=2, deadline=50) == Course(frozenset({1, 2}), 1, 120)
    never = course([1, 2, 3], times, here, 0, enough=3, least=3, deadline=50)
    assert (len(never.arrived), never.end) == (2, 50 * MOST_ATTEMPTS)
    later = course([1, 2, 3], times, lambda nodes, at: at + 1000, 0, enough=2, least=2, deadline=50)
    assert later == Course(frozenset({1, 2}), 1, 50 + 1000 + 50 + 1000 + 20)
    gone = course([1, 2, 3], times, lambda nodes, at: FOREVER, 0, enough=2, least=2, deadline=50)
    assert gone.arrived == {1}


@given(st.lists(st.none() | st.integers(0, 100), max_size=12), st.integers(0, 100), st.data())
def test_a_course_takes_the_first_that_are_in_time(times: list[int | None], deadline: int, data: st.DataObject) -> None:
    enough = data.draw(st.integers(min(1, len(times)), len(times)))
    found = course(range(len(times)), lambda node, *_: times[node], here, 7, enough=enough, least=0, deadline=deadline)
    in_time = sorted((time, node) for node, time in enumerate(times) if time is not None and time <= deadline)
    assert found.arrived == {node for _, node in in_time[:enough]}
    assert found.lost == len(times) - len(in_time)
    last = in_time[enough - 1][0] if 0 < enough <= len(in_time) else 0 if enough == 0 else deadline
    assert found.end == 7 + last


# ------------------------------------------------------------------------------------------------------------ devices


def test_the_time_of_a_node_is_its_bytes_and_examples() -> None:
    fleet = Fleet(examples_per_second=4, downlink_mbps=8, uplink_mbps=2, latency_seconds=0.25)
    assert seconds(fleet, 12, 3_000_000, 1_000_000) == pytest.approx(0.5 + 3 + 3 + 4)
    assert seconds(fleet, 12, 3_000_000, 1_000_000, speed=2, link=0.5) == pytest.approx(0.5 + 1.5 + 6 + 8)
    assert seconds(Fleet(), 12, 3_000_000, 1_000_000) == 0


def test_devices_are_log_normal_about_their_median_and_keyed() -> None:
    devices = Devices(Fleet(examples_per_second=10, speed_spread=0.7), 3)
    logs = np.log([devices.seconds(node, 10, 1, 1) for node in range(2000)])
    assert abs(logs.mean()) < 0.06
    assert logs.std() == pytest.approx(0.7, rel=0.07)
    assert devices.seconds(5, 10, 1, 1) == devices.seconds(5, 10, 9, 9)
    assert devices.seconds(5, 10, 1, 1) != Devices(devices.fleet, 4).seconds(5, 10, 1, 1)
    links = Devices(Fleet(uplink_mbps=8, link_spread=0.7, speed_spread=0.7), 3)
    ups = np.log([links.seconds(node, 10, 0, 10**6) for node in range(2000)])
    assert ups.std() == pytest.approx(0.7, rel=0.07)
    assert abs(np.corrcoef(logs, ups)[0, 1]) < 0.1, "a fast processor does not come with a fast link"


def test_dropouts_are_as_frequent_as_they_are_said_to_be() -> None:
    devices = Devices(Fleet(dropout=0.3), 3)
    dropped = [devices.drops(node, round_, 1) for node in range(50) for round_ in range(40)]
    assert np.mean(dropped) == pytest.approx(0.3, abs=0.05)
    assert not any(Devices(Fleet(), 3).drops(node, 1, 1) for node in range(100))
    assert [devices.drops(node, 1, 1) for node in range(50)] != [devices.drops(node, 1, 2) for node in range(50)]


@given(
    st.integers(1, 60), st.integers(1, 20), st.none() | st.integers(1, 9), st.none() | st.sampled_from([0.5, 1.0, 2.0])
)
def test_examples_are_those_of_the_batches(count: int, size: int, steps: int | None, epochs: float | None) -> None:
    local = Local(batch_size=size, steps=steps, epochs=None if steps else epochs)
    batches = plan_batches(np.full(count, 5), local, 0, 1, 0)
    assert abs(examples_of(count, local) - sum(map(len, batches))) < max(1, len(batches))
    assert examples_of(0, local) == 0


# --------------------------------------------------------------------------------------------------------- whole runs


def test_a_fleet_that_takes_no_time_changes_no_byte(spec_of: SpecOf, alone: Alone) -> None:
    spec = spec_of()
    plain = trained(spec, LocalGrid(alone.under(spec)))
    fleet = simulated(alone, spec.set("fleet.dropout=0.0"))
    assert fleet[0] == plain[0]
    assert [{k: v for k, v in row.items() if k not in (TIME, "lost")} for row in fleet[1]] == plain[1]
    assert [(row[TIME], row["lost"]) for row in fleet[1]] == [(0.0, 0)] * 2
    assert all(TIME not in row for row in plain[1])


def test_what_is_slow_but_in_time_changes_no_byte_either(spec_of: SpecOf, alone: Alone) -> None:
    spec = spec_of(*PHONES)
    adapter, rows = simulated(alone, spec)
    assert adapter == simulated(alone, spec_of())[0]
    assert 0 < rows[0][TIME] < rows[1][TIME], "the clock goes on from round to round"
    faster = simulated(alone, spec.set("fleet.examples_per_second=4", "fleet.uplink_mbps=0.2"))[1]
    assert faster[1][TIME] - 2 == pytest.approx((rows[1][TIME] - 2) / 2)


def test_the_clock_counts_the_bytes_that_travel(spec_of: SpecOf, alone: Alone) -> None:
    """With a link that carries a megabyte a second and nothing else, a round lasts its bytes of one node."""
    spec = spec_of("fleet.uplink_mbps=8", "fleet.downlink_mbps=8")
    _, rows = simulated(alone, spec)
    moved = sum(row["bytes_up"] + row["bytes_down"] for row in rows) / rows[0]["nodes"]
    assert rows[-1][TIME] == pytest.approx(moved / 1e6, abs=1e-5)


def test_stragglers_are_lost_at_the_deadline_and_not_trained(spec_of: SpecOf, alone: Alone) -> None:
    slow = spec_of(*PHONES)
    grid = FleetGrid(LocalGrid(alone.under(slow)), slow.fleet or Fleet())
    times = sorted(grid._duration(a) for a in [Assignment("run", 1, 1, n, "", b"x" * 1000) for n in grid.nodes()])
    spec = slow.set(f"participation.deadline_seconds={times[3] / SECOND}")
    counting = Counting(alone.under(spec))
    adapter, rows = trained(spec, FleetGrid(counting, slow.fleet or Fleet()))
    assert rows[0]["nodes"] + rows[0]["lost"] == 6
    assert 0 < rows[0]["lost"] < 6
    assert len(counting.trained) == sum(row["nodes"] for row in rows)
    assert rows[-1][TIME] == pytest.approx(2 * times[3] / SECOND)
    assert adapter != simulated(alone, slow)[0]


def test_of_spares_the_first_that_come_are_taken(spec_of: SpecOf, alone: Alone) -> None:
    fixed = ["participation.sampling=fixed", "participation.rate=0.5"]
    spec = spec_of(*PHONES, *fixed, "participation.spare=1.0")
    counting = Counting(alone.under(spec))
    _, rows = trained(spec, with_clock(counting))
    _, waited = simulated(alone, spec_of(*PHONES))
    assert [(row["nodes"], row["lost"]) for row in rows] == [(3, 0)] * 2
    assert rows[-1][TIME] < waited[-1][TIME], "all six are asked, and the slowest are not waited for"
    assert sorted(counting.trained[:3]) == sorted(counting.trained[3:]), "the same are the quickest in each round"


def test_dropouts_are_not_trained_except_where_a_node_keeps_something(spec_of: SpecOf, alone: Alone) -> None:
    top_k = ["recipe.name=fedsvd", "wire.codec=top-k", "wire.density=0.3"]
    for overrides, everybody in (([], False), (top_k, True)):
        spec = spec_of(*overrides, "fleet.dropout=0.5", "run.rounds=3")
        counting = Counting(alone.under(spec))
        _, rows = trained(spec, with_clock(counting))
        arrived = sum(row["nodes"] for row in rows)
        assert 0 < arrived < 18
        assert sum(row["lost"] for row in rows) == 18 - arrived
        assert len(counting.trained) == (18 if everybody else arrived)


def test_a_round_that_all_have_left_is_tried_again(spec_of: SpecOf, alone: Alone) -> None:
    spec = spec_of("fleet.dropout=0.9", "run.rounds=6", "participation.minimum=2", "participation.deadline_seconds=50")
    _, rows = simulated(alone, spec)
    lasted = np.diff([0.0, *(row[TIME] for row in rows)])
    assert all(row["nodes"] >= 2 for row in rows)
    assert set(lasted % 50) == {0}
    assert max(lasted) >= 100


def test_a_fleet_that_never_makes_it_is_named(spec_of: SpecOf, alone: Alone) -> None:
    spec = spec_of("fleet.latency_seconds=60", "participation.deadline_seconds=100")
    with pytest.raises(
        RunError, match=r"round 1: in 20 attempts of 100 s at most, 0 of 6 .* takes 120 s\. Raise particip"
    ):
        simulated(alone, spec)


def test_only_those_that_are_there_take_part(spec_of: SpecOf, alone: Alone) -> None:
    spec = spec_of("fleet.available=0.4", "fleet.latency_seconds=3000", "participation.deadline_seconds=7200")
    spec = spec.set("run.rounds=12", "local.steps=1")
    counting = Counting(alone.under(spec))
    _, rows = trained(spec, with_clock(counting))
    assert {row["nodes"] + row["lost"] for row in rows} <= {2, 3}
    assert any(row["lost"] for row in rows), "who leaves before it has answered is lost"
    assert set(counting.trained) == set(range(6))


def test_nobody_there_lets_the_clock_go_on(spec_of: SpecOf, alone: Alone, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"node": 2, "from": 500, "until": 580}\n{"node": 3, "from": 900, "until": 980}')
    spec = spec_of(f"fleet.trace='{path}'", "fleet.latency_seconds=40")
    counting = Counting(alone.under(spec))
    _, rows = trained(spec, with_clock(counting))
    assert counting.trained == [2, 3]
    assert [row[TIME] for row in rows] == [580, 980]
    with pytest.raises(RunError, match=r"nobody is there at 980 s .* give fleet\.trace lines"):
        simulated(alone, spec.set("run.rounds=3", "participation.deadline_seconds=10000"))


def test_a_cohort_that_has_left_is_waited_for(spec_of: SpecOf, alone: Alone, tmp_path: Path) -> None:
    """Its draw stands: whoever was drawn just before leaving is asked again when it is back."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"node": 2, "from": 500, "until": 600}\n{"node": 2, "from": 5000, "until": 6000}')
    _, rows = simulated(alone, spec_of(f"fleet.trace='{path}'", "fleet.latency_seconds=40"))
    assert [row[TIME] for row in rows] == [580, 5080]


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe.name=fedsvd", "wire.codec=top-k", "wire.density=0.3"],
        ["participation.sampling=fixed", "participation.rate=0.5", "participation.spare=0.5"],
    ],
    ids=["top-k", "spares"],
)
def test_workers_change_neither_bytes_nor_clock(
    spec_of: SpecOf, alone: Alone, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The portions, and what is kept of nodes, go to another client; `test_workers.py` holds processes to the same."""
    monkeypatch.setattr(grid_module, "PORTION", 2)
    spec = spec_of(*PHONES, *overrides, "fleet.dropout=0.2", "run.rounds=3")
    client = alone.under(spec)
    grid = WorkerGrid(client, Here(alone.under(spec)))
    assert trained(spec, with_clock(grid)) == simulated(alone, spec)


class Dying(VirtualNodes):
    """A grid whose process ends after so many answers in all."""

    def __init__(self, grid: LocalGrid, answers: int) -> None:
        super().__init__(grid.client)
        self.grid, self.left = grid, answers

    def send(self, assignments: Sequence[Assignment]) -> None:
        self.grid.send(assignments)

    def replies(self, timeout: float) -> Iterator[Update | Failure]:
        for reply in self.grid.replies(timeout):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield reply


@pytest.mark.parametrize("answers", [0, 3, 7])
@pytest.mark.parametrize(
    "overrides",
    [["recipe.name=fedsvd", "wire.codec=top-k", "wire.density=0.3"], ["recipe.name=diloco", "recipe.fragments=2"], []],
    ids=["top-k", "diloco", "plain"],
)
def test_a_resumed_run_has_the_same_bytes_and_clock(
    spec_of: SpecOf, alone: Alone, overrides: list[str], answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Portions of one node: how a round is cut is part of its bytes, and a resumed round is cut anew."""
    monkeypatch.setattr(grid_module, "PORTION", 1)
    spec = spec_of(*PHONES, *overrides, "fleet.dropout=0.2", "fleet.available=0.8", "run.rounds=3")
    whole, expected = simulated(alone, spec)
    client, store = alone.under(spec), MemoryStore()
    with pytest.raises(KeyboardInterrupt):
        trained(spec, with_clock(Dying(LocalGrid(client), answers)), store)
    resumed, rows = trained(spec, with_clock(LocalGrid(client)), store)
    assert resumed == whole
    assert rows == expected[-len(rows) :]


# ------------------------------------------------------------------------------------------------------------ privacy

CLIENTS = ["recipe.name=ffa", "recipe.weighting=uniform", "privacy.unit=client", "privacy.noise=simulation"]
CLIENTS += ["privacy.epsilon=100", "privacy.noise_multiplier=1.0"]


def test_a_private_round_lasts_its_deadline_and_names_nobody(spec_of: SpecOf, alone: Alone) -> None:
    spec = spec_of(*CLIENTS, *PHONES, "fleet.dropout=0.2", "participation.deadline_seconds=400", "run.rounds=3")
    _, rows = simulated(alone, spec)
    assert [row[TIME] for row in rows] == [400, 800, 1200]
    assert not {"lost", "nodes"} & set().union(*rows)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["participation.sampling=poisson", "participation.minimum=0"], "available = 0.5 is illegal .*all clients"),
        (["participation.sampling=fixed"], 'sampling = "fixed": .* Nearest legal: privacy.mechanism = "banded"'),
        ([], r"needs privacy\.population"),
    ],
)
def test_a_draw_from_all_needs_all(spec_of: SpecOf, overrides: list[str], why: str) -> None:
    private = spec_of(*CLIENTS, *overrides)
    with pytest.raises(SpecError, match=why):
        fleet_of(private.set("fleet.available=0.5"))
    assert fleet_of(private.set("fleet.dropout=0.5")) is not None, "denominators are constant, so a dropout is allowed"


def test_turns_need_nobody_to_be_there(spec_of: SpecOf) -> None:
    spec = spec_of(*CLIENTS, "privacy.mechanism=banded", "privacy.separation=2", "privacy.population=6")
    assert fleet_of(spec.set("fleet.available=0.5")) is not None
    with pytest.raises(SpecError, match="exchanges of codes have no simulated clock"):
        fleet_of(spec_of("recipe.name=onebyte", "fleet.dropout=0.5").model_copy(update={"local": Local()}))


# ------------------------------------------------------------------------------------------------- a large population


class Population(Sequence[int]):
    """A million nodes that count who looks at them, and cannot be walked through."""

    def __init__(self, size: int = 1_000_000) -> None:
        self.size, self.looked_at = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        self.looked_at += 1
        return int(place)

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("somebody walks through all nodes")


class Million(FakeGrid):
    asked = 0

    def population(self) -> Sequence[int]:
        return self.there

    def rank(self, node: int) -> int:
        type(self).asked += 1
        return 0


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_a_draw_looks_at_its_cohort_alone(sampling: Any) -> None:
    nodes = Population()
    cohort = draw(nodes, Participation(sampling=sampling, rate=1e-4), 3, 1)
    assert nodes.looked_at == len(cohort) == len(set(cohort))
    assert 60 < len(cohort) < 140
    assert list(cohort) == sorted(cohort)
    assert cohort != draw(nodes, Participation(sampling=sampling, rate=1e-4), 3, 2)
    with pytest.raises(AssertionError, match="walks"):
        draw(Population(ORDERED), Participation(sampling=sampling, rate=0.5), 3, 1)


def test_a_large_draw_is_uniform() -> None:
    count = ORDERED + 1
    tenths = np.zeros(10)
    for round_ in range(200):
        cohort = draw(range(count), Participation(sampling="fixed", rate=0.01), 3, round_)
        tenths += np.bincount(np.array(cohort) * 10 // count, minlength=10)
    expected = tenths.sum() / 10
    assert ((tenths - expected) ** 2 / expected).sum() < 40  # chi-square, 9 degrees of freedom: once in 10⁵


def test_a_round_of_a_million_asks_its_cohort_alone() -> None:
    spec = fake_spec("recipe.name=fedit", "participation.sampling=fixed", "participation.rate=1e-5", "run.rounds=2")
    nodes = Population()
    grid = Million(spec, there=nodes)
    assert isinstance(grid, Virtual)
    assert not isinstance(grid, Clocked)
    rows = list(Coordinator(spec, grid, MemoryStore()).rounds())
    assert [row["nodes"] for row in rows] == [10, 10]
    assert nodes.looked_at == Million.asked == 20


def test_a_grid_of_a_fleet_is_what_the_coordinator_asks_for(spec_of: SpecOf, alone: Alone) -> None:
    spec = spec_of("fleet.dropout=0.1", "fleet.available=0.5")
    grid = with_clock(LocalGrid(alone.under(spec)))
    assert isinstance(grid, NodeGrid)
    assert isinstance(grid, Clocked)
    assert isinstance(grid, Virtual)
    grid.begin([{"round": 3, TIME: 1.25 * DAY / SECOND}])
    assert grid.now == 1.25 * DAY
