"""The coordinator: a state machine around the store. It can be killed at any line, and resumes where the store stands.

no run        ─ describe ─►  round 0 committed (the start)
round r done  ─ draw ─────►  round r+1 open: its cohort is a committed row, never redrawn
round open    ─ collect ──►  admitted updates are kept as they come; nodes that have answered are not asked again
collected     ─ release ──►  aggregate, step, settle, evaluate; one transaction commits state and metrics
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..privacy.events import Event
from ..privacy.ledger import Ledger
from ..protocols.codecs import CODECS, uplink_of
from ..protocols.errors import RunError, SpecError
from ..protocols.layout import AdapterLayout, Flat
from ..protocols.legality import rank_for, rank_of, recipe_of
from ..protocols.shared import SharedAdapter
from ..protocols.spec import RunSpec
from ..protocols.update import Assignment, Description, Update, version_of
from .admission import refusal
from .advance import UNSCORED, Score, advance
from .clock import Clocked, Virtual
from .grid import Failure, NodeGrid, Parted
from .optimizers import Buffers
from .participation import draw, wanted
from .private import OWN_BUFFERS, BandedLevel, ClientLevel, client_level
from .quorum import Quorum
from .rounds import Contribution, evaluation_of
from .settling import effective_rank
from .store import Row, Snapshot, Store

logger = logging.getLogger(__name__)

CHANGEABLE = {"rounds", "evaluate_every", "patience"}
"""What of `[run]` may differ when a run goes on: how long it is and when it is looked at, never what it computes."""

LARGEST_LOSS = 1e30
"""A node's loss, or error, from here on is left out of the round's row, which one node could otherwise make infinite."""

Evaluate = Callable[[Flat], Mapping[str, float]]
"""A whole adapter (fp32, the layout's size) ⇒ metrics; injected, because the server does not load the model."""

Part = Callable[[int, int], AdapterLayout]  # a round and a rank ⇒ what of the state travels


@dataclass(frozen=True)
class Progress:
    """How far a round is: answers so far, of how many."""

    round: int
    answered: int
    cohort: int


class Coordinator:
    """Runs one federated training to its end. `ending` is why it came before `run.rounds`, where a cap on ε brought it.

    Raises SpecError where the store holds another spec under this name, or where the aggregator needs an `evaluate`
    and there is none.
    """

    def __init__(
        self,
        spec: RunSpec,
        grid: NodeGrid,
        store: Store,
        *,
        evaluate: Evaluate | None = None,
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self.spec, self.grid, self.store = spec, grid, store
        self.recipe = recipe_of(spec)
        if spec.recipe.aggregator == "greedy-soup" and evaluate is None:
            raise SpecError(UNSCORED)
        self.evaluate, self.progress = evaluate, progress
        self.run = spec.run.name
        self.up, self.down = uplink_of(spec), CODECS[spec.wire.downlink]
        self.description = self._begin()
        self.layout = self.description.layout
        self.shared = self._shared(self.description)
        self.private = self._private()
        self.quorum, self.ending = Quorum(spec), ""

    def rounds(self) -> Iterator[Row]:
        """Run what is left, yielding the row of each round when it is committed.

        Ends after `run.rounds` rounds, when `run.patience` evaluations have passed without progress, or when one more
        round would pass `privacy.epsilon`, here or at the nodes.
        """
        while True:
            rows = self.store.rows(self.run)
            if len(rows) > self.spec.run.rounds or self._out_of_patience(rows) or self._spent():
                return
            if (row := self._round(rows)) is None:
                return
            yield row

    def adapter(self, round_: int | None = None) -> Flat:
        """The whole adapter after a round that was kept: the last by default, or the best."""
        snapshot = self.store.snapshot(self.run, round_)
        return self.shared.whole(snapshot.state, snapshot.round + 1)

    @property
    def ledger(self) -> Ledger:
        """What the run's releases have been charged here: nothing but for client-level privacy."""
        return self.store.ledger(self.run)

    def farewells(self, nodes: Sequence[int]) -> list[Assignment]:
        """What hands the run's adapter to nodes: the best round's, else the last's."""
        best = self.store.snapshot(self.run, self.best_round())
        return list(self._assigned(best.round + 1, best.state, self._ranks(nodes)[0], self.shared.received).values())

    def best_round(self) -> int | None:
        """The round with the best evaluation (accuracy, else loss), the first of equals; None if none was made."""
        return best_round(self.store.rows(self.run))

    def _begin(self) -> Description:
        found = self.store.find(self.run)
        if found is not None:
            spec, description = found
            require_same(spec, self.spec)
            return description
        description = self.grid.describe()
        state = self._shared(description).initial_state()
        row: Row = {"round": 0}
        if self.spec.privacy.unit == "client":
            row["population"] = self.spec.privacy.population or len(self.grid.nodes())
        if self.evaluate is not None:
            row["evaluation"] = dict(self.evaluate(description.start))
        self.store.create(self.run, self.spec.to_json(), description, Snapshot(0, state), row)
        return description

    def _shared(self, description: Description) -> SharedAdapter:
        return SharedAdapter(self.recipe, self.spec.recipe, description.layout, description.start)

    def _round(self, rows: Sequence[Row]) -> Row | None:
        """One round to its commit; None where nodes' caps on ε leave too few of them for it."""
        started = time.monotonic()
        round_, snapshot = len(rows), self.store.snapshot(self.run)
        if isinstance(self.grid, Clocked):
            self.grid.begin(rows)
        assignments = self._assigned(round_, snapshot.state, self._open(round_), self.shared.delivered)
        simulated = self.grid.expect(list(assignments.values())) if isinstance(self.grid, Clocked) else {}
        failures = self._collect(round_, assignments)
        refusals, came = self.store.refusals(self.run, round_), self.store.contributions(self.run, round_)
        reasons = [*refusals, *((failure.node, failure.reason) for failure in failures)]
        updates = self.quorum.taken(f"round {round_}", assignments, came, reasons, self.grid.nodes)
        if updates is None:
            self._end(self.quorum.ending)
            return None
        after, error, events = self._release(snapshot, round_, [u for u in updates if u.kind == "delta"])
        adapter = self.shared.whole(after.state, round_ + 1)
        row: Row = {"round": round_}
        if self.private is None:
            row |= {
                **_describe(updates),
                "refused": len(refusals),
                "failed": len(failures),
                "aggregation_error": error,
                "bytes_down": sum(len(a.payload) for a in assignments.values()),
                "bytes_up": sum(len(u.payload) for u in came),
            }
        else:  # who answered, and how its training went, is what must stay hidden
            row |= self._expected_bytes(round_)
        row |= simulated
        row["effective_rank"] = effective_rank(self.layout, adapter)
        if self.spec.run.is_evaluated(round_):
            row |= self._epsilon(events)
            if self.evaluate is not None:
                row["evaluation"] = dict(self.evaluate(adapter))
            if self.spec.participation.evaluates:
                row |= self._scored(round_, after.state)
        if self.private is None:  # the more nodes were drawn, the longer a round takes, and rows are for everybody
            row["seconds"] = round(time.monotonic() - started, 4)
        best = best_round([*rows, row])
        self.store.commit(self.run, after, row, kept=[] if best is None else [best], events=events)
        return row

    def _scored(self, round_: int, state: Flat) -> Row:
        """How the nodes that are here find the adapter on their own data."""
        asked = self._assigned(round_ + 1, state, self._ranks(self.grid.nodes())[0], self.shared.received)
        return evaluation_of(self.grid.evaluate(list(asked.values()), self.spec.participation.deadline_seconds))

    def _private(self) -> ClientLevel | BandedLevel | None:
        """Client-level privacy, over the number of clients that was public when the run began."""
        if self.spec.privacy.unit != "client":
            return None
        return client_level(self.spec, self.store.rows(self.run)[0]["population"], self.shared.sent(1).size)

    def _spent(self) -> bool:
        """Whether one more round would pass the cap."""
        if self.private is None or self.private.allows(self.store.ledger(self.run)):
            return False
        self._end(f"one more round would pass privacy.epsilon = {self.spec.privacy.epsilon:g}: the run ends here")
        return True

    def _end(self, why: str) -> None:
        logger.warning(why)
        self.ending = why

    def _epsilon(self, events: Sequence[Event]) -> Row:
        """What the run has spent with `events`; nothing where nothing is charged here."""
        if self.private is None:
            return {}
        account = self.store.ledger(self.run).after(events).spent(self.spec.privacy.delta)
        return {"epsilon": account.epsilon, "private": account.private}

    def _expected_bytes(self, round_: int) -> Row:
        """Bytes of as many nodes as a round expects, a number that says nothing of who came."""
        assert self.private is not None
        nodes = self.private.mechanism.expected
        down, up = self.down.size(self.shared.delivered(round_)), self.up.size(self.shared.sent(round_))
        return {"bytes_down": round(nodes * down), "bytes_up": round(nodes * up)}

    def _open(self, round_: int) -> dict[int, int]:
        """The round's cohort: each node, and the rank that it trains at, or has trained at."""
        if isinstance(self.grid, Virtual):
            drawn = self._draw(self.grid.population(), round_)
            return self._ranks(self.store.open_round(self.run, round_, drawn))[0]
        nodes = self.grid.nodes()
        if not nodes:
            raise RunError("no node can train: none has connected, or none has an example")
        ranks = {update.node: self._rank(update) for update in self.store.contributions(self.run, round_)}
        here, without = self._ranks([node for node in nodes if node not in ranks])
        self._leave_out(round_, without)
        ranks |= here
        if not ranks:
            raise RunError(f"no node can train: {next(iter(without.values()))}")
        cohort = self.store.open_round(self.run, round_, self._draw(sorted(ranks), round_))
        known = {*ranks, *without}
        late, without = self._ranks([node for node in cohort if node not in known])
        self._leave_out(round_, without)
        ranks |= late
        return {node: ranks[node] for node in cohort if node in ranks}

    def _draw(self, nodes: Sequence[int], round_: int) -> tuple[int, ...]:
        """Who trains in a round, of the nodes that can."""
        if not nodes:
            raise RunError("no node can train: none has connected, or none has an example")
        if self.private is None:
            return draw(nodes, self.spec.participation, self.spec.run.seed, round_)
        return self.private.draw(sorted(nodes), round_)

    def _ranks(self, nodes: Sequence[int]) -> tuple[dict[int, int], dict[int, str]]:
        """The rank of each node in this run, by what it says that it can afford, and why others have none."""
        ranks, without = {}, {}
        for node in nodes:
            try:
                ranks[node] = rank_for(self.spec, self.grid.rank(node))
            except SpecError as error:
                without[node] = str(error)
        return ranks, without

    def _leave_out(self, round_: int, nodes: Mapping[int, str]) -> None:
        """Record why nodes take no part in a round, once."""
        recorded = self.store.refusals(self.run, round_) if nodes else []
        for node, reason in nodes.items():
            if (node, reason) not in recorded:
                logger.warning("round %d: node %d is left out: %s", round_, node, reason)
                self.store.refuse(self.run, round_, node, reason)

    def _rank(self, update: Update) -> int:
        """The rank that an update was trained at."""
        return rank_of(self.spec, update.node) if update.rank is None else update.rank

    def _assigned(self, round_: int, state: Flat, ranks: Mapping[int, int], part: Part) -> dict[int, Assignment]:
        """A round's assignments by node: of their `part`, nodes of a smaller rank get the leading components alone."""
        packed: dict[int, tuple[bytes, str]] = {}
        assignments = {}
        for node, rank in ranks.items():
            if rank not in packed:
                own = part(round_, rank)
                payload = self.down.encode(self.shared.received(round_).cut(state, own), own, key=round_)
                packed[rank] = payload, version_of(own, self.down.decode(payload, own))
            payload, version = packed[rank]
            assignments[node] = Assignment(self.run, round_, 1, node, version, payload, rank)
        return assignments

    def _as_received(self, round_: int, state: Flat) -> Flat:
        """The state as it arrives: with a lossy downlink, nodes start from what they received."""
        layout = self.shared.received(round_)
        return self.down.decode(self.down.encode(state, layout, key=round_), layout)

    def _collect(self, round_: int, assignments: Mapping[int, Assignment]) -> list[Failure]:
        """Ask the nodes that have not answered yet, and keep what is admitted."""
        answered = {update.node for update in self.store.contributions(self.run, round_)}
        self.progress(Progress(round_, len(answered), len(assignments)))
        waiting = [a for node, a in assignments.items() if node not in answered]
        if not waiting:
            return []
        failures = []
        enough = wanted(len(assignments), self.spec.participation)
        if isinstance(self.grid, Parted):
            self.grid.part(list(assignments.values()))
        self.grid.send(waiting)
        for reply in self.grid.replies(self.spec.participation.deadline_seconds):
            if isinstance(reply, Failure):
                logger.warning("round %d: node %d failed: %s", round_, reply.node, reply.reason)
                failures.append(reply)
                continue
            asked = assignments.get(reply.node)
            rank = asked.rank if asked is not None else 0
            reason = refusal(reply, asked, self.up, self.shared.sent(round_, rank))
            if reason is None and not self.store.contribute(self.run, replace(reply, rank=rank)):
                reason = "duplicate"
            if reason is not None:
                logger.warning("round %d: refused an update of node %d: %s", round_, reply.node, reason)
                self.store.refuse(self.run, round_, reply.node, reason)
                continue
            answered.add(reply.node)
            self.progress(Progress(round_, len(answered), len(assignments)))
            if enough <= len(answered) < len(assignments):
                break
        return failures

    def _release(
        self, before: Snapshot, round_: int, updates: Sequence[Update]
    ) -> tuple[Snapshot, float | None, Sequence[Event]]:
        """The state after the round, the aggregation error, and what the round is charged with."""
        received = self._as_received(round_, before.state)
        buffers = {name: values for name, values in before.buffers.items() if name not in OWN_BUFFERS}
        kept: Buffers = {}
        events: Sequence[Event] = []
        contributions = self._contributions(updates, self.shared.sent(round_))
        if self.private is not None:
            mean, kept, events = self.private.release([c.change for c in contributions], before.buffers, round_)
            contributions = [Contribution(1.0, mean)]
        state, buffers, error = advance(
            self.shared, before.state, received, buffers, contributions, number=round_, score=self._score()
        )
        return Snapshot(round_, state, buffers | kept), error, events

    def _score(self) -> Score | None:
        """How good an adapter is on the data of `evaluate`: what makes a round the best makes an adapter the best."""
        evaluate = self.evaluate
        return None if evaluate is None else lambda adapter: -_badness(evaluate(adapter))

    def _contributions(self, updates: Sequence[Update], trained: AdapterLayout) -> list[Contribution]:
        if not updates:
            return []
        uniform = self.spec.recipe.weighting == "uniform"
        weights = np.array([1.0 if uniform else update.weight for update in updates])
        weights /= weights.sum()
        contributions = []
        for weight, update in zip(weights, updates, strict=True):
            rank = self._rank(update)
            own = self.shared.sent(update.round, rank)
            change, information = self.up.decode(update.payload, own)
            known = None if information is None else trained.pad(information, own)
            contributions.append(Contribution(float(weight), trained.pad(change, own), rank, known))
        return contributions

    def _out_of_patience(self, rows: Sequence[Row]) -> bool:
        best, patience = best_round(rows), self.spec.run.patience
        if best is None or patience == 0:
            return False
        return sum("evaluation" in row for row in rows[best + 1 :]) >= patience


def require_same(stored: str, spec: RunSpec) -> None:
    """Raises SpecError where a run goes on with a spec that is not its own, but for what is CHANGEABLE."""
    before = RunSpec.model_validate_json(stored)
    run = before.run.model_copy(update=spec.run.model_dump(include=CHANGEABLE))
    if before.model_copy(update={"run": run}) != spec:
        raise SpecError(f'run "{spec.run.name}" exists with another spec; give this one a name of its own')


def best_round(rows: Sequence[Row]) -> int | None:
    """The round with the highest accuracy, or the lowest loss where there is no accuracy; the first of equals."""
    evaluated = [row for row in rows if "evaluation" in row]
    return min(evaluated, key=lambda row: _badness(row["evaluation"]))["round"] if evaluated else None


def _badness(metrics: Mapping[str, float]) -> float:
    """Lower is better: minus the accuracy, or the loss where there is none."""
    value = float(-metrics["accuracy"] if "accuracy" in metrics else metrics["loss"])
    return math.inf if math.isnan(value) else value


def _describe(updates: Sequence[Update]) -> Row:
    """How the nodes of a round fared: counts, the spread of their mean training losses, and the mean error of codecs."""
    losses = [x for update in updates if abs(x := update.metrics.get("loss", math.nan)) < LARGEST_LOSS]
    errors = [x for update in updates if 0 <= (x := update.metrics.get("codec_error", math.nan)) < LARGEST_LOSS]
    kinds = [update.kind for update in updates]
    row: Row = {"nodes": kinds.count("delta"), "empty": kinds.count("empty")}
    if errors:
        row["codec_error"] = float(np.mean(errors))
    stated = [update.metrics["epsilon"] for update in updates if "epsilon" in update.metrics]
    spent = [epsilon for epsilon in stated if 0 <= epsilon < math.inf]
    if spent:  # at the nodes: each example is in one of them, so what counts is the node with the largest
        row |= {"epsilon": max(spent), "private": all(update.metrics.get("private") == 1.0 for update in updates)}
    if losses:
        low, high = np.percentile(losses, [10, 90])
        row |= {"train_loss": float(np.mean(losses)), "train_loss_p10": float(low), "train_loss_p90": float(high)}
    return row
