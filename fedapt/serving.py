"""The operator's side: a folder with certificates, a store and runs, and the server that serves them."""

import contextlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .protocols.errors import OutputError, RunError, SpecError
from .protocols.identity import Token, tls13_only

if TYPE_CHECKING:
    from .protocols.spec import RunSpec
    from .server.hosting import Hooks
    from .server.link.hub import Hub
    from .server.registry import Registry
    from .server.settings import ServerSettings
    from .server.store import Status, Store

logger = logging.getLogger("fedapt")

CERTIFICATES = "certificates"
LOOPBACK = "127.0.0.1:7443"


@dataclass(frozen=True)
class Place:
    """The server's folder, its file read."""

    folder: Path
    settings: "ServerSettings"

    @classmethod
    def at(cls, folder: Path) -> "Place":
        from .server.settings import ServerSettings

        return cls(folder, ServerSettings.load(folder))

    @property
    def certificates(self) -> Path:
        return self.folder / CERTIFICATES

    def store(self) -> "Store":
        from .server.store import open_store

        return open_store(self.settings.store)

    @contextlib.contextmanager
    def registry(self) -> "Iterator[Registry]":
        from .server.registry import Registry
        from .server.store import open_store

        store = open_store(self.settings.store)
        try:
            yield Registry(store.engine)
        finally:
            store.close()


def init(folder: Path, names: Sequence[str], port: int, own: Path | None = None) -> dict[str, Any]:
    """Make certificates and `server.toml`. `own` holds the operator's certificate authority (ca.pem, ca-key.pem).

    Raises OutputError where the folder holds a federation already, TrustError for names that cannot be.
    """
    from .server.authority import Authority, KeyPair
    from .server.settings import write_settings

    try:
        folder.mkdir(parents=True, exist_ok=True)
        pair = None if own is None else KeyPair((own / "ca-key.pem").read_bytes(), (own / "ca.pem").read_bytes())
    except OSError as error:
        raise OutputError(f"{error.filename}: {error.strerror}") from None
    authority = Authority.create(folder / CERTIFICATES, names, pair)
    host = f"[{names[0]}]" if ":" in names[0] else names[0]
    everywhere = "[::]" if ":" in names[0] else "0.0.0.0"
    settings = write_settings(folder, f"{host}:{port}", f"{everywhere}:{port}")
    return {
        "folder": str(folder),
        "settings": str(settings),
        "names": list(authority.names),
        "address": f"{host}:{port}",
    }


def create_token(place: Place, name: str, lifetime: timedelta) -> Token:
    from .server.authority import Authority

    token = Authority.load(place.certificates).issue_token(name, place.settings.address, lifetime)
    with place.registry() as registry:
        registry.add_token(token)
    return token


def parse_lifetime(text: str) -> timedelta:
    """`30m`, `24h` or `7d`. Raises SpecError for anything else."""
    units = {"m": "minutes", "h": "hours", "d": "days"}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not number.isdecimal() or not number.strip("0"):
        raise SpecError(f"a lifetime of {text!r}: write a number and m, h or d, as in 24h")
    try:
        return timedelta(**{units[unit]: int(number)})
    except (OverflowError, ValueError):  # or more digits than Python reads
        raise SpecError(f"a lifetime of {len(number)} digits: no certificate lasts so long") from None


def token_rows(place: Place) -> list[dict[str, Any]]:
    with place.registry() as registry:
        now = datetime.now(UTC)
        return [
            {
                "id": token.id,
                "name": token.name,
                "state": token.state(now),
                "expires": _time(token.expires),
                "node": None if token.node is None else str(token.node),
            }
            for token in registry.tokens()
        ]


def node_rows(place: Place) -> list[dict[str, Any]]:
    with place.registry() as registry:
        return [
            {
                "id": str(node.id),
                "name": node.name,
                "state": "revoked" if node.revoked else "enrolled",
                "joined": _time(node.joined),
                "seen": None if node.seen is None else _time(node.seen),
            }
            for node in registry.nodes()
        ]


def run_rows(place: Place, store: "Store | None" = None) -> list[dict[str, Any]]:
    """All runs: how they stand, and how far they are."""
    from .protocols.spec import RunSpec

    opened = store or place.store()
    rows = []
    for state in opened.runs():
        found = opened.find(state.name)
        assert found is not None
        spec = RunSpec.model_validate_json(found[0])
        rows.append(
            {
                "name": state.name,
                "status": state.status,
                "reason": state.reason,
                "rounds": state.rounds,
                "of": spec.run.rounds,
                "recipe": spec.recipe.name,
                "updated": _time(state.updated),
            }
        )
    return rows


