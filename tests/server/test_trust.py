"""Who gets through a real gRPC port: TLS, then the registry. The service here is the least that asks both."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest

from fedapt.client.enrolment import SiteKeys, channel_credentials
from fedapt.privacy.chain import durable
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.identity import Peer, Token, TrustError
from fedapt.server.authority import Authority, server_credentials
from fedapt.server.registry import Registry, Tables

Refused = grpc.aio.AioRpcError
Context = grpc.aio.ServicerContext[bytes, bytes]


@dataclass
class Federation:
    folder: Path
    authority: Authority
    registry: Registry
    port: int = 0

    async def join(self, body: bytes, context: Context) -> bytes:
        """Body: a certificate request. Answer: a certificate."""
        try:
            peer = Peer.of_context(context.auth_context())
            chain, _ = self.registry.redeem(peer, body, self.authority.certify)
        except PayloadError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        return chain

    async def open(self, _body: bytes, context: Context) -> bytes:
        """Answer: who the caller is. The body may claim what it likes."""
        try:
            peer = Peer.of_context(context.auth_context())
            reason = self.registry.admits(peer)
        except PayloadError as error:
            reason = str(error)
        if reason is not None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, reason)
        return str(peer.node).encode()

    def token(self, lifetime: timedelta = timedelta(hours=1)) -> Token:
        token = self.authority.issue_token("hospital-a", "localhost:1", lifetime)
        self.registry.add_token(token)
        return token

    async def call(self, method: str, credentials: grpc.ChannelCredentials, body: bytes = b"") -> bytes:
        async with grpc.aio.secure_channel(f"localhost:{self.port}", credentials) as channel:
            return await called(channel, method, body)

    async def joined(self, name: str, token: Token | None = None) -> SiteKeys:
        token, site = token or self.token(), SiteKeys.make(self.folder / name)
        site.accept(await self.call("join", channel_credentials(token), site.request()), token.roots_pem)
        return site

    async def opened(self, identity: SiteKeys | Token, body: bytes = b"") -> int:
        return int(await self.call("open", channel_credentials(identity), body))


async def called(channel: grpc.aio.Channel, method: str, body: bytes = b"") -> bytes:
    to: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/test/{method}")
    return await to(body, timeout=20)


@asynccontextmanager
async def served(federation: Federation) -> AsyncIterator[Federation]:
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "join": grpc.unary_unary_rpc_method_handler(federation.join),
        "open": grpc.unary_unary_rpc_method_handler(federation.open),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
    federation.port = server.add_secure_port("localhost:0", server_credentials(federation.authority))
    await server.start()
    try:
        yield federation
    finally:
        await server.stop(None)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    engine = durable(tmp_path / "store.sqlite")
    Tables.metadata.create_all(engine)
    authority = Authority.create(tmp_path / "ca", ["localhost", "127.0.0.1"])
    yield Federation(tmp_path, authority, Registry(engine))
    engine.dispose()


def run(federation: Federation, scene: Callable[[Federation], Awaitable[None]]) -> None:
    async def play() -> None:
        async with served(federation) as up:
            await scene(up)

    asyncio.run(play())


async def no_handshake(call: Awaitable[object]) -> None:
    with pytest.raises(Refused) as refused:
        await call
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def denied(call: Awaitable[object], why: str) -> None:
    with pytest.raises(Refused, match=why) as refused:
        await call
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_a_site_joins_and_is_known_by_its_key(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        site = await up.joined("a")
        assert await up.opened(site) == site.peer.node

    run(federation, scene)


def test_the_id_in_a_body_counts_for_nothing(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        one, other = await up.joined("a"), await up.joined("b")
        assert await up.opened(one, str(other.peer.node).encode()) == one.peer.node

    run(federation, scene)


def test_another_nodes_certificate_without_its_key(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        one, other = await up.joined("a"), await up.joined("b")
        forged = grpc.ssl_channel_credentials(one.roots_pem, one.key_pem, other.chain_pem)
        await no_handshake(up.call("open", forged))

    run(federation, scene)


def test_no_certificate(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        await no_handshake(up.call("open", grpc.ssl_channel_credentials(up.authority.roots_pem)))

    run(federation, scene)


def test_a_certificate_of_another_authority(federation: Federation, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", ["localhost"])

    async def scene(up: Federation) -> None:
        site = SiteKeys.make(tmp_path / "stranger")
        site.accept(other.certify(site.request()), other.roots_pem)
        await no_handshake(up.call("open", channel_credentials(site)))  # the stranger trusts no server here
        trusting = grpc.ssl_channel_credentials(up.authority.roots_pem, site.key_pem, site.chain_pem)
        await no_handshake(up.call("open", trusting))

    run(federation, scene)


def test_a_token_for_another_server(federation: Federation, tmp_path: Path) -> None:
    """A site takes no server that its token's authority has not signed."""
    other = Authority.create(tmp_path / "other", ["localhost"])
    token = other.issue_token("a", "localhost:1", timedelta(hours=1))

    async def scene(up: Federation) -> None:
        await no_handshake(up.joined("a", token))

    run(federation, scene)


