"""One stream at a time, written by hand: what the server answers, and where it ends."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest

from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.errors import OutputError
from fedapt.protocols.identity import Peer
from fedapt.protocols.update import Assignment
from fedapt.server.link.desk import Answered, Asked, Desk
from fedapt.server.link.hub import OWN_FAULT, Hub, host_of, is_loopback
from fedapt.server.link.limits import Limits
from fedapt.server.link.session import Session
from fedapt.server.link.stopped import StoppedError

from .federation import OpenDoor, channel, faultless, until

LIMITS = Limits(beat=0.2, silence=2.0, hello=1.0, streams_per_address=3, revocation_poll=0.05)
HELLO = pb.Up(hello=pb.Hello(oldest=1, newest=1))
BEAT = pb.Up(beat=pb.Beat())


class Stream:
    """A node without a mind of its own."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call: Any = channel.stream_stream(f"/{link.SERVICE}/{link.OPEN}")()

    async def write(self, *frames: pb.Up | bytes) -> None:
        for frame in frames:
            await self.call.write(frame if isinstance(frame, bytes) else frame.SerializeToString())

    async def read(self) -> pb.Down | None:
        """The next frame; None at the end."""
        raw = await asyncio.wait_for(self.call.read(), 10)
        return pb.Down.FromString(raw) if isinstance(raw, bytes) else None

    async def all(self) -> list[pb.Down]:
        """All frames to the end of the stream."""
        frames = []
        while (frame := await self.read()) is not None:
            frames.append(frame)
        return frames

    async def greeted(self) -> "Stream":
        await self.write(HELLO)
        frame = await self.read()
        assert frame is not None
        assert frame.welcome.protocol == 1
        return self


Script = Callable[[Callable[[int], Stream]], Awaitable[Any]]


@pytest.fixture
def door() -> OpenDoor:
    return OpenDoor()


@pytest.fixture
def hub(door: OpenDoor, caplog: pytest.LogCaptureFixture) -> Iterator[Hub]:
    """A server; nothing that a peer does may be a fault of its own."""
    with faultless(door, LIMITS, caplog) as hub:
        yield hub


def play(hub: Hub, script: Script) -> Any:
    """Run a script; it is given a way to open streams."""

    async def run() -> Any:
        channels: list[grpc.aio.Channel] = []

        def stream(node: int) -> Stream:
            channels.append(channel(hub.port, node))
            return Stream(channels[-1])

        try:
            return await asyncio.wait_for(script(stream), 30)
        finally:
            for one in channels:
                await one.close()

    return asyncio.run(run())


def rejected(frames: list[pb.Down]) -> pb.Rejected:
    assert frames[-1].WhichOneof("frame") == "rejected", frames
    return frames[-1].rejected


def test_hello_and_welcome(hub: Hub) -> None:
    async def script(stream: Callable[[int], Stream]) -> None:
        one = stream(5)
        await one.write(HELLO)
        frame = await one.read()
        assert frame is not None
        assert (frame.welcome.protocol, frame.welcome.beat_seconds) == (1, LIMITS.beat)
        until(lambda: hub.nodes() == [5], "the node is here")
        assert hub.absence(5) == 0
        await one.write(BEAT)
        frame = await one.read()
        assert frame is not None
        assert frame.WhichOneof("frame") == "beat"
        await one.write(pb.Up(bye=pb.Bye(reason="enough")))
        assert await one.all() == []

    play(hub, script)
    until(lambda: hub.nodes() == [], "the node is gone")
    assert hub.absence(5) > 0


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], "no Hello within 1 s"),
        ([BEAT], "the first frame is no Hello"),
        ([b"\xff\xff"], "not a frame"),
        ([pb.Up(hello=pb.Hello(oldest=2, newest=3))], "upgrade the server's fedapt"),
        ([pb.Up(hello=pb.Hello(oldest=1, newest=1, software="x" * 200))], "at most 128"),
        ([HELLO], "silent for 2 s"),
        ([HELLO, b"\xff\xff"], "not a frame"),
        ([HELLO, pb.Up(want=pb.Want(sha256=b"short"))], "a SHA-256 of 5 bytes"),
        ([HELLO, pb.Up(answer=pb.Answer(body=bytes(link.MOST_BODY + 1)))], "a body of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_ends_a_stream_is_said_and_another_try_is_welcome(
    hub: Hub, frames: list[pb.Up | bytes], reason: str
) -> None:
    async def script(stream: Callable[[int], Stream]) -> None:
        one = stream(5)
        await one.write(*frames)
        refusal = rejected(await one.all())
        assert reason in refusal.reason
        assert not refusal.final
        await stream(5).greeted()

    play(hub, script)


