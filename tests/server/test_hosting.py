"""Runs over a real link: nodes in threads that do what `fakes.FakeGrid` does, so the right state is known without them."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from fedapt.client.duties import Duties
from fedapt.client.kept import Kept
from fedapt.client.link import Backoff, Link
from fedapt.privacy.ledger import NO_ROOM
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.blobs import digest
from fedapt.protocols.errors import DataError, RunError, SpecError
from fedapt.protocols.link import NAME_KEY
from fedapt.protocols.recipes import FIRST_ORDER
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Update
from fedapt.server.hosting import Hooks, Host
from fedapt.server.link.doors import OpenDoor, named
from fedapt.server.link.grid import LinkGrid
from fedapt.server.link.hub import OWN_FAULT, Hub
from fedapt.server.link.limits import Limits
from fedapt.server.link.stopped import StoppedError
from fedapt.server.store import SqliteStore, Store

from .fakes import FakeGrid, plain, run, spec_of

NAMES = ("amber", "birch", "cedar")
NODES = tuple(sorted(named(name).node for name in NAMES))


class FakeSite:
    """A Worker whose training is FakeGrid's."""

    def __init__(self, name: str) -> None:
        self.node = named(name).node
        self.adopted: list[str] = []

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        grid = FakeGrid(RunSpec.model_validate_json(spec))
        asked = link.assignment(question, self.node, payload)
        if question.kind == pb.TRAIN:
            update = grid.train(asked)
            return link.result(question, update), update.payload
        if question.kind == pb.DESCRIBE:
            described = link.description_to_bytes(grid.describe())
            return pb.Result(question=question.id, payload=link.blob(described)), described
        if question.kind == pb.ADOPT:
            self.adopted.append(question.run)
        (scores,) = grid.evaluate([asked], 1.0)
        assert not hasattr(scores, "reason")
        empty = pb.Blob(sha256=digest(b""))
        metrics = {"loss": float(self.node)}
        return pb.Result(question=question.id, weight=self.node % 3, metrics=metrics, payload=empty), b""

    def exchange(self, body: bytes) -> bytes:
        raise NotImplementedError


@contextmanager
def site(port: int, name: str, folder: Path, rank: int = 0) -> Iterator[FakeSite]:
    """A node's process, as far as the link goes, in a thread. `rank` is what it can afford."""
    worker = FakeSite(name)
    loop = asyncio.new_event_loop()

    def channel() -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    duties = Duties(worker, Kept(folder / name))
    dialled = Link(channel, duties, backoff=Backoff(0.05, 0.2), metadata=((NAME_KEY, name),), rank=rank)
    task = loop.create_task(dialled.run())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield worker

    async def stop() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@contextmanager
def federation(
    folder: Path, *names: str, ranks: Mapping[str, int] | None = None
) -> Iterator[tuple[Hub, list[FakeSite]]]:
    limits = Limits(beat=0.5, silence=5.0, absence=1.0)
    with Hub("127.0.0.1:0", OpenDoor(), credentials=None, limits=limits) as hub:
        contexts = [site(hub.port, name, folder, (ranks or {}).get(name, 0)) for name in names]
        try:
            yield hub, [context.__enter__() for context in contexts]
        finally:
            for context in contexts:
                context.__exit__(None, None, None)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def serve(hub: Hub, store: Store, *specs: RunSpec, stopping: threading.Event | None = None) -> Host:
    host = Host(hub, store, lambda _: Hooks())
    host.begin(specs)
    host.serve(stopping or threading.Event(), until_done=True)
    return host


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "store.sqlite")
    yield opened
    opened.close()


@pytest.mark.parametrize("recipe", ["fedsvd", "fedit", "flora"])
def test_a_run_over_the_link_is_the_run_without_it(recipe: str, tmp_path: Path, store: SqliteStore) -> None:
    spec = spec_of(f"recipe.name={recipe}", "run.name=over", "participation.minimum=3")
    reference, _ = run(FakeGrid(spec, there=NODES))
    with federation(tmp_path, *NAMES) as (hub, sites):
        serve(hub, store, spec)
        until(lambda: all(site.adopted == ["over"] for site in sites))
    snapshot = store.snapshot("over")
    assert snapshot.round == 3
    np.testing.assert_array_equal(snapshot.state, reference.store.snapshot("over").state)
    drop = ("seconds",)
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in drop} for row in plain(s.rows("over"))]
        for s in (store, reference.store)
    )
    assert ours == theirs
    assert store.status("over") == "finished"


