"""`fedapt ledger`: on a run's folder, on a site's file, and on what is neither."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedapt.privacy.accounting import spent
from fedapt.privacy.chain import Charge
from fedapt.privacy.events import Everyone, GaussianEvent, MatrixEvent
from fedapt.privacy.ledger import SiteLedger
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.update import Description
from fedapt.server.store import Snapshot, SqliteStore

from .running import in_process

EVENT = GaussianEvent(
    unit="client", relation="add-remove", noise_std=8.0, sensitivity=2.0, secret=True, sampling=Everyone()
)
OWN = replace(EVENT, unit="example")
MATRIX = MatrixEvent(
    unit="client",
    relation="replace-one",
    noise_std=8.0,
    sensitivity=2.0,
    secret=True,
    rounds=10,
    separation=5,
    participations=2,
)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Three rounds of one run, and a simulated one of another."""
    path = tmp_path / "ledger.sqlite"
    ledger = SiteLedger(path)
    for round_ in (1, 2, 4):
        ledger.append("first", round_, OWN)
    ledger.append("second", 1, replace(OWN, secret=False))
    ledger.close()
    return path


def store_in(folder: Path) -> SqliteStore:
    """The store of a run's folder, as `fedapt simulate --out` makes it."""
    folder.mkdir()
    store = SqliteStore(folder / "run.sqlite")
    layout = AdapterLayout([TensorSpec("score.bias", (3,), "other")])
    zeros = np.zeros(3, np.float32)
    store.create("run", "{}", Description(layout, zeros, {}, "base"), Snapshot(0, zeros), {"round": 0})
    return store


def release(store: SqliteStore, round_: int, *events: GaussianEvent | MatrixEvent | Charge) -> None:
    store.open_round("run", round_, [1])
    store.commit("run", Snapshot(round_, np.zeros(3, np.float32)), {"round": round_}, [], events=events)


