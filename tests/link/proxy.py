"""A TCP proxy that does to a connection what a bad link does, at moments that a key draws."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Literal

Fault = Literal["delay", "throttle", "cut", "blackhole", "duplicate", "reorder"]
FAULTS: tuple[Fault, ...] = ("delay", "throttle", "cut", "blackhole", "duplicate", "reorder")

PIECE = 4096
DELAY_SECONDS, THROTTLED_BYTES = 0.01, 1_000_000
SLOW_BYTES = 100_000
"""How many bytes a slow connection is slow for before it is cut, so that the next fault has its turn."""


@dataclass(frozen=True)
class Point:
    """From this byte of a connection on, one way of it, the fault holds."""

    fault: Fault
    up: bool
    byte: int


class Proxy:
    """Connections to `port` go to `to`. Each new one takes the next fault of the schedule; later ones have none.

    `bytes_up` and `bytes_down` count what went through, all connections together.
    """

    def __init__(self, to: int, schedule: list[Point]) -> None:
        self.to, self.port = to, 0
        self._schedule = list(schedule)
        self._open: set[asyncio.Future[None]] = set()
        self.met: list[Point] = []
        self.connections = self.bytes_up = self.bytes_down = 0

    async def serve(self) -> asyncio.Server:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def close(self) -> None:
        for _ in range(2):  # a connection that was just taken has no task before the loop has turned
            await asyncio.sleep(0.02)
            for connection in self._open:
                connection.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)
        await asyncio.sleep(0.02)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.ensure_future(self._through(reader, writer))
        self._open.add(connection)
        connection.add_done_callback(self._open.discard)

    async def _through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        point = self._schedule.pop(0) if self._schedule else None
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.transport.abort()
            return
        ways = [
            asyncio.ensure_future(self._pump(reader, up_writer, True, point if point and point.up else None)),
            asyncio.ensure_future(self._pump(up_reader, writer, False, None if point and point.up else point)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, up_writer):
                end.transport.abort()

    async def _pump(self, of: asyncio.StreamReader, to: asyncio.StreamWriter, up: bool, point: Point | None) -> None:
        """Until the connection ends, or the fault ends it."""
        passed = slow = 0
        while data := await of.read(PIECE):
            if point is not None and passed + len(data) > point.byte:
                if point not in self.met:
                    self.met.append(point)
                clean, data = data[: max(0, point.byte - passed)], data[max(0, point.byte - passed) :]
                to.write(clean)
                data = await self._faulty(point.fault, data, of)
                slow += len(data)
                if slow > SLOW_BYTES:
                    return
                passed += len(clean)
            passed += len(data)
            self.bytes_up, self.bytes_down = self.bytes_up + up * len(data), self.bytes_down + (not up) * len(data)
            to.write(data)
            await to.drain()

    async def _faulty(self, fault: Fault, data: bytes, of: asyncio.StreamReader) -> bytes:
        """What is to go on instead of `data`. Raises ConnectionError where nothing is."""
        match fault:
            case "delay":
                await asyncio.sleep(DELAY_SECONDS)
            case "throttle":
                await asyncio.sleep(len(data) / THROTTLED_BYTES)
            case "cut":
                raise ConnectionError
            case "blackhole":
                while await of.read(PIECE):
                    pass
            case "duplicate":  # TCP would never: HTTP/2 finds nonsense, and its connection is lost
                return data + data
            case "reorder":
                return data[len(data) // 2 :] + data[: len(data) // 2]
        return data


def schedule(count: int, key: int, most: int) -> list[Point]:
    """`count` faults of all kinds, both ways, at bytes up to `most`, spread evenly over the magnitudes."""
    chance = random.Random(key)
    points = []
    for number in range(count):
        byte = int(most ** chance.uniform(0.2, 1.0))
        points.append(Point(FAULTS[number % len(FAULTS)], chance.random() < 0.5, byte))
    return points


@contextmanager
def proxy(to: int, points: list[Point]) -> Iterator[Proxy]:
    """In a thread of its own, so that nothing else of a test delays what goes through."""
    loop, made = asyncio.new_event_loop(), Proxy(to, points)
    server = loop.run_until_complete(made.serve())

    def run() -> None:
        loop.run_forever()
        server.close()
        loop.run_until_complete(made.close())
        loop.close()

    thread = Thread(target=run)
    thread.start()
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
