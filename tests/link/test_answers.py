"""Answers to zeroth-order frames over a connection of their own: whose they are, when it is opened, and how it ends."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedapt.client import link as client_link
from fedapt.client.duties import Duties
from fedapt.client.kept import Kept
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.outbox import Outbox
from fedapt.server.link.hub import Hub

from .federation import BRISK, Arithmetic, OpenDoor, channel, faultless, link_of, nodes_here, until


@pytest.fixture
def door() -> OpenDoor:
    return OpenDoor()


@pytest.fixture
def hub(door: OpenDoor, caplog: pytest.LogCaptureFixture) -> Iterator[Hub]:
    with faultless(door, BRISK, caplog) as hub:
        yield hub


class Carried:
    """How many answers came over which way, and what was answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.apart = 0
        self.got: list[tuple[int, bytes | None]] = []

        def read_answer(raw: bytes) -> bytes:
            self.apart += 1
            return raw

        monkeypatch.setattr(link, "read_answer", read_answer)

    def exchange(self, hub: Hub, bodies: Sequence[bytes], node: int = 5) -> None:
        """One after the other, as a run does."""
        for body in bodies:
            before = len(self.got)
            hub.exchange([(node, body)], lambda node, body: self.got.append((node, body)))
            until(lambda before=before: len(self.got) > before, "the answer is here")  # type: ignore[misc]


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> Carried:
    return Carried(monkeypatch)


BODIES = [bytes([i]) * 20 for i in range(6)]


def test_brisk_answers_have_a_connection_of_their_own(hub: Hub, carried: Carried, tmp_path: Path) -> None:
    with nodes_here([link_of(hub.port, Arithmetic(5, 3), 5, tmp_path)]):
        until(lambda: hub.nodes() == [5], "the node is here")
        carried.exchange(hub, BODIES)
    assert carried.got == [(5, body) for body in BODIES]
    assert carried.apart == 5, "the first does not know yet that others follow"


def test_seldom_answers_go_over_the_stream(
    hub: Hub, carried: Carried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_link, "BRISK_SECONDS", 0.0)
    with nodes_here([link_of(hub.port, Arithmetic(5, 3), 5, tmp_path)]):
        until(lambda: hub.nodes() == [5], "the node is here")
        carried.exchange(hub, BODIES)
    assert carried.got == [(5, body) for body in BODIES]
    assert carried.apart == 0


def test_a_pause_closes_the_connection_and_the_next_answers_open_another(
    hub: Hub, carried: Carried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_link, "BRISK_SECONDS", 0.3)
    with nodes_here([link_of(hub.port, Arithmetic(5, 3), 5, tmp_path)]):
        until(lambda: hub.nodes() == [5], "the node is here")
        carried.exchange(hub, BODIES[:3])
        (session,) = hub._sessions
        until(lambda: session._answering is not None and session._answering.done(), "it is closed")
        carried.exchange(hub, BODIES[3:])
        assert [session] == list(hub._sessions), "the stream itself stays"
    assert carried.got == [(5, body) for body in BODIES]


def test_where_there_is_no_way_answers_go_over_the_stream(
    hub: Hub, carried: Carried, door: OpenDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server says that there is a Link.Answer, and whatever stands between the two lets none through."""
    identify = door.identify

    def only_once(context: Any) -> Any:
        if carried.got:
            raise PayloadError("a middle box lets one connection through")
        return identify(context)

    monkeypatch.setattr(door, "identify", only_once)
    with nodes_here([link_of(hub.port, Arithmetic(5, 3), 5, tmp_path)]):
        until(lambda: hub.nodes() == [5], "the node is here")
        carried.exchange(hub, BODIES)
    assert carried.got == [(5, body) for body in BODIES]
    assert carried.apart == 0


def test_a_server_of_yesterday_gets_frames(tmp_path: Path) -> None:
    """Its Welcome says nothing of Link.Answer."""

    async def answered(answers: Outbox | None) -> bytes:
        outbox = Outbox(lambda chunk: pb.Up(chunk=chunk).SerializeToString())
        duties = Duties(Arithmetic(5, 3), Kept(tmp_path))
        duties.enter(outbox, answers)
        duties.exchange(b"body")
        working = asyncio.ensure_future(duties.run())
        raw = await asyncio.wait_for((answers or outbox).next(), 10)
        working.cancel()
        return raw

    assert not pb.Welcome.FromString(pb.Welcome(protocol=1).SerializeToString()).answers
    assert asyncio.run(answered(None)) == pb.Up(answer=pb.Answer(body=b"body")).SerializeToString()
    assert asyncio.run(answered(Outbox(lambda chunk: chunk.data))) == b"body"


Script = Callable[[grpc.aio.Channel, grpc.aio.Channel], Any]


def scripted(hub: Hub, script: Script, node: int = 5, other: int = 5) -> None:
    async def run() -> None:
        async with channel(hub.port, node) as one, channel(hub.port, other) as two:
            await asyncio.wait_for(script(one, two), 30)

    asyncio.run(run())


async def greeted(one: grpc.aio.Channel) -> Any:
    stream: Any = one.stream_stream(f"/{link.SERVICE}/{link.OPEN}")()
    await stream.write(pb.Up(hello=pb.Hello(oldest=1, newest=1)).SerializeToString())
    assert pb.Down.FromString(await stream.read()).welcome.answers
    return stream


def answering(two: grpc.aio.Channel) -> Any:
    return two.stream_unary(f"/{link.SERVICE}/{link.ANSWER}")()


async def refused(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asyncio.wait_for(call, 10)
    return str(raised.value.details())


@pytest.mark.parametrize("other", [5, 6])
def test_answers_belong_to_an_open_stream_of_their_node(hub: Hub, other: int) -> None:
    async def script(one: grpc.aio.Channel, two: grpc.aio.Channel) -> None:
        if other != 5:
            stream = await greeted(one)
            assert not stream.done()
        assert "answers belong to a stream that is open" in await refused(answering(two))

    scripted(hub, script, other=other)


def test_a_revoked_node_answers_no_more(hub: Hub, door: OpenDoor) -> None:
    async def script(one: grpc.aio.Channel, two: grpc.aio.Channel) -> None:
        stream = await greeted(one)
        call = answering(two)
        await call.initial_metadata()
        assert not call.done()
        door.refused.add(5)
        assert pb.Down.FromString(await stream.read()).rejected.final
        assert await asyncio.wait_for(call, 10) == b""
        assert await refused(answering(two)) == "revoked"

    scripted(hub, script)


@pytest.mark.parametrize(
    ("body", "problem"), [(b"code", "an answer to no exchange"), (bytes(link.MOST_BODY + 1), "a body of 65537 bytes")]
)
def test_what_is_no_answer_ends_the_connection_and_not_the_stream(hub: Hub, body: bytes, problem: str) -> None:
    async def script(one: grpc.aio.Channel, two: grpc.aio.Channel) -> None:
        stream = await greeted(one)
        call = answering(two)
        await call.initial_metadata()
        await call.write(body)
        assert problem in await refused(call)
        await stream.write(pb.Up(beat=pb.Beat()).SerializeToString())
        assert pb.Down.FromString(await stream.read()).WhichOneof("frame") == "beat"

    scripted(hub, script)


def test_the_newest_connection_counts(hub: Hub) -> None:
    async def script(one: grpc.aio.Channel, two: grpc.aio.Channel) -> None:
        stream = await greeted(one)
        first = answering(two)
        await first.initial_metadata()
        second = answering(one)
        await second.initial_metadata()
        assert await asyncio.wait_for(first, 10) == b""
        assert not second.done()
        assert not stream.done()

    scripted(hub, script)