def tamper(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER ledger_refuses_update")
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("command", [["ledger"], ["ledger", "show"], ["ledger", "verify"]], ids=" ".join)
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    code, out, _ = in_process(capsys, *command, "--help")
    assert code == 0
    assert len(command) == 1 or "Example:" in out


def test_show_is_rows_and_what_follows_from_them(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    code, out, _ = in_process(capsys, "ledger", "show", site)
    assert code == 0
    account = spent([replace(OWN, count=4)], 1e-5, ("PRV", "RDP"))
    lines = [line.split() for line in out.splitlines() if line.startswith(("first", "second"))]
    assert [line[:7] for line in lines] == [
        ["first", "–", "1–4", "3", "example", "add-remove", "4"],
        ["second", "–", "1", "1", "example", "add-remove", "4"],
    ]
    assert "everyone  NOT private (simulation noise)" in out
    assert f"ε = {account.epsilon:.4f} at δ = 1e-05, example-level, add-remove" in out
    assert f"RDP {account.crosschecks['RDP']:.4f}, PRV {account.crosschecks['PRV']:.4f}" in out
    assert "NOT private (simulation noise): the ε above is no promise" in out
    assert "do NOT agree" not in out


def test_show_one_run_for_machines(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    code, out, _ = in_process(capsys, "ledger", "show", site, "--run", "first", "--delta", "1e-6", "--json")
    assert code == 0
    document = json.loads(out)
    assert [row["sequence"] for row in document["rows"]] == [1, 2, 3]
    assert document["rows"][0]["event"]["sampling"] == {"kind": "everyone"}
    assert document["head"]["count"] == 4
    (statement,) = document["spent"]
    assert statement["epsilon"] == spent([replace(OWN, count=3)], 1e-6).epsilon
    assert statement["private"]
    assert statement["consistent"]
    assert not statement["simulated"]


def test_a_run_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = store_in(tmp_path / "run")
    release(store, 1, MATRIX)
    for round_ in (2, 3):
        release(store, round_, EVENT, Charge(OWN, 2**64 - 1))
    release(store, 4, Charge(OWN, 3))
    code, out, _ = in_process(capsys, "ledger", "show", tmp_path / "run", "--json")
    store.close()
    assert code == 0
    statements = {(s["unit"], s["relation"]): s for s in json.loads(out)["spent"]}
    assert set(statements) == {("client", "add-remove"), ("client", "replace-one"), ("example", "add-remove")}
    nodes = statements["example", "add-remove"]
    assert (nodes["node"], nodes["nodes"]) == (str(2**64 - 1), 2), "the node that has spent most"
    assert nodes["epsilon"] == statements["client", "add-remove"]["epsilon"] == spent([EVENT] * 2, 1e-5).epsilon
    assert statements["client", "replace-one"]["method"] == "matrix bound"
    code, out, _ = in_process(capsys, "ledger", "verify", tmp_path / "run")
    assert code == 0
    assert f"of 2 nodes, {2**64 - 1} has spent most" in out


def test_a_run_that_charged_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store_in(tmp_path / "run").close()
    code, out, _ = in_process(capsys, "ledger", "show", tmp_path / "run")
    assert code == 0
    assert "no privacy is claimed" in out
    assert in_process(capsys, "ledger", "verify", tmp_path / "run")[0] == 0


def test_a_release_without_noise_is_no_promise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ledger = SiteLedger(tmp_path / "ledger")
    ledger.append("run", 1, replace(EVENT, noise_std=0.0))
    ledger.close()
    code, out, _ = in_process(capsys, "ledger", "show", tmp_path / "ledger")
    assert code == 0
    assert "NOT private (a release without noise)" in out
    code, out, _ = in_process(capsys, "ledger", "show", tmp_path / "ledger", "--json")
    assert code == 0
    assert json.loads(out)["spent"][0]["epsilon"] is None
    assert "Infinity" not in out


def test_verify_names_the_first_bad_row(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    code, out, _ = in_process(capsys, "ledger", "verify", site)
    assert code == 0
    noted = out.split()[-1]
    assert in_process(capsys, "ledger", "verify", site, "--noted", noted)[0] == 0
    code, out, _ = in_process(capsys, "ledger", "verify", site, "--noted", "0" * 63 + "1")
    assert code == 1
    assert "no row has the hash 0000" in out
    tamper(site, "UPDATE ledger SET round = 3 WHERE sequence = 2")
    code, out, _ = in_process(capsys, "ledger", "verify", site)
    assert code == 1
    assert "BROKEN: row 2 is not what was written here" in out
    code, out, _ = in_process(capsys, "ledger", "verify", site, "--json")
    assert code == 1
    assert json.loads(out)["fault"]["sequence"] == 2
    code, _, errors = in_process(capsys, "ledger", "show", site)
    assert code == 2
    assert "row 2 is not what was written here" in errors
    assert "No ε follows" in errors


@pytest.mark.parametrize("action", ["show", "verify"])
def test_what_is_no_ledger(capsys: pytest.CaptureFixture[str], tmp_path: Path, action: str) -> None:
    (tmp_path / "letter").write_text("dear auditor")
    (tmp_path / "empty").touch()
    for path, message in [
        (tmp_path / "nowhere", "no such file"),
        (tmp_path, "run.sqlite: no such file"),
        (tmp_path / "letter", "not a database"),
        (tmp_path / "empty", "no such table"),
    ]:
        code, _, errors = in_process(capsys, "ledger", action, path)
        assert code == 2
        assert message in errors
        assert "name a run's folder, or a site's ledger" in errors
    assert {path.name for path in tmp_path.iterdir()} == {"letter", "empty"}


def test_a_wrong_run_or_delta(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    code, _, errors = in_process(capsys, "ledger", "show", site, "--run", "third")
    assert code == 2
    assert 'no row of a run "third"; it has first, second' in errors
    code, _, errors = in_process(capsys, "ledger", "verify", site, "--delta", "0")
    assert code == 2
    assert "delta = 0.0" in errors
