"""The low-bandwidth mode on the real link: exchanges a second, and bytes at the socket, with the log on disk.

    python benchmarks/exchanges.py [--nodes 8] [--exchanges 2000] [--processes 1]

The nodes live in processes of their own, one or more, each node with its own connections, on loopback, without TLS; the
loss costs nothing, so that the link and the log are what is measured. CPU time is of the second half of a run, as the
rate is. Bytes are counted by a proxy, frame by frame of HTTP/2, on a run of its own. The store is SQLite with
synchronous=FULL: no step is sent before it is on disk.

Beside it, in the same run, what gRPC alone makes of it: as many streams, messages of the same sizes, and nothing else.
"""

import argparse
import asyncio
import collections
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

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
from fedapt.server.coordinator import Progress
from fedapt.server.exchanges import ZerothCoordinator
from fedapt.server.link.doors import OpenDoor, named
from fedapt.server.link.grid import LinkGrid
from fedapt.server.link.hub import Hub
from fedapt.server.store import SqliteStore

LAYOUT = AdapterLayout([TensorSpec("score.weight", (2, 30), "other")])
START = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
DIRECTIONS = 16
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
"""As a site has it: no two nodes share a connection."""

Context = grpc.aio.ServicerContext[bytes, bytes]

FRAMES = {0: "DATA", 6: "PING", 8: "WINDOW_UPDATE"}


def spec_of(nodes: int, exchanges: int) -> RunSpec:
    return RunSpec.parse(
        f'[model]\nbase = "m"\ntask = "causal-lm"\n[run]\nrounds = {exchanges}\nevaluate_every = {exchanges}\n'
        f'[recipe]\nname = "onebyte"\nweighting = "uniform"\n[zeroth]\ndirections = {DIRECTIONS}\n'
        f"[participation]\nminimum = {nodes}\ndeadline_seconds = 10"
    )


class Quadratic:
    """A Worker whose loss is a quadratic. Those of one process share a replica, as virtual nodes do: each step is applied
    once a process, as on machines of their own each would apply it at the same time."""

    exchanger: Exchanger | None = None
    one_at_a_time = threading.Lock()

    def __init__(self, name: str) -> None:
        self.node = named(name).node

    def work(self, question: pb.Question, spec: bytes, payload: bytes) -> tuple[pb.Result, bytes]:
        if question.kind == pb.DESCRIBE:
            answer = link.description_to_bytes(Description(LAYOUT, START, {}, "none"))
        elif question.kind == pb.EXCHANGE:
            run = RunSpec.model_validate_json(spec)
            with self.one_at_a_time:
                Quadratic.exchanger = self.exchanger or Exchanger(run.run.name, terms_of(run), START, slopes)
            answer = self.exchange(payload)
        else:
            answer = b""
        return pb.Result(question=question.id, payload=link.blob(answer)), answer

    def exchange(self, body: bytes) -> bytes:
        if self.exchanger is None:
            return Answer(self.node, Exchange.from_bytes(self.node, body).number, "lost").to_bytes()
        with self.one_at_a_time:
            return self.exchanger.reply(self.node, body)