def test_a_frame_that_is_too_large_ends_its_stream_alone(hub: Hub) -> None:
    async def script(stream: Callable[[int], Stream]) -> None:
        other, one = await stream(6).greeted(), await stream(5).greeted()
        with pytest.raises(grpc.aio.AioRpcError):  # noqa: PT012 - the write can see it as well as the read
            await one.write(bytes(link.FRAME_BYTES + 1))
            await one.all()
        await other.write(BEAT)
        assert await other.read() is not None

    play(hub, script)


def test_frames_of_tomorrow_are_ignored(hub: Hub) -> None:
    async def script(stream: Callable[[int], Stream]) -> None:
        one = await stream(5).greeted()
        await one.write(bytes([15 << 3 | 2, 3]) + b"new", BEAT)
        frame = await one.read()
        assert frame is not None
        assert frame.WhichOneof("frame") == "beat"

    play(hub, script)


def test_streams_of_one_address_are_counted(hub: Hub) -> None:
    async def script(stream: Callable[[int], Stream]) -> None:
        first = [await stream(node).greeted() for node in range(3)]
        refusal = rejected(await stream(9).all())
        assert (refusal.reason, refusal.final) == ("more than 3 streams from 127.0.0.1", False)
        await first[0].write(pb.Up(bye=pb.Bye()))
        await first[0].all()
        await stream(9).greeted()

    play(hub, script)


