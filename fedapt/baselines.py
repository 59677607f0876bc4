"""What the same data gives without federation: trained in one place, and by each client alone."""

import numpy as np

from .client.client import Sites
from .progress import Watch
from .protocols.keys import derive, generator
from .protocols.spec import RunSpec
from .report import Curve
from .server.participation import cohort_size
from .server.store import MemoryStore
from .sim.federation import Federation
from .simulation import coordinate

LOCAL_CLIENTS = 5
"""Clients trained alone: their mean is the local-only figure, and each costs a whole run of its own."""

ALONE = {"recipe.optimizer": "sgd", "recipe.learning_rate": 1.0, "participation.sampling": "all"}


def centralized(spec: RunSpec, federation: Federation, watch: Watch) -> Curve:
    """One client that holds all data, with as many local steps a round as a federated round has in all."""
    client = federation.client
    indices = np.sort(np.concatenate([client.sites.indices[node] for node in client.nodes()]))
    changes = dict(ALONE)
    if spec.local.steps is not None:
        changes["local.steps"] = spec.local.steps * cohort_size(len(client.nodes()), spec.participation)
    pooled = client.at(Sites(client.sites.examples, {0: indices})).under(_changed(spec, "centralized", changes))
    outcome = coordinate(pooled.spec, pooled, MemoryStore(), federation.evaluate, watch)
    return Curve("centralized", [_without_bytes(row) for row in outcome.rows])


def local_only(spec: RunSpec, federation: Federation, watch: Watch) -> Curve:
    """The mean evaluation of up to LOCAL_CLIENTS clients (drawn by key), each trained alone for as many rounds."""
    client = federation.client
    order = generator(derive(spec.run.seed, "local-only")).permutation(client.nodes())
    outcomes = []
    for node in sorted(order[:LOCAL_CLIENTS].tolist()):
        name = f"local-only-{node}"
        changes = {**ALONE, "run.evaluate_every": spec.run.rounds, "run.patience": 0}
        alone = client.at(Sites(client.sites.examples, {node: client.sites.indices[node]}))
        alone = alone.under(_changed(spec, name, changes))
        outcomes.append(coordinate(alone.spec, alone, MemoryStore(), federation.evaluate, watch).rows)
    ends = [rows[-1]["evaluation"] for rows in outcomes if "evaluation" in rows[-1]]
    mean = {key: float(np.mean([end[key] for end in ends])) for key in (ends[0] if ends else {})}
    last = {"round": outcomes[0][-1]["round"], "evaluation": mean} if ends else {"round": 0}
    return Curve(f"local only (mean of {len(outcomes)})", [outcomes[0][0], last])


def _changed(spec: RunSpec, name: str, changes: dict[str, object]) -> RunSpec:
    settings = [f"{key}={value if not isinstance(value, str) else repr(value)}" for key, value in changes.items()]
    return spec.set(f"run.name={name!r}", *settings)


def _without_bytes(row: dict[str, object]) -> dict[str, object]:
    """A baseline moves nothing."""
    return {key: value for key, value in row.items() if not key.startswith("bytes_")}
