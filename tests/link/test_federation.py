"""Server and nodes over real sockets: rounds, and everything that a link or a node can do to them."""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedapt.client.kept import Kept
from fedapt.client.link import Backoff, Link, RejectedError
from fedapt.outputs import spec_toml
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.blobs import CHUNK_BYTES, INLINE_BYTES
from fedapt.protocols.errors import RunError
from fedapt.protocols.identity import TrustError
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Update
from fedapt.server.app import server_app
from fedapt.server.coordinator import Coordinator
from fedapt.server.flower import FlowerGrid
from fedapt.server.grid import Failure, NodeGrid
from fedapt.server.link import desk as desks
from fedapt.server.link.desk import Desk
from fedapt.server.link.grid import LinkGrid
from fedapt.server.link.hub import Hub
from fedapt.server.link.limits import Limits
from fedapt.server.link.session import Session
from fedapt.server.link.stopped import StoppedError
from fedapt.server.store import MemoryStore, Row

from .federation import (
    BRISK,
    Arithmetic,
    OpenDoor,
    faultless,
    layout_of,
    link_of,
    nodes_here,
    recomputed,
    spec_of,
    until,
)

NODES, ROUNDS, WIDTH = [1, 2, 3], 4, 40
WIDE = 40_000
"""Two chunks and an end: what does not come inline."""


@pytest.fixture
def door() -> OpenDoor:
    return OpenDoor()


@pytest.fixture
def hub(door: OpenDoor, caplog: pytest.LogCaptureFixture) -> Iterator[Hub]:
    with faultless(door, BRISK, caplog) as hub:
        yield hub


def trained(hub: Hub, spec: RunSpec) -> tuple[bytes, list[Row], MemoryStore]:
    """A whole run: the last adapter, the rows and the store."""
    store = MemoryStore()
    coordinator = Coordinator(spec, LinkGrid(hub, spec), store)
    rows = list(coordinator.rounds())
    return coordinator.adapter().tobytes(), rows, store


def links(port: int, folder: Path, width: int = WIDTH, nodes: Sequence[int] = NODES) -> list[Link]:
    return [link_of(port, Arithmetic(node, width), node, folder) for node in nodes]


def right(adapter: bytes, width: int = WIDTH, rounds: int = ROUNDS) -> bool:
    """Whether an adapter is what somebody else computes."""
    wanted = recomputed(layout_of(width), NODES, rounds)
    return bool(np.allclose(np.frombuffer(adapter, np.float32), wanted, rtol=0, atol=1e-5))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """The adapter of a run that nobody disturbs, by width."""
    adapters = {}
    for width in (WIDTH, WIDE):
        with (
            Hub("127.0.0.1:0", OpenDoor(), credentials=None, limits=BRISK) as hub,
            nodes_here(links(hub.port, tmp_path_factory.mktemp("clean"), width)),
        ):
            adapters[width] = trained(hub, spec_of(len(NODES), ROUNDS))[0]
        assert right(adapters[width], width)
    return adapters


@pytest.mark.parametrize("width", [WIDTH, WIDE])
def test_a_run_comes_to_what_it_must(hub: Hub, tmp_path: Path, clean: dict[int, bytes], width: int) -> None:
    with nodes_here(links(hub.port, tmp_path, width)):
        adapter, rows, _ = trained(hub, spec_of(len(NODES), ROUNDS))
        until(lambda: not list(tmp_path.glob("*/*.result")), "what was received is forgotten", 5)
    assert adapter == clean[width]
    assert [(row["nodes"], row["refused"], row["failed"]) for row in rows] == ROUNDS * [(3, 0, 0)]


def test_nodes_that_come_late_are_waited_for(hub: Hub, tmp_path: Path, clean: dict[int, bytes]) -> None:
    spec, adapters = spec_of(len(NODES), ROUNDS), list[bytes]()
    running = threading.Thread(target=lambda: adapters.append(trained(hub, spec)[0]))
    with nodes_here(links(hub.port, tmp_path / "a", nodes=NODES[:2])):
        running.start()
        until(lambda: hub.nodes() == NODES[:2], "two nodes are here")
        with nodes_here(links(hub.port, tmp_path / "b", nodes=NODES[2:])):
            running.join()
    assert adapters == [clean[WIDTH]]


