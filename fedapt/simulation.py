"""A simulation from spec to result: it wires client, server and simulator together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .client.accounts import Accounts
from .client.evaluation import score
from .client.shelf import Shelf
from .outputs import RunFolder, spec_toml
from .privacy.ledger import Ledger
from .progress import Silent, Watch
from .promise import Promise, promise
from .protocols.keys import derive, generator
from .protocols.layout import Flat
from .protocols.legality import recipe_of
from .protocols.spec import RunSpec
from .protocols.update import Description
from .report import ClientScore, Curve, Report, write
from .server.coordinator import Coordinator, Evaluate, Progress, best_round
from .server.exchanges import ZerothCoordinator
from .server.export import one_adapter, save_adapter
from .server.grid import NodeGrid
from .server.store import MemoryStore, Row, SqliteStore, Store
from .sim.clock import with_clock
from .sim.federation import Federation, build
from .sim.fleet import fleet_of
from .sim.forking import prepare
from .sim.grid import LocalGrid, VirtualNodes
from .sim.memory import keep_freed_memory
from .sim.workers import WorkerGrid, cores, processes

if TYPE_CHECKING:
    from .client.client import Client

STANDINGS = "nodes.sqlite"
"""The file in a run's folder of what nodes keep from round to round, where the recipe or the codec has such a thing."""

SCORED_CLIENTS, SCORED_EXAMPLES = 60, 240
"""How many clients the report's spread shows, and how many examples are scored for it in all."""


@dataclass(frozen=True)
class Outcome:
    """What a coordinator leaves: rows, the adapter (fp32 over the layout) of the best round, else of the last, and what
    was charged here."""

    rows: list[Row]
    description: Description
    adapter: Flat
    ledger: Ledger
    complete: bool


@dataclass
class Result:
    """A simulation that has ended, or was interrupted.

    `metrics` has one row a round (round 0 is the start); `curves` are comparisons for the report.
    """

    spec: RunSpec
    outcome: Outcome
    federation: Federation
    curves: list[Curve] = field(default_factory=list)

    @property
    def metrics(self) -> list[Row]:
        return self.outcome.rows

    @property
    def privacy(self) -> Promise:
        """What is promised of all that the run has released."""
        return promise(self.spec, self.outcome.rows, self.outcome.ledger)

    @property
    def best_round(self) -> int | None:
        return best_round(self.outcome.rows)

    @property
    def adapter(self) -> dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]:
        """The best round's adapter (the last's, without evaluation): tensors under peft's names."""
        return one_adapter(self.outcome.description, self.outcome.adapter)[0]

    def save(self, folder: str | Path) -> Path:
        """Write the adapter as a folder that `peft.PeftModel.from_pretrained` loads."""
        save_adapter(Path(folder), self.outcome.description, self.outcome.adapter, self.privacy.as_dict())
        return Path(folder)

    def report(self, path: str | Path = "report.html") -> Path:
        """Write the report: one self-contained HTML file."""
        write(_report(self), Path(path))
        return Path(path)


def run(
    spec: RunSpec,
    out: Path | None = None,
    watch: Watch | None = None,
    *,
    workers: int = 1,
    engine: Literal["local", "ray"] = "local",
) -> Result:
    """Simulate a spec. With `out`, everything is written there, and a run that was interrupted goes on.

    With more than one of `workers` (0: one a core) as many processes train the clients: here, or with `engine = "ray"`
    on the Ray cluster that this process is part of. The result is the same to the byte, as far as torch's matmuls are
    the same for its number of threads, which workers share.
    On Ctrl-C the result so far is returned (`outcome.complete` is False).
    """
    watch = watch or Silent()
    recipe_of(spec)
    fleet_of(spec)
    folder = RunFolder(out) if out is not None else None
    watch.say("loading model and data …")
    if engine == "local" and workers != 1:
        prepare()
    federation = build(spec)
    watch.say(_greeting(spec, federation))
    if folder is not None:
        federation = federation.keeping(Accounts(folder.sites))
    # A simulation can be run again: its store outlives the process, and need not outlive the power.
    store = SqliteStore(folder.store, "NORMAL") if folder else MemoryStore()
    if folder is not None:
        keep_on_disk(federation.client, folder.path / STANDINGS, fresh=store.find(spec.run.name) is None)
    with worker_grid(federation.client, workers, engine) as grid:
        clocked = with_clock(grid)
        outcome = coordinate(spec, federation.client, store, federation.evaluate, watch, folder=folder, grid=clocked)
    result = Result(spec, outcome, federation)
    if folder is not None:
        result.save(folder.adapter)
        result.report(folder.report)
    return result


