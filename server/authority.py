"""The federation's own certificate authority: it signs the server, join tokens, and nodes.

    ca.pem, ca-key.pem   the authority, 10 years; whoever has the key can make nodes (the registry still knows none of them)
    server.pem           the server's key and chain in one file, so that both change in one moment; a year
    roots.pem            what sites trust for the server: ca.pem, and the operator's own roots where there are any

Times are in UTC.
"""

import ipaddress
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..protocols.errors import OutputError, PayloadError
from ..protocols.identity import (
    BACKDATED,
    MOST_CERTIFICATE,
    Token,
    TrustError,
    checked_address,
    checked_name,
    fingerprint,
    is_due,
    node_id,
    on_p256,
    parsing,
    write_secret,
)

if TYPE_CHECKING:
    import grpc

Clock = Callable[[], datetime]
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

OF_AUTHORITY, OF_SERVER, OF_NODE = timedelta(days=3650), timedelta(days=365), timedelta(days=90)
"""How long certificates last."""

MOST_OF_TOKEN = timedelta(days=30)
_CA, _CA_KEY, _SERVER, _ROOTS = "ca.pem", "ca-key.pem", "server.pem", "roots.pem"


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class KeyPair:
    """A private key and its certificate, with the certificates between it and a root where there are any; all PEM."""

    key: bytes = field(repr=False)
    chain: bytes


