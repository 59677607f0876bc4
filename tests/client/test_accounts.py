"""A real site's one ledger: what it takes over of older ones, and what it refuses to begin with."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Metadata, RecordDict

from fedapt.client.accounts import LEDGER, Accounts, SiteAccounts
from fedapt.client.flower import app
from fedapt.privacy.accounting import spent
from fedapt.privacy.events import Poisson
from fedapt.privacy.ledger import SiteLedger
from fedapt.protocols.errors import FedaptError, OutputError, PrivacyError
from fedapt.protocols.records import DESCRIBE, message
from fedapt.protocols.update import Assignment

from .ledgers import FULL, broken
from .residents import SPEC, make_site


def charge(accounts: Accounts, node: int, run: str = "run", cap: float = 99.0) -> None:
    accounts.charge(Assignment(run, 1, 1, node, "", b""), FULL, 1e-5, per_run=cap, in_all=cap)


def close(accounts: Accounts) -> None:
    for file in accounts._files.values():
        file.close()


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.sqlite"))


def rows_of(path: Path) -> list[str]:
    ledger = SiteLedger(path)
    rows = [entry.run for entry in ledger.chain().entries]
    ledger.close()
    return rows


def test_a_site_has_one_ledger_and_virtual_nodes_have_their_own(tmp_path: Path) -> None:
    cap = spent([FULL], 1e-5).epsilon * 1.01
    virtual, site = Accounts(tmp_path / "virtual"), SiteAccounts(tmp_path / "site")
    for node in (7, 8):
        charge(virtual, node, cap=cap)
    charge(site, 7, cap=cap)
    with pytest.raises(PrivacyError, match="the cap is"):
        charge(site, 8, "other", cap)
    assert files_of(tmp_path / "virtual") == ["7.sqlite", "8.sqlite"]
    assert files_of(tmp_path / "site") == [LEDGER]
    assert site.ledger(9, "run").spent(1e-5).epsilon == spent([FULL], 1e-5).epsilon


@pytest.mark.parametrize("rounds", [1, 30, 500])
def test_what_is_told_of_an_account_does_not_tell_how_many_examples_there_are(rounds: int) -> None:
    told, exact = [], []
    for examples in (1000, 1001):
        accounts, asked = Accounts(), Assignment("run", 1, 1, 7, "", b"")
        accounts.charge(
            asked, replace(FULL, sampling=Poisson(16 / examples), count=rounds), 1e-5, per_run=99.0, in_all=99.0
        )
        told.append(accounts.spent(asked, 1e-5).epsilon)
        exact.append(accounts.ledger(7, "run").spent(1e-5).epsilon)
    assert told[0] == told[1] == float(f"{told[0]:.2g}")
    assert exact[0] > exact[1] > 0
    assert exact[0] <= told[0] <= 1.1 * exact[0], "an upper bound, and hardly above"


def test_nothing_is_made_before_a_charge(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        SiteAccounts(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_that_is_named_after_a_node_is_taken_over(tmp_path: Path) -> None:
    """With its last rows, which a process that was killed has left in the log; a copy by another name is no matter."""
    own, killed = Accounts(tmp_path / "own"), tmp_path / "killed"
    for run in ("a", "b"):
        charge(own, 7, run)
    assert (tmp_path / "own" / "7.sqlite-wal").stat().st_size > 0
    shutil.copytree(tmp_path / "own", killed)
    shutil.copy(killed / "7.sqlite", killed / "copy of may.sqlite")
    close(own)
    site = SiteAccounts(killed)
    charge(site, 8, "c")
    close(site)
    assert files_of(killed) == ["copy of may.sqlite", LEDGER]
    assert rows_of(killed / LEDGER) == ["a", "b", "c"]
    close(SiteAccounts(killed))
    assert rows_of(killed / LEDGER) == ["a", "b", "c"]


def test_a_ledger_that_is_in_use_is_not_renamed(tmp_path: Path) -> None:
    """Its other user would go on with a log by the old name."""
    own = Accounts(tmp_path)
    charge(own, 7)
    with pytest.raises(OutputError, match="end every process that serves this site"):
        SiteAccounts(tmp_path)
    close(own)
    close(SiteAccounts(tmp_path))
    assert files_of(tmp_path) == [LEDGER]


@pytest.mark.parametrize("names", [("7", "8"), ("7", "ledger"), ("7", "8", "ledger")])
def test_several_ledgers_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        SiteLedger(tmp_path / f"{name}.sqlite").close()
    with pytest.raises(PrivacyError, match=f"holds {len(names)} ledgers .*Way out: divide delta") as refused:
        SiteAccounts(tmp_path)
    assert all(f"{name}.sqlite" in str(refused.value) for name in names)
    assert files_of(tmp_path) == sorted(f"{name}.sqlite" for name in names)


@pytest.mark.parametrize("name", ["7.sqlite", LEDGER])
def test_what_is_broken_is_found_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no database" * 1000)
    with pytest.raises(OutputError, match=name):
        SiteAccounts(tmp_path)
    (tmp_path / name).unlink()
    SiteLedger(tmp_path / name).close()
    broken(tmp_path / name)
    with pytest.raises(PrivacyError, match="is not as it was written"):
        SiteAccounts(tmp_path)


def test_a_supernode_tells_nothing_of_a_broken_ledger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_site(tmp_path / "site", "north", 1)
    charge(SiteAccounts(folder / "accounts"), 7)
    broken(folder / "accounts" / LEDGER)
    metadata = Metadata(1, "", 1, 5, "", "", time.time(), 3600.0, DESCRIBE)
    context = Context(1, 5, {"site": str(folder)}, RecordDict(), {"spec": SPEC})
    caplog.set_level("ERROR", "flwr")
    with pytest.raises(FedaptError) as told:
        app(message(RecordDict(), metadata), context)
    assert str(told.value) == "DataError at this site, which its operator finds in its log"
    assert f"{LEDGER}: the ledger's row 2" in caplog.text
