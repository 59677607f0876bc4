"""Streaming DiLoCo at a node (arXiv 2501.18512): tensors of its own, which each round meets the federation's in part.

| here       | paper | meaning                                                                   |
|------------|-------|---------------------------------------------------------------------------|
| `own`      | θ_m   | what the node trains, round after round, with one AdamW                    |
| `outer`    | θ     | the federation's values, as far as the node was told                       |
| `mixing`   | α     | how much of its own a node keeps where the federation's arrive             |
| `delay`    | τ     | steps that a node trains on before it takes what has arrived               |
| `change`   | −Δ_m  | own − outer of the fragment whose turn it is: the outer gradient, negated  |

A node that joins late, or has missed a round, does not know all of the federation's values. It trains along, takes each
fragment as it comes, and sends nothing until it has seen them all: `fragments` rounds at most.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..protocols.keys import derive
from ..protocols.layout import Flat
from ..protocols.shared import SharedAdapter
from ..protocols.update import Assignment
from .shelf import Shelf
from .tasks import Examples
from .trainer import Losses, Member, Moments, Trainer


@dataclass(frozen=True)
class Replica:
    """One node's standing before a round or in it: `own` and `outer` are fp32 over the trained layout.

    `round` is the last that it took part in, 0 for none. `unseen` are the names of tensors whose value in the federation the node does not know.
    """

    round: int
    own: Flat
    outer: Flat
    moments: Moments
    unseen: frozenset[str] = frozenset()


Visit = tuple[Assignment, Replica, Member]
"""A node in a round: what it is asked, where it stands, and its batches."""


class Replicas:
    """The nodes' standings, on a shelf (`client/shelf.py`), of each node those after its last two rounds: 32 bytes a
    trained value.

    Formal guarantees: with one node, one step a round, outer SGD at rate 1, one fragment and mixing 0, the federation
    follows the plain inner optimizer; mixing 1 keeps a node's own tensors, mixing 0 takes the federation's.
    """

    def __init__(self, shared: SharedAdapter, shelf: Shelf | None = None) -> None:
        self.shared = shared
        self.trained = shared.trained(1)
        self.shelf = Shelf() if shelf is None else shelf

    def tables(self) -> tuple[Any, ...]:
        """All that is kept from round to round, each by node: whoever moves nodes elsewhere takes their entries along."""
        return (self.shelf,)

    def arrive(self, asked: Assignment, received: Flat) -> Replica:
        """The node's standing at the start of a round; `received` is fp32 over `shared.delivered(asked.round)`.

        What arrived is known at once, and in `own` only where it was not known before; the rest waits for `train`.
        """
        found = self._standing(asked)
        layout = self.shared.delivered(asked.round)
        arrived = set(layout.offsets)
        outer, own = found.outer.copy(), found.own.copy()
        self.trained.put(outer, layout.split(received))
        late = {name: values for name, values in layout.split(received).items() if name in found.unseen}
        self.trained.put(own, late)
        return replace(found, own=own, outer=outer, unseen=found.unseen - arrived)

    def train(self, trainer: Trainer, examples: Examples, visits: Sequence[Visit]) -> list[tuple[Flat | None, Losses]]:
        """A round of each visiting node: what it is to send, and its losses.

        After `delay` steps (or all, if it has fewer) a node's tensors meet what arrived.
        """
        delay = self.shared.settings.delay
        asked = [assignment for assignment, _, _ in visits]
        replicas, before = _steps(trainer, examples, [(r, _cut(m, slice(delay))) for _, r, m in visits])
        replicas = [self._mixed(a, r) for a, r in zip(asked, replicas, strict=True)]
        rest = [(r, _cut(m, slice(delay, None))) for r, (_, _, m) in zip(replicas, visits, strict=True)]
        replicas, after = _steps(trainer, examples, rest)
        losses = [np.concatenate(parts) for parts in zip(before, after, strict=True)]
        return [(self.leave(a, r), own) for a, r, own in zip(asked, replicas, losses, strict=True)]

    def _mixed(self, asked: Assignment, replica: Replica) -> Replica:
        """`mixing` of the node's own, and 1 − `mixing` of the federation's, of what arrived in this round."""
        share, own = np.float32(self.shared.settings.mixing), replica.own.copy()
        tensors, others = self.trained.split(own), self.trained.split(replica.outer)
        for name in self.shared.delivered(asked.round).offsets:
            tensors[name][...] = share * tensors[name] + (1 - share) * others[name]
        return replace(replica, own=own)

    def leave(self, asked: Assignment, after: Replica) -> Flat | None:
        """Keep the standing after a round; its change over `shared.sent(asked.round)`, None while values are unseen."""
        self.keep(asked, after)
        if after.unseen:
            return None
        return self.trained.cut(after.own - after.outer, self.shared.sent(asked.round))

    def keep(self, asked: Assignment, after: Replica) -> None:
        """Put down how the node stands after a round."""
        unseen = np.frombuffer(json.dumps(sorted(after.unseen)).encode(), np.uint8)
        moments = {"first": after.moments.first, "second": after.moments.second}
        steps = np.array([after.moments.steps], np.int64)
        self.shelf.put(asked, {"own": after.own, "outer": after.outer, "unseen": unseen, "steps": steps, **moments})

    def before(self, asked: Assignment) -> Replica:
        """How the node stood before a round, also where it is asked for again; the start, where it was in none."""
        found = self.shelf.before(asked)
        if found is None:
            return self._start()
        round_, kept = found
        moments = Moments(kept["first"], kept["second"], int(kept["steps"][0]))
        return Replica(round_, kept["own"], kept["outer"], moments, frozenset(json.loads(kept["unseen"].tobytes())))

    def _standing(self, asked: Assignment) -> Replica:
        """Where the node begins this round."""
        now = self.before(asked)
        # What the node's last round moved would have come with the next one; what the last round moved comes now.
        missed = {name for round_ in range(now.round, asked.round - 1) for name in self.shared.sent(round_).offsets}
        return replace(now, unseen=now.unseen | missed)

    def _start(self) -> Replica:
        start = self.shared.layout.cut(self.shared.start, self.trained)
        nothing = np.zeros_like(start)
        return Replica(0, start, start, Moments(nothing, nothing))


def _cut(member: Member, steps: slice) -> Member:
    """A part of a member's steps; their dropout has a key of its own, because steps are counted anew."""
    return replace(member, batches=member.batches[steps], dropout_key=derive(member.dropout_key, "part", str(steps)))


def _steps(
    trainer: Trainer, examples: Examples, cohort: Sequence[tuple[Replica, Member]]
) -> tuple[list[Replica], list[Losses]]:
    """The replicas after their members' steps, and the losses; a member without a step stays as it is."""
    busy = [replace(m, start=r.own, moments=r.moments) for r, m in cohort if m.batches]
    results = iter(trainer.train(examples, busy) if busy else ())
    replicas, losses = [], []
    for replica, member in cohort:
        if not member.batches:
            replicas.append(replica)
            losses.append(np.empty(0, np.float32))
            continue
        trained = next(results)
        own = replica.own + trained.change
        replicas.append(replace(replica, own=own, moments=trained.moments or replica.moments))
        losses.append(trained.losses)
    return replicas, losses
