"""What the link costs: `.venv/bin/python benchmarks/link.py [--stock]`, from the repository root; two to four minutes.

Server and nodes are processes of their own on this machine; nobody trains. Links are as they are in use: TLS 1.3, with a
certificate for each node, which the server looks up in its store. `--stock` measures rounds of the same size over
Flower's own SuperLink and two SuperNodes, without TLS, which takes some minutes more.
"""

import argparse
import asyncio
import json
import os
import re
import select
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from fedapt.client.dialling import channel_of
from fedapt.client.duties import Duties
from fedapt.client.enrolment import SiteKeys
from fedapt.client.kept import Kept
from fedapt.client.link import Backoff, Link
from fedapt.client.site import Server as Address
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.identity import SUITES
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Update
from fedapt.server.authority import Authority, server_credentials
from fedapt.server.link.doors import CertifiedDoor
from fedapt.server.link.grid import LinkGrid
from fedapt.server.link.hub import Hub
from fedapt.server.registry import Registry
from fedapt.server.store import SqliteStore

TINY, LARGE = 100, 20_000_000
CROWD, PER_PROCESS = 300, 50
HALF_OPEN, CLAIMS = 500, 100


class Echo:
    """A worker that sends back what it got."""

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        asked = link.assignment(question, 0, payload)
        update = Update(asked.run, asked.round, asked.attempt, asked.node, asked.version, "delta", 1.0, payload)
        return link.result(question, update), payload

    def exchange(self, body: bytes) -> bytes:
        return body


