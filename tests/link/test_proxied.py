"""A run over bad links: every node comes back, no round is late, and the result is that of a good link, to the bit."""

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedapt.server.coordinator import Coordinator
from fedapt.server.link.grid import LinkGrid
from fedapt.server.link.hub import Hub
from fedapt.server.store import MemoryStore

from .federation import BRISK, Arithmetic, OpenDoor, faults, layout_of, link_of, nodes_here, recomputed, spec_of, until
from .proxy import FAULTS, Point, proxy, schedule

NODES, WIDTH, DEADLINE = [1, 2, 3], 30_000, 20.0
PAYLOAD = 4 * layout_of(WIDTH).size
MARGIN = 5.0


def through(schedules: Sequence[list[Point]], folder: Path, rounds: int) -> tuple[bytes, list[Point], int]:
    """A run with a proxy before each node: the adapter, the faults that were met, and the connections.

    Once the faults of the schedules are through, every node has to be back.
    """
    spec = spec_of(len(NODES), rounds, f"participation.deadline_seconds={DEADLINE}")
    with ExitStack() as stack:
        limits = BRISK.model_copy(update={"absence": DEADLINE})
        hub = stack.enter_context(Hub("127.0.0.1:0", OpenDoor(), credentials=None, limits=limits))
        proxies = [stack.enter_context(proxy(hub.port, points)) for points in schedules]
        links = [link_of(p.port, Arithmetic(node, WIDTH), node, folder) for p, node in zip(proxies, NODES, strict=True)]
        stack.enter_context(nodes_here(links))
        coordinator = Coordinator(spec, LinkGrid(hub, spec), MemoryStore())
        last = time.monotonic()
        for row in coordinator.rounds():
            assert time.monotonic() - last < DEADLINE + MARGIN
            assert row["nodes"] == len(NODES), "a round of which a node's part was lost"
            last = time.monotonic()
        until(lambda: hub.nodes() == NODES, "every node has come back")
        met = [point for p in proxies for point in p.met]
        return coordinator.adapter().tobytes(), met, sum(p.connections for p in proxies)


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedapt.client.link.HELLO_SECONDS", 1.0)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    adapter, met, connections = through([[], [], []], tmp_path_factory.mktemp("clean"), 2)
    assert (met, connections) == ([], len(NODES))
    return adapter


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(clean: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    """In the head of a connection, in the middle of a frame that goes up, and of one that goes down."""
    chance, schedules = random.Random(fault), []
    for up in (True, False, True):
        bytes_ = [chance.randrange(10, 300), chance.randrange(1000, PAYLOAD)]
        schedules.append([Point(fault, up, byte) for byte in bytes_])  # type: ignore[arg-type]
    adapter, met, connections = through(schedules, tmp_path, 2)
    assert {point.fault for point in met} == {fault}
    assert adapter == clean
    assert connections > len(NODES) or fault in ("delay", "throttle")
    assert faults(caplog.records) == []


@pytest.mark.slow
def test_a_hundred_faults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    points = schedule(108, key=7, most=3 * PAYLOAD)
    rounds = 20
    clean, *_ = through([[], [], []], tmp_path / "clean", rounds)
    assert abs(recomputed(layout_of(WIDTH), NODES, rounds)).max() > 0.5
    met = 0
    for number in range(6):
        part = points[18 * number : 18 * (number + 1)]
        schedules = [part[node::3] for node in range(3)]
        adapter, points_met, _ = through(schedules, tmp_path / str(number), rounds)
        assert adapter == clean
        met += len(points_met)
    assert met >= 100
    assert faults(caplog.records) == []