class Grudging(Grid):
    """A grid that shows no more than Flower's own interface."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)


@pytest.mark.parametrize("grudging", [False, True], ids=["narrow", "messages"])
def test_the_server_app_runs_on_it_unchanged(hub: Hub, tmp_path: Path, clean: dict[int, bytes], grudging: bool) -> None:
    spec, store = spec_of(len(NODES), ROUNDS), MemoryStore()
    context = Context(1, 0, {}, RecordDict(), {"spec": "\n" + spec_toml(spec)})
    with nodes_here(links(hub.port, tmp_path)):
        whole = LinkGrid(hub, spec)
        grid: Grid = Grudging(whole) if grudging else whole
        assert isinstance(grid, NodeGrid) != grudging
        server_app(store)(grid, context)
    described = Coordinator(spec, FlowerGrid(grid), store)
    assert described.adapter().tobytes() == clean[WIDTH]


def test_messages_to_nobody_are_errors_of_their_own(hub: Hub, tmp_path: Path) -> None:
    spec = spec_of(1, 1)
    with nodes_here(links(hub.port, tmp_path, nodes=[1])):
        grid = LinkGrid(hub, spec)
        asked = grid.create_message(RecordDict(), "evaluate", 1, "1")
        empty = grid.create_message(RecordDict(), "train", 1, "1")
        numbers = list(grid.push_messages([asked, empty]))
        replies = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(numbers)}
    assert set(replies) == set(numbers)
    assert all(reply.has_error() for reply in replies.values())


class Repeating(Desk):
    """Whatever comes from a node comes ten times, and once more after everything else that came."""

    def __init__(self, node: int, limits: Limits) -> None:
        super().__init__(node, limits)
        self._earlier: list[Callable[[], None]] = []

    def _again(self, event: Callable[[], None]) -> None:
        for _ in range(10):
            event()
        for earlier in self._earlier[-20:]:
            earlier()
        self._earlier.append(event)

    def result(self, result: pb.Result) -> None:
        self._again(lambda: Desk.result(self, result))

    def chunk(self, chunk: pb.Chunk) -> None:
        self._again(lambda: Desk.chunk(self, chunk))

    def ask(self, asked: desks.Asked) -> None:
        """And what goes to it goes ten times."""
        for _ in range(10):
            super().ask(asked)


@pytest.mark.parametrize("width", [WIDTH, WIDE])
def test_ten_times_and_reordered_and_stale_is_as_once(
    hub: Hub, tmp_path: Path, clean: dict[int, bytes], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr("fedapt.server.link.hub.Desk", Repeating)
    with nodes_here(links(hub.port, tmp_path, width)):
        adapter, rows, _ = trained(hub, spec_of(len(NODES), ROUNDS))
    assert adapter == clean[width]
    assert all(row["refused"] == 0 for row in rows)


@dataclass
class Counting:
    """A worker that counts what it is asked to do, and may wait for leave."""

    worker: Arithmetic
    asked: Counter[bytes] = field(default_factory=Counter)
    leave: threading.Event = field(default_factory=threading.Event)

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        self.asked[question.id] += 1
        assert self.leave.wait(20)
        return self.worker.work(question, spec, payload)

    def exchange(self, body: bytes) -> bytes:
        return body


def test_a_blob_travels_once_although_two_questions_name_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same time, and later: it is known by its hash."""
    sent: Counter[bytes] = Counter()
    send = desks.Desk.want

    def want(self: Desk, asked: pb.Want) -> None:
        sent[asked.sha256] += 1
        send(self, asked)

    monkeypatch.setattr(desks.Desk, "want", want)
    payload, spec = bytes(3 * CHUNK_BYTES), spec_of(1, 1)
    worker = Counting(Arithmetic(1, WIDTH))
    worker.leave.set()
    with nodes_here([link_of(hub.port, worker, 1, tmp_path)]):
        grids = [LinkGrid(hub, spec), LinkGrid(hub, spec)]
        grids[0].nodes()
        for round_ in (1, 3):
            for number, grid in enumerate(grids):
                grid.send([Assignment("run", round_ + number, 1, 1, "v", payload)])
            for grid in grids:
                (reply,) = grid.replies(20)
                assert isinstance(reply, Update)
    assert list(sent.values()) == [1]
    assert sorted(worker.asked.values()) == [1, 1, 1, 1]


