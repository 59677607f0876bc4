"""The coordinator of zeroth-order runs: a state machine around the log of Steps (DESIGN §8).

no log          ─ describe ─►  row 0: the hash of spec, start and base
step n logged   ─ ask ──────►  Exchange n+1 to the nodes drawn, each with the Steps that it may lack
answers         ─ reduce ───►  Step n+1, logged with its charge in one transaction; only then is it sent to anybody

Going on after a crash is the same loop: it takes Steps from the log while there are any, and asks the nodes after that.
A node that is late is left out of an exchange and gets its Step with the next; one whose state has another hash gets a
snapshot. Neither stops the others.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, sqrt
from typing import Protocol, runtime_checkable

import numpy as np

from ..kernels.replica import Replica
from ..protocols.codecs import CODECS
from ..protocols.errors import RunError, SpecError
from ..protocols.exchange import PROOF_EVERY, Answer, Exchange, Step, Terms, terms_of
from ..protocols.layout import AdapterLayout, Flat
from ..protocols.legality import recipe_of
from ..protocols.shared import SharedAdapter
from ..protocols.spec import RunSpec
from ..protocols.update import Assignment, Description, version_of
from .coordinator import CHANGEABLE, Evaluate, Progress, best_round, require_same
from .grid import Failure, NodeGrid
from .importance import Pool
from .log import ExchangeLog, MemoryLog, SqlLog, genesis
from .pacing import Pace
from .participation import cohort_size, draw
from .private import ClientLevel
from .quorum import Quorum
from .reduction import Asked, Reduction
from .settling import effective_rank
from .store import Row, Snapshot, Store

logger = logging.getLogger(__name__)

FIRST_CLIP = 1.0
"""The range of a code in the first exchange, where the spec leaves it to the public rule."""

UNKNOWN = -1
"""Where a node stands of which nothing is known, or that is lost: it gets all there is."""


@runtime_checkable
class ExchangeGrid(Protocol):
    """What of a grid exchanges need: nodes (`server.grid.NodeGrid`), and codes instead of updates."""

    def nodes(self) -> Sequence[int]:
        """The nodes that can train now, ascending."""

    def describe(self) -> Description:
        """The model as the nodes have it. Raises RunError where no node answers."""

    def exchange(self, requests: Sequence[Exchange], timeout: float) -> Iterator[Answer | Failure]:
        """Answers as they come, until all are in or `timeout` seconds have passed; later ones are dropped."""


@dataclass
class _Period:
    """What has happened since the last row."""

    started: float = field(default_factory=time.monotonic)
    answered: int = 0
    refused: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    epsilons: list[tuple[float, bool]] = field(default_factory=list)


class ZerothCoordinator:
    """Runs one zeroth-order training to its end; `run.rounds` counts exchanges, and `ending` is as in `Coordinator`.

    Raises SpecError where the store holds another spec under this name, or the grid cannot exchange codes.
    """

    def __init__(
        self,
        spec: RunSpec,
        grid: NodeGrid | ExchangeGrid,
        store: Store,
        *,
        evaluate: Evaluate | None = None,
        progress: Callable[[Progress], None] = lambda _: None,
        log: ExchangeLog | None = None,
    ) -> None:
        if not isinstance(grid, ExchangeGrid):
            raise SpecError(
                f'recipe.name = "{spec.recipe.name}": {type(grid).__name__} carries rounds, and no exchanges. Simulate '
                'it in one process (--workers 1), deploy it on our own link, or take recipe.name = "fedsvd"'
            )
        self.spec, self.grid, self.store = spec, grid, store
        self.recipe, self.run = recipe_of(spec), spec.run.name
        self.evaluate, self.progress = evaluate, progress
        self.log = log or log_beside(store)
        self.description = self._begin()
        self.terms = terms_of(spec)
        self.trained = self.description.layout.select(self.recipe.trains)
        self.start = Replica.begin(self.terms, self._cut(self.description))
        self._plan()
        self._recover()

    def _plan(self) -> None:
        """What follows from the spec and from how many nodes there were at the start: a public constant."""
        population = int(self.store.rows(self.run)[0]["population"])
        unit, sampling = self.spec.privacy.unit, self.spec.participation
        private = ClientLevel(self.spec, population, self.terms.directions) if unit == "client" else None
        nodes = ceil(private.mechanism.expected) if private else max(1, cohort_size(population, sampling))
        self.quorum, self.ending = Quorum(self.spec), ""
        self.private, self.reduction = private, Reduction(self.spec, self.terms, nodes, private)
        self.pace = Pace(self.spec, nodes * self.terms.directions, self.terms.code.largest)
        self.pool = Pool(self.terms, self.spec.zeroth.importance) if self.terms.mode == "pool" else None

    def _recover(self) -> None:
        """The state at the last row: a snapshot, and what the log says of scale and pool."""
        number = int(self.store.rows(self.run)[-1]["round"])
        kept = self.log.kept(self.run, number) if number else None
        self.replica = self.start if kept is None else self.start.restored(kept)
        self.scale = self._first_scale()
        self.last: Step | None = None
        self.opened = 1
        self.positions: dict[int, int] = {}
        self.period = _Period()
        self.log.open(self.run, self._genesis())
        for row in self.log.rows(self.run, after=0):
            if row.number <= self.replica.number:
                self._learn(Step.from_bytes(row.body))
        self.ledger = self.log.ledger(self.run)

    def rounds(self) -> Iterator[Row]:
        """Run what is left, yielding the row of each exchange that is evaluated, when it is committed.

        Ends after `run.rounds` exchanges, when `run.patience` evaluations have passed without progress, or when one more
        exchange would pass `privacy.epsilon`.
        """
        logged = self.log.rows(self.run, after=self.replica.number)
        rows = self.store.rows(self.run)
        while self.replica.number < self.spec.run.rounds and not self._out_of_patience(rows):
            row = next(logged, None)
            if row is not None:
                self._take(Step.from_bytes(row.body))
            elif self._spent() or not self._exchange():
                break
            if self.spec.run.is_evaluated(self.replica.number):
                yield self._row(rows)
                rows = self.store.rows(self.run)
        if self.replica.number > int(rows[-1]["round"]):
            yield self._row(rows)

    def adapter(self, round_: int | None = None) -> Flat:
        """The whole adapter after an exchange that was kept: the last row's by default, or the best."""
        number = int(self.store.rows(self.run)[-1]["round"]) if round_ is None else round_
        return self._whole(self.store.snapshot(self.run, number).state)

    def farewells(self, nodes: Sequence[int]) -> list[Assignment]:
        """What hands the run's adapter to nodes: the best row's, else the last's."""
        best = self.best_round()
        adapter, number = self.adapter(best), best or int(self.store.rows(self.run)[-1]["round"])
        shared = SharedAdapter(self.recipe, self.spec.recipe, self.description.layout, self.description.start)
        own, codec = shared.delivered(number + 1), CODECS[self.spec.wire.downlink]
        payload = codec.encode(self.description.layout.cut(adapter, own), own, key=number)
        version = version_of(own, codec.decode(payload, own))
        return [Assignment(self.run, number + 1, 1, node, version, payload) for node in nodes]

    def best_round(self) -> int | None:
        """The exchange with the best evaluation (accuracy, else loss), the first of equals; None if none was made."""
        return best_round(self.store.rows(self.run))

    def _begin(self) -> Description:
        found = self.store.find(self.run)
        if found is not None:
            spec, description = found
            require_same(spec, self.spec)
            return description
        description = self.grid.describe()
        row: Row = {"round": 0, "population": self.spec.privacy.population or len(self.grid.nodes())}
        if self.evaluate is not None:
            row["evaluation"] = dict(self.evaluate(description.start))
        self.store.create(self.run, self.spec.to_json(), description, Snapshot(0, self._cut(description)), row)
        return description

    def _genesis(self) -> bytes:
        run = self.spec.run.model_copy(update=dict.fromkeys(CHANGEABLE, 1))
        spec = self.spec.model_copy(update={"run": run}).to_json()
        return genesis(spec, self.description.version, self.description.base)

    def _cut(self, description: Description) -> Flat:
        return description.layout.cut(description.start, description.layout.select(self.recipe.trains))

    def _whole(self, trained: Flat) -> Flat:
        layout: AdapterLayout = self.description.layout
        whole = self.description.start.copy()
        layout.put(whole, self.trained.split(trained))
        return whole

    def _first_scale(self) -> int:
        """The range of a code: fixed by the spec, or by the clip of what is noised here; else the rule's first."""
        if self.private is not None:
            return self.terms.code.scale_of(self.spec.privacy.clip)
        return self.terms.code.scale_of(self.spec.zeroth.clip or FIRST_CLIP)

    def _exchange(self) -> bool:
        """One exchange, from asking to the Step on disk; False where nodes' caps on ε leave too few of them for it."""
        number = self.replica.number + 1
        asked = self._asked(number)
        answers = self._collect(asked)
        if not answers:
            refusals = self.store.refusals(self.run, number)
            if self.quorum.taken(f"exchange {number}", asked.slots, (), refusals, self.grid.nodes) is None:
                self._end(self.quorum.ending)
                return False
        body, events = self.reduction.body(asked, answers)
        step = self.pace.step(self.replica, self.terms, self.scale, body, self.opened)
        if number % PROOF_EVERY == 0:
            step = replace(step, proof=self.replica.after(step).proof)
        self.log.append(self.run, step, events)
        self.ledger = self.ledger.after(events)
        self.period.epsilons = [
            (a.epsilon, a.private) for a in answers.values() if a.epsilon is not None and 0 <= a.epsilon < inf
        ]
        self._take(step)
        return True

    def _take(self, step: Step) -> None:
        """A Step that is on disk becomes the state."""
        self.replica = self.replica.after(step)
        answered = self.terms.answers(step)
        nodes = self.reduction.nodes if answered is None else answered
        down, up = wire_bytes(self.spec, self.terms, step.number, self.last)
        self.period.answered += nodes
        self.period.bytes_down += nodes * down
        self.period.bytes_up += nodes * up
        self._learn(step)

    def _learn(self, step: Step) -> None:
        """What follows from a Step beside the state."""
        if self.last is not None and step.segment != self.last.segment:
            self.opened = step.number
        self.last, self.scale = step, step.scale
        if self.private is None and self.spec.zeroth.clip is None:
            counts = self.terms.applied(step)[2]
            if self.terms.mode == "shared":  # a sum of so many: they agree in part, so this is never too narrow by much
                counts = np.rint(counts / sqrt(self.reduction.nodes)).astype(np.int64)
            self.scale = self.terms.code.next_scale(step.scale, counts)
        if self.pool is not None:
            self.pool.take(step)

    def _asked(self, number: int) -> Asked:
        nodes = self.grid.nodes()
        if not nodes:
            raise RunError("no node can train: none has connected, or none has an example")
        if self.private is not None:  # a secret draw is committed before anybody hears of it, and never drawn again
            drawn = self.store.open_round(self.run, number, self.private.draw(nodes, number))
        else:
            drawn = draw(nodes, self.spec.participation, self.spec.run.seed, number)
        slots = {node: slot for slot, node in enumerate(drawn)}
        picks = {n: self.pool.picks(self.spec.run.seed, number, s) for n, s in slots.items()} if self.pool else {}
        return Asked(number, self.scale, slots, picks)

    def _requests(self, asked: Asked) -> Iterator[Exchange]:
        """Each node's request; nodes that stand at the same step share what they lack."""
        lacking: dict[int, tuple[bytes, tuple[Step, ...]]] = {}
        for node, slot in asked.slots.items():
            position = self.positions.get(node, UNKNOWN)
            if position not in lacking:
                lacking[position] = self._catch_up(position)
            snapshot, steps = lacking[position]
            proof = self.replica.proof if position == UNKNOWN else b""
            picks = asked.picks.get(node, b"")
            yield Exchange(
                self.run, node, asked.number, slot, asked.scale, self.spec.zeroth.radius, picks, proof, snapshot, steps
            )

    def _catch_up(self, position: int) -> tuple[bytes, tuple[Step, ...]]:
        """What brings a node from its position to the present: the Steps between, or a snapshot where that is shorter."""
        if self.last is not None and position == self.last.number - 1:
            return b"", (self.last,)
        snapshot = self.replica.snapshot()
        steps, size = [], 0
        for row in self.log.rows(self.run, after=max(position, 0)):
            steps.append(Step.from_bytes(row.body))
            size += len(row.body)
            if size > len(snapshot):
                return snapshot, ()
        return b"", tuple(steps)

    def _collect(self, asked: Asked) -> dict[int, Answer]:
        """The admitted answers by node. What is refused is recorded, and stops nobody."""
        answers: dict[int, Answer] = {}
        self.progress(Progress(asked.number, 0, len(asked.slots)))
        requests = list(self._requests(asked))
        for answer in self.grid.exchange(requests, self.spec.participation.deadline_seconds) if requests else ():
            if isinstance(answer, Failure):
                logger.warning("exchange %d: node %d failed: %s", asked.number, answer.node, answer.reason)
                continue
            if answer.kind == "lost" and answer.node in asked.slots:
                logger.warning("exchange %d: node %d is lost, and gets a snapshot", asked.number, answer.node)
                self.positions[answer.node] = UNKNOWN
                continue
            reason = answer.reason or answer.kind if answer.kind != "codes" else asked.refusal(answer, self.terms)
            if reason is None and answer.node in answers:
                reason = "duplicate"
            if reason is None:
                answers[answer.node] = answer
            elif answer.kind != "empty":
                logger.warning("exchange %d: refused node %d: %s", asked.number, answer.node, reason)
                self.store.refuse(self.run, asked.number, answer.node, reason)
                self.period.refused += 1
            if reason is None or answer.kind == "empty":
                self.positions[answer.node] = asked.number - 1
        return answers

    def _spent(self) -> bool:
        """Whether one more exchange would pass the cap."""
        if self.private is None or self.private.allows(self.ledger):
            return False
        self._end(f"one more exchange would pass privacy.epsilon = {self.spec.privacy.epsilon:g}: the run ends here")
        return True

    def _end(self, why: str) -> None:
        logger.warning(why)
        self.ending = why

    def _row(self, rows: Sequence[Row]) -> Row:
        """Evaluate, and commit what a resumed run goes on from."""
        number, period = self.replica.number, self.period
        weights = self.replica.weights
        adapter = self._whole(weights)
        row: Row = {"round": number}
        if self.private is None:
            row |= {"answers": period.answered, "refused": period.refused}
        row |= {"bytes_down": period.bytes_down, "bytes_up": period.bytes_up, **self._epsilon()}
        row["clip"] = self.terms.code.clip_of(self.scale)
        row["segment"], row["state"] = self.replica.lattice.segment.number, self.replica.proof.hex()
        row["effective_rank"] = effective_rank(self.description.layout, adapter)
        if self.evaluate is not None:
            row["evaluation"] = dict(self.evaluate(adapter))
        if self.private is None:  # as in a round's row
            row["seconds"] = round(time.monotonic() - period.started, 4)
        best = best_round([*rows, row])
        self.log.keep(self.run, number, self.replica.snapshot())
        self.store.open_round(self.run, number, ())
        self.store.commit(self.run, Snapshot(number, weights), row, kept=[] if best is None else [best])
        self.period = _Period()
        return row

    def _epsilon(self) -> Row:
        """What has been spent: here under client-level privacy, else what the node with the largest account says."""
        if self.private is not None:
            account = self.ledger.spent(self.spec.privacy.delta)
            return {"epsilon": account.epsilon, "private": account.private}
        spent = self.period.epsilons
        if not spent:
            return {}
        return {"epsilon": max(e for e, _ in spent), "private": all(private for _, private in spent)}

    def _out_of_patience(self, rows: Sequence[Row]) -> bool:
        best, patience = best_round(rows), self.spec.run.patience
        if best is None or patience == 0:
            return False
        return sum("evaluation" in row and int(row["round"]) > best for row in rows) >= patience


def wire_bytes(spec: RunSpec, terms: Terms, number: int, last: Step | None) -> tuple[int, int]:
    """Bytes down and up of one node that is in step, in an exchange after the Step `last` (None: the first)."""
    steps = () if last is None else (last,)
    picks = bytes(2 * terms.directions) if terms.mode == "pool" else b""
    accounts = spec.privacy.unit == "example" and spec.run.is_evaluated(number)
    answer = Answer(0, number, "codes", bytes(terms.code.size(terms.directions)), epsilon=0.0 if accounts else None)
    return len(Exchange(spec.run.name, 0, number, 0, 0, 1.0, picks, steps=steps).to_bytes()), len(answer.to_bytes())


def log_beside(store: Store) -> ExchangeLog:
    """The log in a store's own database; in memory beside a store that is there."""
    engine = getattr(store, "engine", None)
    return MemoryLog() if engine is None else SqlLog(engine)
