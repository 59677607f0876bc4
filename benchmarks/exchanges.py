"""The low-bandwidth mode on the real link: exchanges a second, and bytes at the socket, with the log on disk.

    python benchmarks/exchanges.py [--nodes 8] [--exchanges 2000] [--folder DIR]

A server and the nodes are processes of their own, on loopback, without TLS; the loss costs nothing, so that the link and the log are what is measured. Bytes are counted by a proxy, on a run of its own. The store is SQLite with
synchronous=FULL: no step is sent before it is on disk.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np

from fedapt.client.duties import Duties
from fedapt.client.exchanger import Exchanger, Probe, Slopes
from fedapt.client.kept import Kept
from fedapt.client.link import Backoff, Link
from fedapt.kernels.directions import Floats
from fedapt.protocols import link
from fedapt.protocols import link_pb2 as pb
from fedapt.protocols.exchange import Answer, Exchange, terms_of
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Description
from fedapt.server.exchanges import ZerothCoordinator
from fedapt.server.link.doors import OpenDoor, named
from fedapt.server.link.grid import LinkGrid
from fedapt.server.link.hub import Hub
from fedapt.server.store import SqliteStore

LAYOUT = AdapterLayout([TensorSpec("score.weight", (2, 30), "other")])
START = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
DIRECTIONS = 16
OPTIONS = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4 << 20)]


def spec_of(nodes: int, exchanges: int) -> RunSpec:
    return RunSpec.parse(
        f'[model]\nbase = "m"\ntask = "causal-lm"\n[run]\nrounds = {exchanges}\nevaluate_every = {exchanges}\n'
        f'[recipe]\nname = "onebyte"\nweighting = "uniform"\n[zeroth]\ndirections = {DIRECTIONS}\n'
        f"[participation]\nminimum = {nodes}\ndeadline_seconds = 10"
    )


class Quadratic:
    """A Worker whose loss is a quadratic."""

    def __init__(self, name: str) -> None:
        self.node = named(name).node
        self.target = np.full(LAYOUT.size, (self.node % 7) / 7, np.float32)
        self.exchanger: Exchanger | None = None

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        if question.kind == pb.DESCRIBE:
            answer = link.description_to_bytes(Description(LAYOUT, START, {}, "none"))
        elif question.kind == pb.EXCHANGE:
            run = RunSpec.model_validate_json(spec)
            self.exchanger = self.exchanger or Exchanger(run.run.name, terms_of(run), START, self.slopes)
            answer = self.exchange(payload)
        else:
            answer = b""
        return pb.Result(question=question.id, payload=link.blob(answer)), answer

    def exchange(self, body: bytes) -> bytes:
        if self.exchanger is None:
            return Answer(self.node, Exchange.from_bytes(self.node, body).number, "lost").to_bytes()
        return self.exchanger.reply(self.node, body)

    def slopes(self, weights: Floats, probes: Sequence[Probe]) -> list[Slopes]:
        """Numbers that depend on the state and cost nothing: it is the link that is measured."""
        return [Slopes((weights - self.target)[:DIRECTIONS].astype(np.float64))] * len(probes)


def nodes_process(port: int, names: Sequence[str], folder: str) -> None:
    async def stay() -> None:
        links = []
        for name in names:

            def channel() -> grpc.aio.Channel:
                return grpc.aio.insecure_channel(f"127.0.0.1:{port}", OPTIONS)

            duties = Duties(Quadratic(name), Kept(Path(folder, name)))
            links.append(Link(channel, duties, backoff=Backoff(0.05, 1.0), metadata=[(link.NAME_KEY, name)]).run())
        await asyncio.gather(*links)

    asyncio.run(stay())


class Counter:
    """A loopback proxy that counts what nodes send."""

    def __init__(self, port: int) -> None:
        self.target, self.up, self.down = port, 0, 0

    async def start(self) -> int:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self._copy(reader, to_writer, "up"), self._copy(to_reader, writer, "down"))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        while data := await reader.read(65536):
            setattr(self, way, getattr(self, way) + len(data))
            writer.write(data)
            await writer.drain()
        writer.close()


def measure(nodes: int, exchanges: int, folder: Path, *, counted: bool) -> dict[str, float]:
    """Exchanges a second over the second half of a run, and, where counted, bytes an exchange and node over all of it."""
    spec = spec_of(nodes, exchanges)
    store = SqliteStore(folder / "store.sqlite")
    with Hub("127.0.0.1:0", OpenDoor(), credentials=None) as hub:
        counter, port = Counter(hub.port), hub.port
        if counted:
            loop = asyncio.new_event_loop()
            port = loop.run_until_complete(counter.start())
            __import__("threading").Thread(target=loop.run_forever, daemon=True).start()
        context = multiprocessing.get_context("spawn")
        names = [f"n{i}" for i in range(nodes)]
        workers = [
            context.Process(target=nodes_process, args=(port, names[i::2], str(folder)), daemon=True) for i in range(2)
        ]
        for worker in workers:
            worker.start()
        moments: list[float] = []
        before = (0, 0)
        grid = LinkGrid(hub, spec)
        coordinator = ZerothCoordinator(spec, grid, store, progress=lambda p: moments.append(time.perf_counter()))
        before = counter.up, counter.down
        list(coordinator.rounds())
        for worker in workers:
            worker.terminate()
    half = len(moments) // 2
    steps = np.diff(moments[half:])
    figures = {"per_second": 1 / float(np.mean(steps)), "median_ms": 1000 * statistics.median(steps.tolist())}
    if counted:
        figures["up"] = (counter.up - before[0]) / (nodes * exchanges)
        figures["down"] = (counter.down - before[1]) / (nodes * exchanges)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--exchanges", type=int, default=2000)
    options = parser.parse_args()
    for counted in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(options.nodes, options.exchanges, Path(folder), counted=counted)
        print(json.dumps({"counted": counted} | {name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