@dataclass(frozen=True)
class Authority:
    """A folder with the keys of a federation, loaded. `now` gives the time in UTC."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    now: Clock = utc_now

    @classmethod
    def create(cls, folder: Path, names: Sequence[str], own: KeyPair | None = None, now: Clock = utc_now) -> Self:
        """Make an authority (or take the operator's `own`) and a server certificate for `names`, DNS names or IPs.

        The folder is made whole or not at all. Raises OutputError where it is there and not empty, and TrustError for
        a name or an own authority that cannot be used. An own authority must be a root made for this federation: each
        certificate that it signs passes TLS here, though only registered ones pass the registry.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder}: is there already; a federation's keys are never overwritten. Choose another")
        certificate, key = _own(own, now) if own is not None else _new_authority(now())
        with _writing(folder), _made_whole(folder) as made:
            new = cls(made, certificate, key, now)
            write_secret(made / _CA, _pem(certificate))
            write_secret(made / _CA_KEY, _key_pem(key))
            write_secret(made / _ROOTS, _pem(certificate))
            write_secret(made / _SERVER, new._server_certificate(_checked_names(names), _new_key()))
        return cls(folder, certificate, key, now)

    @classmethod
    def load(cls, folder: Path, now: Clock = utc_now) -> Self:
        """Raises TrustError where there is no authority, or not a whole one."""
        try:
            pair = KeyPair((folder / _CA_KEY).read_bytes(), (folder / _CA).read_bytes())
            loaded = cls(folder, *_own(pair, now), now)
            _pair(loaded.server)
        except OSError as error:
            raise TrustError(
                f"{folder}: no certificates ({error.strerror}). Make them with `fedapt server init`"
            ) from None
        return loaded

    @property
    def server(self) -> KeyPair:
        """The server's key and chain as they are now in the file, which another process may have renewed."""
        bundle = (self.folder / _SERVER).read_bytes()
        begin = bundle.find(b"-----BEGIN CERTIFICATE-----")
        return KeyPair(bundle[:begin], bundle[begin:])

    @property
    def roots_pem(self) -> bytes:
        return (self.folder / _ROOTS).read_bytes()

    @property
    def names(self) -> tuple[str, ...]:
        """What the server's certificate says it is called."""
        chain, _ = _pair(self.server)
        return tuple(_names_of(chain[0]))

    def adopt(self, server: KeyPair, roots: bytes) -> None:
        """Take the operator's own server certificate; `roots` (PEM) are what it ends at. The next handshake shows it.

        Do this before tokens are made: a site trusts the roots that its token had. Raises TrustError where the key, the
        chain and the roots do not belong together, or the certificate is not valid now.
        """
        chain, key = _pair(server)
        with parsing("roots"):
            ends = x509.load_pem_x509_certificates(roots)
        _check_chain(chain, ends)
        if not chain[0].not_valid_before_utc <= self.now() < chain[0].not_valid_after_utc or not _names_of(chain[0]):
            raise TrustError("the server's certificate is not valid now, or has no names: get another one")
        with _writing(self.folder):
            write_secret(
                self.folder / _ROOTS, _pem(self.certificate, *(end for end in ends if end != self.certificate))
            )
            write_secret(self.folder / _SERVER, _key_pem(key) + _pem(*chain))

    def renewal_due(self) -> bool:
        """Whether the server's certificate is in the last third of its life."""
        return is_due(_pair(self.server)[0][0], self.now())

    def renew(self) -> None:
        """A new server certificate over the same key, with the same names. The next handshake shows it.

        Raises TrustError for a certificate of another authority, which only that one can renew.
        """
        chain, key = _pair(self.server)
        if chain[0].issuer != self.certificate.subject:
            issuer = chain[0].issuer.rfc4514_string()
            raise TrustError(f"the server's certificate is from {issuer}: renew it there, then adopt the new one")
        with _writing(self.folder):
            write_secret(self.folder / _SERVER, self._server_certificate(_names_of(chain[0]), key))

    def issue_token(self, name: str, address: str, lifetime: timedelta) -> Token:
        """A token for a site of this name. It is good for nothing before `Registry.add_token` has it.

        Raises TrustError for a name, an address or a lifetime that cannot be; the host must be one of `names`.
        """
        host = checked_address(address).rpartition(":")[0].strip("[]")
        if host not in self.names:
            raise TrustError(
                f"address {address!r}: the server's certificate is for {', '.join(self.names)}, not {host}"
            )
        if not timedelta(0) < lifetime <= MOST_OF_TOKEN:
            raise TrustError(f"a token that lasts {lifetime}: more than nothing, and {MOST_OF_TOKEN.days} days at most")
        key, uri = _new_key(), x509.UniformResourceIdentifier(f"fedapt://{address}")
        serial = 2**63 | secrets.randbits(63)  # 16 digits: a person types it to revoke the token
        builder = self._builder(_subject("join", checked_name(name)), key.public_key(), lifetime, serial)
        certificate = self._signed_client(builder, uri)
        with parsing("roots.pem"):
            roots = x509.load_pem_x509_certificates(self.roots_pem)
        others = (root for root in roots if root != self.certificate)
        return Token(_key_der(key), certificate, (self.certificate, *others))

    def certify(self, csr: bytes) -> bytes:
        """A node's certificate (PEM) for a certificate request (PEM), for 90 days.

        Only the key is taken from the request: subject and extensions that it asks for are not looked at. Raises
        PayloadError for a request that is malformed, is not signed by its own key, or is not ECDSA P-256.
        """
        if len(csr) > MOST_CERTIFICATE:
            raise PayloadError(f"certificate request: {len(csr)} bytes; the limit is {MOST_CERTIFICATE}")
        with parsing("certificate request"):
            request = x509.load_pem_x509_csr(csr)
            key = request.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey) or not on_p256(key):
                raise PayloadError("certificate request: its key is not ECDSA P-256, which is the only kind taken here")
            if not request.is_signature_valid:
                raise PayloadError("certificate request: it is not signed by its own key")
            node = str(node_id(fingerprint(request)))
        builder = self._builder(_subject("node", node), key, OF_NODE, x509.random_serial_number())
        return _pem(self._signed_client(builder, x509.UniformResourceIdentifier(f"fedapt:node:{node}")))

    def _server_certificate(self, names: Iterable[str], key: PrivateKey) -> bytes:
        """Key and certificate, PEM."""
        builder = self._builder(_subject("server", "fedapt"), key.public_key(), OF_SERVER, x509.random_serial_number())
        builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_general_name, names))), critical=False)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        return _key_pem(key) + _pem(builder.add_extension(usage, critical=True).sign(self.key, hashes.SHA256()))

    def _signed_client(self, builder: x509.CertificateBuilder, uri: x509.GeneralName) -> x509.Certificate:
        """For clients alone: with the use of a server, a site could pose as one; without a name in it, gRPC would
        compare the common name with the server's address."""
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        return builder.add_extension(usage, critical=True).sign(self.key, hashes.SHA256())

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, lifetime: timedelta, serial: int
    ) -> x509.CertificateBuilder:
        now, issuer = self.now(), self.certificate
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.subject)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(max(now - BACKDATED, issuer.not_valid_before_utc))
            .not_valid_after(min(now + lifetime, issuer.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )


def server_credentials(authority: Authority) -> "grpc.ServerCredentials":
    """Mutual TLS for a gRPC server: no handshake without a certificate of this authority.

    The server's certificate is read again whenever its file has changed. Call `tls13_only` before gRPC is imported.
    """
    import grpc

    roots, file = _pem(authority.certificate), authority.folder / _SERVER
    shown = file.stat().st_mtime_ns

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(authority.server.key, authority.server.chain)], roots)

    def changed() -> "grpc.ServerCertificateConfiguration | None":
        nonlocal shown
        if (there := file.stat().st_mtime_ns) == shown:
            return None
        renewed = configuration()  # where it fails, gRPC goes on with the older one and asks again
        shown = there
        return renewed

    fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", changed)  # None, too, says gRPC's documentation
    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)


