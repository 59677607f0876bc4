"""`fedapt client`: what it prints, what it refuses with exit code 2, and a site that joins over TLS."""

import json
import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedapt.client.accounts import Accounts, SiteAccounts
from fedapt.client.enrolment import SiteKeys
from fedapt.client.status import Status, alone_in
from fedapt.privacy.events import Everyone, GaussianEvent
from fedapt.protocols.errors import RunError
from fedapt.protocols.update import Assignment
from fedapt.server.authority import Authority

from .running import in_process

SPEC = """
[run]
name = "tiny"
[model]
base = "builtin:byte-llama"
task = "causal-lm"
max_length = 32
[adapter]
rank = 2
targets = ["q_proj"]
[recipe]
name = "fedit"
[local]
batch_size = 2
steps = 50
[wire]
codec = "int8"
"""

CLASSES = SPEC.replace('task = "causal-lm"', 'task = "sequence-classification"\nlabels = 2')


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    lines = [f'{{"text": "line {i} of a text", "label": {i % 2}}}' for i in range(6)]
    (folder / "own.jsonl").write_text("\n".join(lines))
    write(folder)
    (tmp_path / "spec.toml").write_text(SPEC)
    (tmp_path / "classes.toml").write_text(CLASSES)
    return folder


def write(folder: Path, data: str = "", policy: str = "") -> None:
    server = '[server]\naddress = "127.0.0.1:1"\nplaintext = "north"\n'
    text = f'{server}[data]\nsource = "own.jsonl"\n{data}\n[policy]\n{policy}\n'
    (folder / "client.toml").write_text(text)


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gRPC is loaded already where all tests run in one process."""
    monkeypatch.setattr("fedapt.logs.log_to", lambda *_, **__: None)
    monkeypatch.setattr("fedapt.protocols.identity.tls13_only", lambda: None)


def rehearse(capsys: pytest.CaptureFixture[str], site: Path, spec: str = "spec.toml") -> tuple[int, str, str]:
    path = site.parent / spec
    return in_process(capsys, "client", "start", "--folder", site, "--dry-run", "--spec", path, "--json")


def test_a_dry_run_shows_what_would_leave(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = rehearse(capsys, site)
    assert code == 0, err
    found = json.loads(out)
    assert (found["examples"], found["kind"], found["codec"]) == (6, "delta", "int8")
    assert found["metrics"]["steps"] == 1
    assert 0 < found["bytes"] < 4 * found["parameters"]
    assert not list(site.glob("accounts/*")) + list(site.glob("results/*"))


def test_a_dry_run_counts_labels(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = rehearse(capsys, site, "classes.toml")
    assert code == 0, err
    assert json.loads(out)["labels"] == {"0": 3, "1": 3}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (('text = "txt"', "", "", "spec.toml"), 'no column "txt"; the columns are text, label. Set data.text = "text"'),
        (('label = "labels"', "", "", "classes.toml"), 'no column "labels"'),
        (("", "", '\n{"text": "x", "label": 2}', "classes.toml"), "legal range 0..1"),
        (("", "most_steps = 10", "", "spec.toml"), "most_steps = 10"),
        (("", 'units = ["example"]', "", "spec.toml"), "allows the units"),
    ],
)
def test_a_dry_run_says_what_does_not_fit(
    site: Path, capsys: pytest.CaptureFixture[str], case: tuple[str, str, str, str], said: str
) -> None:
    data, policy, row, spec = case
    write(site, data, policy)
    with (site / "own.jsonl").open("a") as file:
        file.write(row)
    code, out, err = rehearse(capsys, site, spec)
    assert (code, out) == (2, "")
    assert said in err


def test_wrong_use(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--spec FILE" in in_process(capsys, "client", "start", "--folder", site, "--dry-run")[2]
    code, _, err = in_process(capsys, "client", "start", "--folder", site.parent)
    assert code == 2
    assert "client.toml" in err
    code, _, err = in_process(capsys, "client", "join", "fedapt1.nonsense", "--folder", site)
    assert code == 2
    assert "nonsense" not in err
    with alone_in(site):
        code, _, err = in_process(capsys, "client", "start", "--folder", site)
    assert code == 2
    assert "another process" in err


def test_what_holds_no_token_or_no_site_is_one_line(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise, file = site / "noise", site / "own.jsonl"
    noise.write_bytes(bytes(range(128, 256)))
    (site / "status.json").mkdir()
    wrong = [
        (("join", noise, "--folder", site), "is no text"),
        (("join", "token.txt", "--folder", site), "neither a token"),
        (("join", site, "--folder", site), "neither a token"),
        (("status", "--folder", file), "Not a directory"),
        (("status", "--folder", site), "status.json: cannot be read"),
        (("pause", "--folder", file), "Not a directory"),
        (("resume", "--folder", file), "Not a directory"),
        (("start", "--folder", site.parent), "fedapt client join TOKEN"),
    ]
    for arguments, said in wrong:
        code, out, err = in_process(capsys, "client", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert said in err, arguments


def test_status_pause_and_resume(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def status() -> dict[str, object]:
        code, out, err = in_process(capsys, "client", "status", "--folder", site, "--json")
        assert code == 0, err
        found: dict[str, object] = json.loads(out)
        return found

    assert not status()["running"]
    with alone_in(site):
        own = Status(site)
        own.connected(True, "")
        own.round(run="tiny", round=1, kind="delta", loss=2.5, seconds=1.0)
        in_process(capsys, "client", "pause", "--folder", site)
        found = status()
        assert (found["running"], found["connected"], found["paused"]) == (True, True, True)
        in_process(capsys, "client", "resume", "--folder", site)
        text = in_process(capsys, "client", "status", "--folder", site)[1]
        assert text.startswith("running; 127.0.0.1:1: connected since")
        assert "tiny round 1: delta, loss 2.5" in text
    assert not status()["connected"]


def charge(folder: Path, node: int, accounts: Accounts | None = None) -> None:
    event = GaussianEvent(
        unit="example", relation="add-remove", noise_std=2.0, sensitivity=1.0, secret=True, sampling=Everyone(), count=1
    )
    asked = Assignment("run", 1, 1, node, "", b"")
    (accounts or SiteAccounts(folder / "accounts")).charge(asked, event, 1e-5, per_run=99.0, in_all=99.0)


def test_status_shows_the_sites_one_ledger(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A site that has a new key goes on with what it has spent."""
    found = []
    for node in (7, 8):
        charge(site, node)
        facts = json.loads(in_process(capsys, "client", "status", "--folder", site, "--json")[1])
        found.append(facts["spent"]["epsilon"])
    assert 0 < found[0] < found[1]