def session_of(hub: Hub) -> Session | None:
    """Node 1's stream: it has one at most."""
    return next(iter(list(hub._sessions)), None)


def is_back(hub: Hub, before: Session) -> bool:
    """Whether node 1 has another stream than before."""
    return session_of(hub) not in (None, before)


def test_a_stream_that_breaks_while_a_node_works_costs_nothing(hub: Hub, tmp_path: Path, door: OpenDoor) -> None:
    """Not even the work: it is done once, whatever number of streams it takes to tell."""
    spec, worker = spec_of(1, 1), Counting(Arithmetic(1, WIDTH))
    with nodes_here([link_of(hub.port, worker, 1, tmp_path)]):
        grid = LinkGrid(hub, spec)
        grid.send([Assignment("run", 1, 1, 1, "v", bytes(4 * layout_of(WIDTH).size))])
        until(lambda: worker.asked, "the node works")
        for _ in range(5):
            session = until(lambda: session_of(hub), "the node is here")
            session.close(pb.Down(bye=pb.Bye(reason="a break")))
            until(partial(is_back, hub, session), "the node is back")
        worker.leave.set()
        (reply,) = grid.replies(20)
    assert isinstance(reply, Update)
    assert list(worker.asked.values()) == [1]


def test_what_a_dead_node_has_done_is_told_by_its_next_process(hub: Hub, tmp_path: Path) -> None:
    spec, worker = spec_of(1, 1), Counting(Arithmetic(1, WIDTH))
    worker.leave.set()
    grid, about = LinkGrid(hub, spec), Assignment("run", 1, 1, 1, "v", bytes(4 * layout_of(WIDTH).size))
    question = link.question(pb.TRAIN, about, link.blob(spec.to_json().encode()), link.blob(about.payload))
    result, payload = worker.worker.work(question, b"", about.payload)
    Kept(tmp_path / "1").keep(result, payload)
    with nodes_here([link_of(hub.port, worker, 1, tmp_path)]):
        until(lambda: hub.nodes() == [1], "the node is here")
        until(lambda: not list(tmp_path.glob("1/*.result")), "a stale result is given up")
        Kept(tmp_path / "1").keep(result, payload)
        grid.send([about])
        (reply,) = grid.replies(20)
    assert isinstance(reply, Update)
    assert not worker.asked


@dataclass
class Boastful:
    """A node that claims 64 MB for its update."""

    worker: Arithmetic

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        result, good = self.worker.work(question, spec, payload)
        if question.kind == pb.TRAIN:
            result.payload.CopyFrom(pb.Blob(sha256=bytes(32), size=64_000_000))
        return result, good

    def exchange(self, body: bytes) -> bytes:
        return body


def test_a_node_can_send_as_much_as_an_update_has(hub: Hub, tmp_path: Path) -> None:
    """The grid knows how much that is from the description, its own or that of the run that goes on."""
    spec, layout = spec_of(1, 1), layout_of(WIDE)
    assigned = Assignment("run", 1, 1, 1, "v", bytes(4 * layout.size))
    with nodes_here([link_of(hub.port, Boastful(Arithmetic(1, WIDE)), 1, tmp_path)]):
        first = LinkGrid(hub, spec)
        description = first.describe()
        for number, grid in enumerate((first, LinkGrid(hub, spec, description=description)), 1):
            grid.send([replace(assigned, round=number)])
            (reply,) = grid.replies(20)
            assert isinstance(reply, Failure)
            assert reply.reason == (
                f"a result of 64000000 bytes; at most {INLINE_BYTES + 4 * layout.size} for what was asked"
            )


