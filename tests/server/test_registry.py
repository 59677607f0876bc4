"""Who is admitted, and that every change of it is in the log, on SQLite and PostgreSQL."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DatabaseError

from fedapt.client.enrolment import SiteKeys
from fedapt.privacy.chain import durable
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.identity import Peer, Token, TrustError
from fedapt.server.authority import Authority
from fedapt.server.registry import Registry, Tables

START = datetime(2030, 1, 1, 12, tzinfo=UTC)


@dataclass
class Clock:
    time: datetime = START

    def __call__(self) -> datetime:
        return self.time

    def move(self, **by: float) -> None:
        self.time += timedelta(**by)


@dataclass
class Federation:
    folder: Path
    engine: Engine
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.authority = Authority.create(self.folder / "ca", ["localhost"], now=self.clock)
        self.registry = Registry(self.engine, self.clock)

    def token(self, name: str = "hospital-a", hours: float = 24) -> Token:
        token = self.authority.issue_token(name, "localhost:1", timedelta(hours=hours))
        self.registry.add_token(token)
        return token

    def site(self, name: str) -> SiteKeys:
        return SiteKeys.make(self.folder / name)

    def redeem(self, token: Token, site: SiteKeys) -> Peer:
        chain, _ = self.registry.redeem(token.peer, site.request(), self.authority.certify)
        return Peer.of(chain)

    def joined(self, name: str = "hospital-a") -> Peer:
        return self.redeem(self.token(name), self.site(name))

    def renewed(self, peer: Peer, name: str = "hospital-a") -> Peer:
        return Peer.of(self.registry.renew(peer, self.site(name).request(), self.authority.certify))

    def actions(self) -> list[str]:
        return [row.action for row in self.registry.audit()]


@pytest.fixture
def federation(place: Callable[[], str], tmp_path: Path) -> Iterator[Federation]:
    where = place()
    engine = create_engine(where) if "://" in where else durable(Path(where))
    Tables.metadata.create_all(engine)
    yield Federation(tmp_path, engine)
    engine.dispose()


def test_a_token_makes_a_node(federation: Federation) -> None:
    registry, token = federation.registry, federation.token("hospital-a")
    (row,) = registry.tokens()
    assert (row.id, row.name, row.state(START), row.expires) == (token.id, "hospital-a", "open", token.expires)
    federation.clock.move(hours=1)
    peer = federation.redeem(token, federation.site("a"))
    assert registry.admits(peer) is None
    (node,) = registry.nodes()
    assert (node.id, node.name, node.fingerprint) == (peer.node, "hospital-a", peer.fingerprint)
    assert (node.joined, node.seen, node.revoked) == (START + timedelta(hours=1), None, None)
    (row,) = registry.tokens()
    assert (row.state(START), row.used, row.node) == ("used", node.joined, peer.node)
    federation.clock.move(minutes=1)
    registry.seen(peer)
    assert registry.nodes()[0].seen == START + timedelta(hours=1, minutes=1)
    assert federation.actions() == ["token.create", "node.join"]


def test_a_node_that_never_joined_is_unknown(federation: Federation) -> None:
    """Its certificate is the authority's own: TLS would let it in."""
    peer = Peer.of(federation.authority.certify(federation.site("a").request()))
    assert "unknown" in (federation.registry.admits(peer) or "")
    with pytest.raises(TrustError, match="unknown"):
        federation.renewed(peer, "a")


def test_another_key_cannot_use_a_token_again(federation: Federation) -> None:
    token = federation.token()
    federation.redeem(token, federation.site("a"))
    before = federation.registry.changes()
    with pytest.raises(TrustError, match="another key"):
        federation.redeem(token, federation.site("b"))
    assert len(federation.registry.nodes()) == 1
    assert federation.registry.changes() == before


