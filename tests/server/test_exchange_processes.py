"""Eight processes that have nothing in common but the bytes of an exchange: they must end with one state.

They differ in threads, one computes by NumPy alone, one is killed and started again, one joins late, one leaves.
"""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedapt.protocols.exchange import Answer, Exchange
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Description
from fedapt.server.exchanges import ZerothCoordinator
from fedapt.server.store import SqliteStore

from .exchanging import LAYOUT, START, spec_of

NODE = """
import hashlib, resource, struct, sys
import numpy as np
from fedapt.kernels import lattice, signs
from fedapt.client.exchanger import Exchanger, Slopes
from fedapt.protocols.exchange import terms_of
from fedapt.protocols.spec import RunSpec

node, threads = int(sys.argv[1]), int(sys.argv[2])
spec = RunSpec.model_validate_json(sys.argv[3])
if threads == 0:
    lattice.accumulate = signs.accumulate_reference
else:
    lattice.accumulate = lambda *arguments: signs.accumulate(*arguments, threads=threads)

def measure(weights, probes):  # a trivial loss: slopes that depend on weights and node, and on rounding too
    return [Slopes(weights[:4].astype(np.float64) * (1 + node) + np.float64(probe.number % 7) / 8) for probe in probes]

exchanger = Exchanger(spec.run.name, terms_of(spec), np.linspace(-1, 1, 60, dtype=np.float32), measure)
stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
while head := stdin.read(4):
    body = stdin.read(struct.unpack("<I", head)[0])
    if not body:  # asked for its state
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = exchanger.replica.proof + struct.pack("<QQ", exchanger.replica.number, memory)
    else:
        answer = exchanger.reply(node, body)
    stdout.write(struct.pack("<I", len(answer)) + answer)
    stdout.flush()
"""


@dataclass
class Process:
    """One node at the other end of a pipe. `threads` = 0 is the NumPy path."""

    spec: RunSpec
    node: int
    threads: int
    process: "subprocess.Popen[bytes]" = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-P", "-c", NODE, str(self.node), str(self.threads), self.spec.to_json()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ})

    def ask(self, body: bytes) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(struct.pack("<I", len(body)) + body)
        self.process.stdin.flush()
        (length,) = struct.unpack("<I", self.process.stdout.read(4))
        return self.process.stdout.read(length)

    def state(self) -> tuple[bytes, int, int]:
        """Hash of the state, number of steps, most memory so far in KiB."""
        answer = self.ask(b"")
        return answer[:32], *struct.unpack("<QQ", answer[32:])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@dataclass
class Processes:
    """A grid of processes; `events` are what happens to them before an exchange of a number is sent."""

    spec: RunSpec
    there: dict[int, Process]
    exchanges: int
    late: dict[int, Process] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)

    def nodes(self) -> Sequence[int]:
        return sorted(self.there)

    def describe(self) -> Description:
        return Description(LAYOUT, START, {}, "digest")

    def exchange(self, requests: Sequence[Exchange], timeout: float) -> Iterator[Answer]:
        number = requests[0].number
        if number == self.exchanges // 2:
            self.there[2].kill()
            self.there[2].start()
        if number == self.exchanges // 3:
            self.there |= self.late
        if number in (self.exchanges // 5, self.exchanges - 1):
            self.memory.append(self.there[0].state()[2])
        leaving = self.there.pop(3) if number == 2 * self.exchanges // 3 else None
        if leaving is not None:
            leaving.kill()
        for request in requests:
            if request.node in self.there:
                body = self.there[request.node].ask(request.to_bytes())
                yield Answer.from_bytes(request.node, body, 4)


@pytest.mark.parametrize("exchanges", [90, pytest.param(2000, marks=pytest.mark.slow)])
def test_eight_processes_hold_one_state(exchanges: int, tmp_path: Path) -> None:
    spec = spec_of(f"run.rounds={exchanges}", f"run.evaluate_every={exchanges}")
    processes = {node: Process(spec, node, threads) for node, threads in enumerate([1, 2, 3, 1, 0, 4, 1, 2])}
    grid = Processes(spec, {n: p for n, p in processes.items() if n != 7}, exchanges, {7: processes[7]})
    store = SqliteStore(tmp_path / "run.sqlite")
    try:
        coordinator = ZerothCoordinator(spec, grid, store)
        list(coordinator.rounds())
        last = coordinator.log.rows("run", after=exchanges - 1)
        requests = coordinator._requests(coordinator._asked(exchanges + 1))
        for request in requests:
            grid.there[request.node].ask(request.to_bytes())
        states = {process.state()[:2] for process in grid.there.values()}
        assert states == {(coordinator.replica.proof, exchanges)}
        assert len(grid.there) == 7
        assert next(last).number == exchanges
        assert not np.array_equal(coordinator.replica.weights, START)
        assert grid.memory[1] <= grid.memory[0] + 2048, "KiB: a node does not grow with the run"
    finally:
        for node, process in processes.items():
            if node != 3:
                process.kill()
        store.close()
