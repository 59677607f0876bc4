"""README's federation across sites, as typed: an operator and two sites, in real processes, over TLS on one port."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

FEDAPT = str(Path(sys.executable).with_name("fedapt"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SPEC = """
[run]
name = "first"
rounds = {rounds}
evaluate_every = 2

[model]
base = "builtin:byte-llama"
task = "causal-lm"
max_length = 32

[adapter]
rank = 2
targets = ["q_proj"]

[recipe]
name = "{recipe}"

[local]
steps = 1
batch_size = 2

[participation]
minimum = 2
evaluates = {evaluates}
deadline_seconds = 120
"""


def fedapt(*arguments: object) -> str:
    command = [FEDAPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(log: Path, *arguments: object) -> Iterator["subprocess.Popen[bytes]"]:
    """A command in the background; what it says is in `log`."""
    with log.open("ab") as file:
        process = subprocess.Popen([FEDAPT, *map(str, arguments)], stdout=file, stderr=file, env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool], seconds: float, folder: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in folder.glob("*.log"))
        assert time.monotonic() < deadline, f"waited in vain; {logs}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture
def operator(tmp_path: Path) -> Path:
    """The operator's folder, its server's address being this machine."""
    folder = tmp_path / "federation"
    fedapt("server", "init", "--name", "localhost", "--port", free_port(), "--folder", folder)
    return folder


def join(operator: Path, site: Path, name: str) -> None:
    """A site joins the server that runs, with a few lines of its own and a policy that allows everything."""
    token = site.with_suffix(".token")
    token.write_text(fedapt("token", "create", "--name", name, "--expires", "1h", "--folder", operator))
    fedapt("client", "join", token, "--folder", site)
    lines = [json.dumps({"text": f"def {name}_{i}(x):\n    return x + {i}\n"}) for i in range(8)]
    (site / "data.jsonl").write_text("\n".join(lines))
    written = (site / "client.toml").read_text()
    data = '[data]\nsource = "data.jsonl"\ntext = "text"\n\n'
    (site / "client.toml").write_text(written[: written.index("# A .jsonl")] + data + "[policy]\n")


def rounds_of(operator: Path) -> int:
    rows = json.loads(fedapt("runs", "list", "--folder", operator, "--json"))["runs"]
    return max((row["rounds"] for row in rows), default=0)


@contextmanager
def federation(operator: Path, spec: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A server with two sites that have joined it."""
    folder = operator.parent
    with ExitStack() as stack:
        log = folder / "server.log"
        server = stack.enter_context(running(log, "server", "start", spec, "--folder", operator, "--until-done"))
        until(lambda: "listening" in log.read_text(), 60, folder)
        for name in ("north", "south"):
            join(operator, folder / name, name)
            stack.enter_context(running(folder / f"{name}.log", "client", "start", "--folder", folder / name))
        yield server


@pytest.mark.slow
def test_a_federation_of_two_sites(operator: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(SPEC.format(rounds=2, recipe="fedsvd", evaluates="true"))
    with federation(operator, spec) as server:
        assert server.wait(180) == 0, (tmp_path / "server.log").read_text()
    run = operator / "runs/first"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[2]["nodes"] == 2
    assert rows[2]["federated"]["nodes"] == 2
    assert (run / "report.html").is_file()
    north, central = (
        folder / "adapter_model.safetensors" for folder in (tmp_path / "north/adapters/first", run / "adapter")
    )
    assert north.read_bytes() == central.read_bytes(), "each site got the run's adapter"
    status = json.loads(fedapt("server", "status", "--folder", operator, "--json"))
    assert [row["status"] for row in status["runs"]] == ["finished"]
    assert {row["name"] for row in status["nodes"]} == {"north", "south"}
    tokens = json.loads(fedapt("token", "list", "--folder", operator, "--json"))["tokens"]
    assert {row["state"] for row in tokens} == {"used"}


@pytest.mark.slow
def test_a_killed_server_goes_on_and_a_revoked_node_is_let_go(operator: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(SPEC.format(rounds=1000, recipe="ffa", evaluates="false"))
    log = tmp_path / "server.log"
    with federation(operator, spec) as server:
        until(lambda: rounds_of(operator) >= 2, 180, tmp_path)
        server.send_signal(signal.SIGKILL)
        server.wait()
        before = rounds_of(operator)
        with running(log, "server", "start", "--folder", operator):
            until(lambda: rounds_of(operator) >= before + 2, 180, tmp_path)
            (node, *_) = json.loads(fedapt("node", "list", "--folder", operator, "--json"))["nodes"]
            fedapt("node", "revoke", node["id"], "--folder", operator)
            until(lambda: "was revoked" in (tmp_path / f"{node['name']}.log").read_text(), 60, tmp_path)
            stopped_at = rounds_of(operator)
            time.sleep(3)
            assert rounds_of(operator) <= stopped_at + 1, "two nodes are needed, and one is left"
            fedapt("runs", "stop", "first", "--folder", operator)
            rows = json.loads(fedapt("runs", "show", "first", "--folder", operator, "--json"))["rounds"]
            assert [row["round"] for row in rows] == list(range(len(rows)))