def test_a_lost_answer_is_asked_for_again(federation: Federation) -> None:
    """The first certificate stays good until the second one is seen: whoever repeats a request locks nobody out."""
    token, site = federation.token(), federation.site("a")
    first, second = federation.redeem(token, site), federation.redeem(token, site)
    assert first.node == second.node
    assert len(federation.registry.nodes()) == 1
    assert federation.registry.admits(first) is None
    federation.registry.seen(second)
    assert federation.registry.admits(second) is None
    assert "replaced" in (federation.registry.admits(first) or "")


def test_an_expired_token_is_refused(federation: Federation) -> None:
    token = federation.token(hours=1)
    federation.clock.move(hours=1)
    assert federation.registry.tokens()[0].state(federation.clock()) == "expired"
    with pytest.raises(TrustError, match="expired"):
        federation.redeem(token, federation.site("a"))


def test_a_revoked_token_is_refused(federation: Federation) -> None:
    token = federation.token()
    federation.registry.revoke_token(token.id)
    with pytest.raises(TrustError, match="revoked"):
        federation.redeem(token, federation.site("a"))
    assert federation.registry.nodes() == []
    with pytest.raises(TrustError, match="token list"):
        federation.registry.revoke_token("ff")


def test_a_certificate_that_is_no_token_joins_nobody(federation: Federation) -> None:
    known, site = federation.token(), federation.site("a")
    unknown = federation.authority.issue_token("b", "localhost:1", timedelta(hours=1))  # never added
    node = federation.joined("c")
    for peer in (unknown.peer, node, replace(unknown.peer, serial=known.id), replace(node, serial=known.id)):
        with pytest.raises(TrustError, match="no token"):
            federation.registry.redeem(peer, site.request(), federation.authority.certify)


def test_a_join_certificate_is_no_node(federation: Federation) -> None:
    token = federation.token()
    assert "join" in (federation.registry.admits(token.peer) or "")
    with pytest.raises(TrustError, match="join"):
        federation.registry.renew(token.peer, federation.site("a").request(), federation.authority.certify)


def test_a_malformed_request_leaves_the_token_unused(federation: Federation) -> None:
    token = federation.token()
    with pytest.raises(PayloadError):
        federation.registry.redeem(token.peer, b"nothing", federation.authority.certify)
    assert federation.registry.tokens()[0].state(START) == "open"
    assert federation.redeem(token, federation.site("a"))


def test_a_revoked_node_is_out_for_good(federation: Federation) -> None:
    registry, peer = federation.registry, federation.joined("a")
    other = federation.joined("b")
    before = registry.changes()
    Registry(federation.engine, federation.clock).revoke_node(peer.node)  # as another process does
    assert registry.changes() > before
    assert "revoked" in (registry.admits(peer) or "")
    assert registry.admits(other) is None
    with pytest.raises(TrustError, match="revoked"):
        federation.renewed(peer, "a")
    with pytest.raises(TrustError, match="new key"):
        federation.redeem(federation.token("a"), federation.site("a"))
    with pytest.raises(TrustError, match="unknown"):
        registry.revoke_node(17)


def test_renewal_keeps_the_node_and_retires_the_older_certificate(federation: Federation) -> None:
    registry, old = federation.registry, federation.joined()
    federation.clock.move(days=61)
    new = federation.renewed(old)
    assert (new.node, new.fingerprint) == (old.node, old.fingerprint)
    assert new.serial != old.serial
    assert registry.admits(old) is None  # the answer may be lost
    assert registry.admits(new) is None
    before = registry.changes()
    registry.seen(old)
    assert registry.changes() == before
    registry.seen(new)
    assert registry.changes() == before + 1
    assert "replaced" in (registry.admits(old) or "")
    registry.seen(new)
    assert registry.changes() == before + 1


def test_a_node_renews_only_its_own_key(federation: Federation) -> None:
    peer = federation.joined("a")
    federation.joined("b")
    with pytest.raises(TrustError, match="another key"):
        federation.renewed(peer, "b")