@pytest.mark.parametrize("kind", ["join", "node"])
def test_a_site_cannot_pose_as_the_server(federation: Federation, kind: str) -> None:
    """Its certificate is of the same authority, and must not pass for the server's."""

    async def scene(up: Federation) -> None:
        identity = up.token() if kind == "join" else await up.joined("a")
        pair = [(identity.key_pem, identity.chain_pem)]
        server = grpc.aio.server()
        port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials(pair, identity.roots_pem, True))
        await server.start()
        victim = channel_credentials(up.token())
        try:
            # Even where the victim asks for the very names that are in the certificate.
            for name in ("localhost", "hospital-a", str(identity.peer.node)):
                options = (("grpc.ssl_target_name_override", name),)
                async with grpc.aio.secure_channel(f"localhost:{port}", victim, options) as channel:
                    await no_handshake(called(channel, "open"))
        finally:
            await server.stop(None)

    run(federation, scene)


def test_an_expired_token_gets_no_handshake(federation: Federation) -> None:
    past = Authority.load(federation.authority.folder, lambda: datetime.now(UTC) - timedelta(hours=2))
    token = past.issue_token("a", "localhost:1", timedelta(hours=1))
    federation.registry.add_token(token)

    async def scene(up: Federation) -> None:
        await no_handshake(up.joined("a", token))

    run(federation, scene)


def test_a_token_that_expires_in_the_table_alone(federation: Federation) -> None:
    """The registry has a clock of its own: it does not lean on TLS for this."""
    token = federation.token()
    federation.registry._now = lambda: datetime.now(UTC) + timedelta(hours=2)

    async def scene(up: Federation) -> None:
        await denied(up.joined("a", token), "expired")

    run(federation, scene)


def test_a_reused_token(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        token = up.token()
        await up.joined("a", token)
        await denied(up.joined("b", token), "used by another key")

    run(federation, scene)


def test_a_revoked_token(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        token = up.token()
        up.registry.revoke_token(token.id)
        await denied(up.joined("a", token), "revoked")

    run(federation, scene)


def test_a_token_that_the_operator_never_made(federation: Federation) -> None:
    """Signed by the authority, and unknown to the registry."""
    token = federation.authority.issue_token("a", "localhost:1", timedelta(hours=1))

    async def scene(up: Federation) -> None:
        await denied(up.joined("a", token), "no token")

    run(federation, scene)


def test_a_tampered_token(federation: Federation, tmp_path: Path) -> None:
    """With another key and certificate beside the real authority, whoever makes up a token gets no handshake."""
    real = federation.token()
    forged = Authority.create(tmp_path / "other", ["localhost"]).issue_token("a", "localhost:1", timedelta(hours=1))
    mixed = Token(forged.key, forged.certificate, real.authorities)
    with pytest.raises(PayloadError):
        Token.decode(mixed.encode())

    async def scene(up: Federation) -> None:
        await no_handshake(up.call("join", channel_credentials(mixed)))

    run(federation, scene)


def test_a_join_certificate_opens_no_stream(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        await denied(up.opened(up.token()), "join certificate")

    run(federation, scene)


def test_a_node_certificate_is_no_token(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        site = await up.joined("a")
        await denied(up.call("join", channel_credentials(site), SiteKeys.make(up.folder / "b").request()), "no token")

    run(federation, scene)


def test_a_revoked_node(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        site, other = await up.joined("a"), await up.joined("b")
        up.registry.revoke_node(site.peer.node)
        await denied(up.opened(site), "revoked")
        assert await up.opened(other) == other.peer.node

    run(federation, scene)


def test_a_certificate_that_was_replaced(federation: Federation) -> None:
    async def scene(up: Federation) -> None:
        site = await up.joined("a")
        older = channel_credentials(site)
        site.accept(up.registry.renew(site.peer, site.request(), up.authority.certify))
        assert await up.opened(site) == site.peer.node
        up.registry.seen(site.peer)
        await denied(up.call("open", older), "replaced")

    run(federation, scene)


def test_a_port_without_tls_has_no_peers() -> None:
    """Plaintext is the link's to allow; nobody has an identity there."""
    with pytest.raises(TrustError, match="TLS"):
        Peer.of_context({})
