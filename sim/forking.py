"""The process that workers are forked from. It is started before anything heavy is imported here, to import beside us."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, get_context


def prepare() -> None:
    """Start importing what a worker needs, beside whatever this process does next; once is enough.

    Workers are forked from a process that has imported torch and done nothing else: it costs seconds once and not once
    a worker, and no thread or lock of this process is copied, which is what makes a plain fork unsafe.
    """
    get_context("forkserver").set_forkserver_preload(["fedapt.sim.workers"])
    with _without_interrupts():
        forkserver.ensure_running()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that come of one started in here ignore Ctrl-C, which is for the one that coordinates."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
