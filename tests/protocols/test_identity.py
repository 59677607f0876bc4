"""Tokens survive their text and nothing else does; a peer is its key."""

import sys
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.errors import PayloadError, RunError
from fedapt.protocols.identity import (
    MOST_TOKEN,
    SUITES,
    Peer,
    Token,
    TrustError,
    _checksum,
    checked_address,
    checked_name,
    fingerprint,
    is_due,
    node_id,
    on_p256,
    tls13_only,
    write_secret,
)
from fedapt.server.authority import Authority

HOSTS = ("localhost", "fl.example.org", "127.0.0.1", "2001:db8::1")
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)


@lru_cache
def authority() -> Authority:
    folder = TemporaryDirectory(prefix="fedapt-ca-")
    made = Authority.create(Path(folder.name) / "ca", HOSTS)
    object.__setattr__(made, "_kept", folder)  # for as long as the authority
    return made


def token_of(name: str = "hospital-a", address: str = "localhost:9443") -> Token:
    return authority().issue_token(name, address, timedelta(hours=24))


@lru_cache
def text() -> str:
    return token_of().encode()


def certificate(
    unit: str | None, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, days: int = 90
) -> x509.Certificate:
    """Self-signed, as nobody here makes them."""
    units = [] if unit is None else [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)]
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(x509.Name(units)).issuer_name(x509.Name([]))
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=days))
    return builder.public_key(key.public_key()).serial_number(255).sign(key, hashes.SHA256())


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def with_checksum(body: str) -> str:
    return f"{body}.{_checksum(body)}"


@given(NAMES, st.sampled_from(HOSTS), st.integers(1, 2**16 - 1), st.integers(1, 30 * 24 * 60))
def test_a_token_comes_back_whole(name: str, host: str, port: int, minutes: int) -> None:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    token = authority().issue_token(name, address, timedelta(minutes=minutes))
    back = Token.decode(f"  {token.encode()}\n")
    assert back == token
    assert (back.name, back.address, back.peer.kind) == (name, address, "join")
    assert back.authority_fingerprint == fingerprint(authority().certificate)
    assert (back.key_pem, back.chain_pem, back.roots_pem) == (token.key_pem, token.chain_pem, token.roots_pem)
    assert back.encode() == token.encode()


@given(st.data())
def test_a_changed_token_is_refused(data: st.DataObject) -> None:
    whole = text()
    at = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.sampled_from(["replace", "insert", "delete", "cut"]))
    letter = data.draw(st.characters().filter(lambda c: c != whole[at] and not c.isspace()))
    changed = {
        "replace": whole[:at] + letter + whole[at + 1 :],
        "insert": whole[:at] + letter + whole[at:],
        "delete": whole[:at] + whole[at + 1 :],
        "cut": whole[:at],
    }[change]
    with pytest.raises(PayloadError):
        Token.decode(changed)


@given(st.integers(1, 3), st.integers(0, 10**4), st.integers(1, 255))
def test_behind_a_right_checksum_a_changed_part_is_refused(part: int, at: int, flip: int) -> None:
    """The checksum has no key: the parsers behind it must hold by themselves, up to what the signature covers."""
    parts = text().split(".")[:-1]
    der = bytearray(urlsafe_b64decode(parts[part] + "=="))
    der[at % len(der)] ^= flip
    parts[part] = urlsafe_b64encode(bytes(der)).rstrip(b"=").decode()
    with pytest.raises(PayloadError) as refused:
        Token.decode(with_checksum(".".join(parts)))
    assert parts[part][:40] not in str(refused.value)


@given(st.text())
def test_any_text_is_refused_as_a_token(words: str) -> None:
    for candidate in (words, f"fedapt1.{words}", with_checksum(f"fedapt1.{words}")):
        with pytest.raises(PayloadError):
            Token.decode(candidate)


def test_a_token_of_another_version_or_size_is_refused() -> None:
    body = text().rpartition(".")[0]
    with pytest.raises(PayloadError, match="another version"):
        Token.decode(with_checksum(body.replace("fedapt1.", "fedapt2.")))
    with pytest.raises(PayloadError, match=str(MOST_TOKEN)):
        Token.decode(with_checksum(body + "." + "A" * MOST_TOKEN))


def test_the_key_of_a_token_shows_nowhere() -> None:
    token = token_of()
    secret = token.encode().split(".")[1]
    for shown in (repr(token), str(token), f"{token}", repr(replace(token))):
        assert secret[-40:] not in shown
        assert repr(token.key)[10:60] not in shown
    body = token.encode().rpartition(".")[0]
    with pytest.raises(PayloadError) as caught:
        Token.decode(body + ".AAAAAAAAAAAA")
    assert secret[-40:] not in str(caught.value)