def coordinate(
    spec: RunSpec,
    client: "Client",
    store: Store,
    evaluate: Evaluate | None,
    watch: Watch,
    *,
    folder: RunFolder | None = None,
    grid: NodeGrid | None = None,
) -> Outcome:
    """Run (or resume) a spec over the nodes of `client` on the local grid, until it ends or is interrupted.

    `grid` reaches the same nodes in another way.
    """

    def portion(progress: Progress) -> None:
        watch.portion(progress.round, progress.answered / max(1, progress.cohort))

    kind = ZerothCoordinator if recipe_of(spec).zeroth else Coordinator
    coordinator = kind(spec, grid or LocalGrid(client), store, evaluate=evaluate, progress=portion)
    rows = store.rows(spec.run.name)
    if folder is not None:
        folder.begin(spec, rows)
    watch.start(spec.run.name, spec.run.rounds, rows[-1]["round"])
    complete = True
    try:
        for row in coordinator.rounds():
            watch.row(row)
            if folder is not None:
                folder.append(row)
    except KeyboardInterrupt:
        complete = False
    adapter = coordinator.adapter(coordinator.best_round())
    return Outcome(store.rows(spec.run.name), coordinator.description, adapter, coordinator.ledger, complete)


def keep_on_disk(client: "Client", path: Path, *, fresh: bool) -> None:
    """Let what nodes keep from round to round lie in a file, so that a run goes on with it; a `fresh` one with nothing."""
    for keeper in (client.feedback, client.replicas):
        if keeper is not None:
            keeper.shelf = Shelf(path)
            if fresh:
                keeper.shelf.clear()


@contextmanager
def worker_grid(client: "Client", workers: int, engine: Literal["local", "ray"]) -> Iterator[VirtualNodes]:
    """The nodes of a client as reached through workers; one local worker is this process."""
    if engine == "ray":
        from .sim.ray_workers import actors

        with actors(client, workers) as pool:
            yield WorkerGrid(client, pool)
        return
    if (count := workers or cores()) == 1:
        keep_freed_memory()
        yield LocalGrid(client)
        return
    with processes(client, count) as pool:
        yield WorkerGrid(client, pool)


def client_scores(federation: Federation, start: Flat, end: Flat) -> list[ClientScore]:
    """Loss before and after the run on the data of up to SCORED_CLIENTS clients, drawn by key."""
    client = federation.client
    random = generator(derive(client.spec.run.seed, "report"))
    nodes = np.sort(random.permutation(client.nodes())[:SCORED_CLIENTS])
    share = max(1, SCORED_EXAMPLES // max(1, len(nodes)))
    own = [random.permutation(client.sites.indices[node])[:share] for node in nodes.tolist()]
    losses: list[list[float]] = []
    for adapter in (start, end):
        federation.adapted.write(adapter)
        scores = score(federation.adapted, client.sites.examples, np.concatenate(own))
        bounds = np.cumsum([0, *map(len, own)])
        parts = (scores.of(np.arange(a, b)) for a, b in pairwise(bounds))
        losses.append([part.metrics(federation.adapted.task)["loss"] for part in parts])
    return [
        ClientScore(federation.names[node], len(client.sites.indices[node]), before, after)
        for node, before, after in zip(nodes.tolist(), *losses, strict=True)
    ]


def _greeting(spec: RunSpec, federation: Federation) -> str:
    empty = f" ({federation.empty} more have no data and are skipped)" if federation.empty else ""
    return (
        f"{len(federation.client.nodes())} clients{empty}, {len(federation.client.sites.examples):,} examples; "
        f"recipe {spec.recipe.name}, {_trainable(federation)} trainable"
    )


def _trainable(federation: Federation) -> str:
    whole = sum(p.numel() for p in federation.adapted.model.parameters())
    return f"{federation.client.trained.size:,} of {whole:,} parameters"


def _trainer_and_codec(spec: RunSpec) -> dict[str, str]:
    local, zeroth = spec.local, spec.zeroth
    sizes = f"rate {local.learning_rate:g}, batch {local.batch_size}"
    if recipe_of(spec).zeroth:
        probes = f"{zeroth.directions} directions, {zeroth.sides}-sided, radius {zeroth.radius:g}, {sizes}"
        return {"Local training": probes, "Codec": f"{zeroth.code}, one code a direction"}
    return {
        "Local training": f"{local.optimizer}, {sizes}",
        "Codec": f"{spec.wire.downlink} down, {spec.wire.codec} up",
    }


def _report(result: Result) -> Report:
    spec, federation = result.spec, result.federation
    facts = {
        "Recipe": spec.recipe.name,
        "Base": spec.model.base.rstrip("/").rpartition("/")[2],
        "Clients": f"{len(federation.client.nodes()):,}" + (f" (+{federation.empty} empty)" * bool(federation.empty)),
        "Trainable": _trainable(federation),
        **_trainer_and_codec(spec),
        "Privacy": result.privacy.text(),
        "Seed": str(spec.run.seed),
    }
    start = result.outcome.description.start
    return Report(
        title=spec.run.name,
        curves=[Curve(spec.recipe.name, result.metrics), *result.curves],
        spec=spec_toml(spec),
        facts=facts,
        # Scores on clients' own data are of what a unit of privacy hides.
        clients=client_scores(federation, start, result.outcome.adapter) if spec.privacy.unit == "none" else [],
        best_round=result.best_round,
        note="" if result.outcome.complete else "The run was interrupted; this is what it had reached.",
    )
