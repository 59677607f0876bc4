"""Who is at the other end of a link: keys, certificates and join tokens.

A node is its key: its id is the beginning of the SHA-256 of its public key, so nobody can claim another's. All keys are
ECDSA P-256, because BoringSSL, which gRPC brings, takes no Ed25519 certificate. A federation has one authority, and the
organizational unit of a certificate says what it may be used for:

    join   a short-lived certificate inside a token; with its key a site asks for a node's certificate, and nothing else
    node   a site's certificate, over a key that never leaves the site

What a message says of its sender counts for nothing: `Peer.of_context` takes the sender from the TLS connection.
"""

import hashlib
import os
import re
import sys
import tempfile
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, cast, get_args
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)
from cryptography.x509.oid import NameOID

from .errors import PayloadError, RunError

Kind = Literal["join", "node"]
PREFIX = "fedapt1"
"""What a token begins with: the version of its format is in it."""

MOST_TOKEN = 2**14
MOST_CERTIFICATE = 2**13
"""The largest token in characters, and the largest certificate or request in bytes."""

BACKDATED = timedelta(days=1)
"""Certificates begin that much before they are made, because clocks differ."""

SUITES = "ECDHE-PSK-CHACHA20-POLY1305"
_SUITES_VARIABLE = "GRPC_SSL_CIPHER_SUITES"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class TrustError(PayloadError):
    """An identity is not accepted, or cannot be made; the message names it and the way out."""


def fingerprint(of: x509.Certificate | x509.CertificateSigningRequest | ec.EllipticCurvePrivateKey) -> str:
    """SHA-256 of the public key (DER SubjectPublicKeyInfo), hex. It stays when a certificate is renewed."""
    key = of.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(key).hexdigest()


def node_id(of: str) -> int:
    """The id of the node with a fingerprint: its first 8 bytes, unsigned 64 bit."""
    return int(of[:16], 16)


def on_p256(key: object) -> bool:
    """Whether a public or private key is one that a federation takes."""
    is_curve = isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey)
    return is_curve and isinstance(cast(ec.EllipticCurvePublicKey, key).curve, ec.SECP256R1)


def is_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether a certificate is to be renewed: in the last third of its life, the day that it begins early not counted."""
    begin, end = certificate.not_valid_before_utc + BACKDATED, certificate.not_valid_after_utc
    return now >= end - (end - begin) / 3


def write_secret(file: Path, content: bytes) -> None:
    """Replace a file in one moment, and on the disk; its owner alone can read it (0600). Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as new:
        try:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
            Path(new.name).replace(file)
        except BaseException:  # a disk that is full must not be filled with what was tried
            Path(new.name).unlink(missing_ok=True)
            raise


def checked_name(name: str) -> str:
    """The name of a site. Raises TrustError."""
    if not _NAME.fullmatch(name):
        raise TrustError(f"name {name!r}: a site's name is 1 to 63 of the letters A-Z a-z, digits, and . _ - inside it")
    return name


def checked_address(address: str) -> str:
    """`host:port` of a server, an IPv6 host in brackets. Raises TrustError."""
    try:
        parts = urlsplit(f"//{address}")
        is_address = bool(parts.hostname and parts.port) and address.isascii() and parts.netloc == address
    except ValueError:
        is_address = False
    if not is_address or not address.isprintable() or set(address) & set("@ %"):
        raise TrustError(f"address {address!r}: write host:port, as in fl.example.org:9443 or [2001:db8::1]:9443")
    return address


