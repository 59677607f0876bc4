"""The two doors: the federation's certificates, and, on a loopback address alone, whoever says a name."""

import hashlib
from typing import TYPE_CHECKING

from grpc.aio import ServicerContext

from ...protocols.errors import PayloadError
from ...protocols.identity import Peer
from ...protocols.link import NAME_KEY
from ..authority import Authority, utc_now
from ..registry import Registry

if TYPE_CHECKING:
    from datetime import datetime

Context = ServicerContext[bytes, bytes]


class CertifiedDoor:
    """Nodes that hold a certificate of the authority and that the registry knows."""

    def __init__(self, authority: Authority, registry: Registry) -> None:
        self.authority, self.registry = authority, registry

    def identify(self, context: Context) -> Peer:
        return Peer.of_context({key: tuple(values) for key, values in (context.auth_context() or {}).items()})

    def refusal(self, peer: Peer) -> str | None:
        return self.registry.admits(peer)

    def enter(self, peer: Peer) -> None:
        self.registry.seen(peer)

    def join(self, peer: Peer, csr: bytes) -> tuple[bytes, str]:
        chain, name = self.registry.redeem(peer, csr, self.authority.certify)
        return chain, name

    def renew(self, peer: Peer, csr: bytes) -> bytes:
        return self.registry.renew(peer, csr, self.authority.certify)

    def changes(self) -> int:
        return self.registry.changes()


class OpenDoor:
    """Anybody who can reach the port, under any name: for trials on one machine."""

    def identify(self, context: Context) -> Peer:
        """Raises PayloadError for a stream without a name."""
        name = dict(context.invocation_metadata() or ()).get(NAME_KEY)
        if not name:
            raise PayloadError(f"a plaintext link needs a name in the metadata {NAME_KEY}")
        return named(str(name))

    def refusal(self, peer: Peer) -> str | None:
        return None

    def enter(self, peer: Peer) -> None: ...

    def join(self, peer: Peer, csr: bytes) -> tuple[bytes, str]:
        raise PayloadError("this server runs without certificates: nobody joins it, nodes just start")

    def renew(self, peer: Peer, csr: bytes) -> bytes:
        raise PayloadError("this server runs without certificates")

    def changes(self) -> int:
        return 0


def named(name: str) -> Peer:
    """The peer that a plaintext node of this name is taken for."""
    expires: datetime = utc_now().replace(year=9999)
    return Peer("node", hashlib.sha256(name.encode()).hexdigest(), "0", expires)
