"""How a site joins a federation: it makes a key that never leaves, and gets a certificate over it for a token.

    key.pem          the site's key; its hash is the node's id
    certificate.pem  the node's certificate, 90 days, renewed by the node itself
    ca.pem           whom the site trusts for the server, as the token had it

The folder is for its owner alone (0700), as are the files (0600). `client.toml` beside it is the site's own file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from ..protocols.errors import OutputError
from ..protocols.identity import Peer, Token, TrustError, fingerprint, is_due, on_p256, parsing, write_secret

if TYPE_CHECKING:
    import grpc

Join = Callable[[bytes], bytes]
"""Certificate request (PEM) ⇒ certificate (PEM), over a channel that `channel_credentials(token)` opens."""

_KEY, _CERTIFICATE, _ROOTS = "key.pem", "certificate.pem", "ca.pem"

CONFIG = """\
# This site's own file, written by `fedapt client join`: where the server is, what is trained on, and what that may be
# used for, whatever a task asks. Change it as you like; `fedapt client start` reads it.

{server}
# A .jsonl, .csv or .parquet file, and the names of its columns.
# [data]
# source = "patients.jsonl"
# text = "text"
# label = "label"

# A site refuses what is not kept here, tells the server why, and computes nothing from its data. These clauses are
# strict; remove one and everything of its kind is allowed.
[policy]
units = ["example"]             # noise is added here, before anything leaves; "client" would trust the server with that
recipes = ["ffa", "fedsvd"]
public = []                     # adapter.public is read without noise: list the sources that anybody may see
most_steps = 100                # of one round; a run must then state local.steps
# most_batch = 1024             # examples of one step
# most_length = 4096            # tokens of one example
# hub = ["FacebookAI/roberta-base"]  # bases that may be downloaded; `fedapt client import` takes one from a folder

least_noise = 0.6               # standard deviation ÷ sensitivity
most_clip = 1.0                 # L2 norm of one example's gradient
most_epsilon_per_run = 3.0
most_epsilon = 8.0              # over all runs of all servers: what is charged is never given back
delta = 1e-6                    # below 1 / the number of people

# The SHA-256 of the base in its precision, as a run's description names it. Pin the one that you have looked at; it must
# then be here before a run asks for it.
# base = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
"""


@dataclass(frozen=True)
class SiteKeys:
    """The folder of a site's key. `make` it once; what is in it is read whenever it is asked for."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Self:
        """The folder with a key in it; one that is there already stays. Raises OutputError, TrustError as `key`."""
        keys = cls(folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            if not (folder / _KEY).exists():
                key = ec.generate_private_key(ec.SECP256R1())
                write_secret(folder / _KEY, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        except OSError as error:
            raise OutputError(
                f"{folder}: a key cannot be written there ({error.strerror}); choose another folder"
            ) from None
        keys.key()
        return keys

    @property
    def key_pem(self) -> bytes:
        return self._read(_KEY)

    @property
    def chain_pem(self) -> bytes:
        return self._read(_CERTIFICATE)

    @property
    def roots_pem(self) -> bytes:
        return self._read(_ROOTS)

    @property
    def peer(self) -> Peer:
        """Whom the server sees: the node's id is in it, and when its certificate expires."""
        return Peer.of(self.chain_pem)

    def key(self) -> ec.EllipticCurvePrivateKey:
        """Raises TrustError where it is no ECDSA P-256 key."""
        with parsing(f"{self.folder / _KEY}"):
            key = load_pem_private_key(self.key_pem, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not on_p256(key):
            raise TrustError(f"{self.folder / _KEY}: is no ECDSA P-256 key; choose another folder for this site's keys")
        return key

    def request(self) -> bytes:
        """A certificate request (PEM) for the key, to join and to renew. It names nobody: the key is the name."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self.key(), hashes.SHA256()).public_bytes(Encoding.PEM)

    def accept(self, chain: bytes, roots: bytes | None = None) -> None:
        """Keep a certificate. `roots`, when joining, are the token's; otherwise those that are there stand.

        Raises TrustError where it is not a node's, not over this key, or not signed by the authority: the first root.
        """
        roots = self.roots_pem if roots is None else roots
        with parsing("the server's answer"):
            (certificate, *_), authority = (
                x509.load_pem_x509_certificates(chain),
                x509.load_pem_x509_certificates(roots)[0],
            )
            certificate.verify_directly_issued_by(authority)
        peer = Peer.of_certificate(certificate)
        if peer.kind != "node" or peer.fingerprint != fingerprint(self.key()):
            raise TrustError(
                f"the server answered with a {peer.kind} certificate of node {peer.node}, and not this site's"
            )
        try:
            write_secret(self.folder / _ROOTS, roots)
            write_secret(self.folder / _CERTIFICATE, chain)
        except OSError as error:
            raise OutputError(f"{self.folder}: the certificate cannot be written ({error.strerror})") from None

    def renewal_due(self, now: datetime) -> bool:
        """Whether the certificate is in the last third of its life."""
        with parsing(f"{self.folder / _CERTIFICATE}"):
            certificate = x509.load_pem_x509_certificate(self.chain_pem)
        return is_due(certificate, now)

    def require_valid(self, now: datetime) -> None:
        """Raises TrustError where the certificate has run out: then no renewal helps, and the site joins again."""
        if now >= (expires := self.peer.expires):
            raise TrustError(
                f"this site's certificate expired on {expires:%Y-%m-%d %H:%M} UTC, and one that has is not renewed. Way "
                "out: ask the operator for a new token, then `fedapt client join TOKEN` in the same folder: the site "
                "keeps its key, its client.toml and its ledger, and stays the same node"
            )

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            way_out = "join with `fedapt client join TOKEN`"
            raise TrustError(f"{self.folder / name}: cannot be read ({error.strerror}); {way_out}") from None


def enrol(token: Token, keys: Path, config: Path, join: Join, now: datetime | None = None) -> SiteKeys:
    """Join: make the key, let `join` get its certificate, write both and `client.toml`, which is never overwritten.

    What was interrupted is tried again with the same key and token, and goes on. A site whose certificate ran out joins
    again with a new token and stays the same node. Raises TrustError where the token has expired, the folder is
    another federation's, or the answer is not this site's certificate; and whatever `join` raises.
    """
    if (now or datetime.now(UTC)) >= token.expires:
        raise TrustError(f"the token expired on {token.expires:%Y-%m-%d %H:%M} UTC: ask for another")
    if (keys / _ROOTS).exists() and SiteKeys(keys).roots_pem != token.roots_pem:
        raise TrustError(
            f"{keys}: holds the keys for another federation; choose another folder for this one. Each folder has a ledger of "
            "its own: where both train on the same data, divide most_epsilon and delta between their policies"
        )
    site = SiteKeys.make(keys)
    site.accept(join(site.request()), token.roots_pem)
    server = tomli_w.dumps({"server": {"address": token.address, "keys": str(keys.absolute())}})
    try:
        with config.open("x", encoding="utf-8") as file:
            file.write(CONFIG.format(server=server))
    except FileExistsError:
        pass  # the site's own policy: whoever wrote it meant it
    except OSError as error:
        raise OutputError(f"{config}: cannot be written ({error.strerror})") from None
    return site


def channel_credentials(identity: SiteKeys | Token) -> "grpc.ChannelCredentials":
    """Mutual TLS for a gRPC channel, as a node or as the holder of a token. Call `tls13_only` before gRPC is imported."""
    import grpc

    return grpc.ssl_channel_credentials(identity.roots_pem, identity.key_pem, identity.chain_pem)
