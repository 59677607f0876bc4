"""A site's process: the link, the worker behind it, and how both end."""

import asyncio
import hashlib
import logging
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc
import torch

from ..protocols import link
from ..protocols import link_pb2 as pb
from ..protocols.identity import Token, TrustError, node_id
from .duties import Duties
from .enrolment import SiteKeys, channel_credentials
from .kept import Kept
from .link import Backoff, Link
from .resident import RESULTS, Resident, Save
from .site import Server, Site
from .status import Status, is_paused

logger = logging.getLogger(__name__)

NAME_KEY = "fedapt-name"
"""The metadata in which a node of a plaintext link says who it is."""

JOIN_SECONDS = 30.0


def serve(site: Site, folder: Path, save: Save, *, once: bool = False, backoff: Backoff | None = None) -> None:
    """Stay with the server until Ctrl-C or SIGTERM; with `once`, until it has taken the update of one round.

    Raises RejectedError where the server refuses this node for good, TrustError where there is no key to show it.
    """
    if site.train.threads is not None:
        torch.set_num_threads(site.train.threads)
    status = Status(folder)
    resident = Resident(site, node_of(site.server), folder, save=save, status=status)
    asyncio.run(_serve(resident, once, backoff))


async def _serve(resident: Resident, once: bool, backoff: Backoff | None) -> None:
    site, folder = resident.site, resident.folder

    def closed(received: pb.Received) -> None:
        if once and received.question == resident.trained:
            leave("its one round is done")

    def resting() -> str:
        return "paused" if is_paused(folder) else "" if site.schedule.allows(datetime.now()) else "outside its hours"

    def leave(reason: str) -> None:
        logger.info("leaving: %s", reason)
        own.leave(reason)
        resident.halfway.stop()

    def interrupted() -> None:
        for number in SIGNALS:  # a second one ends the process as it would end any other
            loop.remove_signal_handler(number)
        leave("this node was stopped")

    duties = Duties(resident, Kept(folder / RESULTS), resting=resting, closed=closed)
    own = Link(
        channel_of(site.server),
        duties,
        backoff=backoff,
        connected=resident.status.connected,
        metadata=[] if site.server.plaintext is None else [(NAME_KEY, site.server.plaintext)],
        renewal=Certificate(site.server.keys) if site.server.plaintext is None else None,
    )
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, interrupted)
    await own.run()


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Certificate:
    """The renewal of a site's certificate."""

    def __init__(self, keys: Path) -> None:
        self.keys = SiteKeys(keys)

    def due(self) -> bytes | None:
        return self.keys.request() if self.keys.renewal_due(datetime.now(UTC)) else None

    def accept(self, chain: bytes) -> None:
        self.keys.accept(chain)


def node_of(server: Server) -> int:
    """Who this site is to the server. Raises TrustError where it has not joined."""
    if server.plaintext is not None:
        return node_id(hashlib.sha256(server.plaintext.encode()).hexdigest())
    return SiteKeys(server.keys).peer.node


def channel_of(server: Server) -> Callable[[], grpc.aio.Channel]:
    """Makes a channel; keys are read anew for each, because a certificate is renewed while the process lives."""
    options: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", link.FRAME_BYTES),
        ("grpc.use_local_subchannel_pool", 1),  # else the last try's own waiting time counts for the next
    ]
    if server.plaintext is not None:
        return lambda: grpc.aio.insecure_channel(server.address, [*options, ("grpc.enable_http_proxy", 0)])
    if server.proxy is not None:
        options.append(("grpc.http_proxy", server.proxy))
    return lambda: grpc.aio.secure_channel(server.address, channel_credentials(SiteKeys(server.keys)), options)


def ask_to_join(token: Token, proxy: str | None = None) -> Callable[[bytes], bytes]:
    """Certificate request (PEM) ⇒ chain (PEM), from the token's server. Raises TrustError with its reason."""

    def join(csr: bytes) -> bytes:
        options = [] if proxy is None else [("grpc.http_proxy", proxy)]
        with grpc.secure_channel(token.address, channel_credentials(token), options) as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{link.SERVICE}/{link.JOIN}")
            try:
                raw = call(pb.JoinRequest(csr=csr).SerializeToString(), timeout=JOIN_SECONDS)
            except grpc.RpcError as error:
                raise TrustError(_refusal(token.address, error)) from None
        return bytes(pb.JoinReply.FromString(raw).chain)

    return join


def _refusal(address: str, error: grpc.RpcError) -> str:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return f"{address} refuses the token: {details}"
    return f"{address} cannot be reached ({code.name}: {details}); a proxy is taken from the environment's https_proxy"