def serve(
    place: Place,
    specs: Sequence[Path],
    settings: Sequence[str] = (),
    *,
    plaintext: str | None = None,
    evaluate: bool = False,
    until_done: bool = False,
    json_lines: bool = False,
) -> list[dict[str, Any]]:
    """Serve specs, and what was running before, until SIGINT or SIGTERM, or until all have ended. Returns `run_rows`.

    `plaintext`, a loopback address, does without certificates. Raises SpecError for a spec that is not legal,
    OutputError where port, store or folder cannot be had.
    """
    tls13_only()
    from .logs import log_to
    from .protocols.legality import recipe_of
    from .protocols.spec import RunSpec
    from .server.hosting import Host

    log_to(sys.stderr, as_json=json_lines)
    if settings and not specs:
        raise SpecError("--set changes the specs that are named, and none is: a run that is stored keeps its own")
    checked = [RunSpec.load(path, settings) for path in specs]
    for spec in checked:
        recipe_of(spec)
    if len({spec.run.name for spec in checked}) < len(checked):
        raise SpecError("two specs have the same run.name; give each one of its own")
    store = place.store()
    stopping = threading.Event()
    with _hub(place, store, plaintext) as hub, _signals(stopping):
        logger.info("listening on port %d", hub.port)
        host = Host(hub, store, lambda spec: _hooks(spec, place.settings.runs, evaluate))
        try:
            host.begin(checked)
            host.serve(stopping, until_done=until_done)
        finally:
            host.stop()
    return run_rows(place, store)


def _hub(place: Place, store: Any, plaintext: str | None) -> "Hub":
    from .server.authority import Authority, server_credentials
    from .server.link.doors import CertifiedDoor, OpenDoor
    from .server.link.hub import Hub
    from .server.registry import Registry

    limits = place.settings.limits
    if plaintext is not None:
        return Hub(plaintext, OpenDoor(), credentials=None, limits=limits)
    authority = Authority.load(place.certificates)
    if authority.renewal_due():
        authority.renew()
    door = CertifiedDoor(authority, Registry(store.engine))
    return Hub(place.settings.listen, door, credentials=server_credentials(authority), limits=limits)


@contextlib.contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    """Until the block ends, SIGINT and SIGTERM set `stopping`; a second one ends the process as ever."""

    def stop(number: int, _frame: object) -> None:
        logger.info("%s: runs are left where they are; the next start goes on with them", signal.Signals(number).name)
        stopping.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hooks(spec: "RunSpec", runs: Path, evaluate: bool) -> "Hooks":
    """A run's folder is written as it goes; its adapter and report, when it has ended."""
    from .outputs import RunFolder
    from .server.coordinator import Coordinator
    from .server.exchanges import ZerothCoordinator
    from .server.hosting import Hooks

    folder = RunFolder(runs / spec.run.name)
    evaluation = None
    if evaluate:
        from .sim.federation import build

        evaluation = build(spec).evaluate

    def began(coordinator: Coordinator | ZerothCoordinator) -> None:
        folder.begin(spec, coordinator.store.rows(spec.run.name))

    def row(new: Mapping[str, Any]) -> None:
        folder.append(new)
        facts = {key: value for key, value in new.items() if key in ("train_loss", "federated", "epsilon", "seconds")}
        logger.info(
            "run %s round %d: %s", spec.run.name, new["round"], json.dumps(facts | dict(new.get("evaluation", {})))
        )

    def ended(coordinator: Coordinator | ZerothCoordinator) -> None:
        _write_results(spec, folder, coordinator)
        logger.info("run %s has ended: %s", spec.run.name, folder.adapter)

    return Hooks(evaluation, began, row, ended)


def _write_results(spec: "RunSpec", folder: Any, coordinator: Any) -> None:
    from .outputs import spec_toml
    from .promise import promise
    from .report import Curve, Report, write
    from .server.export import save_adapter

    rows = coordinator.store.rows(spec.run.name)
    kept = promise(spec, rows, coordinator.ledger)
    best = coordinator.best_round()
    save_adapter(folder.adapter, coordinator.description, coordinator.adapter(best), kept.as_dict())
    facts = {
        "Recipe": spec.recipe.name,
        "Base": spec.model.base.rstrip("/").rpartition("/")[2],
        "Codec": f"{spec.wire.downlink} down, {spec.wire.codec} up",
        "Privacy": kept.text(),
        "Seed": str(spec.run.seed),
    }
    report = Report(spec.run.name, [Curve(spec.recipe.name, rows)], spec_toml(spec), facts, best_round=best)
    write(report, folder.report)


def round_rows(place: Place, name: str) -> list[dict[str, Any]]:
    """The rows of a run, as metrics.jsonl has them. Raises RunError where there is none of this name."""
    store = place.store()
    _require_run(store, name)
    return store.rows(name)


def change_run(place: Place, name: str, wish: "Status") -> None:
    """`stopping` or `running`: a server that serves this store follows within a second.

    Raises RunError where there is no such run, or nothing left of it.
    """
    store = place.store()
    _require_run(store, name)
    if store.status(name) == "finished":
        raise RunError(f"run {name!r} has finished")
    store.set_status(name, wish)


def _require_run(store: "Store", name: str) -> None:
    if store.find(name) is None:
        known = ", ".join(state.name for state in store.runs()) or "none"
        raise RunError(f"run {name!r}: there is none of this name; there are: {known}")


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
