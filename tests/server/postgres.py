"""A PostgreSQL of the tests' own: a private cluster behind a socket in a temporary folder, and a database for each test.

Where its programs are not installed the tests are skipped; with FEDAPT_REQUIRE_POSTGRES set they fail.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import URL, create_engine, make_url

from fedapt.server.store import open_store

slow_on_postgres = pytest.mark.parametrize(
    "place", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)], indirect=True
)
"""For tests that make many stores: a database takes much longer to make than a file."""

# A crash of the machine is not tested here: the processes that are killed are clients, and this server lives on.
SETTINGS = {"listen_addresses": "", "fsync": "off", "full_page_writes": "off", "shared_buffers": "16MB"}


def binaries() -> Path:
    """The folder of PostgreSQL's programs. Debian keeps them off PATH."""
    found = shutil.which("initdb")
    candidates = [Path(found).resolve()] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return candidates[-1].parent if candidates else _missing("no initdb on PATH or in /usr/lib/postgresql")


def _missing(what: str) -> Path:
    words = f"PostgreSQL is not installed: {what}"
    if os.environ.get("FEDAPT_REQUIRE_POSTGRES"):
        pytest.fail(words)
    pytest.skip(words)


def _account() -> str | None:
    """Whom the server runs as: it refuses to be root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        _missing("root cannot run it, and there is no user postgres")
        raise


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[URL]:
    """The cluster, by the URL of its first database."""
    programs, account = binaries(), _account()
    # Not under pytest's own folder, which nobody else can enter, and whose name may be too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="fedapt-pg-"))
    if account:
        shutil.chown(folder, account, account)

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, "-D", folder / "data", *arguments],
            check=True,
            cwd=folder,
            stdout=subprocess.DEVNULL,
            user=account,
            group=account,
            extra_groups=[] if account else None,
        )

    try:
        call("initdb", "--username=tests", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")
        settings = {**SETTINGS, "unix_socket_directories": str(folder)}
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        call("pg_ctl", "start", "--wait", "--log", str(folder / "log"), "--options", options)
        try:
            yield URL.create("postgresql+psycopg", "tests", database="postgres", query={"host": str(folder)})
        finally:
            call("pg_ctl", "stop", "--mode=immediate")
    finally:
        shutil.rmtree(folder)


@contextmanager
def databases(server: URL) -> Iterator[Callable[[str], str]]:
    """Makes a database with each call, as a copy of the one that is named, and says its URL."""
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    made = []

    def make(template: str) -> str:
        made.append(f"test_{next(_numbers)}")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {made[-1]} TEMPLATE {template}")
        return server.set(database=made[-1]).render_as_string()

    yield make
    with engine.connect() as connection:
        for name in made:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


_numbers = count()


@pytest.fixture(scope="session")
def postgres_store(postgres_server: URL) -> Iterator[str]:
    """The name of a database with the tables of a store, to be copied: that is faster than making them."""
    with databases(postgres_server) as make:
        where = make("template1")
        open_store(where).close()
        name = make_url(where).database
        assert name is not None
        yield name


@pytest.fixture
def postgres_databases(postgres_server: URL) -> Iterator[Callable[[str], str]]:
    with databases(postgres_server) as make:
        yield make