@contextmanager
def enrolled(nodes: int) -> Iterator[Path]:
    """The folder of a federation that so many nodes have joined: its authority and store, and the keys of each node."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = Authority.create(folder / "certificates", ["127.0.0.1"])
        store = SqliteStore(folder / "store.sqlite")
        registry = Registry(store.engine)
        for node in range(nodes):
            token = authority.issue_token(f"site-{node}", "127.0.0.1:1", timedelta(hours=1))
            registry.add_token(token)
            site = SiteKeys.make(folder / str(node))
            chain, _ = registry.redeem(token.peer, site.request(), authority.certify)
            site.accept(chain, token.roots_pem)
        store.close()
        yield folder


def attend(port: int, folder: Path, first: int, count: int) -> None:
    """`count` nodes in this process."""

    async def run() -> None:
        links = []
        for node in range(first, first + count):
            keys = folder / str(node)
            duties = Duties(Echo(), Kept(keys / "results"))
            channel = channel_of(Address(address=f"127.0.0.1:{port}", keys=keys))
            links.append(Link(channel, duties, backoff=Backoff(most=10.0)))
        await asyncio.gather(*(link.run() for link in links))

    asyncio.run(run())


def serve(port: int, folder: Path) -> None:
    """Say how many nodes are here whenever that changes; do rounds as stdin asks: nodes, rounds, bytes."""
    authority = Authority.load(folder / "certificates")
    door = CertifiedDoor(authority, Registry(SqliteStore(folder / "store.sqlite").engine))
    with Hub(f"127.0.0.1:{port}", door, credentials=server_credentials(authority)) as hub:
        said = -1
        while True:
            if len(hub.nodes()) != said:
                said = len(hub.nodes())
                say(here=said)
            if select.select([sys.stdin], [], [], 0.02)[0]:
                line = sys.stdin.readline()
                if not line:
                    return
                say(seconds=rounds(hub, *json.loads(line)))


def rounds(hub: Hub, nodes: int, count: int, size: int) -> list[float]:
    """Seconds of each round, from sending to the last answer; no two payloads are alike."""
    text = f'[run]\nname = "bench"\n[model]\nbase = "m"\ntask = "causal-lm"\n[participation]\nminimum = {nodes}'
    grid = LinkGrid(hub, RunSpec.parse(text))
    here, seconds = grid.nodes()[:nodes], []
    for round_ in range(1, count + 1):
        payload = os.urandom(size)
        version = os.urandom(4).hex()
        begin = time.perf_counter()
        grid.send([Assignment("bench", round_, 1, node, version, payload) for node in here])
        replies = list(grid.replies(120))
        seconds.append(time.perf_counter() - begin)
        assert len(replies) == nodes
        assert all(isinstance(reply, Update) and reply.payload == payload for reply in replies), replies
    return seconds


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


class Server:
    def __init__(self, port: int, folder: Path) -> None:
        self.process = spawn("serve", port, folder)

    def hear(self, key: str) -> Any:
        assert self.process.stdout is not None
        while True:
            heard = json.loads(self.process.stdout.readline())
            if key in heard:
                return heard[key]

    def until(self, nodes: int) -> None:
        while self.hear("here") != nodes:
            pass

    def rounds(self, nodes: int, count: int, size: int) -> list[float]:
        assert self.process.stdin is not None
        print(json.dumps([nodes, count, size]), file=self.process.stdin, flush=True)
        found: list[float] = self.hear("seconds")
        return found


def spawn(*arguments: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-P", __file__, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRPC_SSL_CIPHER_SUITES": SUITES}  # TLS 1.3 alone
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@contextmanager
def ended(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    with process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def federation(nodes: int, others: int = 0) -> Iterator[tuple[Server, int, Path]]:
    """A server and its nodes, each in a process. So many others have joined, and are not here."""
    with ExitStack() as stack:
        port, folder = free_port(), stack.enter_context(enrolled(nodes + others))
        server = Server(port, folder)
        stack.enter_context(ended(server.process))
        server.until(0)
        for node in range(nodes):
            stack.enter_context(ended(spawn("attend", port, folder, node, 1)))
        server.until(nodes)
        yield server, port, folder


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def row(what: str, measured: str, asked: str) -> None:
    print(f"| {what} | {measured} | {asked} |", flush=True)


def measure_rounds() -> None:
    for nodes, asked in ((2, ("≤ 25 ms", "≤ 1.0 s")), (8, ("linear", "linear"))):
        with federation(nodes) as (server, _, _):
            server.rounds(nodes, 5, TINY)
            tiny = [1000 * s for s in server.rounds(nodes, 100, TINY)]
            server.rounds(nodes, 1, LARGE)
            large = server.rounds(nodes, 5, LARGE)
        row(
            f"round of 100 bytes, {nodes} nodes",
            f"median {statistics.median(tiny):.1f} ms (p99 {percentile(tiny, 0.99):.1f}), of 100",
            asked[0],
        )
        low, high = min(large), max(large)
        row(
            f"round of 20 MB down and up, {nodes} nodes",
            f"median {statistics.median(large):.2f} s ({low:.2f} to {high:.2f}), of 5",
            asked[1],
        )


class Counter:
    """A TCP proxy in a thread that counts what passes."""

    def __init__(self, to: int) -> None:
        self.to, self.up, self.down = to, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            node, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.to))
            for of, to, up in ((node, server, True), (server, node, False)):
                Thread(target=self._pump, args=(of, to, up), daemon=True).start()

    def _pump(self, of: socket.socket, to: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while data := of.recv(1 << 16):
                self.up, self.down = self.up + up * len(data), self.down + (not up) * len(data)
                to.sendall(data)


def measure_wire() -> None:
    port = free_port()
    counter = Counter(port)
    with ExitStack() as stack:
        folder = stack.enter_context(enrolled(1))
        server = Server(port, folder)
        stack.enter_context(ended(server.process))
        server.until(0)
        stack.enter_context(ended(spawn("attend", counter.port, folder, 0, 1)))
        server.until(1)
        server.rounds(1, 1, TINY)
        for size in (TINY, 1_000_000, LARGE):
            counter.up = counter.down = 0
            server.rounds(1, 1, size)
            time.sleep(0.1)  # the acknowledgement of the result
            most = int(1.01 * size + 2000)
            row(
                f"bytes at the socket for a payload of {size:,}",
                f"{counter.down:,} down, {counter.up:,} up",
                f"≤ {most:,}",
            )


def measure_crowd() -> None:
    port = free_port()
    with ExitStack() as stack:
        folder = stack.enter_context(enrolled(CROWD))
        server = Server(port, folder)
        stack.enter_context(ended(server.process))
        server.until(0)
        before = memory(server)
        for first in range(0, CROWD, PER_PROCESS):
            stack.enter_context(ended(spawn("attend", port, folder, first, PER_PROCESS)))
        server.until(CROWD)
        watched, begin, wall = psutil.Process(server.process.pid), None, 20.0
        time.sleep(2)
        begin = watched.cpu_times()
        time.sleep(wall)
        end = watched.cpu_times()
        share = (end.user + end.system - begin.user - begin.system) / wall
        after = memory(server)
        row(
            f"{CROWD} idle nodes: the server's memory (PSS)",
            f"{after:.0f} MB, {(after - before) / CROWD:.2f} MB a node beyond the idle server's {before:.0f} MB",
            "≤ 600 MB in all, ≤ 0.5 MB a node",
        )
        row(f"{CROWD} idle nodes: the server's CPU time", f"{100 * share:.1f} % of a core", "≤ 10 %")
        back = []
        for _ in range(3):
            server.process.kill()
            server.process.wait()
            time.sleep(2)
            begin = time.monotonic()
            server = Server(port, folder)
            stack.enter_context(ended(server.process))
            server.until(CROWD)
            back.append(time.monotonic() - begin)
        row(
            f"a server is killed and starts 2 s later: all {CROWD} nodes are back, its own start included",
            f"{', '.join(f'{seconds:.1f}' for seconds in back)} s",
            "≤ 15 s",
        )


def memory(server: Server) -> float:
    """MB of the server: its own pages, and its share of those that it has in common with others."""
    return float(psutil.Process(server.process.pid).memory_full_info().pss) / 1e6


def literal(name: str, value: str) -> bytes:
    """A header in HPACK, neither compressed nor remembered."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def claim() -> bytes:
    """An HTTP/2 stream whose one message says that it has 1 GiB, and then says no more."""
    path = f"/{link.SERVICE}/{link.OPEN}"
    headers = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("te", "trailers")]
    headers += [("content-type", "application/grpc")]
    block = b"".join(literal(*header) for header in headers)
    message = b"\0" + (1 << 30).to_bytes(4) + bytes(1000)
    return PREFACE + frame(4, 0, 0, b"") + frame(1, 4, 1, block) + frame(0, 0, 1, message)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CLIENT_HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(13)
