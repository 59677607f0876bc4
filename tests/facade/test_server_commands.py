"""`fedapt server`, `token`, `node` and `runs`: what an operator types, and that each mistake is one line and exit code 2."""

import json
import logging
import socket
from pathlib import Path

import pytest

from fedapt.logs import LINE, Lines

from .running import in_process


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gRPC is loaded already where all tests run in one process."""
    monkeypatch.setattr("fedapt.logs.log_to", lambda *_, **__: None)
    monkeypatch.setattr("fedapt.serving.tls13_only", lambda: None)


@pytest.fixture
def federation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "federation"
    code, out, err = in_process(capsys, "server", "init", "--name", "fl.example.org", "--folder", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["address"] == "fl.example.org:7443"
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that must be refused."""
    code, out, err = in_process(capsys, *arguments)
    assert (code, out) == (2, ""), arguments
    assert err.count("\n") == 1, err
    return err


def test_a_token_is_made_listed_and_revoked(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--folder", federation)
    made = json.loads(in_process(capsys, "token", "create", "--name", "north", "--expires", "2h", *at, "--json")[1])
    assert made["token"].startswith("fedapt1.")
    (row,) = json.loads(in_process(capsys, "token", "list", *at, "--json")[1])["tokens"]
    assert (row["id"], row["name"], row["state"]) == (made["id"], "north", "open")
    assert in_process(capsys, "token", "revoke", made["id"], *at)[0] == 0
    assert "revoked" in in_process(capsys, "token", "list", *at)[1]
    for empty, said in (("runs list", "no runs"), ("node list", "no nodes"), ("server status", "no nodes")):
        assert said in in_process(capsys, *empty.split(), *at)[1]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("server init --name fl.example.org", "is there already"),
        ("token create --name a/b", "a site's name"),
        ("token create --name a --expires 0h", "24h"),
        ("token create --name a --expires 31d", "30 days at most"),
        ("token create --name a --expires 999999999999d", "12 digits"),
        (f"token create --name a --expires {'9' * 5000}d", "5000 digits"),
        ("token revoke nothing", "token list"),
        ("node revoke 17", "node 17 is unknown"),
        ("runs show nothing", "none of this name"),
        ("runs stop nothing", "none of this name"),
        ("runs resume nothing", "none of this name"),
        ("server start nothing.toml", "no such file"),
        ("server start --set run.rounds=2", "--set"),
        ("server start --plaintext 0.0.0.0:7443", "loopback"),
        ("server start --plaintext nonsense", "loopback"),
    ],
)
def test_mistakes(federation: Path, capsys: pytest.CaptureFixture[str], command: str, said: str) -> None:
    assert said in refused(capsys, *command.split(), "--folder", federation)


@pytest.mark.parametrize("name", ["a name", "münchen.de", "", "a:b", "x/y"])
def test_names_that_nobody_can_dial(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert "write a DNS name" in refused(capsys, "server", "init", "--name", name, "--folder", tmp_path / "new")


def test_a_node_of_no_possible_id(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The parser of the command line says so, with its usage."""
    code, _, err = in_process(capsys, "node", "revoke", 2**64, "--folder", federation)
    assert code == 2
    assert "range" in err


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("listen", "lisen", 'did you mean "listen"'),
        ('address = "fl.example.org:7443"', 'address = "nowhere"', "host:port"),
        ('store = "store.sqlite"', 'store = "postgres://a:secret@b/c"', "no such store"),
        ('store = "store.sqlite"', 'store = "nowhere/store.sqlite"', "cannot be used"),
        ("# silence = 20.0", "silence = -1", "greater than 0"),
        ("[limits]", "[limits", "cannot be read"),
    ],
)
def test_a_file_with_a_mistake(
    federation: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, said: str
) -> None:
    file = federation / "server.toml"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    err = refused(capsys, "server", "status", "--folder", federation)
    assert said in err
    assert "secret" not in err


def test_folders_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "fedapt server init" in refused(capsys, "server", "status", "--folder", tmp_path)
    assert "file" in refused(capsys, "server", "status", "--folder", file)
    assert "file" in refused(capsys, "server", "init", "--name", "a.org", "--folder", file)
    assert "ca-key.pem" in refused(capsys, "server", "init", "--name", "a", "--folder", tmp_path, "--authority", file)


def test_a_log_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "store.sqlite"):
        assert "no such file" in refused(capsys, "runs", "replay", path)
    assert list(tmp_path.iterdir()) == []


def test_a_peer_writes_no_lines_of_its_own_into_the_log() -> None:
    record = logging.makeLogRecord({"levelname": "INFO", "msg": "leaves: \x1b[2J\n2026 INFO all is well"})
    text = Lines(LINE).format(record)
    assert text.isprintable()
    assert r"\x1b[2J\n2026" in text


def test_a_port_that_is_taken(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ("server", "start", "--plaintext", address, "--until-done", "--folder", federation)
        assert "is another server running" in refused(capsys, *command)


def test_an_ipv6_server_listens_where_its_sites_dial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(capsys, "server", "init", "--name", "2001:db8::1", "--folder", tmp_path / "f")[0] == 0
    text = (tmp_path / "f" / "server.toml").read_text()
    assert 'listen = "[::]:7443"' in text
    assert 'address = "[2001:db8::1]:7443"' in text
