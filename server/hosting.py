"""Runs side by side over one link: each has a thread, goes on by itself after a crash, and ends when it is told to."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy.exc import OperationalError

from ..protocols.errors import FedaptError, RunError
from ..protocols.legality import recipe_of
from ..protocols.spec import RunSpec
from .coordinator import Coordinator, Evaluate, require_same
from .exchanges import ZerothCoordinator
from .link.grid import LinkGrid
from .link.hub import OWN_FAULT, Hub
from .link.stopped import StoppedError
from .private import require_population
from .store import Row, Status, Store

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""Before a round that too few nodes have answered is asked again."""

FAREWELL_SECONDS = 60.0
"""How long a run that has finished waits until the nodes that are here have its adapter."""

LOOK_SECONDS = 0.5
"""How soon a run that was stopped or resumed from elsewhere is noticed."""


@dataclass(frozen=True)
class Hooks:
    """What the facade adds to a run: an evaluation of its adapter, and somebody who writes down what it does."""

    evaluate: Evaluate | None = None
    began: Callable[[Coordinator | ZerothCoordinator], None] = lambda _: None
    row: Callable[[Row], None] = lambda _: None
    ended: Callable[[Coordinator | ZerothCoordinator], None] = lambda _: None


class HostedRun:
    """One run, served in a thread of its own until it is finished, stopped or fails."""

    def __init__(self, spec: RunSpec, hub: Hub, store: Store, hooks: Hooks) -> None:
        self.spec, self.hub, self.store, self.hooks = spec, hub, store, hooks
        self.stopping = threading.Event()
        self._left = False
        self._grid: LinkGrid | None = None
        self._thread = threading.Thread(target=self._serve, name=f"run {spec.run.name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def leave(self) -> None:
        """Leave the run where it is, because the server ends: nodes work on, and the next start takes what they have."""
        self._left = True
        self.stopping.set()

    def stop(self) -> None:
        """End the run where it is, because somebody wants it: nodes are asked no more. It can go on from there."""
        self.stopping.set()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _serve(self) -> None:
        self._go_on()
        if self._grid is not None and not self._left:
            with suppress(StoppedError):  # the link is closed, and all desks with it
                self._grid.withdraw("the run has ended here")

    def _go_on(self) -> None:
        """Until the run has finished, has failed, or is called off."""
        name = self.spec.run.name
        while True:
            try:
                self._run()
                return
            except StoppedError:
                logger.info("run %s: left where it is", name)
                return
            except RunError as error:
                logger.warning("run %s: %s", name, error)
                if self.stopping.wait(RETRY_SECONDS):
                    return
            except FedaptError as error:
                logger.error("run %s failed: %s", name, error)
                self._set("failed", str(error))
                return
            except OperationalError as error:
                logger.warning("run %s: the store cannot be used: %s", name, error.orig)
                if self.stopping.wait(RETRY_SECONDS):
                    return
            except Exception:  # the other runs go on, and this one says what it was
                logger.exception("run %s failed", name)
                self._set("failed", OWN_FAULT)
                return

    def _run(self) -> None:
        found = self.store.find(self.spec.run.name)
        description = None if found is None else found[1]
        self._grid = grid = LinkGrid(self.hub, self.spec, description=description, stopping=self.stopping)
        kind = ZerothCoordinator if recipe_of(self.spec).zeroth else Coordinator
        coordinator = kind(self.spec, grid, self.store, evaluate=self.hooks.evaluate)
        self.hooks.began(coordinator)
        for row in coordinator.rounds():
            self.hooks.row(row)
            if self.stopping.is_set():
                raise StoppedError
        self.hooks.ended(coordinator)
        self._set("finished", coordinator.ending)
        grid.adopt(coordinator.farewells(self.hub.known()), FAREWELL_SECONDS)

    def _set(self, status: Status, reason: str) -> None:
        if self.store.find(self.spec.run.name) is not None:
            self.store.set_status(self.spec.run.name, status, reason)


class Host:
    """All runs of a store, over one hub. `hooks` makes those of a run."""

    def __init__(self, hub: Hub, store: Store, hooks: Callable[[RunSpec], Hooks] = lambda _: Hooks()) -> None:
        self.hub, self.store, self.hooks = hub, store, hooks
        self._hosted: dict[str, HostedRun] = {}

    def begin(self, specs: Iterable[RunSpec]) -> None:
        """Serve these, also where they were stopped before. Raises SpecError where one's name has another spec."""
        known = [(spec, self.store.find(spec.run.name)) for spec in specs]
        for spec, found in known:
            if found is not None:
                require_same(found[0], spec)
            else:
                require_population(spec)
        for spec, found in known:
            if found is not None:
                self.store.set_status(spec.run.name, "running")
            self._hosted[spec.run.name] = HostedRun(spec, self.hub, self.store, self.hooks(spec))

    def serve(self, stopping: threading.Event, *, until_done: bool = False) -> None:
        """Follow what the store says of each run until `stopping` is set, or, with `until_done`, until none is left."""
        while not stopping.is_set():
            try:
                self._follow()
            except OperationalError as error:  # a database that is away for a moment must not end the server
                logger.warning("the store cannot be used: %s", error.orig)
            if until_done and not any(run.alive for run in self._hosted.values()):
                return
            stopping.wait(LOOK_SECONDS)

    def stop(self, seconds: float = 10.0) -> None:
        """Leave all runs where they are; the next start goes on with them."""
        deadline = time.monotonic() + seconds
        for run in self._hosted.values():
            run.leave()
        for run in self._hosted.values():
            run.join(max(0.0, deadline - time.monotonic()))

    def _follow(self) -> None:
        for state in self.store.runs():
            run = self._hosted.get(state.name)
            if state.status == "stopping":
                self._stop(state.name, run)
            elif state.status == "running" and (run is None or not run.alive):
                self._resume(state.name)

    def _stop(self, name: str, run: HostedRun | None) -> None:
        if run is not None and run.alive:
            run.stop()
        else:
            self.store.set_status(name, "stopped", "somebody asked for it")

    def _resume(self, name: str) -> None:
        found = self.store.find(name)
        assert found is not None
        logger.info("run %s goes on", name)
        try:
            spec = RunSpec.model_validate_json(found[0])
            self._hosted[name] = HostedRun(spec, self.hub, self.store, self.hooks(spec))
        except Exception as error:  # the other runs go on
            logger.exception("run %s cannot go on", name)
            self.store.set_status(name, "failed", str(error) if isinstance(error, FedaptError) else OWN_FAULT)