"""How the first message of a TLS handshake begins, which has 512 bytes."""


def claiming(port: int, keys: Path) -> socket.socket:
    """A connection of a node that has joined, and that claims."""
    context = ssl.create_default_context(cafile=str(keys / "ca.pem"))
    context.load_cert_chain(keys / "certificate.pem", keys / "key.pem")
    context.set_alpn_protocols(["h2"])
    connection = context.wrap_socket(socket.create_connection(("127.0.0.1", port), 20), server_hostname="127.0.0.1")
    connection.sendall(claim())
    return connection


def besiege(port: int, folder: Path, first: int) -> None:
    """Keep half-open connections, a fifth of them nodes that claim 1 GiB, for ever; closed ones are replaced."""
    held: dict[int, socket.socket] = {}
    say(here=0)
    while True:
        for number in range(HALF_OPEN):
            if number in held and not select.select([held[number]], [], [], 0)[0]:
                continue
            with suppress(OSError):
                if number in held and held[number].recv(1 << 16):
                    continue
                held.pop(number, socket.socket()).close()
                if number < CLAIMS:
                    held[number] = claiming(port, folder / str(first + number))
                else:
                    held[number] = socket.create_connection(("127.0.0.1", port))
                    held[number].sendall(CLIENT_HELLO[: number % 24])
        time.sleep(0.2)