def test_two_runs_side_by_side(tmp_path: Path, store: SqliteStore) -> None:
    specs = [
        spec_of(f"run.name={name}", "participation.minimum=2", f"run.seed={seed}")
        for name, seed in (("a", 1), ("b", 2))
    ]
    with federation(tmp_path, *NAMES[:2]) as (hub, _):
        serve(hub, store, *specs)
    assert {state.name: (state.status, state.rounds) for state in store.runs()} == {
        "a": ("finished", 3),
        "b": ("finished", 3),
    }


def test_stopped_and_resumed_from_elsewhere(tmp_path: Path, store: SqliteStore) -> None:
    spec = spec_of("run.name=long", "run.rounds=100000", "participation.minimum=1")
    with federation(tmp_path, NAMES[0]) as (hub, _):
        host, stopping = Host(hub, store), threading.Event()
        host.begin([spec])
        thread = threading.Thread(target=host.serve, args=(stopping,))
        thread.start()
        until(lambda: bool(store.runs()) and store.runs()[0].rounds > 2)
        store.set_status("long", "stopping")
        until(lambda: store.status("long") == "stopped")
        rounds = store.runs()[0].rounds
        time.sleep(0.3)
        assert store.runs()[0].rounds == rounds, "nothing happens to a run that is stopped"
        store.set_status("long", "running")
        until(lambda: store.runs()[0].rounds > rounds)
        stopping.set()
        thread.join()
        host.stop()
    assert store.status("long") == "running", "a server that ends leaves its runs where they are"
    assert [row["round"] for row in store.rows("long")] == list(range(len(store.rows("long"))))


