"""A federation without models: what a node sends is a fixed function of what it received, so the right sum can be
computed again by somebody who was not there.

As a program it is a nursery: for each JSON line on stdin it forks a server or a process of nodes, and says its pid. They
are there to be killed.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import grpc
import numpy as np
import pytest
from sqlalchemy import Engine
from sqlalchemy import event as sql_event
from sqlalchemy.orm import Session

from fedapt.client.duties import Duties, Worker
from fedapt.client.kept import Kept
from fedapt.client.link import Backoff, Link
from fedapt.privacy.chain import Charge, append
from fedapt.privacy.events import Event
from fedapt.privacy.ledger import Ledger
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.errors import PayloadError, RunError
from fedapt.protocols.identity import Peer
from fedapt.protocols.keys import derive, generator
from fedapt.protocols.layout import AdapterLayout, Flat, TensorSpec
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Description, Update
from fedapt.server.coordinator import Coordinator
from fedapt.server.link.grid import LinkGrid
from fedapt.server.link.hub import Hub
from fedapt.server.link.limits import Limits
from fedapt.server.private import client_level
from fedapt.server.store import Row, Snapshot, SqliteStore, SqlStore

QUICK = Backoff(first=0.02, most=0.2)
BRISK = Limits(beat=0.2, silence=3.0, hello=1.0, absence=5.0)
"""Limits under which a test sees in a second what takes a minute otherwise."""


def layout_of(width: int) -> AdapterLayout:
    return AdapterLayout(
        [
            TensorSpec("q.lora_A.weight", (2, width), "A"),
            TensorSpec("q.lora_B.weight", (width, 2), "B"),
            TensorSpec("score.bias", (3,), "other"),
        ]
    )


def start_of(layout: AdapterLayout) -> Flat:
    return generator(derive(0, "start")).standard_normal(layout.size).astype(np.float32)


def change_of(state: Flat, round_: int, node: int) -> Flat:
    """Half of the way to a target of the node's own."""
    target = generator(derive(0, "target", round_, node)).standard_normal(state.size).astype(np.float32)
    return np.asarray(np.float32(0.5) * (target - state))


def weight_of(node: int) -> float:
    return 1.0 + node % 3


def recomputed(layout: AdapterLayout, nodes: Sequence[int], rounds: int) -> Flat:
    """What `rounds` rounds of all nodes come to, each counted once; computed in float64."""
    state = start_of(layout).astype(np.float64)
    weights = np.array([weight_of(node) for node in nodes])
    for round_ in range(1, rounds + 1):
        changes = [change_of(state.astype(np.float32), round_, node) for node in nodes]
        state = state + (weights / weights.sum()) @ np.stack(changes).astype(np.float64)
    return state.astype(np.float32)


def spec_of(nodes: int, rounds: int, *overrides: str) -> RunSpec:
    """fp32 both ways, and all nodes in each round: `recomputed` is right for it."""
    text = '[model]\nbase = "m"\ntask = "causal-lm"\n[run]\nname = "run"\n[recipe]\nname = "fedit"'
    own = [f"run.rounds={rounds}", f"participation.minimum={nodes}", "participation.deadline_seconds=20"]
    return RunSpec.parse(text, overrides=[*own, *overrides])


@dataclass(frozen=True)
class Arithmetic:
    """A worker without a model. `seconds` is how long it takes for an answer."""

    node: int
    width: int
    seconds: float = 0.0

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        if question.kind == pb.DESCRIBE:
            layout = layout_of(self.width)
            data = link.description_to_bytes(Description(layout, start_of(layout), {"r": 2}, "base"))
            return pb.Result(question=question.id, payload=link.blob(data)), data
        time.sleep(self.seconds)
        asked = link.assignment(question, self.node, payload)
        change = change_of(np.frombuffer(payload, "<f4"), asked.round, self.node)
        own = (asked.run, asked.round, asked.attempt, asked.node, asked.version)
        update = Update(*own, "delta", weight_of(self.node), change.tobytes(), {"loss": 1.0})
        return link.result(question, update), update.payload

    def exchange(self, body: bytes) -> bytes:
        return body


class OpenDoor:
    """A node is who it says it is, in the only header that a channel sends by itself."""

    def __init__(self) -> None:
        self.refused: set[int] = set()

    def identify(self, context: Any) -> Peer:
        agent = dict(context.invocation_metadata()).get("user-agent", "")
        if not agent.startswith("node-"):
            raise PayloadError("nobody")
        return self.peer(int(agent.split()[0].removeprefix("node-")))

    @staticmethod
    def peer(node: int) -> Peer:
        return Peer("node", f"{node:016x}" + 48 * "0", "1", datetime.max.replace(tzinfo=UTC))

    def refusal(self, peer: Peer) -> str | None:
        return "revoked" if peer.node in self.refused else None

    def enter(self, peer: Peer) -> None:
        pass

    def join(self, peer: Peer, csr: bytes) -> tuple[bytes, str]:
        raise PayloadError("nobody joins here")

    def renew(self, peer: Peer, csr: bytes) -> bytes:
        return b"chain of " + csr

    def changes(self) -> int:
        return len(self.refused)


def channel(port: int, node: int) -> grpc.aio.Channel:
    options = [
        ("grpc.primary_user_agent", f"node-{node}"),
        ("grpc.max_receive_message_length", link.FRAME_BYTES),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)


