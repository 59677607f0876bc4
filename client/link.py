"""The node's end of the link: it dials out, says Hello, serves what it is asked, and comes back whenever it is cut off."""

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from ..protocols import link
from ..protocols import link_pb2 as pb
from ..protocols.errors import FedaptError, PayloadError
from ..protocols.outbox import Outbox
from ..protocols.records import LONGEST_REASON
from .duties import Duties

logger = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
FAREWELL_SECONDS = 2.0
SILENT_BEATS = 4
"""Beats without an answer after which the stream is taken for dead."""

BROKEN = (grpc.aio.AioRpcError, PayloadError, TimeoutError, OverflowError, asyncio.InvalidStateError)
"""What ends a stream and not the node; the last is gRPC's for a write to a call that has just ended."""

BRISK_SECONDS = 20.0
"""Answers that come at least so often have a connection of their own: it never falls silent for long, and the bytes that it
saves soon pay for its opening."""

RENEW_SECONDS = 3600.0
"""How often a node looks whether its certificate is to be renewed."""

Stream = grpc.aio.StreamStreamCall[bytes, bytes]
Answers = grpc.aio.StreamUnaryCall[bytes, bytes]


class RejectedError(FedaptError):
    """The server lets this node in no more: trying again ends the same way."""


@dataclass(frozen=True)
class Backoff:
    """Seconds between two tries: doubled from `first` to `most`, and drawn from the upper half, so that nodes which were
    cut off together do not come back together."""

    first: float = 0.5
    most: float = 60.0

    def __call__(self, tries: int) -> float:
        # Not a computation that has to be repeatable: the spread is what counts.
        return random.SystemRandom().uniform(0.5, 1.0) * min(self.most, self.first * 2.0 ** min(tries, 30))


class Renewal(Protocol):
    """Who keeps the node's certificate. Both may read and write files."""

    def due(self) -> bytes | None:
        """A certificate request (PEM), if it is time for one."""

    def accept(self, chain: bytes) -> None:
        """Keep what came of it. Raises PayloadError where it is no certificate of this node."""

    def require_valid(self) -> None:
        """Raises FedaptError, saying the way out, where the certificate has run out: it cannot be renewed any more."""