def test_what_is_withdrawn_is_not_begun(hub: Hub, tmp_path: Path) -> None:
    spec, worker = spec_of(1, 1), Counting(Arithmetic(1, WIDTH))
    payload = bytes(4 * layout_of(WIDTH).size)
    with nodes_here([link_of(hub.port, worker, 1, tmp_path)]):
        grid = LinkGrid(hub, spec)
        grid.nodes()
        for round_ in (1, 2):
            grid.send([Assignment("run", round_, 1, 1, "v", payload)])
            until(lambda: worker.asked, "the node works")
        grid.send([Assignment("run", 3, 1, 1, "v", payload)])
        worker.leave.set()
        (reply,) = grid.replies(20)
        assert isinstance(reply, Update)
        assert reply.round == 3
        until(lambda: not list(tmp_path.glob("1/*.result")), "nothing is kept of what nobody wants")
    assert len(worker.asked) == 2, "the second was withdrawn before its turn"


def test_a_node_that_is_gone_fails_and_ends_no_wait_of_others(hub: Hub, tmp_path: Path) -> None:
    spec = spec_of(1, 1)
    object.__setattr__(hub.limits, "absence", 0.3)
    with nodes_here(links(hub.port, tmp_path, nodes=[1])):
        grid = LinkGrid(hub, spec)
        grid.send([Assignment("run", 1, 1, node, "v", bytes(4 * layout_of(WIDTH).size)) for node in (1, 2)])
        replies = {reply.node: reply for reply in grid.replies(20)}
    assert isinstance(replies[1], Update)
    assert replies[2] == Failure(2, "the node has left")


def test_a_wait_can_be_called_off(hub: Hub) -> None:
    stopping = threading.Event()
    grid = LinkGrid(hub, spec_of(1, 1), stopping=stopping)
    threading.Timer(0.1, stopping.set).start()
    with pytest.raises(StoppedError):
        grid.nodes()
    grid.send([Assignment("run", 1, 1, 1, "v", b"")])
    with pytest.raises(StoppedError):
        list(grid.replies(20))


class RanOut:
    """A certificate that has; somebody counts how often that is looked at."""

    def __init__(self) -> None:
        self.looked = 0

    def due(self) -> bytes | None:
        return None

    def accept(self, chain: bytes) -> None:
        raise NotImplementedError

    def require_valid(self) -> None:
        self.looked += 1
        raise TrustError("it expired")


def test_a_node_whose_certificate_ran_out_stops_trying_where_it_is_not_let_in(
    hub: Hub, door: OpenDoor, tmp_path: Path
) -> None:
    """Its clock may be wrong: while the server lets it in, it does not matter what that says."""
    own = link_of(hub.port, Arithmetic(1, WIDTH), 1, tmp_path)
    own.renewal = renewal = RanOut()

    def visit() -> None:
        with nodes_here([own]) as (future,):
            until(lambda: hub.nodes() == [1], "the node is here")
            assert not renewal.looked
            door.refused.add(1)
            until(future.done, "the node gives up", 20)

    with pytest.raises(TrustError, match="it expired"):
        visit()
    assert renewal.looked == 1


class Broken:
    """A worker that fails in every way that there is."""

    def __init__(self, fault: Exception) -> None:
        self.fault = fault

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        raise self.fault

    def exchange(self, body: bytes) -> bytes:
        return body


