"""How a site reaches its server: as a node, or with a token to become one. Nothing heavy is imported here."""

import hashlib
from collections.abc import Callable

import grpc

from ..protocols import link
from ..protocols import link_pb2 as pb
from ..protocols.identity import Token, TrustError, node_id
from .enrolment import SiteKeys, channel_credentials
from .site import Server

JOIN_SECONDS = 30.0


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