@dataclass(frozen=True)
class Peer:
    """A client that has proved to hold the key of a certificate.

    `fingerprint` is that of its key; `serial`, of its certificate, is hex (of a join certificate: the token's id);
    `expires` is in UTC.
    """

    kind: Kind
    fingerprint: str
    serial: str
    expires: datetime

    @property
    def node(self) -> int:
        """The id that its key has. A join certificate has one too, and no node is ever registered under it."""
        return node_id(self.fingerprint)

    @classmethod
    def of(cls, pem: bytes) -> Self:
        """Read a certificate, the first one if there are more. Its signature is not looked at: TLS has done that.

        Raises PayloadError for what no authority of ours signs.
        """
        with parsing("certificate"):
            if len(pem) > MOST_CERTIFICATE:
                raise PayloadError(f"certificate: {len(pem)} bytes; the limit is {MOST_CERTIFICATE}")
            return cls.of_certificate(x509.load_pem_x509_certificate(pem))

    @classmethod
    def of_certificate(cls, certificate: x509.Certificate) -> Self:
        """The same for a certificate that was read already."""
        with parsing("certificate"):
            units = [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
            if len(units) != 1 or units[0] not in get_args(Kind):
                raise PayloadError(f"certificate: its organizational units are {units}; one of {get_args(Kind)} is due")
            if not on_p256(certificate.public_key()):
                raise PayloadError("certificate: its key is not ECDSA P-256, which is the only kind taken here")
            expires, serial = certificate.not_valid_after_utc, f"{certificate.serial_number:x}"
            return cls(cast(Kind, units[0]), fingerprint(certificate), serial, expires)

    @classmethod
    def of_context(cls, context: Mapping[str, Iterable[bytes]]) -> Self:
        """The peer of a call, from gRPC's `context.auth_context()`.

        Raises TrustError for a connection without TLS 1.3 or without a certificate: gRPC sets no least version of TLS,
        so it is looked at again here, on each call. Raises PayloadError as `of`.
        """
        facts = {name: next(iter(values), b"") for name, values in context.items()}
        version = facts.get("ssl_tls_version", b"none").decode("ascii", "replace")
        if facts.get("transport_security_type") != b"ssl" or version != "TLSv1.3":
            raise TrustError(f"a connection with TLS version {version} is refused: TLSv1.3 is the only one served")
        if "x509_pem_cert" not in facts:
            raise TrustError("a connection without a client certificate is refused")
        return cls.of(facts["x509_pem_cert"])


@dataclass(frozen=True)
class Token:
    """What an operator hands to a site: where the server is, whom to trust there, and the right to join once.

    `certificate` is the join certificate and `key` its private key (PKCS #8, DER). `authorities` are what the site
    trusts: first the authority that signs nodes, then the roots of the server's certificate where those are others.

    As text it is `fedapt1.KEY.CERTIFICATE.AUTHORITY….CHECKSUM`, each DER in base64url. The checksum finds a slip of the
    clipboard; it has no key, and keeps nobody from making another token, for a server of his own.
    """

    key: bytes = field(repr=False)
    certificate: x509.Certificate
    authorities: tuple[x509.Certificate, ...]

    def encode(self) -> str:
        """The token as one line of text: a secret. `decode` reads it back."""
        ders = [self.key, *(c.public_bytes(Encoding.DER) for c in (self.certificate, *self.authorities))]
        body = ".".join([PREFIX, *map(_text, ders)])
        return f"{body}.{_checksum(body)}"

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read a token; white space around it is nothing. Raises PayloadError, which never repeats the token.

        Formal guarantees: its authority signed the join certificate, whose key it holds. A text that differs from what
        `encode` gave is refused but for a chance of 2⁻⁷². Nothing beyond MOST_TOKEN characters is parsed.
        """
        text = text.strip()
        if len(text) > MOST_TOKEN:
            raise PayloadError(f"token: {len(text)} characters; the limit is {MOST_TOKEN}. Is this a token?")
        body, _, checksum = text.rpartition(".")
        prefix, *parts = body.split(".")
        if prefix != PREFIX:
            raise PayloadError(f"token: one begins with {PREFIX!r}. Another number there is another version's format")
        if _checksum(body) != checksum:
            raise PayloadError("token: its checksum does not match; copy it again, whole")
        with parsing("token"):
            key, *ders = (urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in parts)
            certificate, *authorities = map(x509.load_der_x509_certificate, ders)
            token = cls(key, certificate, tuple(authorities))
            token._check()
        return token

    def _check(self) -> None:
        if self.peer.kind != "join" or not self.authorities:
            raise PayloadError("token: it holds no join certificate, or no authority")
        key = load_der_private_key(self.key, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or fingerprint(key) != self.peer.fingerprint:
            raise PayloadError("token: its key is not that of its certificate")
        for signed in (self.certificate, self.authorities[0]):
            signed.verify_directly_issued_by(self.authorities[0])
        checked_name(self.name)
        checked_address(self.address)

    @cached_property
    def peer(self) -> Peer:
        """Whom the server will see when the token is used."""
        return Peer.of_certificate(self.certificate)

    @property
    def id(self) -> str:
        """What the token is revoked by: the serial of its certificate, hex. No secret."""
        return self.peer.serial

    @property
    def expires(self) -> datetime:
        return self.peer.expires

    @property
    def name(self) -> str:
        """The site's name, as the operator chose it."""
        (name,) = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(name.value)

    @property
    def address(self) -> str:
        """host:port of the server. It is in the certificate, so that nobody can put another one there."""
        names = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return uri.removeprefix("fedapt://")

    @property
    def authority_fingerprint(self) -> str:
        """What an operator and a site can compare by telephone."""
        return fingerprint(self.authorities[0])

    @property
    def key_pem(self) -> bytes:
        key = load_der_private_key(self.key, None)
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def chain_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def roots_pem(self) -> bytes:
        return b"".join(authority.public_bytes(Encoding.PEM) for authority in self.authorities)


def tls13_only() -> None:
    """Let gRPC, in this whole process, refuse TLS 1.2 and older while hands are shaken. Call it before grpc is imported.

    gRPC has no setting for the least version. It has one for the cipher suites of TLS 1.2, which it reads once, while
    it is imported: the one suite that stays needs a pre-shared key, nobody here has one, and so no TLS 1.2 is left,
    whatever the server's certificate. The suites of TLS 1.3 are not touched by it. Raises RunError where gRPC is
    there already; `Peer.of_context` refuses older versions even so, after the handshake.
    """
    if os.environ.get(_SUITES_VARIABLE) == SUITES:
        return
    if "grpc._cython.cygrpc" in sys.modules:
        raise RunError(f"gRPC is loaded, and would still offer TLS 1.2: start with {_SUITES_VARIABLE}={SUITES} set")
    os.environ[_SUITES_VARIABLE] = SUITES


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Whatever a library says of malformed bytes becomes a PayloadError."""
    wrong = (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm)
    try:
        yield
    except (*wrong, x509.ExtensionNotFound, x509.DuplicateExtension, x509.InvalidVersion) as error:
        raise PayloadError(f"{what}: {type(error).__name__}, so it is damaged or was not made by fedapt") from None


def _text(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _checksum(body: str) -> str:
    """72 bits of SHA-256, in 12 characters."""
    return _text(hashlib.sha256(body.encode()).digest()[:9])
