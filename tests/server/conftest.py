"""All stores."""

import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from fedapt.server.store import MemoryStore, SqliteStore, SqlStore, Store, open_store

from .postgres import postgres_databases, postgres_server, postgres_store

__all__ = ["empty_place", "place", "postgres_databases", "postgres_server", "postgres_store", "sqlite_store", "store"]


@pytest.fixture(scope="session")
def sqlite_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs, to be copied: that is faster than making one."""
    path = tmp_path_factory.mktemp("store") / "run.sqlite"
    SqliteStore(path).close()
    return path


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Says with each call where another store is, for `open_store`. None has a run."""
    if request.param == "postgres":
        make, template = (request.getfixturevalue(name) for name in ("postgres_databases", "postgres_store"))
        return lambda: str(make(template))
    empty, numbers = request.getfixturevalue("sqlite_store"), count()
    return lambda: str(shutil.copy(empty, tmp_path / f"{next(numbers)}.sqlite"))


@pytest.fixture(params=["sqlite", "postgres"])
def empty_place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Says with each call where a store can be made: there is nothing yet."""
    if request.param == "postgres":
        make = request.getfixturevalue("postgres_databases")
        return lambda: str(make("template1"))
    numbers = count()
    return lambda: str(tmp_path / f"{next(numbers)}.sqlite")


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    if request.param == "sqlite":
        store: SqlStore = SqliteStore(
            Path(shutil.copy(request.getfixturevalue("sqlite_store"), tmp_path / "run.sqlite"))
        )
    else:
        make, template = (request.getfixturevalue(name) for name in ("postgres_databases", "postgres_store"))
        store = open_store(make(template))
    yield store
    store.close()
