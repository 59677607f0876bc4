"""The server's end of the link: one port, one thread, every node's stream and the questions that are open."""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from typing import Any, Self

import grpc
from grpc.aio import ServicerContext

from ...protocols import link
from ...protocols import link_pb2 as pb
from ...protocols.errors import OutputError, PayloadError
from ...protocols.identity import Peer
from .desk import Asked, Desk
from .door import Door
from .limits import Limits
from .session import Read, Session
from .stopped import StoppedError

logger = logging.getLogger(__name__)

Context = ServicerContext[bytes, bytes]

BROKEN = (grpc.aio.UsageError, grpc.aio.InternalError, asyncio.InvalidStateError)
"""What gRPC raises where a stream breaks while something is written."""

STOP_SECONDS = 2.0

EXPIRY_SECONDS = 60.0
"""How often open streams are held against the clock."""

OWN_FAULT = "an error in the server, which its operator finds in its log"


class Hub:
    """Listens at `address` from `start` to `stop`. Its methods may be called from any thread.

    Those that ask or answer raise StoppedError after `stop`.

    `credentials` None is plaintext, which is refused but on a loopback address. Raises OutputError where the port cannot be had.
    """

    def __init__(
        self, address: str, door: Door, *, credentials: grpc.ServerCredentials | None, limits: Limits | None = None
    ) -> None:
        if credentials is None and not is_loopback(address):
            raise OutputError(f"{address}: without TLS the link listens on a loopback address alone")
        self.address, self.door, self.credentials = address, door, credentials
        self.limits = limits or Limits()
        self.port = 0
        self._desks: dict[int, Desk] = {}
        self._sessions: dict[Session, None] = {}  # the oldest first
        self._streams: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        bound: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(bound)), name="link", daemon=True)
        self._thread.start()
        self.port = bound.result()

    def stop(self, reason: str = "the server stops", after_seconds: float = 1.0) -> None:
        """Take leave of all nodes, then close the port. They come back after about `after_seconds`."""
        if self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set_result, pb.Bye(reason=reason, after_seconds=after_seconds))
        self._thread.join()
        self._thread = None

    def nodes(self) -> list[int]:
        """The nodes whose streams are open and that do not rest, ascending."""
        return sorted(node for node, desk in list(self._desks.items()) if desk.present and not desk.rests)

    def known(self) -> list[int]:
        """All nodes that were here since the start, ascending."""
        return sorted(self._desks)

    def absence(self, node: int) -> float:
        """Seconds since a node was last here; 0 while it is."""
        desk = self._desks.get(node)
        return 0.0 if desk is None else desk.absence

    def rank(self, node: int) -> int | None:
        """The largest rank that a node said it can afford (0: any); None where it was not here since the start."""
        desk = self._desks.get(node)
        return None if desk is None else desk.rank

    def ask(self, questions: Sequence[Asked]) -> None:
        """Ask now, or as soon as the node is here."""

        def ask() -> None:
            for asked in questions:
                self._desk(asked.node).ask(asked)

        self._soon(ask)

    def close(self, node: int, questions: Iterable[bytes], reason: str = "") -> None:
        """The questions are dealt with: the node may forget them."""

        def close() -> None:
            for question in questions:
                self._desk(node).close(question, reason)

        self._soon(close)

    def exchange(self, frames: Sequence[tuple[int, bytes]], deliver: Callable[[int, bytes | None], None]) -> None:
        """Send zeroth-order frames to their nodes; `deliver` gets each one's answer in the link's thread, or None."""

        def send() -> None:
            for node, body in frames:
                self._desk(node).exchange(body, partial(deliver, node))

        self._soon(send)

    def _soon(self, function: Callable[[], None]) -> None:
        """Call it in the link's thread, without waiting for it."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed
            raise StoppedError from None

    def _desk(self, node: int) -> Desk:
        if node not in self._desks:
            self._desks[node] = Desk(node, self.limits)
        return self._desks[node]

    async def _serve(self, bound: "Future[int]") -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping: asyncio.Future[pb.Bye] = self._loop.create_future()
        server = grpc.aio.server(options=self._options())
        server.add_generic_rpc_handlers((self._handlers(),))
        try:
            if self.credentials is None:
                port = server.add_insecure_port(self.address)
            else:
                port = server.add_secure_port(self.address, self.credentials)
        except RuntimeError:
            bound.set_exception(OutputError(f"{self.address}: the port cannot be had; is another server running?"))
            return
        await server.start()
        bound.set_result(port)
        watching = asyncio.ensure_future(self._revoking())
        bye = await self._stopping
        watching.cancel()
        for session in list(self._sessions):
            session.close(pb.Down(bye=bye))
        await server.stop(STOP_SECONDS)

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_receive_message_length", link.FRAME_BYTES),
            ("grpc.server_handshake_timeout_ms", int(1000 * self.limits.connections_handshake)),
            ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not take half of the nodes
            ("grpc.max_metadata_size", 16 << 10),
        ]

    def _handlers(self) -> grpc.GenericRpcHandler:
        methods: dict[str, Any] = {
            link.JOIN: grpc.unary_unary_rpc_method_handler(self._join),
            link.OPEN: grpc.stream_stream_rpc_method_handler(self._open),
            link.ANSWER: grpc.stream_unary_rpc_method_handler(self._answer),
        }
        return grpc.method_handlers_generic_handler(link.SERVICE, methods)

    async def _join(self, request: bytes, context: Context) -> bytes:
        try:
            asked = pb.JoinRequest.FromString(request)
            peer = self.door.identify(context)
            chain, name = await asyncio.to_thread(self.door.join, peer, asked.csr)
        except (PayloadError, ValueError) as error:
            logger.warning("a join was refused: %s", error)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error)[:500])
        except Exception:  # gRPC would tell the peer what it says
            logger.exception("a join failed")
            await context.abort(grpc.StatusCode.UNAVAILABLE, OWN_FAULT)
        return pb.JoinReply(chain=chain, name=name).SerializeToString()

    async def _open(self, _requests: Any, context: Context) -> None:
        address = host_of(context.peer())
        self._streams[address] += 1
        try:
            await self._admitted(context, address)
        except (PayloadError, OverflowError, TimeoutError) as error:
            await self._reject(context, str(error) or f"silent for {self.limits.silence:g} s", final=False)
        except BROKEN:
            pass
        except Exception:  # gRPC would tell the peer what it says
            logger.exception("a stream from %s failed", address)
            await self._reject(context, OWN_FAULT, final=False)
        finally:
            self._streams[address] -= 1
            if not self._streams[address]:
                del self._streams[address]

    async def _admitted(self, context: Context, address: str) -> None:
        """Let the stream's peer in, if it may come in, and serve it."""
        if self._streams[address] > self.limits.streams_per_address:
            raise PayloadError(f"more than {self.limits.streams_per_address} streams from {address}")
        peer = self.door.identify(context)
        session = self._session(peer, context)
        before = [other for other in self._sessions if other.peer.node == peer.node]
        # Registered before the door is asked: a revocation meets the stream there or here, and never in between. The
        # older ones stay registered until they have ended: this one may never be admitted.
        self._sessions[session] = None
        try:
            refusal = await asyncio.to_thread(self.door.refusal, peer)
            if refusal is not None:
                logger.warning("node %d is refused: %s", peer.node, refusal)
                await self._reject(context, refusal, final=True)
                return
            for other in before:  # the node lost that stream and this end has not noticed yet
                other.close(pb.Down(bye=pb.Bye(reason="another stream of this node was opened")))
            await asyncio.to_thread(self.door.enter, peer)
            await session.run(self._desk(peer.node))
        finally:
            del self._sessions[session]

    async def _answer(self, _requests: Any, context: Context) -> bytes:
        """Answers of a node whose stream is open, over a connection down which nothing comes."""
        try:
            peer = self.door.identify(context)
            refusal = await asyncio.to_thread(self.door.refusal, peer)
            own = [session for session in self._sessions if session.peer.node == peer.node]
            if refusal is not None or not own:
                raise PayloadError(refusal or "answers belong to a stream that is open")
            await context.send_initial_metadata(((link.TAKEN_KEY, "1"),))
            await own[-1].answers(_reads(context))
        except PayloadError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error)[:500])
        except BROKEN:
            pass
        except Exception:  # gRPC would tell the peer what it says
            logger.exception("a connection of answers failed")
            await context.abort(grpc.StatusCode.UNAVAILABLE, OWN_FAULT)
        return b""

    def _session(self, peer: Peer, context: Context) -> Session:
        async def renew(peer: Any, csr: bytes) -> bytes:
            return await asyncio.to_thread(self.door.renew, peer, csr)

        return Session(peer, self.limits, read=_reads(context), write=context.write, renew=renew)

    async def _reject(self, context: Context, reason: str, *, final: bool) -> None:
        """Say why, unless the peer does not read that either."""
        frame = pb.Down(rejected=pb.Rejected(reason=reason[:500], final=final)).SerializeToString()
        with suppress(TimeoutError, *BROKEN):
            await asyncio.wait_for(context.write(frame), self.limits.hello)

    async def _revoking(self) -> None:
        """Close the streams of nodes that may not have one any more: soon after that was decided elsewhere, and within a
        minute where a certificate has run out."""
        seen: int | None = None
        looked = 0.0
        while True:
            try:
                changes, now = await asyncio.to_thread(self.door.changes), self._loop.time()
                if changes != seen or now - looked > EXPIRY_SECONDS:
                    await self._let_go()
                    looked = now
                seen = changes
            except Exception:  # a database that is away for a moment must not end the watch
                logger.exception("whether nodes were revoked cannot be seen; looking again")
            await asyncio.sleep(self.limits.revocation_poll)

    async def _let_go(self) -> None:
        for session in list(self._sessions):
            refusal = await asyncio.to_thread(self.door.refusal, session.peer)
            if refusal is not None:
                logger.warning("node %d is let go: %s", session.peer.node, refusal)
                session.close(pb.Down(rejected=pb.Rejected(reason=refusal, final=True)))


def _reads(context: Context) -> Read:
    """Reads the next frame; None at the end."""

    async def read() -> bytes | None:
        raw = await context.read()
        return raw if isinstance(raw, bytes) else None

    return read


def host_of(peer: str) -> str:
    """The address in gRPC's name of a peer, such as `ipv4:10.0.0.7:51234`."""
    return peer.rpartition(":")[0].partition(":")[2]


def is_loopback(address: str) -> bool:
    """Whether `host:port` is of this machine alone. A name that only looks like such an address is not."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