def test_the_parts_of_a_token_must_belong_together() -> None:
    one, other = token_of(), token_of()
    foreign = certificate("join", p256())
    node = x509.load_pem_x509_certificate(authority().certify(request(p256())))
    for bad in (
        replace(one, key=other.key),
        replace(one, authorities=()),
        replace(one, authorities=(foreign,)),
        replace(one, certificate=node),
    ):
        with pytest.raises(PayloadError):
            Token.decode(bad.encode())


def request(key: ec.EllipticCurvePrivateKey) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_a_node_is_its_key() -> None:
    key = p256()
    first, second = (Peer.of(authority().certify(request(key))) for _ in range(2))
    assert first.fingerprint == second.fingerprint == fingerprint(key)
    assert first.node == second.node == node_id(fingerprint(key)) == int.from_bytes(bytes.fromhex(fingerprint(key))[:8])
    assert first.serial != second.serial
    assert 0 <= first.node < 2**64


def test_ids_reach_over_all_64_bits() -> None:
    assert node_id("f" * 64) == 2**64 - 1
    assert node_id("0" * 63 + "1") == 0


@pytest.mark.parametrize("unit", [None, "server", "Node", "nodes"])
def test_a_certificate_without_a_known_unit_is_no_peer(unit: str | None) -> None:
    with pytest.raises(PayloadError, match="organizational units"):
        Peer.of_certificate(certificate(unit, p256()))


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)])
def test_a_peer_on_another_curve_is_refused(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    assert not on_p256(key)
    with pytest.raises(PayloadError, match="P-256"):
        Peer.of_certificate(certificate("node", key))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_a_certificate(noise: bytes) -> None:
    with pytest.raises(PayloadError):
        Peer.of(noise)
    with pytest.raises(PayloadError, match="the limit"):
        Peer.of(noise + certificate_pem() * 30)


@given(st.integers(0, 10**4), st.integers(1, 255))
def test_a_changed_certificate_is_a_peer_or_a_payload_error(at: int, flip: int) -> None:
    """Its signature is TLS's to check; whatever comes, nothing else is raised."""
    der = bytearray(x509.load_pem_x509_certificate(certificate_pem()).public_bytes(Encoding.DER))
    der[at % len(der)] ^= flip
    body = b64encode(der)
    with suppress(PayloadError):
        assert Peer.of(b"-----BEGIN CERTIFICATE-----\n" + body + b"\n-----END CERTIFICATE-----\n").kind in (
            "join",
            "node",
        )


@lru_cache
def certificate_pem() -> bytes:
    return certificate("node", p256()).public_bytes(Encoding.PEM)


def context_of(**changes: bytes | None) -> dict[str, list[bytes]]:
    facts: dict[str, bytes | None] = {
        "transport_security_type": b"ssl",
        "ssl_tls_version": b"TLSv1.3",
        "x509_pem_cert": certificate_pem(),
    }
    return {name: [value] for name, value in {**facts, **changes}.items() if value is not None}


def test_the_peer_of_a_call_is_the_holder_of_its_certificate() -> None:
    assert Peer.of_context(context_of()) == Peer.of(certificate_pem())
    assert Peer.of_context(context_of()).serial == "ff"


@pytest.mark.parametrize(
    "changes",
    [
        {"ssl_tls_version": b"TLSv1.2"},
        {"ssl_tls_version": b"TLSv1.1"},
        {"ssl_tls_version": b"\xff"},
        {"ssl_tls_version": None},
        {"transport_security_type": b"insecure"},
        {"transport_security_type": None},
        {"x509_pem_cert": None},
    ],
)
def test_a_call_without_tls_13_or_certificate_has_no_peer(changes: dict[str, bytes | None]) -> None:
    with pytest.raises(TrustError):
        Peer.of_context(context_of(**changes))


def test_old_tls_can_only_be_switched_off_before_grpc_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_SSL_CIPHER_SUITES", raising=False)
    monkeypatch.setitem(sys.modules, "grpc._cython.cygrpc", sys)
    with pytest.raises(RunError, match=SUITES):
        tls13_only()
    monkeypatch.setenv("GRPC_SSL_CIPHER_SUITES", SUITES)
    tls13_only()


@pytest.mark.parametrize(
    "address", ["localhost", ":1", "a:0", "a:65536", "a:b", "a:1/x", "u@a:1", "a b:1", "a:1\n", "é:1", ""]
)
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(TrustError, match="host:port"):
        checked_address(address)


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "a" * 64, "ä", "a\n", "../a"])
def test_a_name_is_plain(name: str) -> None:
    with pytest.raises(TrustError, match="name"):
        checked_name(name)


def test_renewal_is_due_in_the_last_third() -> None:
    made, now = certificate("node", p256(), days=90), datetime.now(UTC)
    assert not is_due(made, now + timedelta(days=59))
    assert is_due(made, now + timedelta(days=61))


def test_a_secret_is_for_its_owner_alone(tmp_path: Path) -> None:
    write_secret(tmp_path / "key", b"first")
    write_secret(tmp_path / "key", b"second")
    assert (tmp_path / "key").read_bytes() == b"second"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["key"]