def slopes(weights: Floats, probes: Sequence[Probe]) -> list[Slopes]:
    """Numbers that depend on state and node and cost nothing: it is the link that is measured."""
    return [Slopes(weights[:DIRECTIONS].astype(np.float64) - (probe.node % 7) / 7) for probe in probes]


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
    """A loopback proxy that counts bytes: all of them by direction, and by direction and kind of HTTP/2 frame."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.counts: collections.Counter[str] = collections.Counter()

    async def start(self) -> int:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self.target)
        ways = self._copy(reader, to_writer, "up", 24), self._copy(to_reader, writer, "down", 0)
        await asyncio.gather(*ways, return_exceptions=True)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str, preface: int) -> None:
        """`preface` are the bytes before the first frame."""
        waiting, begun = b"", preface == 0
        while data := await reader.read(65536):
            self.counts[way] += len(data)
            waiting += data
            if not begun and len(waiting) >= preface:
                waiting, begun = waiting[preface:], True
            while begun and len(waiting) >= 9 and len(waiting) >= (size := 9 + int.from_bytes(waiting[:3], "big")):
                self.counts[f"{way} {FRAMES.get(waiting[3], 'other')}"] += size
                waiting = waiting[size:]
            writer.write(data)
            await writer.drain()
        writer.close()


def measure(nodes: int, exchanges: int, processes: int, folder: Path, *, counted: bool) -> dict[str, float]:
    """Of the second half of a run: exchanges a second and milliseconds of CPU an exchange, or, where counted, bytes an
    exchange and node."""
    spec = spec_of(nodes, exchanges)
    store = SqliteStore(folder / "store.sqlite")
    with Hub("127.0.0.1:0", OpenDoor(), credentials=None) as hub:
        counter, port = Counter(hub.port), hub.port
        if counted:
            loop = asyncio.new_event_loop()
            port = loop.run_until_complete(counter.start())
            threading.Thread(target=loop.run_forever, daemon=True).start()
        context = multiprocessing.get_context("spawn")
        names = [f"n{i}" for i in range(nodes)]
        workers = [
            context.Process(target=nodes_process, args=(port, names[i::processes], str(folder)), daemon=True)
            for i in range(processes)
        ]
        for worker in workers:
            worker.start()
        moments: list[float] = []
        half: list[dict[str, float]] = []

        def spent() -> dict[str, float]:
            return {"server": time.process_time(), "nodes": cpu_of(*workers)} | counter.counts

        def progress(_: Progress) -> None:
            moments.append(time.perf_counter())
            if len(moments) == exchanges // 2:
                half.append(spent())

        list(ZerothCoordinator(spec, LinkGrid(hub, spec), store, progress=progress).rounds())
        end = spent()
        for worker in workers:
            worker.terminate()
    steps = np.diff(moments[exchanges // 2 - 1 :])
    passed = {key: (value - half[0].get(key, 0)) / len(steps) for key, value in end.items()}
    if counted:
        return {key: passed[key] / nodes for key in sorted(counter.counts)}
    return {
        "per_second": 1 / float(np.mean(steps)),
        "median_ms": 1000 * statistics.median(steps.tolist()),
        "server_cpu_ms": 1000 * passed["server"],
        "nodes_cpu_ms": 1000 * passed["nodes"],
    }


DOWN, UP = bytes(179), bytes(20)
"""A message of an exchange with 8 nodes, each way."""


def bare_nodes(port: int, nodes: int) -> None:
    async def node() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", OPTIONS) as channel:
            stream: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream("/bare/Open")()
            await stream.write(UP)
            while isinstance(await stream.read(), bytes):
                await stream.write(UP)

    async def stay() -> None:
        await asyncio.gather(*(node() for _ in range(nodes)))

    asyncio.run(stay())


async def bare(nodes: int, exchanges: int) -> dict[str, float]:
    """As `measure`, of messages that nobody reads or makes: write to all, read from all, again."""
    streams: asyncio.Queue[Context] = asyncio.Queue()
    over = asyncio.Event()

    async def opened(_: object, context: Context) -> None:
        await context.read()
        streams.put_nowait(context)
        await over.wait()

    async def exchanged(context: Context) -> None:
        await context.write(DOWN)
        await context.read()

    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Open": grpc.stream_stream_rpc_method_handler(opened)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    worker = multiprocessing.get_context("spawn").Process(target=bare_nodes, args=(port, nodes), daemon=True)
    worker.start()
    all_streams = [await streams.get() for _ in range(nodes)]
    began, server_began, nodes_began = time.perf_counter(), time.process_time(), cpu_of(worker)
    for _ in range(exchanges):
        await asyncio.gather(*map(exchanged, all_streams))
    figures = {
        "per_second": exchanges / (time.perf_counter() - began),
        "server_cpu_ms": 1000 * (time.process_time() - server_began) / exchanges,
        "nodes_cpu_ms": 1000 * (cpu_of(worker) - nodes_began) / exchanges,
    }
    over.set()
    worker.terminate()
    await server.stop(0)
    return figures


def cpu_of(*processes: multiprocessing.process.BaseProcess) -> float:
    """Seconds that these processes have computed."""
    times = [psutil.Process(process.pid).cpu_times() for process in processes]
    return float(sum(cpu.user + cpu.system for cpu in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--exchanges", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    for counted in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            sizes = options.nodes, options.exchanges, options.processes
            figures = measure(*sizes, Path(folder), counted=counted)
        show({"counted": counted}, figures)
    show({"bare": True}, asyncio.run(bare(options.nodes, options.exchanges)))


def show(what: dict[str, bool], figures: dict[str, float]) -> None:
    print(json.dumps(what | {name: round(value, 2) for name, value in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