def measure_siege() -> None:
    with federation(2, others=CLAIMS) as (server, port, folder):
        server.rounds(2, 20, TINY)
        quiet = [1000 * s for s in server.rounds(2, 500, TINY)]
        before = memory(server)
        with ended(spawn("besiege", port, folder, 2)):
            time.sleep(3)
            loud = [1000 * s for s in server.rounds(2, 500, TINY)]
            growth = memory(server) - before
    row(
        f"round of 100 bytes beside {HALF_OPEN} half-open connections, a fifth of them claims of 1 GiB",
        f"p99 {percentile(loud, 0.99):.1f} ms (median {statistics.median(loud):.1f}), without them "
        f"{percentile(quiet, 0.99):.1f} ({statistics.median(quiet):.1f}), of 500; the server grows by {growth:.0f} MB",
        "p99 < 2×, < 64 MiB",
    )


PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "stock"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41.0"]
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "stock.server:app"
clientapp = "stock.client:app"
[tool.flwr.app.config]
out = ""
"""
STOCK_SERVER = """
import json, os, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    seconds = {}
    for size, count in ((100, 5), (20_000_000, 3)):
        for _ in range(count):
            record = RecordDict({"arrays": ArrayRecord({"flat": Array(np.frombuffer(os.urandom(size), np.uint8))})})
            begin = time.perf_counter()
            messages = [Message(record, dst_node_id=node, message_type="train") for node in nodes]
            replies = list(grid.send_and_receive(messages, timeout=300))
            assert len(replies) == 2 and not any(reply.has_error() for reply in replies), replies
            seconds.setdefault(size, []).append(time.perf_counter() - begin)
    with open(context.run_config["out"], "w") as file:
        json.dump(list(seconds.values()), file)
"""
STOCK_CLIENT = """
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""


def measure_stock() -> None:
    """The same rounds over Flower's own transport: a stub app on a SuperLink and two SuperNodes."""
    folder = Path(tempfile.mkdtemp())
    (folder / "app" / "stock").mkdir(parents=True)
    (folder / "app" / "pyproject.toml").write_text(PROJECT)
    for name, text in (("__init__", ""), ("server", STOCK_SERVER), ("client", STOCK_CLIENT)):
        (folder / "app" / "stock" / f"{name}.py").write_text(text)
    port = free_port()
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    out, programs = folder / "seconds.json", Path(sys.executable).parent
    environment = os.environ | {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }

    def start(program: str, *arguments: str) -> "subprocess.Popen[str]":
        with (folder / f"{program}.log").open("a") as log:
            return subprocess.Popen(
                [str(programs / program), *arguments],
                stdout=log,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )

    address = f"127.0.0.1:{port}"
    started = [
        start("flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(port))
    ]
    try:
        time.sleep(10)
        for _ in range(2):
            started.append(start("flower-supernode", "--insecure", "--superlink", address, "--port", str(free_port())))
        time.sleep(10)
        begin = time.monotonic()
        subprocess.run(
            [str(programs / "flwr"), "run", str(folder / "app"), "bench", "--run-config", f'out="{out}"'],
            env=environment,
            check=True,
            capture_output=True,
        )
        while not out.exists() or not out.read_text():
            assert time.monotonic() - begin < 500, f"see the logs in {folder}"
            time.sleep(0.5)
        tiny, large = json.loads(out.read_text())
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
    for what, seconds in (("100 bytes", tiny), ("20 MB down and up", large)):
        row(
            f"stock Flower, round of {what}, 2 nodes",
            f"median {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), of {len(seconds)}",
            "",
        )


def main() -> None:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        role, port, folder, *numbers = sys.argv[1:]
        roles: dict[str, Callable[..., None]] = {"serve": serve, "attend": attend, "besiege": besiege}
        roles[role](int(port), Path(folder), *map(int, numbers))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stock", action="store_true", help="measure Flower's own transport as well")
    parser.add_argument("--only", default="", help="a pattern: rounds, wire, crowd, siege, stock")
    chosen = parser.parse_args()
    parts = {"rounds": measure_rounds, "wire": measure_wire, "crowd": measure_crowd, "siege": measure_siege}
    if chosen.stock or chosen.only == "stock":
        parts["stock"] = measure_stock
    print("| what | measured | asked |\n|---|---|---|")
    for name, measure in parts.items():
        if re.search(chosen.only, name):
            measure()


if __name__ == "__main__":
    main()
