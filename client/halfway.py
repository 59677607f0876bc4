"""A round that is longer than a machine's uptime: the state between two steps, kept on disk, and gone on from.

Only training without privacy is kept. A private round that was cut off begins anew, and is charged anew: what was drawn
before never left the site, so the charge is more than was spent and never less.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .stopped import StoppedWork

logger = logging.getLogger(__name__)

PARAMETER, LOSSES = "parameter:", "losses"


@dataclass(frozen=True)
class Point:
    """A member after `steps` steps: what it trains, the optimizer's state of each tensor, and its losses (steps,)."""

    steps: int
    values: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]
    losses: Tensor


class Halfway:
    """One file with the last Point of one piece of work, written every `seconds` (0: after each step).

    Where it cannot be written the training goes on: more of it is lost if this machine goes down, and nothing else.

    Formal guarantees: on one machine, training that was cut off anywhere and goes on gives the bytes of training that was
    not.
    """

    def __init__(self, path: Path, seconds: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.seconds, self.clock = path, seconds, clock
        self._about = b""
        self._last = clock()
        self._failing = False
        self._stopped = threading.Event()

    def begin(self, about: bytes) -> None:
        """What is worked on from now on; a Point of anything else is not looked at."""
        self._about, self._last = about, self.clock()

    def stop(self) -> None:
        """The next step that ends is the last: it is kept, and StoppedWork raised."""
        self._stopped.set()

    def found(self, key: bytes) -> Point | None:
        """The Point that was kept of this work and `key`, which of its trainings it is; None where there is none."""
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = file.metadata() or {}
                if facts.get("of") != self._of(key):
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
        except (OSError, SafetensorError):  # none there, or one that the disk has damaged
            return None
        values, states = {}, {}
        for name in json.loads(facts["names"]):
            values[name] = tensors[PARAMETER + name]
            prefix = f"state:{name}:"
            states[name] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        return Point(int(facts["steps"]), values, states, tensors[LOSSES])

    def reached(self, key: bytes, point: Callable[[], Point]) -> None:
        """A step has ended. Raises StoppedWork after `stop`."""
        stopped = self._stopped.is_set()
        if stopped or self.clock() - self._last >= self.seconds:
            self._try_to_keep(key, point())
            self._last = self.clock()
        if stopped:
            raise StoppedWork

    def _try_to_keep(self, key: bytes, point: Point) -> None:
        """A disk that is full is said once, until it is not."""
        try:
            self._keep(key, point)
        except (OSError, SafetensorError) as error:
            if not self._failing:
                logger.warning("%s: the state of a long round cannot be kept (%s); training goes on", self.path, error)
            self._failing = True
            with suppress(OSError):  # what was written of it would fill the disk
                self._new.unlink(missing_ok=True)
        else:
            self._failing = False

    @property
    def _new(self) -> Path:
        return self.path.with_suffix(".new")

    def _keep(self, key: bytes, point: Point) -> None:
        tensors = {PARAMETER + name: value for name, value in point.values.items()} | {LOSSES: point.losses}
        for name, state in point.states.items():
            tensors |= {f"state:{name}:{part}": value for part, value in state.items()}
        facts = {"of": self._of(key), "steps": str(point.steps), "names": json.dumps(list(point.values))}
        new = self._new
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, new, metadata=facts)
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(self.path)

    def _of(self, key: bytes) -> str:
        return hashlib.sha256(self._about + key).hexdigest()


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The tensors that an optimizer keeps of a parameter; SGD without momentum keeps none."""
    return {key: value for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}
