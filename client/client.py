"""The client: one model, the data of one node or of many, and the one training code there is.

`client.train(assignments) -> updates` takes a cohort of any size. A deployment has one node; a simulation hands over
a whole round.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..kernels.cohort import Forward, fastest
from ..protocols.codecs import CODECS, uplink_of
from ..protocols.errors import DataError, PrivacyError
from ..protocols.keys import derive
from ..protocols.layout import AdapterLayout, Flat
from ..protocols.legality import RANKED, recipe_of
from ..protocols.shared import SharedAdapter
from ..protocols.spec import Local, RunSpec
from ..protocols.update import Assignment, Description, Update, refused
from .accounts import Accounts
from .adapted import AdaptedModel
from .batches import plan_batches
from .chunks import chunk_tokens
from .evaluation import Scores, score
from .feedback import Feedback, Rotations
from .information import FisherInformation, drawn
from .policy import Policy, told
from .private import PrivateTrainer, private_trainer
from .replicas import Replica, Replicas
from .shelf import Shelf
from .tasks import Examples, Indices
from .trainer import Losses, Member, Trainer

Kept = list[dict[Any, Any]]
"""Residuals, replicas and accounts of some nodes, each by node: what of them outlives a round."""


@dataclass(frozen=True)
class Sites:
    """The data held here: the examples, and for each node the indices of its own (int64, ascending)."""

    examples: Examples
    indices: Mapping[int, Indices]

    @cached_property
    def nodes(self) -> list[int]:
        """The nodes with an example, ascending: sorted once, because each round asks for them."""
        return sorted(node for node, own in self.indices.items() if len(own) > 0)


@dataclass(frozen=True)
class _Received:
    """What a payload stands for: `adapter` is fp32 over the whole layout, `trained` the part of it that nodes train.

    `fixed` is the rest, as bytes: members of a cohort share it.
    """

    adapter: Flat
    trained: Flat
    fixed: bytes
    rotations: Rotations


@dataclass(frozen=True)
class _Started:
    """An assignment, the federation's adapter as it arrived, and the node's own where it goes on from its own tensors."""

    asked: Assignment
    received: _Received
    replica: Replica | None = None


@dataclass(frozen=True)
class _Outcome:
    """What came of one assignment: the change to send (fp32 over `shared.sent`; None: nothing), losses, or a refusal."""

    change: Flat | None = None
    losses: Losses | None = None
    refusal: str = ""


class Client:
    """Trains assignments. The adapter that is in `adapted` when the client is made is the start of the run."""

    def __init__(self, spec: RunSpec, adapted: AdaptedModel, sites: Sites) -> None:
        self.spec, self.adapted, self.sites = spec, adapted, sites
        self.recipe = recipe_of(spec)
        self.start = adapted.read()
        self.shared = SharedAdapter(self.recipe, spec.recipe, adapted.layout, self.start)
        self.trained = adapted.layout.select(self.recipe.trains)
        self._keep_on(None)
        self.accounts = Accounts()
        self.policy = Policy()
        self.most_rank = 0
        self.objections: list[str] = []
        self.reasons: dict[Assignment, str] = {}
        self._forward: Forward | None = None

    def keeping(self, accounts: Accounts) -> "Client":
        """This client, its nodes charged in other accounts."""
        other = copy.copy(self)
        other.accounts = accounts
        return other

    def shelving(self, shelf: Shelf) -> "Client":
        """This client, what its nodes keep on a shelf that runs share: a run that only became longer goes on there."""
        other = copy.copy(self)
        other._keep_on(shelf)
        if other.feedback is not None or other.replicas is not None:
            about = f"{self.spec.run.seed}|{self.spec.model_dump_json(exclude={'run'}, exclude_none=True)}"
            shelf.begin(self.spec.run.name, about)
        return other

    def obeying(self, policy: Policy) -> "Client":
        """This client, held to a site's policy, under any spec; `objections` are why it does not train this one."""
        other = copy.copy(self)
        other.policy = policy
        other.objections = other._objections()
        return other

    def affording(self, most_rank: int) -> "Client":
        """This client, at a node that can afford adapters of this rank and no larger; 0: any."""
        other = copy.copy(self)
        other.most_rank = most_rank
        return other

    def at(self, sites: Sites) -> "Client":
        """This client, its model and the start of its run, over other data."""
        other = copy.copy(self)
        other.sites = sites
        return other

    def under(self, spec: RunSpec) -> "Client":
        """This client and the start of its run, under another spec of the same recipe and model."""
        other = copy.copy(self)
        other.spec, other.recipe = spec, recipe_of(spec)
        other.shared = replace(self.shared, settings=spec.recipe)
        other._keep_on(None)
        other.objections = other._objections()
        if not self.policy.bounds:  # else they stay: the site's cap is over all runs
            other.accounts = Accounts()
        return other

    def nodes(self) -> list[int]:
        """The nodes whose data is held here, those without an example left out."""
        return list(self.sites.nodes)

    def together(self) -> int:
        """How many nodes train in one chunk, about: how large the parts of a round may be that are trained in one call."""
        lengths = self.sites.examples.lengths
        tokens = self.spec.local.batch_size * (float(lengths.mean()) if len(lengths) else 1.0)
        return max(1, int(chunk_tokens(self.adapted.model) / tokens))

    def describe(self) -> Description:
        """What the server must know of the model before round 1."""
        return Description(
            layout=self.adapted.layout,
            start=self.start,
            config=self.adapted.config(),
            base=self.adapted.base_digest(),
        )

    def train(self, assignments: Sequence[Assignment]) -> list[Update]:
        """One Update an Assignment, in the order given. Those that differ in nothing but where they start train together.

        Where the site's policy objects to the run, or the rank is above what the node can afford, they are refused, and
        neither payload nor data is looked at. `reasons` has then in full, for this site alone, why a round passed a cap.
        Raises PayloadError for a payload that does not fit, DataError for a node whose data is not held here.
        """
        self.reasons = {}
        if self.objections:
            return [refused(asked, " ".join(self.objections)) for asked in assignments]
        updates = {asked: refused(asked, reason) for asked in assignments if (reason := self._too_large(asked))}
        alike: dict[tuple[int, bytes], list[_Started]] = {}
        for started in self._started([asked for asked in assignments if asked not in updates]):
            alike.setdefault((started.asked.round, started.received.fixed), []).append(started)
        for cohort in alike.values():
            self.adapted.write(cohort[0].received.adapter)
            updates |= zip((started.asked for started in cohort), self._train(cohort), strict=True)
        return [updates[assignment] for assignment in assignments]

    def kept(self, assignments: Sequence[Assignment]) -> Kept:
        """What is kept between rounds of the nodes that are asked: another process needs it to train them.

        Ledgers that are files are not part of it: processes share those.
        """
        return [{key: table[key] for key in keys if key in table} for table, keys in self._tables(assignments)]

    def keep(self, assignments: Sequence[Assignment], kept: Kept) -> None:
        """Put what `kept` gave elsewhere in the place of what is kept here of these nodes."""
        for (table, keys), found in zip(self._tables(assignments), kept, strict=True):
            for key in keys:
                table.pop(key, None)
            table.update(found)

    def load(self, assignment: Assignment) -> None:
        """Put the adapter that a payload stands for into the model: all of it, also where rounds bring fragments.

        At a rank below the model's, the components beyond it are zero in A and in B: their gradients are zero too, so
        training leaves them so, and the node trains exactly an adapter of its own rank.
        """
        self.adapted.write(self.shared.whole(self._state(assignment), assignment.round))

    def evaluate(self, node: int) -> Scores:
        """Scores of the adapter in the model on a node's own data.

        Raises DataError where it is not held here, PrivacyError where the site's policy forbids it, and under a unit of
        privacy: exact scores on private data are a release without noise.
        """
        if self.objections:
            raise PrivacyError(" ".join(self.objections))
        self.policy.require_evaluation()
        if self.spec.privacy.unit != "none":
            raise PrivacyError(
                f'privacy.unit = "{self.spec.privacy.unit}": exact scores on a node\'s own data are a release without '
                "noise. Evaluate on data that is public"
            )
        return score(self.adapted, self.sites.examples, self._own(node))

    def _tables(self, assignments: Sequence[Assignment]) -> list[tuple[dict[Any, Any], list[Any]]]:
        """Every table that outlives a round, and its keys that belong to these assignments."""
        nodes: list[Any] = [asked.node for asked in assignments]
        accounts: list[Any] = [(asked.node, run) for asked in assignments for run in (asked.run, None)]
        tables: list[tuple[dict[Any, Any], list[Any]]] = [(self.accounts.table(), accounts)]
        keepers = (keeper for keeper in (self.feedback, self.replicas) if keeper is not None)
        return tables + [(table, nodes) for keeper in keepers for table in keeper.tables()]

    def _objections(self) -> list[str]:
        pinned = self.policy.base is not None  # hashing a large base takes a minute
        return self.policy.problems(self.spec, self.adapted.base_digest() if pinned else None)

    def _too_large(self, asked: Assignment) -> str:
        """Why the node cannot afford what it is asked for; empty where it can."""
        rank = asked.rank or self.spec.adapter.rank
        if not 0 < self.most_rank < rank or self.spec.adapter.method not in RANKED:
            return ""
        return f"asked to train at rank {rank}, and this node can afford {self.most_rank} (most_rank)"

    def _started(self, assignments: Sequence[Assignment]) -> list[_Started]:
        """What each assignment's payload stands for; equal payloads are read once."""
        known: dict[tuple[int, int, bytes], _Received] = {}
        started = []
        for asked in assignments:
            if self.replicas is not None:
                replica = self.replicas.arrive(asked, self._decoded(asked, self.shared.delivered(asked.round)))
                adapter = self.adapted.layout.pad(replica.outer, self.replicas.trained)
                started.append(_Started(asked, self._received(asked.round, adapter, {}), replica))
                continue
            key = asked.round, asked.rank, asked.payload
            if key not in known:
                state = self._state(asked)
                rotations = self.shared.rotations(state, asked.round)
                known[key] = self._received(asked.round, self.shared.whole(state, asked.round), rotations)
            started.append(_Started(asked, known[key]))
        return started

    def _state(self, asked: Assignment) -> Flat:
        """The whole state, at the model's rank, where the payload is all that there is at the node's."""
        own = self.shared.received(asked.round, asked.rank)
        return self.shared.received(asked.round).pad(self._decoded(asked, own), own)

    def _decoded(self, asked: Assignment, own: AdapterLayout) -> Flat:
        return CODECS[self.spec.wire.downlink].decode(asked.payload, own)

    def _received(self, round_: int, adapter: Flat, rotations: Rotations) -> _Received:
        layout, trained = self.adapted.layout, self.shared.trained(round_)
        fixed = AdapterLayout(t for t in layout.tensors if t.name not in trained.offsets)
        return _Received(adapter, layout.cut(adapter, trained), layout.cut(adapter, fixed).tobytes(), rotations)

    def _train(self, cohort: Sequence[_Started]) -> list[Update]:
        """Assignments of one round whose untrained tensors are in the model."""
        busy = [(started, plan) for started in cohort if (plan := self._member(started)).batches]
        outcomes = self._outcomes(busy) if busy else {}
        return [self._update(started, outcomes.get(started.asked, _Outcome())) for started in cohort]

    def _outcomes(self, busy: Sequence[tuple[_Started, Member]]) -> dict[Assignment, _Outcome]:
        """What came of the nodes with data, by assignment."""
        round_ = busy[0][0].asked.round
        trainer = self._trainer(self.spec.local.in_round(round_, self.spec.run.rounds), round_)
        outcomes = self._refusals(trainer, busy)
        busy = [(started, plan) for started, plan in busy if started.asked not in outcomes]
        if self.replicas is not None:
            visits = [(started.asked, started.replica, plan) for started, plan in busy if started.replica]
            results = self.replicas.train(trainer, self.sites.examples, visits)
        else:
            trained = trainer.train(self.sites.examples, [plan for _, plan in busy])
            results = [(own.change, own.losses) for own in trained]
        return outcomes | {started.asked: _Outcome(*result) for (started, _), result in zip(busy, results, strict=True)}

    def _refusals(self, trainer: Trainer, busy: Sequence[tuple[_Started, Member]]) -> dict[Assignment, _Outcome]:
        """The nodes that would pass a cap; the others are charged, before anything is computed from their data."""
        outcomes: dict[Assignment, _Outcome] = {}
        if not isinstance(trainer, PrivateTrainer):
            return outcomes
        delta = self.spec.privacy.delta
        per_run, in_all = self.policy.caps(self.spec.privacy)
        for started, plan in busy:
            try:
                self.policy.require_noise(trainer.mechanism(plan).noise_multiplier)
                self.accounts.charge(started.asked, trainer.event(plan), delta, per_run=per_run, in_all=in_all)
            except PrivacyError as error:
                self.reasons[started.asked] = str(error)
                outcomes[started.asked] = _Outcome(refusal=told(error, started.asked))
        return outcomes

    def _member(self, started: _Started) -> Member:
        asked = started.asked
        own = self._own(asked.node)
        key = (self.spec.run.seed, asked.round, asked.node)
        batches = plan_batches(self.sites.examples.lengths[own], self.spec.local, *key)
        if self.spec.privacy.unit == "example":  # a private trainer draws each step's batch from all of them
            batches = [np.arange(len(own))] * len(batches)
        return Member([own[b] for b in batches], derive(key[0], "dropout", *key[1:]), started.received.trained)

    def _keep_on(self, shelf: Shelf | None) -> None:
        """Let what nodes keep from round to round lie there (None: on a shelf of its own that is empty)."""
        self.feedback = Feedback(self.trained, shelf) if self.spec.wire.codec == "top-k" else None
        self.replicas = Replicas(self.shared, shelf) if self.recipe.streams else None

    def _own(self, node: int) -> Indices:
        if node not in self.sites.indices:
            raise DataError(
                f"node {node} was asked for, and its data is not held here; the nodes here are {self.nodes()[:20]}"
            )
        return self.sites.indices[node]

    def _trainer(self, local: Local, round_: int) -> Trainer:
        """A trainer with the forward to use, which is chosen once on a few rows of real data: the first node's.

        Processes that train parts of a round choose alike, because they all have that node's data.
        """
        if self._forward is None:
            rows = self._own(self.nodes()[0])[:2]
            inputs = self.adapted.batch(self.sites.examples, [rows, rows]).inputs
            names = [self.adapted.parameter_names[t.name] for t in self.trained.tensors]
            self._forward = fastest(self.adapted.model, names, inputs)
        trained = self.shared.trained(round_)
        if self.spec.privacy.unit == "example":
            return private_trainer(self.adapted, self._forward, trained, local, self.spec)
        return Trainer(self.adapted, self._forward, trained, local)

    def _update(self, started: _Started, outcome: _Outcome) -> Update:
        asked = started.asked
        if outcome.refusal:
            return refused(asked, outcome.refusal)
        payload, error = (b"", {}) if outcome.change is None else self._encoded(started, outcome.change)
        return Update(
            run=asked.run,
            round=asked.round,
            attempt=asked.attempt,
            node=asked.node,
            version=asked.version,
            kind="empty" if outcome.change is None else "delta",
            weight=self._weight(asked.node),
            payload=payload,
            metrics=self._metrics(asked, outcome) | error,
        )

    def _weight(self, node: int) -> float:
        """How many examples the node holds; that is not told where one example more must not be seen."""
        return 1.0 if self.spec.privacy.unit == "example" else float(len(self.sites.indices[node]))

    def _metrics(self, asked: Assignment, outcome: _Outcome) -> dict[str, float]:
        metrics = {}
        if outcome.losses is not None and len(outcome.losses):
            metrics = {"loss": float(outcome.losses.mean()), "steps": float(len(outcome.losses))}
        if self.spec.privacy.unit == "example" and self.spec.run.is_evaluated(asked.round):
            account = self.accounts.spent(asked, self.spec.privacy.delta)
            metrics |= {"epsilon": account.epsilon, "private": float(account.private)}
        return metrics

    def _encoded(self, started: _Started, change: Flat) -> tuple[bytes, dict[str, float]]:
        """The payload, and the error of its codec: a number about private data, which no private run sends.

        With feedback the error is of the change and what was left of before, because that is what is coded: a part that
        is left out is late and not lost.
        """
        asked, uplink = started.asked, uplink_of(self.spec)
        key = derive(self.spec.run.seed, "rounding", asked.round, asked.node)
        own = self.shared.sent(asked.round, asked.rank)
        information = self._information(started, change) if uplink.informed else None
        change = self.shared.sent(asked.round).cut(change, own)
        rotations = started.received.rotations
        if self.feedback is None:
            payload = uplink.encode(change, information, own, key)
        else:
            payload = self.feedback.encode(asked, change, rotations, uplink.codec, key)
        if self.spec.privacy.unit != "none":
            return payload, {}
        coded = change if self.feedback is None else self.feedback.corrected(asked, change, rotations)
        return payload, {"codec_error": uplink.error(coded, payload, own)}

    def _information(self, started: _Started, change: Flat) -> Flat:
        """How sure the node is of each value that it sends, where its training has come to."""
        assert self._forward is not None, "it is chosen before anything is trained"
        asked, trained = started.asked, self.shared.trained(started.asked.round)
        measure = FisherInformation(self.adapted, self._forward, trained, self.spec.local)
        at = started.received.trained + change
        return measure.diagonal(self.sites.examples, drawn(self._own(asked.node), self.spec, asked), at)
