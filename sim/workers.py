"""Worker processes: each trains portions of a round, over one copy of the base and the data.

Any worker may take any portion, the next one as soon as it is done, and answers come in the order of the portions. What
outlives a round (residuals, replicas, accounts in memory) stays in this process and travels with its node's portion:
portions need not follow the nodes that they were drawn from, and a worker that dies takes nothing with it.
"""

import mmap
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Protocol

import numpy as np
import torch

from ..client.client import Client, Kept
from ..protocols.errors import FedaptError, RunError
from ..protocols.update import Assignment, Update
from .forking import prepare
from .grid import VirtualNodes
from .image import Bytes, Image, image
from .memory import keep_freed_memory


@dataclass(frozen=True)
class Portion:
    """Assignments that one worker trains in one call, and what is kept of their nodes."""

    assignments: Sequence[Assignment]
    kept: Kept

    def train(self, client: Client) -> tuple[list[Update], Kept]:
        """Updates in the order of the assignments, and what is kept now; `client` itself keeps nothing."""
        client.keep(self.assignments, self.kept)
        try:
            return client.train(self.assignments), client.kept(self.assignments)
        finally:
            client.keep(self.assignments, [{} for _ in self.kept])


class Pool(Protocol):
    """Workers, wherever they are."""

    def train(self, work: Sequence[Portion]) -> Iterator[tuple[list[Update], Kept]]:
        """What `Portion.train` gives, in the order of `work`. Raises RunError where a worker dies."""


class WorkerGrid(VirtualNodes):
    """The nodes of a client, trained by workers; `client` keeps what outlives a round, and scores in this process.

    Formal guarantees: the bytes of every update are those of `LocalGrid`, whatever the number of workers, because a
    round is cut alike; where torch's matmuls depend on the number of threads, this number has to be the same too.
    """

    def __init__(self, client: Client, pool: Pool) -> None:
        super().__init__(client)
        self.pool = pool

    def replies(self, timeout: float) -> Iterator[Update]:
        """All answers, in the order of sending. Virtual clients are on this machine, so there is no deadline."""
        work = [Portion(own, self.client.kept(own)) for own in self.parts()]
        for portion, (updates, kept) in zip(work, self.pool.train(work), strict=True):
            self.client.keep(portion.assignments, kept)
            yield from updates


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Processes:
    """`count` processes on this machine, `threads` of torch each. Close them: `with processes(client, 2) as pool`."""

    def __init__(self, client: Client, count: int, threads: int) -> None:
        descriptor, blocks = _shared_file(), []

        def allocate(size: int) -> Bytes:
            os.ftruncate(descriptor, size)
            blocks.append(np.frombuffer(mmap.mmap(descriptor, size), np.uint8))
            return blocks[0]

        try:
            prepare()
            found, block = image(client, allocate)
            self._workers = [_started(number, threads) for number in range(count)]
            for worker in self._workers:
                send_handle(worker.pipe, descriptor, worker.process.pid)
                worker.pipe.send((found, len(block)))
        finally:
            os.close(descriptor)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def train(self, work: Sequence[Portion]) -> Iterator[tuple[list[Update], Kept]]:
        """What `Portion.train` gives, in the order of `work`. Raises RunError where a worker dies."""
        waiting, next_wanted = iter(enumerate(work)), 0
        busy: dict[Connection, int] = {}
        done: dict[int, tuple[list[Update], Kept] | Exception] = {}
        idle = list(self._workers)
        by_pipe = {worker.pipe: worker for worker in self._workers}
        try:
            while next_wanted < len(work):
                while idle and (task := next(waiting, None)) is not None:
                    worker = idle.pop(0)
                    _ask(worker, task[1])
                    busy[worker.pipe] = task[0]
                for pipe in wait(list(busy)):
                    assert isinstance(pipe, Connection)
                    done[busy.pop(pipe)] = _answer(by_pipe[pipe])
                    idle.append(by_pipe[pipe])
                while next_wanted in done:
                    result = done.pop(next_wanted)
                    if isinstance(result, Exception):
                        raise result
                    next_wanted += 1
                    yield result
        except GeneratorExit:
            # Who has enough stops listening: no answer may be left for the next round to take as its own.
            for pipe in busy:
                _answer(by_pipe[pipe])
            raise

    def close(self) -> None:
        """End the workers, whatever they do: what they are to leave behind is on disk, or has been answered."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()


@contextmanager
def processes(client: Client, count: int) -> Iterator[Processes]:
    """`count` workers that share this machine's cores; at the end, however it comes, none is left."""
    pool = Processes(client, count, max(1, torch.get_num_threads() // count))
    try:
        yield pool
    finally:
        pool.close()


def _shared_file() -> int:
    """A file without a name: it is gone with the last process that has it open, also where that one is killed."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedapt")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _started(number: int, threads: int) -> _Worker:
    context = get_context("forkserver")
    own, other = context.Pipe()
    process = context.Process(target=_work, args=(other, threads), name=f"worker {number + 1}", daemon=True)
    process.start()
    other.close()
    return _Worker(process, own)


def _ask(worker: _Worker, portion: Portion) -> None:
    try:
        worker.pipe.send(portion)
    except OSError:
        raise _death(worker) from None


def _answer(worker: _Worker) -> tuple[list[Update], Kept] | Exception:
    try:
        answer: tuple[list[Update], Kept] | Exception = worker.pipe.recv()
    except (EOFError, OSError):
        raise _death(worker) from None
    return answer


def _death(worker: _Worker) -> RunError:
    worker.process.join(timeout=5)
    code = worker.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    return RunError(
        f"{worker.process.name} (process {worker.process.pid}) {how}. If memory ran out, take fewer --workers. "
        "The round stays open: start the run again to go on with it."
    )


def _work(pipe: Connection, threads: int) -> None:
    """The life of a worker: it ends when the coordinating process closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that coordinates
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        descriptor = recv_handle(pipe)
        found, size = pipe.recv()
        client = _client(found, descriptor, size)
        while True:
            portion: Portion = pipe.recv()
            pipe.send_bytes(_outcome(portion, client))
    except (EOFError, OSError):
        return


def _client(found: Image, descriptor: int, size: int) -> Client:
    block = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
    os.close(descriptor)
    return found.client(block)


def _outcome(portion: Portion, client: Client) -> bytes:
    """The pickled answer to a portion: an error that a person can act on as it is, any other with its traceback."""
    try:
        return pickle.dumps(portion.train(client))
    except FedaptError as error:
        return pickle.dumps(error)
    except Exception:  # noqa: BLE001  (a mistake of ours: it is raised again by the process that asked)
        return pickle.dumps(RuntimeError(f"a worker failed:\n{traceback.format_exc()}"))
