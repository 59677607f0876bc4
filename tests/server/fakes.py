"""A scripted grid: no model, a layout of a few values, and nodes that do what a test says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedapt.protocols.codecs import CODECS, codec_of
from fedapt.protocols.keys import derive, generator
from fedapt.protocols.layout import AdapterLayout, Flat, TensorSpec
from fedapt.protocols.legality import rank_of, recipe_of
from fedapt.protocols.shared import SharedAdapter
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Description, Update, version_of
from fedapt.server.coordinator import Coordinator
from fedapt.server.grid import Evaluated, Failure
from fedapt.server.store import MemoryStore, Row, Store

LAYOUT = AdapterLayout(
    [
        TensorSpec("q.lora_A.weight", (2, 5), "A"),
        TensorSpec("q.lora_B.weight", (4, 2), "B"),
        TensorSpec("score.bias", (3,), "other"),
    ]
)
NODES = (3, 4, 2**63 + 1, 2**64 - 1)
Answer = Update | Failure


def layout_of(spec: RunSpec) -> AdapterLayout:
    """With the frozen factors of its recipe."""
    recipe = recipe_of(spec)
    return LAYOUT.with_frozen(recipe.budget(LAYOUT, spec.recipe)) if recipe.has_frozen else LAYOUT


def start(layout: AdapterLayout = LAYOUT) -> Flat:
    """Orthonormal A's, zero B's, as the model's side draws them."""
    flat = np.zeros(layout.size, np.float32)
    tensors = layout.split(flat)
    random = np.random.default_rng(0)
    for name in ("q.lora_A.weight", "score.bias", "q.frozen_A.weight"):
        if name in tensors:
            tensors[name][...] = random.standard_normal(tensors[name].shape)
        if name in tensors and name != "score.bias":
            parts = np.split(tensors[name], len(tensors[name]) // 2)
            tensors[name][...] = np.concatenate([np.linalg.qr(part.T)[0].T for part in parts])
    return flat


def shared_of(spec: RunSpec) -> SharedAdapter:
    return SharedAdapter(recipe_of(spec), spec.recipe, layout_of(spec), start(layout_of(spec)))


def spec_of(*overrides: str) -> RunSpec:
    return RunSpec.parse('[model]\nbase = "m"\ntask = "causal-lm"\n[run]\nrounds = 3\nseed = 5', overrides=overrides)


@dataclass
class FakeGrid:
    """Nodes that pull the adapter towards a target of their own, and `answer` with what becomes of their updates."""

    spec: RunSpec
    answer: Callable[[Update], Sequence[Answer]] = lambda update: [update]
    there: Sequence[int] = NODES
    scale: float = 0.3
    sent: list[Assignment] = field(default_factory=list)
    received: list[Flat] = field(default_factory=list)
    known: dict[int, Flat] = field(default_factory=dict)
    stated: Mapping[int, int] = field(default_factory=dict)
    _waiting: list[Assignment] = field(default_factory=list)

    def nodes(self) -> Sequence[int]:
        return self.there

    def rank(self, node: int) -> int:
        """What it has stated, or else as in a simulation."""
        return self.stated.get(node, rank_of(self.spec, node))

    def describe(self) -> Description:
        return Description(layout_of(self.spec), start(layout_of(self.spec)), {"r": 2}, "digest")

    def send(self, assignments: Sequence[Assignment]) -> None:
        self._waiting = list(assignments)
        self.sent += assignments

    def replies(self, timeout: float) -> Iterator[Answer]:
        """Not in the order of asking."""
        for assignment in reversed(self._waiting):
            yield from self.answer(self.train(assignment))

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated | Failure]:
        """Node k holds k mod 3 examples, each with a loss of k."""
        for asked in assignments:
            yield Evaluated(asked.node, asked.node % 3, {"loss": float(asked.node)})

    def train(self, assignment: Assignment) -> Update:
        shared, round_, rank = shared_of(self.spec), assignment.round, assignment.rank
        downlink, trained = shared.delivered(round_, rank), shared.sent(round_, rank)
        state = CODECS[self.spec.wire.downlink].decode(assignment.payload, downlink)
        assert assignment.version == version_of(downlink, state), "the version is of what arrives"
        whole = shared.received(round_).pad(state, downlink)
        if shared.recipe.streams:  # a node knows the other fragments from the rounds before
            known = self.known.setdefault(assignment.node, shared.initial_state())
            tensors = shared.received(round_).split(known)
            for name, values in downlink.split(state).items():
                tensors[name][...] = values
            whole = known.copy()
        adapter = shared.whole(whole, round_)
        self.received.append(adapter)
        key = derive(1, "target", assignment.round, assignment.node)
        target = generator(key).standard_normal(shared.layout.size).astype(np.float32)
        change = shared.layout.cut(np.float32(self.scale) * (target - adapter), trained)
        payload = codec_of(self.spec.wire).encode(change, trained, key)
        weight = 1.0 + assignment.node % 3
        own = (assignment.run, assignment.round, assignment.attempt, assignment.node, assignment.version)
        return Update(*own, "delta", weight, payload, {"loss": 1.0 + assignment.node % 3, "steps": 2.0})


def ends(adapter: Flat) -> Mapping[str, float]:
    return {"loss": float(np.linalg.norm(adapter))}


def run(grid: FakeGrid, store: Store | None = None, **options: Any) -> tuple[Coordinator, list[Row]]:
    coordinator = Coordinator(grid.spec, grid, store or MemoryStore(), **options)
    return coordinator, list(coordinator.rounds())


def plain(rows: Sequence[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
