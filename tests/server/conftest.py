"""Both stores."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedapt.server.store import MemoryStore, SqliteStore, Store


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    store = SqliteStore(tmp_path / "run.sqlite")
    yield store
    store.close()
