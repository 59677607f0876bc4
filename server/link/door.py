"""Who may come in: what the link asks of whoever keeps the federation's certificates."""

from typing import Protocol

from grpc.aio import ServicerContext

from ...protocols.identity import Peer


class Door(Protocol):
    """All but `identify` may read a database: the link calls them beside its loop, one at a time a peer."""

    def identify(self, context: "ServicerContext[bytes, bytes]") -> Peer:
        """Who holds the certificate of this connection; never what a message says. Raises PayloadError for nobody."""

    def refusal(self, peer: Peer) -> str | None:
        """Why a peer may open no stream, or keep none; None where it may."""

    def enter(self, peer: Peer) -> None:
        """The peer's stream is open now."""

    def join(self, peer: Peer, csr: bytes) -> tuple[bytes, str]:
        """Certificate chain (PEM) and name for the holder of a token. Raises PayloadError where it is refused."""

    def renew(self, peer: Peer, csr: bytes) -> bytes:
        """A new certificate chain (PEM) for the same key. Raises PayloadError where it is refused."""

    def changes(self) -> int:
        """A number that changes whenever `refusal` might."""
