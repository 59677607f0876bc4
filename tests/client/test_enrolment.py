"""A site joins, and its key stays."""

import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedapt.client.enrolment import Join, SiteKeys, enrol
from fedapt.client.policy import Policy
from fedapt.protocols.errors import OutputError, PayloadError
from fedapt.protocols.identity import Token, TrustError, fingerprint
from fedapt.server.authority import Authority

EXAMPLE = Path(__file__).parents[2] / "examples" / "client.toml"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", ["localhost"])


@pytest.fixture
def token(authority: Authority) -> Token:
    return authority.issue_token("hospital-a", "localhost:9443", timedelta(hours=1))


def enrolled(tmp_path: Path, token: Token, join: Join) -> SiteKeys:
    return enrol(token, tmp_path / "site" / "keys", tmp_path / "site" / "client.toml", join)


def lost(_csr: bytes) -> bytes:
    raise ConnectionError("the line is cut")


def test_a_site_gets_its_certificate(tmp_path: Path, authority: Authority, token: Token) -> None:
    site = enrolled(tmp_path, token, authority.certify)
    assert site.peer.kind == "node"
    assert site.peer.fingerprint == fingerprint(site.key())
    assert site.roots_pem == token.roots_pem
    assert site.folder.stat().st_mode & 0o777 == 0o700
    files = {file.name: file.stat().st_mode & 0o777 for file in site.folder.iterdir()}
    assert files == dict.fromkeys(("key.pem", "certificate.pem", "ca.pem"), 0o600)


def test_the_key_never_leaves(tmp_path: Path, authority: Authority, token: Token) -> None:
    sent: list[bytes] = []

    def join(csr: bytes) -> bytes:
        sent.append(csr)
        return authority.certify(csr)

    site = enrolled(tmp_path, token, join)
    number = site.key().private_numbers().private_value.to_bytes(32)
    (csr,) = sent
    request = x509.load_pem_x509_csr(csr)
    assert request.is_signature_valid
    assert fingerprint(request) == site.peer.fingerprint
    assert number not in request.public_bytes(Encoding.DER)
    assert list(request.subject) == []
    assert "PRIVATE" not in repr(site)


def test_the_site_starts_with_the_strict_policy(tmp_path: Path, authority: Authority, token: Token) -> None:
    site = enrolled(tmp_path, token, authority.certify)
    config = tmp_path / "site" / "client.toml"
    raw = tomllib.loads(config.read_text(encoding="utf-8"))
    assert raw["server"] == {"address": "localhost:9443", "keys": str(site.folder)}
    assert set(raw) == {"server", "policy"}
    assert Policy.load(config) == Policy.load(EXAMPLE)


def test_the_example_has_the_tables_that_joining_writes() -> None:
    raw = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert set(raw["server"]) == {"address", "keys"}
    assert set(raw) >= {"server", "policy"}


def test_a_sites_own_file_stays(tmp_path: Path, authority: Authority, token: Token) -> None:
    config = tmp_path / "site" / "client.toml"
    config.parent.mkdir()
    config.write_text("[policy]\n")
    enrolled(tmp_path, token, authority.certify)
    assert config.read_text() == "[policy]\n"


def test_a_cut_line_is_tried_again_with_the_same_key(tmp_path: Path, authority: Authority, token: Token) -> None:
    with pytest.raises(ConnectionError):
        enrolled(tmp_path, token, lost)
    first = SiteKeys(tmp_path / "site" / "keys").key_pem
    assert not (tmp_path / "site" / "client.toml").exists()
    site = enrolled(tmp_path, token, authority.certify)
    assert site.key_pem == first


def test_another_federation_needs_another_folder(tmp_path: Path, authority: Authority, token: Token) -> None:
    enrolled(tmp_path, token, authority.certify)
    other = Authority.create(tmp_path / "other", ["localhost"])
    with pytest.raises(TrustError, match="another federation"):
        enrolled(tmp_path, other.issue_token("a", "localhost:1", timedelta(hours=1)), other.certify)


def test_an_expired_token_makes_no_key(tmp_path: Path, authority: Authority, token: Token) -> None:
    with pytest.raises(TrustError, match="expired"):
        enrol(token, tmp_path / "keys", tmp_path / "client.toml", authority.certify, now=token.expires)
    assert not (tmp_path / "keys").exists()


def test_only_this_sites_certificate_is_accepted(tmp_path: Path, authority: Authority, token: Token) -> None:
    other = Authority.create(tmp_path / "other", ["localhost"])
    somebody = SiteKeys.make(tmp_path / "somebody").request()
    answers: list[Callable[[bytes], bytes]] = [
        other.certify,
        lambda _csr: authority.certify(somebody),
        lambda _csr: token.chain_pem,
        lambda _csr: b"nothing",
        lambda _csr: b"",
    ]
    for answer in answers:
        with pytest.raises(PayloadError):
            enrolled(tmp_path, token, answer)
        assert not (tmp_path / "site" / "keys" / "certificate.pem").exists()


def test_renewal_is_over_the_same_key(tmp_path: Path, authority: Authority, token: Token) -> None:
    site = enrolled(tmp_path, token, authority.certify)
    before, now = site.peer, datetime.now(UTC)
    assert not site.renewal_due(now + timedelta(days=59))
    assert site.renewal_due(now + timedelta(days=61))
    site.accept(authority.certify(site.request()))
    assert site.peer.node == before.node
    assert site.peer.serial != before.serial


def test_a_foreign_renewal_leaves_the_certificate(tmp_path: Path, authority: Authority, token: Token) -> None:
    site = enrolled(tmp_path, token, authority.certify)
    before = site.chain_pem
    with pytest.raises(PayloadError):
        site.accept(Authority.create(tmp_path / "other", ["localhost"]).certify(site.request()))
    assert site.chain_pem == before


def test_a_folder_that_is_none(tmp_path: Path, authority: Authority, token: Token) -> None:
    (tmp_path / "site").write_text("")
    with pytest.raises(OutputError, match="another folder"):
        enrolled(tmp_path, token, authority.certify)
    with pytest.raises(TrustError, match="client join"):
        _ = SiteKeys(tmp_path / "nowhere").peer


def test_a_damaged_key_is_named(tmp_path: Path) -> None:
    site = SiteKeys.make(tmp_path / "keys")
    (site.folder / "key.pem").write_bytes(b"nothing")
    with pytest.raises(PayloadError, match=r"key\.pem"):
        SiteKeys.make(tmp_path / "keys")
