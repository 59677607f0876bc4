"""The authority signs what it should, and keeps its keys."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedapt.protocols.errors import OutputError, PayloadError
from fedapt.protocols.identity import Peer, Token, TrustError, fingerprint
from fedapt.server.authority import Authority, KeyPair, _key_pem, _pem

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", ["fl.example.org", "127.0.0.1", "::1"])


def usage_of(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def csr_of(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, unit: str = "node", ca: bool = False, mallory: bool = False
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=True)
    request = builder.sign(key, hashes.SHA256())
    if not mallory:
        return request.public_bytes(Encoding.PEM)
    broken = bytearray(request.public_bytes(Encoding.DER))
    broken[-1] ^= 1  # in the signature
    return x509.load_der_x509_csr(bytes(broken)).public_bytes(Encoding.PEM)


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def test_keys_are_for_the_owner_alone(authority: Authority) -> None:
    assert authority.folder.stat().st_mode & 0o777 == 0o700
    files = {file.name: file.stat().st_mode & 0o777 for file in authority.folder.iterdir()}
    assert files == dict.fromkeys(("ca.pem", "ca-key.pem", "server.pem", "roots.pem"), 0o600)
    assert "ec.EllipticCurvePrivateKey" not in repr(authority)


def test_what_was_made_is_loaded(authority: Authority) -> None:
    loaded = Authority.load(authority.folder)
    assert loaded.certificate == authority.certificate
    assert loaded.names == authority.names == ("fl.example.org", "127.0.0.1", "::1")
    assert authority.certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(days=3640)


def test_nothing_is_overwritten(authority: Authority, tmp_path: Path) -> None:
    before = authority.roots_pem
    with pytest.raises(OutputError, match="never overwritten"):
        Authority.create(authority.folder, ["fl.example.org"])
    assert authority.roots_pem == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Authority.create(tmp_path / "file", ["fl.example.org"])
    (tmp_path / "empty").mkdir()
    Authority.create(tmp_path / "empty", ["fl.example.org"])


@pytest.mark.parametrize("names", [[], [""], ["a b"], ["a/b"], ["a", "b:c"], ["é.example.org"]])
def test_a_failed_start_leaves_nothing(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(TrustError):
        Authority.create(tmp_path / "ca", names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["ca.pem", "ca-key.pem", "server.pem"])
def test_half_an_authority_is_not_loaded(authority: Authority, missing: str) -> None:
    (authority.folder / missing).unlink()
    with pytest.raises(TrustError, match="fedapt server init"):
        Authority.load(authority.folder)


def test_a_damaged_authority_is_not_loaded(authority: Authority) -> None:
    (authority.folder / "ca-key.pem").write_bytes(_key_pem(p256()))
    with pytest.raises(TrustError, match="belong together"):
        Authority.load(authority.folder)
    (authority.folder / "ca-key.pem").write_bytes(b"nothing")
    with pytest.raises(PayloadError):
        Authority.load(authority.folder)


def test_a_node_gets_only_what_the_authority_gives(authority: Authority) -> None:
    key = p256()
    certificate = x509.load_pem_x509_certificate(authority.certify(csr_of(key, unit="server", ca=True)))
    certificate.verify_directly_issued_by(authority.certificate)
    peer = Peer.of_certificate(certificate)
    assert (peer.kind, peer.fingerprint) == ("node", fingerprint(key))
    assert usage_of(certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert timedelta(days=89) < peer.expires - datetime.now(UTC) < timedelta(days=91)


def test_a_bad_request_is_refused(authority: Authority) -> None:
    for csr in (
        csr_of(p256(), mallory=True),
        csr_of(rsa.generate_private_key(65537, 2048)),
        csr_of(ec.generate_private_key(ec.SECP384R1())),
        b"",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        csr_of(p256()) * 100,
    ):
        with pytest.raises(PayloadError):
            authority.certify(csr)


def test_a_token_is_for_a_name_that_the_server_has(authority: Authority) -> None:
    token = authority.issue_token("a", "[::1]:9443", timedelta(hours=24))
    assert usage_of(token.certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert len(token.id) == 16
    for name, address, hours in (
        ("a", "other:1", 1),
        ("a b", "127.0.0.1:1", 1),
        ("a", "127.0.0.1:1", 0),
        ("a", "::1", 1),
    ):
        with pytest.raises(TrustError):
            authority.issue_token(name, address, timedelta(hours=hours))
    with pytest.raises(TrustError, match="30 days"):
        authority.issue_token("a", "127.0.0.1:1", timedelta(days=31))


def test_nothing_outlives_the_authority(tmp_path: Path) -> None:
    made = Authority.create(tmp_path / "ca", ["localhost"], now=lambda: NOW)
    late = Authority.load(made.folder, now=lambda: made.certificate.not_valid_after_utc - timedelta(days=1))
    assert Peer.of(late.certify(csr_of(p256()))).expires == made.certificate.not_valid_after_utc
    with pytest.raises(TrustError, match="expired"):
        Authority.load(made.folder, now=lambda: made.certificate.not_valid_after_utc)


def test_the_servers_certificate_is_renewed_over_its_key(tmp_path: Path) -> None:
    time = [NOW]
    authority = Authority.create(tmp_path / "ca", ["localhost", "10.0.0.1"], now=lambda: time[0])
    before = authority.server
    assert not authority.renewal_due()
    time[0] += timedelta(days=250)
    assert authority.renewal_due()
    authority.renew()
    assert not authority.renewal_due()
    assert authority.server.key == before.key
    assert authority.server.chain != before.chain
    assert authority.names == ("localhost", "10.0.0.1")


def test_an_operators_own_authority(tmp_path: Path, authority: Authority) -> None:
    own = KeyPair((authority.folder / "ca-key.pem").read_bytes(), (authority.folder / "ca.pem").read_bytes())
    made = Authority.create(tmp_path / "own", ["localhost"], own)
    assert made.certificate == authority.certificate
    assert Authority.load(made.folder).certificate == authority.certificate
    for bad in (KeyPair(_key_pem(p256()), own.chain), authority.server, KeyPair(own.key, own.chain * 2)):
        with pytest.raises(TrustError):
            Authority.create(tmp_path / "bad", ["localhost"], bad)
    assert not (tmp_path / "bad").exists()


def test_an_operators_own_server_certificate(tmp_path: Path, authority: Authority) -> None:
    other = Authority.create(tmp_path / "company", ["fl.company.org"])
    root = _pem(other.certificate)
    authority.adopt(other.server, root)
    assert authority.names == ("fl.company.org",)
    token = Token.decode(authority.issue_token("a", "fl.company.org:1", timedelta(hours=1)).encode())
    assert token.authorities == (authority.certificate, other.certificate)
    with pytest.raises(TrustError, match="adopt"):
        authority.renew()
    with pytest.raises(TrustError, match="signed by none"):
        authority.adopt(other.server, _pem(authority.certificate))
    with pytest.raises(TrustError, match="belong together"):
        authority.adopt(KeyPair(_key_pem(p256()), other.server.chain), root)
    past = Authority.create(tmp_path / "past", ["fl.company.org"], now=lambda: datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(TrustError, match="not valid now"):
        authority.adopt(past.server, _pem(past.certificate))
