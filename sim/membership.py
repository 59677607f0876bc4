"""Shadow runs: the same federation trained again and again, each time with other canaries left out.

A canary is an example, drawn by key from all nodes; under client-level privacy it is a node with all of its data. What
is looked at is the adapter that a run would publish, after its last round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..client.client import Client, Sites
from ..client.evaluation import score
from ..client.tasks import Indices
from ..privacy.audit import Values
from ..privacy.membership import Coins, Membership, confidence, judged
from ..protocols.errors import SpecError
from ..protocols.keys import derive, generator
from ..protocols.legality import recipe_of
from ..protocols.spec import RunSpec
from ..server.coordinator import Coordinator
from ..server.exchanges import ZerothCoordinator
from ..server.store import MemoryStore
from .federation import Federation
from .grid import LocalGrid

LEAST_RUNS, LEAST_CANARIES = 4, 16
MOST_CANARIES = 400
"""Examples that have a coin; the others are in every run."""
ATTACK_DELTA = 1e-8
LOOKED_AT = 16
"""Examples of a node that its loss is the mean of."""


@dataclass(frozen=True)
class Canary:
    """Examples that are in a run together or not at all, and those of them that are scored (int64)."""

    own: Indices
    scored: Indices


def membership(
    federation: Federation, runs: int, level: float, done: Callable[[int], None] = lambda _: None
) -> Membership:
    """Attack the adapters of so many runs, each with the others as shadows; `done` hears of each that has ended.

    Raises SpecError for fewer than LEAST_RUNS or LEAST_CANARIES, and for a cohort of fixed size, which asks for a population that does
    not change; and what a run raises.
    """
    spec = federation.client.spec
    if runs < LEAST_RUNS:
        raise SpecError(f"{runs} shadow runs: at least {LEAST_RUNS} are needed to know a canary that is in, and out")
    if spec.privacy.unit == "client" and spec.participation.sampling == "fixed":
        raise SpecError(
            'participation.sampling = "fixed": a draw of fixed size needs all clients to be there, and shadow runs leave '
            'some out. Nearest legal: "poisson".'
        )
    canaries = _canaries(federation)
    if len(canaries) < LEAST_CANARIES:
        raise SpecError(
            f"{len(canaries)} canaries: an attack on fewer than {LEAST_CANARIES} tells nothing, and a run could have none "
            "of them. Take more data or, client-level, more clients"
        )
    present = generator(derive(spec.run.seed, "membership", "coins")).random((runs, len(canaries))) < 0.5
    fits, claims = [], []
    for number, there in enumerate(present):
        own, claimed = _shadow(federation, canaries, there, number)
        fits.append(own)
        claims += [] if claimed is None else [claimed]
        done(number + 1)
    return judged(np.stack(fits), present, _delta(spec), level, max(claims, default=None))


def _canaries(federation: Federation) -> list[Canary]:
    client = federation.client
    random = generator(derive(client.spec.run.seed, "membership", "canaries"))
    nodes = client.nodes()
    if client.spec.privacy.unit == "client":
        owned = [client.sites.indices[node] for node in nodes]
        return [Canary(own, np.sort(random.permutation(own)[:LOOKED_AT])) for own in owned]
    everything = np.concatenate([client.sites.indices[node] for node in nodes])
    chosen = np.sort(random.permutation(everything)[:MOST_CANARIES])
    return [Canary(chosen[i : i + 1], chosen[i : i + 1]) for i in range(len(chosen))]


def _shadow(
    federation: Federation, canaries: Sequence[Canary], there: Coins, number: int
) -> tuple[Values, float | None]:
    """How well one run's adapter fits each canary, float64 (canaries,), and the ε that the run has spent."""
    spec, sites = _spec(federation, number), federation.client.sites
    out = [canary.own for canary, present in zip(canaries, there, strict=True) if not present]
    left = np.concatenate([np.zeros(0, np.int64), *out])
    kept = {node: own[~np.isin(own, left)] for node, own in sites.indices.items()}
    client = federation.client.at(Sites(sites.examples, kept)).under(spec)
    kind = ZerothCoordinator if recipe_of(spec).zeroth else Coordinator
    coordinator = kind(spec, LocalGrid(client), MemoryStore())
    for _ in coordinator.rounds():
        pass
    federation.adapted.write(coordinator.adapter())
    sizes = [len(canary.scored) for canary in canaries]
    found = score(federation.adapted, sites.examples, np.concatenate([canary.scored for canary in canaries]))
    fits = confidence(found.loss / np.maximum(found.counted, 1))
    means = np.add.reduceat(fits, np.cumsum([0, *sizes[:-1]])) / sizes
    return means, _spent(coordinator, client)


def _spent(coordinator: Coordinator | ZerothCoordinator, client: Client) -> float | None:
    """The ε of a run at the δ of the attack; under example-level privacy, of the node that has spent most."""
    spec, delta = coordinator.spec, _delta(coordinator.spec)
    match spec.privacy.unit:
        case "client":
            return coordinator.ledger.spent(delta).epsilon
        case "example":
            ledgers = (client.accounts.ledger(node, spec.run.name) for node in client.nodes())
            return max(ledger.spent(delta).epsilon for ledger in ledgers)
    return None


def _delta(spec: RunSpec) -> float:
    """With the δ of a spec, hundreds of guesses could refute nothing; what is claimed holds at every δ."""
    return min(spec.privacy.delta, ATTACK_DELTA)


def _spec(federation: Federation, number: int) -> RunSpec:
    """The spec with a seed of its own, all rounds to their end, and the population of all clients."""
    spec = federation.client.spec
    seed = derive(spec.run.seed, "membership", "run", number) % 2**63
    run = spec.run.model_copy(update={"seed": seed, "patience": 0, "evaluate_every": spec.run.rounds})
    privacy = spec.privacy
    if privacy.unit == "client" and privacy.population is None:
        privacy = privacy.model_copy(update={"population": len(federation.client.nodes())})
    return spec.model_copy(update={"run": run, "privacy": privacy})
