"""The client: one model, the data of one node or of many, and the one training code there is.

`client.train(assignments) -> updates` takes a cohort of any size. A deployment has one node; a simulation hands over
a whole round.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..kernels.cohort import Forward, fastest
from ..protocols.codecs import CODECS, codec_of
from ..protocols.errors import DataError
from ..protocols.keys import derive
from ..protocols.layout import Flat
from ..protocols.legality import rank_of, recipe_of
from ..protocols.shared import SharedAdapter
from ..protocols.spec import Local, RunSpec
from ..protocols.update import Assignment, Description, Update
from .adapted import AdaptedModel
from .batches import plan_batches
from .evaluation import Scores, score
from .feedback import Feedback, Rotations
from .tasks import Examples, Indices
from .trainer import Member, Trained, Trainer


@dataclass(frozen=True)
class Sites:
    """The data held here: the examples, and for each node the indices of its own (int64, ascending)."""

    examples: Examples
    indices: Mapping[int, Indices]


class Client:
    """Trains assignments. The adapter that is in `adapted` when the client is made is the start of the run."""

    def __init__(self, spec: RunSpec, adapted: AdaptedModel, sites: Sites) -> None:
        self.spec, self.adapted, self.sites = spec, adapted, sites
        self.recipe = recipe_of(spec)
        self.start = adapted.read()
        self.shared = SharedAdapter(self.recipe, spec.recipe, adapted.layout, self.start)
        self.trained = adapted.layout.select(self.recipe.trains)
        self.feedback = self._feedback()
        self._forward: Forward | None = None

    def at(self, sites: Sites) -> "Client":
        """This client, its model and the start of its run, over other data."""
        other = copy.copy(self)
        other.sites = sites
        return other

    def under(self, spec: RunSpec) -> "Client":
        """This client and the start of its run, under another spec of the same recipe and model."""
        other = copy.copy(self)
        other.spec = spec
        other.shared = replace(self.shared, settings=spec.recipe)
        other.feedback = other._feedback()
        return other

    def nodes(self) -> list[int]:
        """The nodes whose data is held here, those without an example left out."""
        return sorted(node for node, own in self.sites.indices.items() if len(own) > 0)

    def describe(self) -> Description:
        """What the server must know of the model before round 1."""
        return Description(
            layout=self.adapted.layout,
            start=self.start,
            config=self.adapted.config(),
            base=self.adapted.base_digest(),
        )

    def train(self, assignments: Sequence[Assignment]) -> list[Update]:
        """One Update an Assignment, in the order given.

        Raises PayloadError for a payload that does not fit, DataError for a node whose data is not held here.
        """
        alike: dict[tuple[int, str, bytes], list[Assignment]] = {}
        for assignment in assignments:
            alike.setdefault((assignment.round, assignment.version, assignment.payload), []).append(assignment)
        updates: dict[Assignment, Update] = {}
        for cohort in alike.values():
            state = self.load(cohort[0])
            rotations = self.shared.rotations(state, cohort[0].round)
            updates |= zip(cohort, self._train(cohort, rotations), strict=True)
        return [updates[assignment] for assignment in assignments]

    def load(self, assignment: Assignment) -> Flat:
        """Put the global adapter that an assignment's payload stands for into the model; returns the state received.

        At a rank below the model's, the components beyond it are zero in A and in B: their gradients are zero too, so
        training leaves them so, and the node trains exactly an adapter of its own rank.
        """
        own = self.shared.received(assignment.round, rank_of(self.spec, assignment.node))
        received = CODECS[self.spec.wire.downlink].decode(assignment.payload, own)
        state = self.shared.received(assignment.round).pad(received, own)
        self.adapted.write(self.shared.whole(state, assignment.round))
        return state

    def evaluate(self, node: int) -> Scores:
        """Scores of the adapter in the model on a node's own data. Raises DataError where it is not held here."""
        return score(self.adapted, self.sites.examples, self._own(node))

    def _train(self, cohort: Sequence[Assignment], rotations: Rotations) -> list[Update]:
        """Assignments that start from the adapter which is in the model."""
        plans = [self._member(assignment) for assignment in cohort]
        busy = [plan for plan in plans if plan.batches]
        local = self.spec.local.in_round(cohort[0].round, self.spec.run.rounds)
        results = iter(self._trainer(busy[0], local, cohort[0].round).train(self.sites.examples, busy) if busy else ())
        return [
            self._update(assignment, next(results) if plan.batches else None, rotations)
            for assignment, plan in zip(cohort, plans, strict=True)
        ]

    def _member(self, assignment: Assignment) -> Member:
        own = self._own(assignment.node)
        lengths = self.sites.examples.lengths[own]
        key = (self.spec.run.seed, assignment.round, assignment.node)
        batches = plan_batches(lengths, self.spec.local, *key)
        return Member([own[b] for b in batches], derive(key[0], "dropout", *key[1:]))

    def _feedback(self) -> Feedback | None:
        """What keeps a biased codec's leavings."""
        return Feedback(self.trained) if self.spec.wire.codec == "top-k" else None

    def _own(self, node: int) -> Indices:
        if node not in self.sites.indices:
            raise DataError(
                f"node {node} was asked for, and its data is not held here; the nodes here are {self.nodes()[:20]}"
            )
        return self.sites.indices[node]

    def _trainer(self, first: Member, local: Local, round_: int) -> Trainer:
        """A trainer with the forward to use, which is chosen once on a few rows of real data: the first member's."""
        if self._forward is None:
            rows = first.batches[0][:2]
            batch = self.adapted.task.collate(self.sites.examples, [rows, rows])
            inputs = {key: value.to(self.adapted.device) for key, value in batch.inputs.items()}
            names = [self.adapted.parameter_names[t.name] for t in self.trained.tensors]
            self._forward = fastest(self.adapted.model, names, inputs)
        return Trainer(self.adapted, self._forward, self.shared.sent(round_), local)

    def _update(self, assignment: Assignment, trained: Trained | None, rotations: Rotations) -> Update:
        node, round_ = assignment.node, assignment.round
        payload, metrics = b"", {}
        if trained is not None:
            key = derive(self.spec.run.seed, "rounding", round_, node)
            own = self.shared.sent(round_, rank_of(self.spec, node))
            change = self.shared.sent(round_).cut(trained.change, own)
            codec = codec_of(self.spec.wire)
            if self.feedback is None:
                payload = codec.encode(change, own, key)
            else:
                payload = self.feedback.encode(assignment, change, rotations, codec, key)
            metrics = {"loss": float(trained.losses.mean()), "steps": float(len(trained.losses))}
        return Update(
            run=assignment.run,
            round=round_,
            attempt=assignment.attempt,
            node=node,
            version=assignment.version,
            kind="empty" if trained is None else "delta",
            weight=float(len(self.sites.indices[node])),
            payload=payload,
            metrics=metrics,
        )
