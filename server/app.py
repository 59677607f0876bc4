"""The Flower ServerApp: the same coordinator on whatever grid Flower hands over.

Under `flwr run`, `fedapt.server.app:app` reads its spec from the run's config (`spec`, TOML text or the path of a
file) and writes the adapter to `out`, where that is set.
"""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..protocols.legality import recipe_of
from ..protocols.records import spec_from_context
from .coordinator import Coordinator, Evaluate
from .exchanges import ZerothCoordinator
from .export import save_adapter
from .flower import FlowerGrid
from .grid import NodeGrid
from .private import require_population
from .store import MemoryStore, Store

logger = logging.getLogger("flwr")


def server_app(store: Store | None = None, evaluate: Evaluate | None = None) -> ServerApp:
    """A ServerApp around a store (memory, if none is given) and an evaluation (none: training metrics alone)."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        spec = spec_from_context(context)
        own = store or MemoryStore()
        if own.find(spec.run.name) is None and not isinstance(grid, NodeGrid):
            require_population(spec)
        nodes = grid if isinstance(grid, NodeGrid) else FlowerGrid(grid, minimum=max(1, spec.participation.minimum))
        kind = ZerothCoordinator if recipe_of(spec).zeroth else Coordinator
        coordinator = kind(spec, nodes, own, evaluate=evaluate)
        for row in coordinator.rounds():
            logger.info("fedapt round %d: %s", row["round"], {k: v for k, v in row.items() if k != "round"})
        if out := context.run_config.get("out"):
            save_adapter(Path(str(out)), coordinator.description, coordinator.adapter(coordinator.best_round()))

    return app


app = server_app()
