"""What a resident client tells those who look into its folder: one small file, and a lock that says whether it lives."""

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..protocols.errors import OutputError, RunError

logger = logging.getLogger(__name__)

STATUS, LOCK, PAUSE = "status.json", "lock", "paused"

ROUNDS = 10
"""How many of the last rounds are shown."""


class Status:
    """The file, written whole at each change. Safe in several threads.

    Where the disk is full nobody is told, and the training goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATUS
        self._lock = threading.Lock()
        self._facts: dict[str, Any] = {"pid": os.getpid(), "started": _now(), "rounds": []}
        self.connected(False, "just started")

    def connected(self, up: bool, why: str) -> None:
        with self._lock:
            if self._facts.get("connected") != up:
                self._facts |= {"connected": up, "since": _now()}
            self._facts["why"] = why
            self._write()

    def doing(self, what: str) -> None:
        with self._lock:
            self._facts["doing"] = what
            self._write()

    def round(self, **facts: Any) -> None:
        """A round is done: what came of it."""
        with self._lock:
            self._facts["rounds"] = [*self._facts["rounds"], {**facts, "at": _now()}][-ROUNDS:]
            self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        try:
            new.write_text(json.dumps(self._facts, indent=2), encoding="utf-8")
            new.replace(self.path)
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", self.path, error.strerror)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else serves the folder for as long as this lasts. Raises RunError where somebody does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("a") as file:
            if not _locked(file.fileno()):
                raise RunError(
                    f"{folder}: another process serves it already; `fedapt client status` shows what it does"
                )
            yield
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used ({error.strerror or error})") from None


def is_served(folder: Path) -> bool:
    """Whether a process serves the folder now. Raises OutputError."""
    try:
        with (folder / LOCK).open("r") as file:
            return not _locked(file.fileno())
    except FileNotFoundError:
        return False
    except OSError as error:
        raise OutputError(f"{folder / LOCK}: cannot be read ({error.strerror})") from None


def pause(folder: Path) -> None:
    """Nothing new is begun in the folder until `resume`. Raises OutputError."""
    try:
        (folder / PAUSE).touch()
    except OSError as error:
        raise OutputError(f"{folder / PAUSE}: cannot be written ({error.strerror})") from None


def resume(folder: Path) -> bool:
    """Whether it was paused. Raises OutputError."""
    try:
        (folder / PAUSE).unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise OutputError(f"{folder / PAUSE}: cannot be removed ({error.strerror})") from None
    return True


def is_paused(folder: Path) -> bool:
    return (folder / PAUSE).exists()


def read_status(folder: Path) -> dict[str, Any]:
    """What the file says; empty where nobody has served the folder yet. Raises OutputError."""
    try:
        found = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    except OSError as error:
        raise OutputError(f"{folder / STATUS}: cannot be read ({error.strerror})") from None
    return found if isinstance(found, dict) else {}


def _locked(descriptor: int) -> bool:
    """The lock goes with the file that is open, and so with the process, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