def test_an_open_stream_is_held_against_the_clock(hub: Hub, door: OpenDoor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate runs out without anybody deciding it: no change is counted."""
    monkeypatch.setattr("fedapt.server.link.hub.EXPIRY_SECONDS", 0.1)
    monkeypatch.setattr(door, "changes", lambda: 0)

    async def script(stream: Callable[[int], Stream]) -> None:
        one = await stream(5).greeted()
        door.refused.add(5)
        while (frame := await one.read()) is not None and frame.WhichOneof("frame") != "rejected":
            pass
        assert frame is not None
        assert frame.rejected.reason == "revoked"

    play(hub, script)


def test_nobody_and_the_revoked_stay_outside(hub: Hub, door: OpenDoor) -> None:
    async def script(stream: Callable[[int], Stream]) -> None:
        anonymous = grpc.aio.insecure_channel(f"127.0.0.1:{hub.port}")
        async with anonymous:
            assert rejected(await Stream(anonymous).all()).reason == "nobody"
        door.refused.add(5)
        refusal = rejected(await stream(5).all())
        assert (refusal.reason, refusal.final) == ("revoked", True)

    play(hub, script)
    assert hub.nodes() == []


def test_a_revocation_ends_a_stream_that_is_open(hub: Hub, door: OpenDoor) -> None:
    async def script(stream: Callable[[int], Stream]) -> None:
        one, other = await stream(5).greeted(), await stream(6).greeted()
        door.refused.add(5)
        assert rejected(await one.all()).final
        await other.write(BEAT)
        assert await other.read() is not None

    play(hub, script)


def test_a_refused_stream_hides_no_older_one_from_a_revocation(
    hub: Hub, door: OpenDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a certificate that was replaced: the stream with the newer one must still be found."""

    async def script(stream: Callable[[int], Stream]) -> None:
        one = await stream(5).greeted()
        monkeypatch.setattr(door, "changes", lambda: -1)
        await asyncio.sleep(3 * LIMITS.revocation_poll)
        door.refused |= {5, 6}
        for refused in (stream(5), stream(6)):
            assert rejected(await refused.all()).final
        await one.write(BEAT)
        assert await one.read() is not None
        monkeypatch.undo()
        assert rejected(await one.all()).final

    play(hub, script)
    assert hub.known() == [5], "who was never let in is not known"


def test_a_fault_of_the_server_is_not_told(
    hub: Hub, door: OpenDoor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(peer: Peer) -> str:
        raise OSError("SELECT name FROM nodes")

    async def script(stream: Callable[[int], Stream]) -> None:
        monkeypatch.setattr(door, "refusal", away)
        refusal = rejected(await stream(5).all())
        assert (refusal.reason, refusal.final) == (OWN_FAULT, False)

    play(hub, script)
    assert "SELECT name" in caplog.text
    caplog.clear()


def test_who_was_shut_out_delivers_nothing_more() -> None:
    """Not even while it refuses to read that it was."""
    answers: list[Answered] = []
    desk, asked = Desk(5, LIMITS), question_of(5, answers)
    result = pb.Up(result=pb.Result(question=asked.question.id, kind="empty", payload=link.blob(b"")))

    async def served(shut_out: bool) -> None:
        frames, never = iter([HELLO, result, BEAT]), asyncio.Event()

        async def read() -> bytes:
            frame = next(frames, None)
            if frame is None:
                await never.wait()
            if frame is result and shut_out:
                session.close(pb.Down(rejected=pb.Rejected(reason="revoked", final=True)))
            assert frame is not None
            return frame.SerializeToString()

        async def write(raw: bytes) -> None:
            if pb.Down.FromString(raw).WhichOneof("frame") == "rejected":
                await never.wait()

        async def renew(peer: Peer, csr: bytes) -> bytes:
            raise NotImplementedError

        session = Session(OpenDoor.peer(5), LIMITS, read=read, write=write, renew=renew)
        desk.ask(asked)
        with pytest.raises(TimeoutError):
            await session.run(desk)

    asyncio.run(served(shut_out=True))
    assert answers == []
    asyncio.run(served(shut_out=False))
    assert len(answers) == 1


def test_the_watch_outlives_a_database_that_is_away(
    hub: Hub, door: OpenDoor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away() -> int:
        raise OSError("the database is locked")

    async def script(stream: Callable[[int], Stream]) -> None:
        one = await stream(5).greeted()
        monkeypatch.setattr(door, "changes", away)
        while "cannot be seen" not in caplog.text:
            await one.write(BEAT)
            await asyncio.sleep(0.02)
        monkeypatch.undo()
        caplog.clear()
        door.refused.add(5)
        assert rejected(await one.all()).final

    play(hub, script)


def question_of(node: int, answers: list[Answered]) -> Asked:
    about = Assignment("run", 1, 1, node, "v", b"payload")
    question = link.question(pb.TRAIN, about, link.blob(b"spec"), link.blob(b"payload"))
    return Asked(node, question, {}, answers.append)


def test_a_newer_stream_of_a_node_replaces_the_older(hub: Hub) -> None:
    """The older end may be a ghost: the node's answers count on the newer alone, and it is not gone in between."""
    answers: list[Answered] = []
    asked = question_of(5, answers)

    async def script(stream: Callable[[int], Stream]) -> None:
        one = await stream(5).greeted()
        hub.ask([asked])
        frame = await one.read()
        assert frame is not None
        assert frame.question == asked.question
        two = await stream(5).greeted()
        (bye,) = await one.all()
        assert bye.bye.reason == "another stream of this node was opened"
        assert hub.nodes() == [5]
        frame = await two.read()
        assert frame is not None
        assert frame.question == asked.question
        result = pb.Result(question=asked.question.id, kind="empty", payload=link.blob(b""))
        await two.write(pb.Up(result=result), pb.Up(result=result), BEAT)
        await two.read()

    play(hub, script)
    assert len(answers) == 1


def test_a_peer_that_reads_nothing_is_let_go(hub: Hub) -> None:
    """Its frames stop at a limit, its stream at another, and the server's write to it is not waited for."""

    async def script(stream: Callable[[int], Stream]) -> None:
        one = stream(5)
        await one.write(HELLO)
        body = bytes(link.MOST_BODY)
        until(lambda: hub.nodes() == [5], "the node is here")
        hub.exchange([(5, body)] * 500, lambda _node, _body: None)
        await asyncio.sleep(LIMITS.silence)
        while hub._streams:
            await asyncio.sleep(0.02)

    play(hub, script)
    assert hub.nodes() == []


def test_zeroth_order_frames_go_both_ways(hub: Hub) -> None:
    got: list[tuple[int, bytes | None]] = []

    async def script(stream: Callable[[int], Stream]) -> None:
        one = await stream(5).greeted()
        until(lambda: hub.nodes() == [5], "the node is here")
        hub.exchange([(5, b"probe"), (6, b"to nobody")], lambda node, body: got.append((node, body)))
        frame = await one.read()
        assert frame is not None
        assert frame.exchange.body == b"probe"
        await one.write(pb.Up(answer=pb.Answer(body=b"byte")), BEAT)
        await one.read()

    play(hub, script)
    assert sorted(got) == [(5, b"byte"), (6, None)]


def test_a_certificate_is_renewed_on_the_stream(hub: Hub) -> None:
    async def script(stream: Callable[[int], Stream]) -> None:
        one = await stream(5).greeted()
        await one.write(pb.Up(renew=pb.Renew(csr=b"request")))
        frame = await one.read()
        assert frame is not None
        assert frame.renewed.chain == b"chain of request"
        await one.write(pb.Up(renew=pb.Renew(csr=b"request")), BEAT)
        frame = await one.read()
        assert frame is not None
        assert frame.WhichOneof("frame") == "beat", "a renewal is not to be had at once again"

    play(hub, script)


def test_a_server_takes_its_leave(door: OpenDoor) -> None:
    hub = Hub("127.0.0.1:0", door, credentials=None, limits=LIMITS)
    hub.start()

    async def script(stream: Callable[[int], Stream]) -> None:
        one = await stream(5).greeted()
        await asyncio.to_thread(hub.stop, "back soon", 3.0)
        (frame,) = await one.all()
        assert (frame.bye.reason, frame.bye.after_seconds) == ("back soon", 3.0)

    play(hub, script)
    with Hub(f"127.0.0.1:{hub.port}", door, credentials=None):
        """The port is free for the next one."""


def test_who_asks_after_the_end_is_called_off(door: OpenDoor) -> None:
    with Hub("127.0.0.1:0", door, credentials=None, limits=LIMITS) as hub:
        hub.ask([question_of(5, [])])
    assert hub.absence(6) == 0
    for late in (partial(hub.ask, []), partial(hub.close, 5, []), partial(hub.exchange, [], lambda _node, _body: None)):
        with pytest.raises(StoppedError):
            late()


def test_a_port_is_had_by_one_server_alone(hub: Hub, door: OpenDoor) -> None:
    with pytest.raises(OutputError, match="is another server running"):
        Hub(f"127.0.0.1:{hub.port}", door, credentials=None).start()


@pytest.mark.parametrize(
    "address", ["0.0.0.0:0", "10.0.0.7:9000", "[::]:9000", "example.org:1", "127.0.0.1.evil.org:1"]
)
def test_without_tls_it_listens_on_loopback_alone(door: OpenDoor, address: str) -> None:
    with pytest.raises(OutputError, match="without TLS"):
        Hub(address, door, credentials=None)


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:10.0.0.7:51234", "10.0.0.7"), ("ipv6:%5B::1%5D:51234", "%5B::1%5D"), ("ipv6:[fe80::1]:5", "[fe80::1]")],
)
def test_ports_do_not_make_addresses_differ(peer: str, host: str) -> None:
    assert host_of(peer) == host


def test_loopback() -> None:
    assert all(map(is_loopback, ["localhost:1", "127.0.0.1:0", "127.9.9.9:5", "[::1]:7"]))
