"""Peers that do not speak the protocol, beside nodes that do: nothing breaks, and nothing grows."""

import asyncio
import random
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import grpc
import psutil
import pytest

from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.server.coordinator import Coordinator
from fedapt.server.link.grid import LinkGrid
from fedapt.server.link.hub import Hub
from fedapt.server.link.limits import Limits
from fedapt.server.store import MemoryStore

from .federation import (
    Arithmetic,
    OpenDoor,
    channel,
    faultless,
    layout_of,
    link_of,
    nodes_here,
    recomputed,
    spec_of,
    until,
)
from .test_frames import MOST_GROWTH, mutated, seeds

NODES, ROUNDS, WIDTH = [1, 2, 3], 10, 40
LIMITS = Limits(beat=0.2, silence=2.0, hello=1.0, connections_handshake=1.0)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture
def hub(caplog: pytest.LogCaptureFixture) -> Iterator[Hub]:
    with faultless(OpenDoor(), LIMITS, caplog) as hub:
        yield hub


def is_right(hub: Hub, folder: Path) -> bool:
    """Whether honest nodes come to what they must."""
    spec = spec_of(len(NODES), ROUNDS)
    with nodes_here([link_of(hub.port, Arithmetic(node, WIDTH), node, folder) for node in NODES]):
        coordinator = Coordinator(spec, LinkGrid(hub, spec), MemoryStore())
        list(coordinator.rounds())
    return bool(abs(coordinator.adapter() - recomputed(layout_of(WIDTH), NODES, ROUNDS)).max() < 1e-5)


def literal(name: bytes, value: bytes) -> bytes:
    """A header in HPACK, neither compressed nor remembered."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def opened(node: int, message: bytes) -> bytes:
    """An HTTP/2 connection with one stream of a node, and what is written to it."""
    path = f"/{link.SERVICE}/{link.OPEN}".encode()
    headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x")]
    headers += [(b"te", b"trailers"), (b"content-type", b"application/grpc"), (b"user-agent", b"node-%d x" % node)]
    block = b"".join(literal(*header) for header in headers)
    return PREFACE + frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 0, 1, message)


def message(raw: bytes) -> bytes:
    return b"\0" + len(raw).to_bytes(4) + raw


CLAIM = b"\0" + (1 << 30).to_bytes(4) + bytes(1000)
HELLO = pb.Up(hello=pb.Hello(oldest=1, newest=1)).SerializeToString()


def test_what_is_written_by_hand_is_understood(hub: Hub) -> None:
    """The control of what follows: with an honest message the same bytes open a stream."""
    with socket.create_connection(("127.0.0.1", hub.port)) as connection:
        connection.sendall(opened(7, message(HELLO)))
        until(lambda: hub.nodes() == [7], "the node is here")
    until(lambda: hub.nodes() == [], "the node is gone")


@contextmanager
def besieged(port: int, half_open: int, claims: int) -> Iterator[None]:
    """Connections that say nothing, or half of a greeting, or that a message of 1 GiB comes; closed ones come again."""
    ended = Event()

    def connect(number: int) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(PREFACE[: number % 24] if number < half_open else opened(1000 + number, CLAIM))
        return connection

    def hold() -> None:
        with ExitStack() as stack:
            held = {number: stack.enter_context(connect(number)) for number in range(half_open + claims)}
            while not ended.wait(0.1):
                readable, _, _ = select.select([c for c in held.values() if c.fileno() < 1024], [], [], 0)
                for number in [number for number, connection in held.items() if connection in readable]:
                    with suppress(OSError):
                        if not held[number].recv(1 << 16):
                            held[number].close()
                            held[number] = stack.enter_context(connect(number))

    thread = Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def growth_of_a_siege(hub: Hub, folder: Path, half_open: int, claims: int) -> int:
    """Bytes that this process grows by while an honest run goes on, its own ends of the connections included."""
    assert is_right(hub, folder / "before")
    before = psutil.Process().memory_info().rss
    with besieged(hub.port, half_open, claims):
        assert is_right(hub, folder / "beside")
        return int(psutil.Process().memory_info().rss - before)


def test_claims_and_half_open_connections_cost_no_memory(hub: Hub, tmp_path: Path) -> None:
    assert growth_of_a_siege(hub, tmp_path, 40, 40) < MOST_GROWTH


@pytest.mark.slow
def test_four_hundred_half_open_connections(hub: Hub, tmp_path: Path) -> None:
    """As many as `select` takes beside the rest; the benchmark holds five hundred, in a process of their own."""
    assert growth_of_a_siege(hub, tmp_path, 300, 100) < MOST_GROWTH


def test_a_claim_ends_its_stream_although_the_connection_stays(hub: Hub) -> None:
    with socket.create_connection(("127.0.0.1", hub.port)) as connection:
        connection.sendall(opened(7, CLAIM))
        assert connection.recv(1 << 16)
        until(lambda: not hub._streams, "the stream is let go")
        assert hub.nodes() == []


async def fuzz(port: int, count: int, each: int) -> int:
    """Write mutated frames, `each` to a stream after its Hello, or one instead of it; how many streams were opened."""
    chance, corpus, streams = random.Random(0), [raw for is_up, raw in seeds() if is_up], 0
    async with channel(port, 9) as to:
        while count > 0:
            call: Any = to.stream_stream(f"/{link.SERVICE}/{link.OPEN}")()
            streams += 1
            frames = [mutated(chance.choice(corpus), chance) for _ in range(each)]
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                for raw in [HELLO, *frames] if streams % 4 else frames:
                    count -= 1
                    await call.write(raw)
                await call.done_writing()
                while isinstance(await call.read(), bytes):
                    pass
            call.cancel()
    return streams


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_frames_over_a_socket(hub: Hub, tmp_path: Path, count: int) -> None:
    before = psutil.Process().memory_info().rss
    assert asyncio.run(fuzz(hub.port, count, 5)) > 10
    assert psutil.Process().memory_info().rss - before < MOST_GROWTH
    assert is_right(hub, tmp_path)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        PREFACE + bytes(100),
        PREFACE + b"\xff" * 100,
        bytes(10_000),
        opened(7, b"\1" + (5).to_bytes(4) + b"bombs"),
        opened(7, b"") + frame(0, 0, 99, b"a stream that is not there"),
    ],
    ids=["http1", "zeros", "ones", "silence", "compressed", "other stream"],
)
def test_what_is_no_link_at_all(hub: Hub, tmp_path: Path, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hub.port)) as connection:
        connection.sendall(garbage)
        assert is_right(hub, tmp_path)