def test_an_expired_certificate_needs_a_new_token_and_stays_the_same_node(federation: Federation) -> None:
    old = federation.joined("a")
    federation.clock.move(days=91)
    assert "expired" in (federation.registry.admits(old) or "")
    new = federation.redeem(federation.token("a2"), federation.site("a"))
    assert federation.registry.admits(new) is None
    (node,) = federation.registry.nodes()
    assert (node.id, node.name) == (old.node, "a2")


def test_another_nodes_id_does_not_help(federation: Federation) -> None:
    """Not even a key whose id collides: the whole fingerprint must be known."""
    peer = federation.joined("a")
    forged = replace(peer, fingerprint=peer.fingerprint[:16] + "0" * 48)
    assert forged.node == peer.node
    assert "unknown" in (federation.registry.admits(forged) or "")


def test_ids_of_64_bits_are_kept(federation: Federation) -> None:
    peers = [federation.joined(name) for name in "abcdefgh"]
    assert [node.id for node in federation.registry.nodes()] == sorted(peer.node for peer in peers)


def test_a_node_gets_another_name(federation: Federation) -> None:
    peer = federation.joined("a")
    federation.registry.rename(peer.node, "clinic")
    assert federation.registry.nodes()[0].name == "clinic"
    with pytest.raises(TrustError, match="letters"):
        federation.registry.rename(peer.node, "a b")
    assert federation.registry.nodes()[0].name == "clinic"


def test_two_sites_with_one_token_at_once(federation: Federation) -> None:
    token, sites = federation.token(), [federation.site(name) for name in "abcd"]
    barrier = threading.Barrier(len(sites))
    outcomes: list[str] = []

    def join(site: SiteKeys) -> None:
        barrier.wait()
        try:
            outcomes.append(federation.redeem(token, site).kind)
        except TrustError:
            outcomes.append("refused")

    threads = [threading.Thread(target=join, args=[site]) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["node", "refused", "refused", "refused"]
    assert len(federation.registry.nodes()) == 1
    assert federation.registry.verify() is None


def test_the_log_is_whole_and_cannot_be_changed(federation: Federation) -> None:
    peer = federation.joined()
    federation.registry.revoke_node(peer.node, actor="operator anna")
    rows = federation.registry.audit()
    assert [row.action for row in rows] == ["token.create", "node.join", "node.revoke"]
    assert rows[-1].actor == "operator anna"
    assert federation.registry.verify(noted=rows[0].hash) is None
    for statement in ("UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"):
        with pytest.raises(DatabaseError, match="append-only"), federation.engine.begin() as connection:
            connection.execute(text(statement))
    assert "another chain" in str(federation.registry.verify(noted="f" * 64))


@pytest.mark.parametrize(
    ("statement", "row"),
    [
        ("UPDATE audit SET actor = 'nobody' WHERE sequence = 2", 2),
        ("UPDATE audit SET time = '2031-01-01T12:00:00.000000+00:00' WHERE sequence = 1", 1),
        ("DELETE FROM audit WHERE sequence = 1", 1),
        ("DELETE FROM audit WHERE sequence = 3", 2),
        ("UPDATE audit_head SET count = 2", 3),
        ("DELETE FROM audit_head", 3),
    ],
)
def test_a_change_behind_the_tables_back_is_found(tmp_path: Path, statement: str, row: int) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'file'}")
    Tables.metadata.create_all(engine)
    federation = Federation(tmp_path, engine)
    federation.registry.revoke_node(federation.joined().node)
    assert federation.registry.verify() is None
    with engine.begin() as connection:
        triggers = connection.scalars(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all()
        for trigger in triggers:
            connection.execute(text(f"DROP TRIGGER {trigger}"))
        connection.execute(text(statement))
    fault = federation.registry.verify()
    engine.dispose()
    assert fault is not None
    assert fault.sequence == row