def test_a_run_that_is_stopped_asks_nothing_more(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends leaves its questions where they are; somebody who stops the run withdraws them."""
    spec = spec_of("run.name=slow", "run.rounds=2", "participation.minimum=1")
    trained, begun, go = FakeSite.work, list[bytes](), threading.Event()

    def slowly(self: FakeSite, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        if question.kind == pb.TRAIN:
            begun.append(question.id)
            assert go.wait(30)
        return trained(self, question, spec, payload)

    monkeypatch.setattr(FakeSite, "work", slowly)
    with federation(tmp_path, NAMES[0]) as (hub, _):
        desk = hub._desk(node_of(NAMES[0]))
        host = Host(hub, store)
        host.begin([spec])
        until(lambda: bool(begun))
        host.stop()
        assert set(desk._questions) == set(begun), "what is being done goes on"
        host = Host(hub, store)
        host.begin([spec])
        thread = threading.Thread(target=host.serve, args=(stopping := threading.Event(),))
        thread.start()
        store.set_status("slow", "stopping")
        until(lambda: store.status("slow") == "stopped")
        until(lambda: not desk._questions)
        go.set()  # a late answer
        until(lambda: desk.state == "idle" and not list(tmp_path.glob("*/*.result")))
        assert store.contributions("slow", 1) == []
        store.set_status("slow", "running")
        until(lambda: store.status("slow") == "finished")
        stopping.set()
        thread.join()
    assert begun[0] == begun[1], "it was asked again when it went on"


def test_who_is_connected_is_no_public_number_of_clients(tmp_path: Path, store: SqliteStore) -> None:
    private = ("run.name=p", "privacy.unit=client", "privacy.epsilon=8", "recipe.weighting=uniform", "recipe.name=ffa")
    with federation(tmp_path, NAMES[0]) as (hub, _), pytest.raises(SpecError, match=r"privacy\.population is missing"):
        serve(hub, store, spec_of(*private))
    assert store.runs() == []


def test_a_name_that_is_taken_is_refused_before_anything_is_served(tmp_path: Path, store: SqliteStore) -> None:
    good, other = spec_of("run.name=good"), spec_of("run.name=taken")
    with federation(tmp_path, NAMES[0]) as (hub, _):
        serve(hub, store, other)
        with pytest.raises(SpecError, match="another spec"):
            serve(hub, store, good, spec_of("run.name=taken", "run.seed=9"))
    assert {state.name: state.status for state in store.runs()} == {"taken": "finished"}


@pytest.mark.parametrize(("fault", "said"), [(DataError("no rows"), "no rows"), (KeyError("row 17"), OWN_FAULT)])
def test_a_run_that_cannot_go_on_fails_alone(tmp_path: Path, store: SqliteStore, fault: Exception, said: str) -> None:
    def fails(_: object) -> None:
        raise fault

    def hooks(spec: RunSpec) -> Hooks:
        return Hooks(began=fails) if spec.run.name == "bad" else Hooks()

    with federation(tmp_path, NAMES[0]) as (hub, _):
        host = Host(hub, store, hooks)
        host.begin([spec_of("run.name=good"), spec_of("run.name=bad")])
        host.serve(threading.Event(), until_done=True)
        assert {state.name: state.status for state in store.runs()} == {"bad": "failed", "good": "finished"}
        assert next(state.reason for state in store.runs() if state.name == "bad") == said

        def unable(_: RunSpec) -> Hooks:
            raise fault

        store.set_status("good", "running")
        host = Host(hub, store, unable)
        host.serve(threading.Event(), until_done=True)
    assert store.status("good") == "failed"


def test_a_database_that_is_away_for_a_moment_ends_no_run(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedapt.server.hosting.RETRY_SECONDS", 0.05)
    calls = {"runs": 0, "rows": 0}

    def flickering(name: str) -> None:
        method = getattr(store, name)

        def call(*arguments: object) -> object:
            calls[name] += 1
            if calls[name] == 2:
                raise OperationalError("SELECT", {}, Exception("the server closed the connection"))
            return method(*arguments)

        monkeypatch.setattr(store, name, call)

    flickering("runs")
    flickering("rows")
    with federation(tmp_path, NAMES[0]) as (hub, _):
        serve(hub, store, spec_of("run.name=run"))
    assert store.status("run") == "finished"
    assert min(calls.values()) >= 2


def test_too_few_answers_leave_the_round_open(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two nodes fails at first: the round waits for it, and then goes on with what it had."""
    spec = spec_of("run.name=two", "run.rounds=1", "participation.minimum=2", "participation.deadline_seconds=5")
    monkeypatch.setattr("fedapt.server.hosting.RETRY_SECONDS", 0.1)
    trained = FakeSite.work
    tries: list[int] = []

    def sometimes(self: FakeSite, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        if question.kind == pb.TRAIN:
            tries.append(self.node)
        if question.kind == pb.TRAIN and self.node == named("birch").node and tries.count(self.node) == 1:
            raise RunError("out of memory")
        return trained(self, question, spec, payload)

    monkeypatch.setattr(FakeSite, "work", sometimes)
    reference, _ = run(FakeGrid(spec, there=tuple(sorted(named(name).node for name in NAMES[:2]))))
    with federation(tmp_path, *NAMES[:2]) as (hub, _):
        serve(hub, store, spec)
    assert tries.count(named("amber").node) == 1, "who has answered is not asked again"
    np.testing.assert_array_equal(store.snapshot("two").state, reference.store.snapshot("two").state)


def test_a_run_ends_where_every_sites_cap_is_spent(
    tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tried again for ever: it says why it has ended, and hands over the adapter of its last round."""
    private = ("privacy.unit=example", "privacy.epsilon=3", "recipe.weighting=uniform", "local.steps=1")
    spec = spec_of("run.name=capped", "recipe.name=ffa", *private, "run.rounds=5", "participation.minimum=2")
    trained = FakeSite.work

    def charged(self: FakeSite, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        if question.kind != pb.TRAIN or question.round <= 2:
            return trained(self, question, spec, payload)
        asked = link.assignment(question, self.node, payload)
        own = (asked.run, asked.round, asked.attempt, asked.node, asked.version)
        return link.result(question, Update(*own, "refused", 0.0, b"", reason=f"{NO_ROOM} 3")), b""

    monkeypatch.setattr(FakeSite, "work", charged)
    stopping = threading.Event()
    limit = threading.Timer(60.0, stopping.set)
    limit.start()
    with federation(tmp_path, *NAMES[:2]) as (hub, sites):
        serve(hub, store, spec, stopping=stopping)
        limit.cancel()
        assert [site.adopted for site in sites] == [["capped"]] * 2
    (state,) = store.runs()
    assert (state.status, state.rounds) == ("finished", 2)
    assert "have room under their caps on epsilon: the run ends here" in state.reason


def test_federated_evaluation(tmp_path: Path, store: SqliteStore) -> None:
    spec = spec_of("run.name=scored", "participation.evaluates=true", "participation.minimum=3")
    with federation(tmp_path, *NAMES) as (hub, _):
        serve(hub, store, spec)
    weights = [node % 3 for node in NODES]
    mean = sum(weight * node for weight, node in zip(weights, NODES, strict=True)) / sum(weights)
    for row in store.rows("scored")[1:]:
        assert row["federated"]["loss"] == pytest.approx(mean)
        assert row["federated"]["nodes"] == sum(weight > 0 for weight in weights)


MIXING = [name for name, recipe in FIRST_ORDER.items() if recipe.mixes_ranks]


def node_of(name: str) -> int:
    return named(name).node


@pytest.mark.parametrize("recipe", MIXING)
def test_nodes_of_stated_ranks_over_the_link_are_those_of_a_simulation(
    recipe: str, tmp_path: Path, store: SqliteStore
) -> None:
    spec = spec_of(f"recipe.name={recipe}", "run.name=mixed", "adapter.rank=2", "participation.minimum=3")
    reference, rows = run(FakeGrid(spec, there=NODES, stated={node_of("birch"): 1}))
    with federation(tmp_path, *NAMES, ranks={"birch": 1, "cedar": 7}) as (hub, sites):
        serve(hub, store, spec)
        until(lambda: all(site.adopted == ["mixed"] for site in sites))
    assert store.snapshot("mixed").state.tobytes() == reference.store.snapshot("mixed").state.tobytes()
    assert plain(store.rows("mixed"))[1:] == plain(rows)
    alike, _ = run(FakeGrid(spec, there=NODES))
    assert store.snapshot("mixed").state.tobytes() != alike.store.snapshot("mixed").state.tobytes()


def test_a_node_too_small_for_the_run_is_left_out_and_not_told_of_it(tmp_path: Path, store: SqliteStore) -> None:
    spec = spec_of("recipe.name=fedit", "run.name=single", "adapter.rank=2", "participation.minimum=3")
    there = [node for node in NODES if node != node_of("birch")]
    reference, _ = run(FakeGrid(spec, there=there))
    with federation(tmp_path, *NAMES, ranks={"birch": 1}) as (hub, sites):
        serve(hub, store, spec)
        until(lambda: sum(site.adopted == ["single"] for site in sites) == 2)
    assert store.snapshot("single").state.tobytes() == reference.store.snapshot("single").state.tobytes()
    assert [row["refused"] for row in store.rows("single")[1:]] == [1, 1, 1]
    ((node, reason),) = store.refusals("single", 3)
    assert node == node_of("birch")
    assert "rank 1, and this run needs rank 2" in reason
    assert [site.adopted for site in sites if site.node == node] == [[]]


@pytest.mark.parametrize("recipe", MIXING)
def test_a_server_that_ends_in_the_middle_reads_what_it_has_at_the_rank_it_asked_for(
    recipe: str, tmp_path: Path, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the restart birch, which has answered at rank 1, can afford all, and cedar, which has not, no more than 1."""
    overrides = ("run.name=middle", "run.rounds=1", "adapter.rank=2", "participation.minimum=3")
    spec = spec_of(f"recipe.name={recipe}", *overrides)
    trained, failing = FakeSite.work, threading.Event()

    def sometimes(self: FakeSite, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        if question.kind == pb.TRAIN and self.node == node_of("cedar") and failing.is_set():
            raise RunError("out of memory")
        return trained(self, question, spec, payload)

    monkeypatch.setattr(FakeSite, "work", sometimes)
    failing.set()
    with federation(tmp_path, *NAMES, ranks={"birch": 1}) as (hub, _):
        host = Host(hub, store)
        host.begin([spec])
        until(lambda: len(store.contributions("middle", 1)) == 2)
        host.stop()
    assert {u.node: u.rank for u in store.contributions("middle", 1)} == {node_of("amber"): 0, node_of("birch"): 1}
    failing.clear()
    with federation(tmp_path, *NAMES, ranks={"amber": 1, "cedar": 1}) as (hub, _):
        serve(hub, store, spec)
    reference, _ = run(FakeGrid(spec, there=NODES, stated={node_of("birch"): 1, node_of("cedar"): 1}))
    assert store.snapshot("middle").state.tobytes() == reference.store.snapshot("middle").state.tobytes()


def test_what_a_node_can_afford_is_known_when_it_is_back(tmp_path: Path) -> None:
    """A node of an open round is waited for after a restart, because nobody else knows; one that stays away may be any."""
    spec, told = spec_of("participation.minimum=1"), list[int]()
    with federation(tmp_path, "amber", ranks={"amber": 3}) as (hub, _):
        hub.limits, brief = hub.limits.model_copy(update={"absence": 60.0}), hub.limits
        grid = LinkGrid(hub, spec)
        until(lambda: hub.nodes() == [node_of("amber")])
        assert grid.rank(node_of("amber")) == 3
        asking = threading.Thread(target=lambda: told.append(grid.rank(node_of("birch"))))
        asking.start()
        with site(hub.port, "birch", tmp_path, rank=5):
            asking.join()
        assert told == [5]
        assert grid.rank(node_of("birch")) == 5, "it has left, and what it said stands"
        hub.limits = brief
        assert grid.rank(node_of("cedar")) == 0
        with site(hub.port, "birch", tmp_path, rank=2):
            until(lambda: grid.rank(node_of("birch")) == 2)
        stopping = threading.Event()
        stopping.set()
        with pytest.raises(StoppedError):
            LinkGrid(hub, spec, stopping=stopping).rank(node_of("cedar"))