class Link:
    """A node's standing connection. `channel` makes a gRPC channel, anew for each try: so a new certificate is used.

    `metadata` goes with each stream. `renewal` None: there is no certificate. `rank` is the largest that the node can
    afford; 0: any.
    """

    def __init__(
        self,
        channel: Callable[[], grpc.aio.Channel],
        duties: Duties,
        *,
        backoff: Backoff | None = None,
        connected: Callable[[bool, str], None] = lambda _up, _why: None,
        metadata: Sequence[tuple[str, str]] = (),
        renewal: Renewal | None = None,
        rank: int = 0,
    ) -> None:
        self.channel, self.duties, self.connected = channel, duties, connected
        self.metadata, self.renewal, self.rank = tuple(metadata), renewal, rank
        self.backoff = backoff or Backoff()
        self._wait: float | None = None
        self._tries = 0
        self._leaving = ""
        self._left = asyncio.Event()

    def leave(self, reason: str) -> None:
        """Take leave of the server, then let `run` return. To be called in the stream's loop."""
        self._leaving = reason
        self._left.set()

    async def run(self) -> None:
        """Stay connected until `leave`, or until cancelled.

        Raises RejectedError where the server says that no try will help, and what `renewal.require_valid` raises where no
        connection comes about.
        """
        working = asyncio.ensure_future(self.duties.run())
        try:
            await self._connecting(working)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _connecting(self, working: "asyncio.Future[None]") -> None:
        while not self._left.is_set():
            self._wait = None
            why = "the server has closed the stream"
            try:
                await self._connected(working)
            except RejectedError:
                await self._require_valid()  # where that is why, it says more
                raise
            except BROKEN as error:
                why = _why(error)
                await self._require_valid()
            if working.done():
                working.result()
            self.connected(False, self._leaving or why)
            if self._left.is_set():
                return
            # Two machines that hold the same key take the stream from each other, and must not do so without a pause.
            seconds = self._wait * random.SystemRandom().uniform(1, 2) if self._wait else self.backoff(self._tries)
            logger.info("not connected (%s); next try in %.1f s", why, seconds)
            self._tries += 1
            await _first(asyncio.sleep(seconds), self._left.wait())

    async def _require_valid(self) -> None:
        """TLS tells a node whose certificate has run out nothing, whichever side notices: so it looks for itself.

        It does so only when it was not let in, because its own clock may be what is wrong.
        """
        if self.renewal is not None:
            await asyncio.to_thread(self.renewal.require_valid)

    async def _connected(self, working: "asyncio.Future[None]") -> None:
        """One stream, from its Hello to its end."""
        async with self.channel() as channel:
            stream: Stream = channel.stream_stream(f"/{link.SERVICE}/{link.OPEN}")(metadata=self.metadata)
            try:
                welcome = await asyncio.wait_for(self._greeted(stream), HELLO_SECONDS)
                self._tries = 0
                self.connected(True, "")
                await self._serve(stream, welcome, working)
            finally:
                stream.cancel()

    async def _greeted(self, stream: Stream) -> pb.Welcome:
        protocols = link.PROTOCOLS
        hello = pb.Hello(oldest=protocols[0], newest=protocols[-1], software=link.SOFTWARE, rank=self.rank)
        await stream.write(pb.Up(hello=hello).SerializeToString())
        frame = await self._read(stream)
        if frame is not None and frame.WhichOneof("frame") == "welcome":
            if frame.welcome.protocol not in protocols:
                raise PayloadError(f"the server wants protocol {frame.welcome.protocol}, which is not spoken here")
            return frame.welcome
        raise PayloadError("the server's first frame is no Welcome")

    async def _serve(self, stream: Stream, welcome: pb.Welcome, working: "asyncio.Future[None]") -> None:
        beat = welcome.beat_seconds
        outbox, answers = (Outbox(lambda chunk: pb.Up(chunk=chunk).SerializeToString()) for _ in range(2))
        jobs = [asyncio.ensure_future(self._reading(stream, SILENT_BEATS * beat))]
        jobs.append(asyncio.ensure_future(self._writing(stream, outbox)))
        jobs.append(asyncio.ensure_future(self._beating(outbox, beat)))
        jobs.append(asyncio.ensure_future(self._renewing(outbox)))
        jobs.append(asyncio.ensure_future(self._departing(outbox)))
        if welcome.answers:
            jobs.append(asyncio.ensure_future(self._answering(answers, outbox)))
        self.duties.enter(outbox, answers if welcome.answers else None)
        try:
            done, _ = await asyncio.wait([*jobs, working], return_when=asyncio.FIRST_COMPLETED)
            if working in done and self._left.is_set():  # called off, because this node leaves
                done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for job in done:
                job.result()
        finally:
            self.duties.leave()
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def _departing(self, outbox: Outbox) -> None:
        """Ends the stream when it is time, if the server does not: it closes it when it has read the Bye."""
        await self._left.wait()
        outbox.put(pb.Up(bye=pb.Bye(reason=self._leaving[:LONGEST_REASON])).SerializeToString())
        await asyncio.sleep(FAREWELL_SECONDS)

    async def _reading(self, stream: Stream, silence: float) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(silence) as timer:
            while True:
                frame = await self._read(stream)
                timer.reschedule(None)  # what is done here is not the server's silence
                if frame is not None:
                    await self._handle(frame)
                timer.reschedule(loop.time() + silence)

    async def _handle(self, frame: pb.Down) -> None:
        match frame.WhichOneof("frame"):
            case "question":
                self.duties.question(frame.question)
            case "chunk":
                self.duties.chunk(frame.chunk)
            case "want":
                self.duties.want(frame.want)
            case "received":
                self.duties.received(frame.received)
            case "exchange":
                self.duties.exchange(frame.exchange.body)
            case "renewed" if self.renewal is not None:
                await self._renewed(self.renewal, frame.renewed.chain)
            case "bye":
                self._wait = frame.bye.after_seconds
                raise PayloadError(f"the server takes its leave: {frame.bye.reason}")

    async def _read(self, stream: Stream) -> pb.Down | None:
        """The next frame; None for one that is not known here. Raises where the stream has ended."""
        raw = await stream.read()
        if not isinstance(raw, bytes):
            raise PayloadError("the server has closed the stream")
        frame = link.read_down(raw)
        if frame is not None and frame.WhichOneof("frame") == "rejected":
            if frame.rejected.final:
                raise RejectedError(f"the server refuses this node: {frame.rejected.reason}")
            raise PayloadError(f"the server refuses: {frame.rejected.reason}")
        return frame

    async def _writing(self, stream: Stream, outbox: Outbox) -> None:
        while True:
            await stream.write(await outbox.next())

    async def _answering(self, answers: Outbox, outbox: Outbox) -> None:
        """Answers to zeroth-order frames: over the stream, or, where they come briskly, over a connection of their own.

        HTTP/2 acknowledges what came down with two WINDOW_UPDATEs of 13 bytes in each write; over a connection down which
        nothing comes there is nothing to acknowledge.
        """
        last, apart = -math.inf, True
        while True:
            body = await answers.next()
            brisk, last = time.monotonic() - last < BRISK_SECONDS, time.monotonic()
            if brisk and apart:
                apart = await self._answering_apart(body, answers)
                if apart:
                    continue
            outbox.put(pb.Up(answer=pb.Answer(body=body)).SerializeToString())

    async def _answering_apart(self, body: bytes, answers: Outbox) -> bool:
        """Send this answer and those that follow it briskly; False, and nothing is sent, where there is no way.

        Raises where the connection breaks later: an answer may be lost with it, and a new stream says so to the server.
        """
        async with self.channel() as channel:
            call: Answers = channel.stream_unary(f"/{link.SERVICE}/{link.ANSWER}")(metadata=self.metadata)
            try:
                async with asyncio.timeout(HELLO_SECONDS):
                    taken = link.TAKEN_KEY in dict(await call.initial_metadata())
            except BROKEN:
                taken = False
            if not taken:
                return False
            await call.write(body)
            loop = asyncio.get_running_loop()
            with suppress(TimeoutError):  # no answer came for so long
                async with asyncio.timeout(BRISK_SECONDS) as timer:
                    while True:
                        body = await answers.next()
                        timer.reschedule(None)
                        await call.write(body)
                        timer.reschedule(loop.time() + BRISK_SECONDS)
            await call.done_writing()
        return True

    async def _beating(self, outbox: Outbox, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            outbox.put(pb.Up(beat=pb.Beat(state=self.duties.standing[: link.LONGEST_NAME])).SerializeToString())

    async def _renewing(self, outbox: Outbox) -> None:
        while True:
            request = None if self.renewal is None else await asyncio.to_thread(self.renewal.due)
            if request is not None:
                outbox.put(pb.Up(renew=pb.Renew(csr=request)).SerializeToString())
            await asyncio.sleep(RENEW_SECONDS)

    async def _renewed(self, renewal: Renewal, chain: bytes) -> None:
        try:
            await asyncio.to_thread(renewal.accept, chain)
        except FedaptError as error:
            logger.error("the certificate could not be renewed: %s", error)
        else:
            logger.info("the certificate was renewed")


async def _first(*waits: Coroutine[Any, Any, Any]) -> None:
    """Return when one of them has ended."""
    jobs = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


def _why(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details() or 'no details'}"
    return str(error) or type(error).__name__