def link_of(port: int, worker: Worker, node: int, folder: Path) -> Link:
    return Link(lambda: channel(port, node), Duties(worker, Kept(folder / str(node))), backoff=QUICK)


@contextmanager
def nodes_here(links: Sequence[Link]) -> Iterator[list["asyncio.Future[None]"]]:
    """Nodes in a thread of this process. Whatever ends one of them but its being called off is raised at the end."""
    loop, futures, begun = asyncio.new_event_loop(), list[asyncio.Future[None]](), Thread(target=lambda: None)

    def run() -> None:
        asyncio.set_event_loop(loop)
        futures.extend(loop.create_task(link.run()) for link in links)
        loop.run_forever()
        for future in futures:
            future.cancel()
        loop.run_until_complete(asyncio.gather(*futures, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    begun = Thread(target=run)
    begun.start()
    try:
        yield futures
    finally:
        ended = [future for future in futures if future.done()]
        loop.call_soon_threadsafe(loop.stop)
        begun.join()
        for future in ended:
            future.result()


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    """The condition's value, as soon as it has one."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.005)
    return found


@contextmanager
def faultless(door: OpenDoor, limits: Limits, caplog: pytest.LogCaptureFixture) -> Iterator[Hub]:
    """A server for a fixture, without TLS: its streams all end before it does, and nothing that a peer does is its fault."""
    with Hub("127.0.0.1:0", door, credentials=None, limits=limits) as hub:
        yield hub
        until(lambda: not hub._streams and not hub._sessions, "all streams are let go")
    # A fixture's records are those of its own phase: the test's are asked for by name.
    assert faults([*caplog.get_records("call"), *caplog.records]) == []


def faults(records: Sequence[logging.LogRecord]) -> list[str]:
    """Errors that were logged. gRPC's own are none of ours: where several event loops of a process share its
    poller, where a call ends while something that nobody reads is being written, where a bad link has damaged a header of
    a stream without TLS, and where a peer takes its call back before our part of it has begun or after it has ended."""
    told = [record for record in records if record.levelno >= logging.ERROR and not _taken_back(record)]
    errors = [record.getMessage() for record in told]
    own = ("PollerCompletionQueue._handle_events", "raised in core by servicer method", "Invalid encoding on")
    return [error for error in errors if not any(text in error for text in own)]


def _taken_back(record: logging.LogRecord) -> bool:
    cause = record.exc_info[0] if record.exc_info else None
    return record.name.startswith("grpc.") and cause is asyncio.CancelledError


class ChargesAfter:
    """A mutant of the store: the release is there first, and its charge is another transaction."""

    def __init__(self, store: SqlStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(
        self, run: str, snapshot: Snapshot, row: Row, kept: Sequence[int], events: Sequence[Event | Charge] = ()
    ) -> None:
        self._store.commit(run, snapshot, row, kept)
        with Session(self._store.engine) as session, session.begin():
            append(session, run, snapshot.round, events)


def die_at_write(point: int) -> None:
    """End this process before the statement of that number that writes, or the commit, of any store."""
    writes = count(1)

    def write() -> None:
        if next(writes) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def statement(_connection: Any, _cursor: Any, sql: str, *_rest: Any) -> None:
        if not sql.startswith(("SELECT", "PRAGMA")):
            write()

    sql_event.listen(Engine, "before_cursor_execute", statement)
    sql_event.listen(Engine, "commit", lambda _connection: write())


def serve(
    folder: str, port: int, spec: str, *, mutant: bool = False, protocols: int = 1, point: int | None = None
) -> None:
    """Run what is left of a run. Each release is published, as the database has it, once it is committed."""
    link.PROTOCOLS = range(1, protocols + 1)
    if point is not None:
        die_at_write(point)
    run, store = RunSpec.model_validate_json(spec), SqliteStore(Path(folder) / "run.sqlite")
    with Hub(f"127.0.0.1:{port}", OpenDoor(), credentials=None, limits=BRISK) as hub:
        kept: Any = ChargesAfter(store) if mutant else store
        published = Path(folder) / "published"
        while True:
            try:
                coordinator = Coordinator(run, LinkGrid(hub, run), kept)
                for row in coordinator.rounds():
                    content = store.snapshot("run", row["round"]).to_bytes().hex()
                    with published.open("a") as file:
                        file.write(f"{row['round']} {content}\n")
                return
            except RunError:  # nobody answered in time: the round is still open
                continue


def attend(folder: str, port: int, nodes: list[int], width: int, seconds: float = 0.0) -> None:
    """Serve as some nodes until killed."""

    async def run() -> None:
        links = [link_of(port, Arithmetic(node, width, seconds), node, Path(folder)) for node in nodes]
        await asyncio.gather(*(link.run() for link in links))

    asyncio.run(run())


def warm(spec: str) -> None:
    """In the nursery itself: what a private round imports and compiles, which no child then has to wait for."""
    level = client_level(RunSpec.model_validate_json(spec), 3, 3)
    level.allows(Ledger({}))
    level.release([np.zeros(3, np.float32)], {}, 1)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system buries the children
    roles: dict[str, Callable[..., None]] = {"serve": serve, "attend": attend}
    for line in sys.stdin:
        arguments = json.loads(line)
        if arguments["role"] == "warm":
            warm(arguments["spec"])
            print(os.getpid(), flush=True)
            continue
        child = os.fork()
        if child == 0:
            sys.stdin.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            roles[arguments.pop("role")](**arguments)
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main()
