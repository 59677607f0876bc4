"""Nodes of a quadratic loss in this process: no model, and exchanges as a link would carry them, as bytes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedapt.client.exchanger import Exchanger, Probe, Slopes
from fedapt.kernels.directions import Floats
from fedapt.kernels.signs import perturb
from fedapt.protocols.exchange import Answer, Exchange, terms_of
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Description, Update
from fedapt.server.exchanges import ZerothCoordinator
from fedapt.server.grid import Failure
from fedapt.server.log import ExchangeLog
from fedapt.server.store import MemoryStore, Row, Store

LAYOUT = AdapterLayout([TensorSpec("score.weight", (2, 30), "other")])
START = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
NODES = (3, 4, 2**63 + 1, 2**64 - 1)


def target_of(node: int) -> Floats:
    return np.random.default_rng([1, node % 1000]).standard_normal(LAYOUT.size).astype(np.float32)


TARGET = np.mean([target_of(node) for node in NODES], axis=0)


def loss(weights: Floats, node: int) -> float:
    return float(0.5 * np.square(weights.astype(np.float64) - target_of(node)).mean())


def measure(weights: Floats, probes: Sequence[Probe]) -> list[Slopes]:
    """Two-sided slopes of each node's own quadratic."""

    def slope(probe: Probe, k: int) -> float:
        points = [perturb(weights, sign * probe.radius, probe.directions[k]) for sign in (1, -1)]
        return (loss(points[0], probe.node) - loss(points[1], probe.node)) / (2 * probe.radius)

    return [Slopes(np.array([slope(p, k) for k in range(len(p.directions))])) for p in probes]


def spec_of(*overrides: str) -> RunSpec:
    text = (
        '[model]\nbase = "m"\ntask = "causal-lm"\n[run]\nrounds = 40\nseed = 5\nevaluate_every = 10\n'
        '[recipe]\nname = "onebyte"\nweighting = "uniform"\n[zeroth]\ndirections = 4\n[local]\nlearning_rate = 1.0'
    )
    return RunSpec.parse(text, overrides=overrides)


def node_of(spec: RunSpec, prober: Callable[..., list[Slopes]] = measure) -> Exchanger:
    return Exchanger(spec.run.name, terms_of(spec), START, prober)


@dataclass
class Nodes:
    """A grid of nodes that each hold a replica of their own. `tamper` sees each answer before the server does."""

    spec: RunSpec
    there: Sequence[int] = NODES
    tamper: Callable[[Answer], Sequence[Answer | Failure]] = lambda answer: [answer]
    prober: Callable[..., list[Slopes]] = measure
    sent: list[Exchange] = field(default_factory=list)
    answered: list[Answer] = field(default_factory=list)
    replicas: dict[int, Exchanger] = field(default_factory=dict)

    def nodes(self) -> Sequence[int]:
        return sorted(self.there)

    def describe(self) -> Description:
        return Description(LAYOUT, START, {}, "digest")

    def send(self, assignments: Sequence[Assignment]) -> None:
        raise AssertionError("a zeroth-order run sends no assignments")

    def replies(self, timeout: float) -> Iterator[Update | Failure]:
        raise AssertionError("a zeroth-order run waits for no updates")

    def exchange(self, requests: Sequence[Exchange], timeout: float) -> Iterator[Answer | Failure]:
        size = terms_of(self.spec).code.size(self.spec.zeroth.directions)
        for request in requests:
            self.sent.append(request)
            node = self.replicas.setdefault(request.node, node_of(self.spec, self.prober))
            arrived = Exchange.from_bytes(request.node, request.to_bytes())
            for answer in node.answer([arrived]):
                read = Answer.from_bytes(request.node, answer.to_bytes(), size)
                self.answered.append(read)
                yield from self.tamper(read)


def coordinator_of(
    spec: RunSpec, grid: Nodes | None = None, store: Store | None = None, log: ExchangeLog | None = None
) -> ZerothCoordinator:
    return ZerothCoordinator(spec, grid or Nodes(spec), store or MemoryStore(), evaluate=evaluate, log=log)


def evaluate(adapter: Floats) -> dict[str, float]:
    return {"loss": float(np.mean([loss(adapter, node) for node in NODES]))}


def run(spec: RunSpec, grid: Nodes | None = None) -> tuple[list[Row], ZerothCoordinator]:
    coordinator = coordinator_of(spec, grid)
    return list(coordinator.rounds()), coordinator