@pytest.mark.parametrize("fault", [RunError("out of data"), ZeroDivisionError("row 17"), MemoryError()])
def test_a_worker_that_fails_says_why_and_lives_on(
    door: OpenDoor, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    spec = spec_of(1, 1)
    with (
        Hub("127.0.0.1:0", door, credentials=None, limits=BRISK) as hub,
        nodes_here([link_of(hub.port, Broken(fault), 1, tmp_path)]),
    ):
        grid = LinkGrid(hub, spec)
        for round_ in (1, 2):
            grid.send([Assignment("run", round_, 1, 1, "v", b"")])
            (reply,) = grid.replies(20)
            assert isinstance(reply, Failure)
            assert (
                str(fault) if isinstance(fault, RunError) else f"{type(fault).__name__} at this site"
            ) == reply.reason
        with pytest.raises(RunError, match="no node could describe"):
            grid.describe()


@dataclass
class Hostile:
    """A node whose updates are never what they should be; each time in another way."""

    worker: Arithmetic
    sent: int = 0

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        result, good = self.worker.work(question, spec, payload)
        if question.kind == pb.DESCRIBE:
            return result, good
        number, self.sent = self.sent, self.sent + 1
        change = np.frombuffer(good, np.float32).copy()
        where = number % len(change)
        match number % 10:
            case 0:
                change[where] = math.nan
            case 1:
                change[where] = -math.inf
            case 2:
                change[where] = 1e38
            case 3:
                change = change[:-1]
            case 4:
                change = np.concatenate([change, change])
            case 5:
                change = change[:0]
            case 6:
                change = change.astype(np.float64)
            case 7:
                change = change.astype(np.float16)
            case 8:
                result.kind = ["", "gradient", "pickle", "delta\0"][number // 10 % 4]
            case 9:
                result.weight = [-1.0, 0.0, 1e300, -0.0][number // 10 % 4]
        bad = change.tobytes()
        result.payload.CopyFrom(link.blob(bad))
        return result, bad

    def exchange(self, body: bytes) -> bytes:
        return body


def poisoned(hub: Hub, folder: Path, rounds: int, hostile: int) -> tuple[bytes, list[Row]]:
    """A run in which the nodes from 11 on are hostile."""
    bad = [
        link_of(hub.port, Hostile(Arithmetic(node, WIDTH), 3 * node), node, folder) for node in range(11, 11 + hostile)
    ]
    with nodes_here([*links(hub.port, folder), *bad]):
        until(lambda: len(hub.nodes()) == len(NODES) + hostile, "all are here")
        adapter, rows, _ = trained(hub, spec_of(len(NODES), rounds))
    return adapter, rows


def test_hostile_updates_never_reach_the_state(hub: Hub, tmp_path: Path, clean: dict[int, bytes]) -> None:
    adapter, rows = poisoned(hub, tmp_path, ROUNDS, 10)
    assert adapter == clean[WIDTH]
    assert all(row["nodes"] == len(NODES) and row["refused"] + row["failed"] == 10 for row in rows)


@pytest.mark.slow
def test_a_thousand_hostile_updates(hub: Hub, tmp_path: Path) -> None:
    adapter, rows = poisoned(hub, tmp_path, 50, 20)
    assert right(adapter, rounds=50)
    assert sum(row["refused"] + row["failed"] for row in rows) == 1000


def test_a_hostile_update_that_was_taken_would_be_seen(
    hub: Hub, tmp_path: Path, clean: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without admission the same nodes do ruin the same run."""
    monkeypatch.setattr("fedapt.server.coordinator.refusal", lambda *_: None)
    with pytest.raises(Exception):  # noqa: B017, PT011 - which of the ten comes first decides how
        assert poisoned(hub, tmp_path, ROUNDS, 10)[0] == clean[WIDTH]


def test_a_refused_node_stops_and_a_cut_one_starts_its_backoff_again(hub: Hub, door: OpenDoor, tmp_path: Path) -> None:
    waited: list[int] = []

    class Watched(Backoff):
        def __call__(self, tries: int) -> float:
            waited.append(tries)
            return 0.01

    node = link_of(hub.port, Arithmetic(1, WIDTH), 1, tmp_path)
    node.backoff = Watched()
    with pytest.raises(RejectedError, match="revoked"), nodes_here([node]) as futures:  # noqa: PT012
        for _ in range(3):
            session = until(lambda: session_of(hub), "the node is here")
            until(lambda: hub.nodes() == [1], "the node is here")
            session.close(pb.Down(rejected=pb.Rejected(reason="for now")))
            until(partial(is_back, hub, session), "the node is back")
        door.refused.add(1)
        until(futures[0].done, "the node gives up")
    assert waited == [0, 0, 0], "each Welcome forgets the tries before"


def test_backoff_doubles_to_its_most_and_never_falls_together() -> None:
    backoff = Backoff(first=0.5, most=60.0)
    for tries in (0, 1, 5, 7, 1000):
        drawn = {backoff(tries) for _ in range(50)}
        most = min(60.0, 0.5 * 2.0 ** min(tries, 30))
        assert all(most / 2 <= seconds <= most for seconds in drawn)
        assert len(drawn) > 10
