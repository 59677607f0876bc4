"""Servers and nodes in processes of their own (`federation.py`), to be killed."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class Process:
    """Not a child of this process, hence the descriptor."""

    def __init__(self, pid: int) -> None:
        self.pid, self._descriptor = pid, os.pidfd_open(pid)

    def kill(self) -> None:
        if not self.has_ended(0):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        assert self.has_ended(30)

    def has_ended(self, seconds: float) -> bool:
        return bool(select.select([self._descriptor], [], [], seconds)[0])

    def close(self) -> None:
        self.kill()
        os.close(self._descriptor)


class Nursery:
    def __init__(self, to: IO[str], of: IO[str]) -> None:
        self._to, self._of = to, of
        self._processes: list[Process] = []

    def start(self, role: str, **arguments: Any) -> Process:
        print(json.dumps({"role": role, **arguments}), file=self._to, flush=True)
        self._processes.append(Process(int(self._of.readline())))
        return self._processes[-1]

    def warm(self, spec: str) -> None:
        """Have what a private run needs imported once, before its servers are started."""
        print(json.dumps({"role": "warm", "spec": spec}), file=self._to, flush=True)
        self._of.readline()

    def close(self) -> None:
        for process in self._processes:
            process.close()
        self._processes.clear()


@contextmanager
def nursery() -> Iterator[Nursery]:
    command = [sys.executable, str(Path(__file__).with_name("federation.py"))]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        children = Nursery(process.stdin, process.stdout)
        try:
            yield children
        finally:
            children.close()
            process.stdin.close()


def free_port() -> int:
    """One that nobody has at the moment; a server that is started again must find it again."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