def _new_authority(now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key, name = _new_key(), _subject("authority", f"fedapt {secrets.token_hex(4)}")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + OF_AUTHORITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _own(pair: KeyPair, now: Clock) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority in a pair. Raises TrustError where it cannot be one."""
    (certificate, *others), key = _pair(pair)
    with parsing("authority"):
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        _check_chain([certificate], [certificate])
    if others or not is_authority or not isinstance(key, ec.EllipticCurvePrivateKey) or not on_p256(key):
        raise TrustError(
            "the authority must be one self-signed ECDSA P-256 certificate that may sign others, and its key"
        )
    if now() >= certificate.not_valid_after_utc:
        raise TrustError(
            f"the authority's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}: make another"
        )
    return certificate, key


def _pair(pair: KeyPair) -> tuple[list[x509.Certificate], PrivateKey]:
    """Chain and key, read. Raises PayloadError where they are malformed, TrustError where they do not belong together."""
    with parsing("key and certificate"):
        chain, key = x509.load_pem_x509_certificates(pair.chain), load_pem_private_key(pair.key, None)
    if not isinstance(key, PrivateKey) or key.public_key() != chain[0].public_key():
        raise TrustError(
            "a certificate and the key beside it do not belong together (an EC or RSA key without password)"
        )
    return chain, key


def _check_chain(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]) -> None:
    """Raises TrustError where one certificate is not signed by the next, or the last by no root."""
    for signed, by in pairwise(chain):
        if not _is_signed(signed, by):
            raise TrustError(f"{signed.subject.rfc4514_string()} is not signed by {by.subject.rfc4514_string()}")
    if not any(_is_signed(chain[-1], root) for root in roots):
        raise TrustError(f"{chain[-1].subject.rfc4514_string()} is signed by none of the roots")


def _is_signed(certificate: x509.Certificate, by: x509.Certificate) -> bool:
    try:
        with parsing("certificate"):
            certificate.verify_directly_issued_by(by)
    except PayloadError:
        return False
    return True


def _names_of(certificate: x509.Certificate) -> list[str]:
    with parsing("server certificate"):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        addresses = map(str, names.get_values_for_type(x509.IPAddress))
        return [*names.get_values_for_type(x509.DNSName), *addresses]


def _checked_names(names: Sequence[str]) -> Sequence[str]:
    if not names:
        raise TrustError("a server needs a DNS name or an IP address, by which sites reach it")
    for name in names:
        try:
            checked_address(f"[{name}]:1" if ":" in name else f"{name}:1")
        except TrustError:
            raise TrustError(
                f"name {name!r}: write a DNS name (in ASCII) or an IP address, as in fl.example.org or 2001:db8::1"
            ) from None
    return names


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _subject(unit: str, name: str) -> x509.Name:
    units = x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)
    return x509.Name([units, x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(**uses: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    )
    every = (*names.split(), "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: uses.get(name, False) for name in every})


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _key_der(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


@contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
    """A folder, 0700, that gets its name when all is in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield made
        made.replace(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder}: keys cannot be written there ({error.strerror})") from None
