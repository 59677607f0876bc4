"""Which TLS a real port speaks, and which certificate it shows, to clients that are not gRPC."""

import shutil
import socket
import ssl
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from fedapt.client.enrolment import SiteKeys
from fedapt.server.authority import Authority, server_credentials


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", ["localhost", "127.0.0.1"])


def site_of(authority: Authority) -> SiteKeys:
    site = SiteKeys.make(authority.folder.parent / "site")
    site.accept(authority.certify(site.request()), authority.roots_pem)
    return site


@contextmanager
def connected(port: int, version: ssl.TLSVersion, site: SiteKeys) -> Iterator[ssl.SSLSocket]:
    """A client of one version of TLS, with every cipher suite that OpenSSL has, however weak."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=site.roots_pem.decode())
    context.load_cert_chain(site.folder / "certificate.pem", site.folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of old versions, which is the point
        context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), 20) as bare,
        context.wrap_socket(bare, server_hostname="localhost") as connection,
    ):
        yield connection


SERVER = """
import sys
from pathlib import Path
from fedapt.protocols.identity import tls13_only
{before}
import grpc
from concurrent.futures import ThreadPoolExecutor
from fedapt.server.authority import Authority, server_credentials
server = grpc.server(ThreadPoolExecutor(1))
print(server.add_secure_port("127.0.0.1:0", server_credentials(Authority.load(Path(sys.argv[1])))), flush=True)
server.start()
sys.stdin.read()
"""


@contextmanager
def other_process(authority: Authority, before: str) -> Iterator[tuple[int, SiteKeys]]:
    """A server in a process of its own, because gRPC reads its suites once; and a site that may connect."""
    site = site_of(authority)
    command = [sys.executable, "-P", "-c", SERVER.format(before=before), str(authority.folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline()), site
        finally:
            server.kill()


def first_bytes(port: int, version: ssl.TLSVersion, site: SiteKeys) -> bytes:
    """What the server says after the handshake; nothing where there is none."""
    with suppress(ssl.SSLError, ConnectionError), connected(port, version, site) as connection:
        connection.settimeout(20)
        return connection.recv(9)
    return b""


def test_tls_older_than_13_is_refused(authority: Authority) -> None:
    with other_process(authority, "tls13_only()") as (port, site):
        said = {version.name: first_bytes(port, version, site) for version in ssl.TLSVersion if version > 0}
        assert {name: bool(words) for name, words in said.items()} == {
            "SSLv3": False,
            "TLSv1": False,
            "TLSv1_1": False,
            "TLSv1_2": False,
            "TLSv1_3": True,
        }


def test_the_check_would_see_tls_12(authority: Authority) -> None:
    """Of itself gRPC takes it; then no call has a peer (`Peer.of_context`)."""
    with other_process(authority, "") as (port, site):
        assert first_bytes(port, ssl.TLSVersion.TLSv1_2, site)
        assert not first_bytes(port, ssl.TLSVersion.TLSv1_1, site)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl program here")
def test_openssl_agrees(authority: Authority) -> None:
    def says(version: str) -> int:
        where = ["-connect", f"127.0.0.1:{port}", "-CAfile", str(site.folder / "ca.pem")]
        own = ["-cert", str(site.folder / "certificate.pem"), "-key", str(site.folder / "key.pem")]
        command = ["openssl", "s_client", "-alpn", "h2", "-cipher", "ALL:@SECLEVEL=0", f"-{version}", *where, *own]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60
        ).returncode

    with other_process(authority, "tls13_only()") as (port, site):
        assert says("tls1_3") == 0
        assert says("tls1_2") != 0
        assert says("tls1_1") != 0


def test_a_renewed_server_certificate_is_shown_at_once(authority: Authority) -> None:
    def shown() -> bytes | None:
        with connected(port, ssl.TLSVersion.TLSv1_3, site) as connection:
            return connection.getpeercert(binary_form=True)

    site, server = site_of(authority), grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(authority))
    server.start()
    try:
        first = shown()
        assert first == shown()
        Authority.load(authority.folder).renew()  # as another process does
        assert shown() not in (first, None)
    finally:
        server.stop(None).wait()
