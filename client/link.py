"""The node's end of the link: it dials out, says Hello, serves what it is asked, and comes back whenever it is cut off."""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from .. import __version__
from ..protocols import link
from ..protocols import link_pb2 as pb
from ..protocols.errors import FedaptError, PayloadError
from ..protocols.outbox import Outbox
from .duties import Duties

logger = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
SILENT_BEATS = 4
"""Beats without an answer after which the stream is taken for dead."""

Stream = grpc.aio.StreamStreamCall[bytes, bytes]


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


class Link:
    """A node's standing connection. `channel` makes a gRPC channel, anew for each try."""

    def __init__(
        self,
        channel: Callable[[], grpc.aio.Channel],
        duties: Duties,
        *,
        backoff: Backoff | None = None,
        connected: Callable[[bool, str], None] = lambda _up, _why: None,
    ) -> None:
        self.channel, self.duties, self.connected = channel, duties, connected
        self.backoff = backoff or Backoff()
        self._wait: float | None = None

    async def run(self) -> None:
        """Stay connected until cancelled. Raises RejectedError where the server says that no try will help."""
        working = asyncio.ensure_future(self.duties.run())
        try:
            await self._connecting(working)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _connecting(self, working: "asyncio.Future[None]") -> None:
        tries = 0
        while True:
            self._wait = None
            why = "the server has closed the stream"
            try:
                if await self._connected(working):
                    tries = 0
            except (grpc.aio.AioRpcError, PayloadError, TimeoutError, OverflowError) as error:
                why = _why(error)
            if working.done():
                working.result()
            self.connected(False, why)
            seconds = self.backoff(tries) if self._wait is None else self._wait * random.SystemRandom().uniform(1, 2)
            logger.info("not connected (%s); next try in %.1f s", why, seconds)
            tries += 1
            await asyncio.sleep(seconds)

    async def _connected(self, working: "asyncio.Future[None]") -> bool:
        """One stream, from its Hello to its end. Whether it got as far as Welcome."""
        async with self.channel() as channel:
            stream: Stream = channel.stream_stream(f"/{link.SERVICE}/{link.OPEN}")()
            try:
                welcome = await asyncio.wait_for(self._greeted(stream), HELLO_SECONDS)
                self.connected(True, "")
                await self._serve(stream, welcome.beat_seconds, working)
            finally:
                stream.cancel()
        return True

    async def _greeted(self, stream: Stream) -> pb.Welcome:
        protocols = link.PROTOCOLS
        hello = pb.Hello(oldest=protocols[0], newest=protocols[-1], software=__version__)
        await stream.write(pb.Up(hello=hello).SerializeToString())
        frame = await self._read(stream)
        if frame is not None and frame.WhichOneof("frame") == "welcome":
            if frame.welcome.protocol not in protocols:
                raise PayloadError(f"the server wants protocol {frame.welcome.protocol}, which is not spoken here")
            return frame.welcome
        raise PayloadError("the server's first frame is no Welcome")

    async def _serve(self, stream: Stream, beat: float, working: "asyncio.Future[None]") -> None:
        outbox = Outbox(lambda chunk: pb.Up(chunk=chunk).SerializeToString())
        jobs = [asyncio.ensure_future(self._reading(stream, SILENT_BEATS * beat))]
        jobs.append(asyncio.ensure_future(self._writing(stream, outbox)))
        jobs.append(asyncio.ensure_future(self._beating(outbox, beat)))
        self.duties.enter(outbox)
        try:
            done, _ = await asyncio.wait([*jobs, working], return_when=asyncio.FIRST_COMPLETED)
            for job in done:
                job.result()
        finally:
            self.duties.leave()
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    async def _reading(self, stream: Stream, silence: float) -> None:
        while True:
            frame = await asyncio.wait_for(self._read(stream), silence)
            if frame is None:
                continue
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
                case "bye":
                    self._wait = max(0.0, frame.bye.after_seconds)
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

    async def _beating(self, outbox: Outbox, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            outbox.put(pb.Up(beat=pb.Beat(state=self.duties.state[: link.LONGEST_NAME])).SerializeToString())


def _why(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details() or 'no details'}"
    return str(error) or type(error).__name__
