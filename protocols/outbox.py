"""What waits to be written on a stream: frames first, in their order, then blobs, a chunk of each in turn."""

import asyncio
from collections import deque
from collections.abc import Callable

from . import link_pb2 as pb
from .blobs import CHUNK_BYTES

MOST_FRAMES = 10_000
"""A peer that reads nothing is let go before its frames fill the memory."""


class Outbox:
    """One stream's outgoing side. Frames overtake chunks, so a heartbeat never waits behind an adapter.

    Blobs are read as the stream takes them: a slow peer holds no copy here but the chunk that is under way.
    """

    def __init__(self, framed: Callable[[pb.Chunk], bytes]) -> None:
        self._framed = framed
        self._frames: deque[bytes] = deque()
        self._blobs: dict[bytes, tuple[bytes, int]] = {}
        self._filled = asyncio.Event()
        self._overflown = False

    def put(self, frame: bytes) -> None:
        """Raises OverflowError where the peer has stopped reading: from then on, because a frame is lost."""
        self._overflown |= len(self._frames) >= MOST_FRAMES
        if self._overflown:
            raise OverflowError(f"{MOST_FRAMES} frames wait for a peer that does not read")
        self._frames.append(frame)
        self._filled.set()

    def send(self, sha256: bytes, data: bytes, offset: int) -> None:
        """Send a blob from `offset` on; one that is under way starts from there again."""
        if offset < len(data):
            self._blobs[sha256] = data, offset
            self._filled.set()

    def forget(self, sha256: bytes) -> None:
        self._blobs.pop(sha256, None)

    async def next(self) -> bytes:
        """The next frame to write, when there is one."""
        while True:
            if self._frames:
                return self._frames.popleft()
            if self._blobs:
                return self._chunk()
            self._filled.clear()
            await self._filled.wait()

    def _chunk(self) -> bytes:
        sha256 = next(iter(self._blobs))
        data, offset = self._blobs.pop(sha256)
        end = offset + CHUNK_BYTES
        if end < len(data):
            self._blobs[sha256] = data, end  # to the end of the line
        return self._framed(pb.Chunk(sha256=sha256, offset=offset, data=data[offset:end]))
