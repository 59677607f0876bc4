"""Where a store can be, and what is said where it cannot."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import URL

from fedapt import ledgers
from fedapt.protocols.errors import DataError, OutputError
from fedapt.server.store import SqliteStore, open_store

from .crashing_store import EVENT
from .test_store import begin, commit

PASSWORD = "s3cr3t/p@ss"


def test_any_path_will_do(tmp_path: Path) -> None:
    path = tmp_path / "50% of a?b=c#d ü" / "run.sqlite"
    path.parent.mkdir()
    store = open_store(str(path))
    begin(store)
    store.close()
    assert path.is_file()


def test_a_url_of_a_file_is_its_path(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/run.sqlite")
    assert isinstance(store, SqliteStore)
    store.close()
    assert (tmp_path / "run.sqlite").is_file()


def test_what_is_no_store_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "run.sqlite").write_text("this is a letter, not a database; it is long enough to have a header" * 9)
    with pytest.raises(OutputError, match="cannot be used as a run's store"):
        SqliteStore(tmp_path / "run.sqlite")
    with pytest.raises(OutputError, match="unable to open database file"):
        SqliteStore(tmp_path / "nowhere" / "run.sqlite")


def test_the_driver_need_not_be_named(postgres_databases: Callable[[str], str]) -> None:
    store = open_store(postgres_databases("template1").replace("postgresql+psycopg", "postgresql"))
    assert store.engine.dialect.driver == "psycopg"
    store.close()


def test_a_database_that_is_not_there(postgres_server: URL) -> None:
    with pytest.raises(OutputError, match=r'database "nowhere" does not exist.*createdb'):
        open_store(postgres_server.set(database="nowhere").render_as_string())


UNUSABLE = {
    "no server": (
        f"postgresql+psycopg://me:{PASSWORD.replace('@', '%40').replace('/', '%2F')}@127.0.0.1:1/runs",
        "refused",
    ),
    "a password in the query": (f"postgresql://me@127.0.0.1:1/runs?password={PASSWORD}", "see that the server runs"),
    "a port that is none": (f"postgresql+psycopg://me:{PASSWORD}@host:port/runs", "it looks like postgresql"),
    "an option that libpq has not": (f"postgresql://me:x@127.0.0.1:1/runs?pasword={PASSWORD}", "cannot be used"),
    "another database": (f"mysql://me:{PASSWORD}@host/runs", "mysql: no such store; name a file, or postgresql"),
}


@pytest.mark.parametrize(("url", "said"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_no_error_holds_a_password(url: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(OutputError, match=said) as caught:
        open_store(url)
    for text in (str(caught.value), repr(caught.value), caplog.text):
        assert PASSWORD not in text
        assert "p@ss" not in text


def test_without_psycopg_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(
        OutputError, match=r"postgresql\+psycopg://me@host/runs: needs psycopg; pip install 'fedapt\[postg"
    ):
        open_store(f"postgresql://me:{PASSWORD.replace('@', '%40').replace('/', '%2F')}@host/runs?password=x")


def test_a_ledger_in_postgres_is_shown_like_that_in_a_file(
    postgres_databases: Callable[[str], str], postgres_store: str, tmp_path: Path
) -> None:
    where, texts = postgres_databases(postgres_store), []
    for place in (where, str(tmp_path / "run.sqlite")):
        store = open_store(place)
        begin(store)
        commit(store, 1, events=[EVENT])
        store.close()
        shown = ledgers.show(place, None, 1e-5)
        assert ledgers.verify(place, 1e-5).sound
        assert len(shown.entries) == len(ledgers.show(place, "run", 1e-5).entries) == 1
        texts.append(shown.text().split("Note its hash")[0].split(", the last on")[0])
    assert texts[0] == texts[1]
    with pytest.raises(DataError, match="holds no ledger that can be read"):
        ledgers.show(postgres_databases("template1"), None, 1e-5)