def test_a_site_whose_ledger_is_broken_does_not_connect(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse round after round, and its operator would not know why."""

    def connect(*_: object) -> None:
        raise RunError("it connects")

    monkeypatch.setattr("fedapt.client.serving.channel_of", connect)
    ledger = site / "accounts" / "ledger.sqlite"

    def said() -> str:
        code, _, err = in_process(capsys, "client", "start", "--folder", site)
        assert code == 2
        return err

    assert "it connects" in said()  # the control
    charge(site, 7)
    assert "it connects" in said()
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("UPDATE ledger_head SET count = 5")
    assert f"{ledger}: the ledger's row 2 is not as it was written" in said()
    for file in ledger.parent.iterdir():  # the log too
        file.unlink()
    ledger.write_bytes(b"no database" * 1000)
    assert f"{ledger}: cannot be used as a ledger" in said()
    ledger.unlink()
    for node in (7, 8):
        charge(site, node, Accounts(site / "accounts"))
    assert "holds 2 ledgers (7.sqlite, 8.sqlite)" in said()


def certified(folder: Path, ago: timedelta) -> None:
    """A site that joined so long ago, and was not connected since."""
    authority = Authority.create(folder.parent / "ca", ["localhost"], now=lambda: datetime.now(UTC) - ago)
    keys = SiteKeys.make(folder / "keys")
    keys.accept(authority.certify(keys.request()), authority.roots_pem)
    server = '[server]\naddress = "127.0.0.1:1"\n'
    (folder / "client.toml").write_text(f'{server}[data]\nsource = "own.jsonl"\n[policy]\n')


@pytest.mark.parametrize(
    ("days", "warning"), [(50, None), (70, "ends in 19 days"), (91, "expired on")], ids=["valid", "due", "expired"]
)
def test_status_warns_of_the_certificates_end(
    site: Path, capsys: pytest.CaptureFixture[str], days: int, warning: str | None
) -> None:
    certified(site, timedelta(days=days))
    facts = json.loads(in_process(capsys, "client", "status", "--folder", site, "--json")[1])
    text = in_process(capsys, "client", "status", "--folder", site)[1]
    assert f"certificate  until {facts['expires'][:10]}" in text
    if warning is None:
        assert (facts["warning"], "WARNING" in text) == (None, False)
    else:
        assert warning in facts["warning"]
        assert f"WARNING      {facts['warning']}" in text


def test_a_certificate_that_ran_out_says_how_to_join_again(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with exit code 2, where a server that is away would be tried for ever."""
    certified(site, timedelta(days=91))
    code, _, err = in_process(capsys, "client", "start", "--folder", site)
    assert code == 2
    assert "certificate expired on" in err
    assert "fedapt client join TOKEN" in err


def test_an_import_is_noted(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "base").mkdir()
    (site / "base" / "config.json").write_text("{}")
    code, _, err = in_process(capsys, "client", "import", "org/base", site / "base", "--folder", site)
    assert code == 0, err
    assert '[model.bases."org/base"]' in (site / "client.toml").read_text()


def test_a_site_joins_connects_renews_and_leaves_over_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token, one command, and the server knows the node by its key; its certificate is renewed over the stream."""
    import asyncio

    from fedapt.client.dialling import channel_of
    from fedapt.client.duties import Duties
    from fedapt.client.enrolment import SiteKeys
    from fedapt.client.kept import Kept
    from fedapt.client.link import Link
    from fedapt.client.serving import Certificate
    from fedapt.client.site import Site
    from fedapt.server.authority import Authority, server_credentials
    from fedapt.server.link.doors import CertifiedDoor
    from fedapt.server.link.hub import Hub
    from fedapt.server.registry import Registry
    from fedapt.server.store import SqliteStore

    authority = Authority.create(tmp_path / "ca", ["localhost"])
    registry = Registry(SqliteStore(tmp_path / "store.sqlite").engine)
    with Hub("127.0.0.1:0", CertifiedDoor(authority, registry), credentials=server_credentials(authority)) as hub:
        token = authority.issue_token("north", f"localhost:{hub.port}", timedelta(hours=1))
        registry.add_token(token)
        folder, file = tmp_path / "site", tmp_path / "token"
        file.write_text(token.encode() + "\n")
        code, out, err = in_process(capsys, "client", "join", file, "--folder", folder, "--json")
        assert code == 0, err
        joined = json.loads(out)
        assert joined["name"] == "north"
        code, _, err = in_process(capsys, "client", "join", file, "--folder", tmp_path / "other")
        assert code == 2
        assert "refuses the token" in err

        server = Site.load(folder).server
        before, renewed = SiteKeys(server.keys).chain_pem, threading.Event()

        class Due(Certificate):
            def due(self) -> bytes | None:
                return self.keys.request()

            def accept(self, chain: bytes) -> None:
                super().accept(chain)
                renewed.set()

        async def visit() -> list[int]:
            duties = Duties(None, Kept(folder / "results"))  # type: ignore[arg-type]
            own = Link(channel_of(server), duties, renewal=Due(server.keys))
            running = asyncio.ensure_future(own.run())
            assert await asyncio.to_thread(renewed.wait, 60)
            here = await asyncio.to_thread(hub.nodes)
            own.leave("done")
            await asyncio.wait_for(running, 30)
            return here

        assert asyncio.run(visit()) == [joined["node"]]
        assert SiteKeys(server.keys).chain_pem != before
        code, out, _ = in_process(capsys, "client", "status", "--folder", folder)
        assert code == 0
        assert "certificate  until" in out
