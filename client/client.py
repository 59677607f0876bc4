"""The client: one model, the data of one node or of many, and the one training code there is.

`client.train(assignments) -> updates` takes a cohort of any size. A deployment has one node; a simulation hands over
a whole round.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..kernels.cohort import Forward, fastest
from ..protocols.codecs import CODECS
from ..protocols.downlink import whole_adapter
from ..protocols.errors import DataError
from ..protocols.keys import derive
from ..protocols.recipes import recipe_of
from ..protocols.spec import Local, RunSpec
from ..protocols.update import Assignment, Description, Update
from .batches import plan_batches
from .evaluation import Scores, score
from .models import AdaptedModel
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
        self.trained = self.recipe.trained(adapted.layout)
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
        updates: list[Update] = []
        for _, group in groupby(assignments, key=lambda a: (a.round, a.version, a.payload)):
            cohort = list(group)
            self.load(cohort[0].payload)
            updates += self._train(cohort)
        return updates

    def load(self, payload: bytes) -> None:
        """Put the global adapter that a payload stands for into the model."""
        downlink = self.recipe.downlink(self.adapted.layout)
        state = CODECS[self.spec.wire.downlink].decode(payload, downlink)
        self.adapted.write(whole_adapter(self.recipe, self.adapted.layout, self.start, state))

    def evaluate(self, node: int) -> Scores:
        """Scores of the adapter in the model on a node's own data. Raises DataError where it is not held here."""
        return score(self.adapted, self.sites.examples, self._own(node))

    def _train(self, cohort: Sequence[Assignment]) -> list[Update]:
        """Assignments that start from the adapter which is in the model."""
        plans = [self._member(assignment) for assignment in cohort]
        busy = [plan for plan in plans if plan.batches]
        local = self.spec.local.in_round(cohort[0].round, self.spec.run.rounds)
        results = iter(self._trainer(busy[0], local).train(self.sites.examples, busy) if busy else ())
        return [
            self._update(assignment, next(results) if plan.batches else None)
            for assignment, plan in zip(cohort, plans, strict=True)
        ]

    def _member(self, assignment: Assignment) -> Member:
        own = self._own(assignment.node)
        lengths = self.sites.examples.lengths[own]
        key = (self.spec.run.seed, assignment.round, assignment.node)
        batches = plan_batches(lengths, self.spec.local, *key)
        return Member([own[b] for b in batches], derive(key[0], "dropout", *key[1:]))

    def _own(self, node: int) -> Indices:
        if node not in self.sites.indices:
            raise DataError(
                f"node {node} was asked for, and its data is not held here; the nodes here are {self.nodes()[:20]}"
            )
        return self.sites.indices[node]

    def _trainer(self, first: Member, local: Local) -> Trainer:
        """A trainer with the forward to use, which is chosen once on a few rows of real data: the first member's."""
        if self._forward is None:
            rows = first.batches[0][:2]
            batch = self.adapted.task.collate(self.sites.examples, [rows, rows])
            inputs = {key: value.to(self.adapted.device) for key, value in batch.inputs.items()}
            names = [self.adapted.parameter_names[t.name] for t in self.trained.tensors]
            self._forward = fastest(self.adapted.model, names, inputs)
        return Trainer(self.adapted, self._forward, self.trained, local)

    def _update(self, assignment: Assignment, trained: Trained | None) -> Update:
        node, round_ = assignment.node, assignment.round
        payload, metrics = b"", {}
        if trained is not None:
            key = derive(self.spec.run.seed, "rounding", round_, node)
            payload = CODECS[self.spec.wire.codec].encode(trained.change, self.trained, key)
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
