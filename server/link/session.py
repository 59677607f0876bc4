"""One open stream: what a node's frames do, and what is written to it."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ...protocols import link
from ...protocols import link_pb2 as pb
from ...protocols.errors import PayloadError
from ...protocols.identity import Peer
from ...protocols.outbox import Outbox
from .desk import Desk
from .limits import Limits

logger = logging.getLogger(__name__)

RENEWAL_SECONDS = 600.0
"""The least time between two renewals over one stream; honest nodes ask once an hour."""

Read = Callable[[], Awaitable[bytes | None]]
Write = Callable[[bytes], Awaitable[None]]
Renew = Callable[[Peer, bytes], Awaitable[bytes]]


class Session:
    """A node's stream from its Hello on. It ends with the stream, with `close`, or when the node falls silent."""

    def __init__(self, peer: Peer, limits: Limits, *, read: Read, write: Write, renew: Renew) -> None:
        self.peer, self.limits = peer, limits
        self._read, self._write, self._renew = read, write, renew
        self.outbox = Outbox(lambda chunk: pb.Down(chunk=chunk).SerializeToString())
        self._closed = asyncio.Event()
        self._last: bytes | None = None
        self._renewed = -math.inf
        self._desk: Desk | None = None
        self._answering: asyncio.Future[None] | None = None

    def close(self, frame: pb.Down) -> None:
        """End the stream after this frame."""
        self._last = frame.SerializeToString()
        self._closed.set()

    async def run(self, desk: Desk) -> None:
        """Serve the stream at its node's desk. Raises PayloadError where the node's first frame is no Hello that can be agreed with."""
        hello = await self._greeted()
        protocol = link.common_protocol(hello)
        if self._last is not None:  # closed before it began
            await asyncio.wait_for(self._write(self._last), self.limits.hello)
            return
        desk.enter(self.outbox, hello.rank)  # before the node is told so
        self._desk = desk
        tasks: list[asyncio.Future[Any]] = []
        try:
            await self._write(self._welcome(protocol))
            jobs = (self._reading(desk), self._writing(), self._closed.wait())
            tasks = [asyncio.ensure_future(job) for job in jobs]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._last is not None:
                await self._farewell(tasks, self._last)
            for task in done:
                task.result()
        finally:
            desk.leave(self.outbox)
            self._desk = None
            if self._answering is not None:
                self._answering.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _welcome(self, protocol: int) -> bytes:
        beat = self.limits.beat
        welcome = pb.Welcome(protocol=protocol, software=link.SOFTWARE, beat_seconds=beat, answers=True)
        return pb.Down(welcome=welcome).SerializeToString()

    async def answers(self, read: Read) -> None:
        """Take answers to zeroth-order frames over a connection of their own, until it or this stream ends.

        Raises PayloadError where this stream is not open, or what comes is no answer. A newer connection takes the
        older one's place.
        """
        if self._desk is None:
            raise PayloadError("answers belong to a stream that is open")
        if self._answering is not None:
            self._answering.cancel()
        own = self._answering = asyncio.ensure_future(self._answers(self._desk, read))
        try:
            await asyncio.wait([own])
        finally:
            own.cancel()
        if not own.cancelled():
            own.result()

    async def _answers(self, desk: Desk, read: Read) -> None:
        while (raw := await read()) is not None and not self._closed.is_set():
            desk.answer(link.read_answer(raw))

    async def _farewell(self, tasks: list["asyncio.Future[Any]"], last: bytes) -> None:
        """One write at a time: the writer is stopped before the last frame goes out."""
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        await asyncio.wait_for(self._write(last), self.limits.hello)

    async def _greeted(self) -> pb.Hello:
        try:
            raw = await asyncio.wait_for(self._read(), self.limits.hello)
        except TimeoutError:
            raise PayloadError(f"no Hello within {self.limits.hello:g} s") from None
        frame = None if raw is None else link.read_up(raw)
        if frame is None or frame.WhichOneof("frame") != "hello":
            raise PayloadError("the first frame is no Hello")
        return frame.hello

    async def _reading(self, desk: Desk) -> None:
        loop, silence = asyncio.get_running_loop(), self.limits.silence
        async with asyncio.timeout(silence) as timer:
            while (raw := await self._read()) is not None:
                timer.reschedule(None)  # what is done here is not the node's silence
                if self._closed.is_set():  # a node that was shut out delivers nothing more
                    return
                frame = link.read_up(raw)
                if frame is not None and await self._handled(desk, frame):
                    return
                timer.reschedule(loop.time() + silence)

    async def _handled(self, desk: Desk, frame: pb.Up) -> bool:
        """Whether the node has taken its leave."""
        match frame.WhichOneof("frame"):
            case "want":
                desk.want(frame.want)
            case "result":
                desk.result(frame.result)
            case "chunk":
                desk.chunk(frame.chunk)
            case "beat":
                desk.state = frame.beat.state
                self.outbox.put(pb.Down(beat=pb.Beat()).SerializeToString())
            case "answer":
                desk.answer(frame.answer.body)
            case "renew":
                await self._renewing(frame.renew.csr)
            case "bye":
                logger.info("node %d leaves: %s", desk.node, frame.bye.reason or "no reason given")
                return True
        return False

    async def _renewing(self, csr: bytes) -> None:
        """Each renewal is a row of the log, so a node that asks again at once is not heard."""
        if time.monotonic() - self._renewed < RENEWAL_SECONDS:
            return
        self._renewed = time.monotonic()
        chain = await self._renew(self.peer, csr)
        self.outbox.put(pb.Down(renewed=pb.Renewed(chain=chain)).SerializeToString())

    async def _writing(self) -> None:
        while True:
            await self._write(await self.outbox.next())
