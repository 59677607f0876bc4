"""Example-level private training (DP-SGD): a Trainer whose steps are noised, with the same seam.

What bounds, sums, noises and divides the gradients of drawn examples is `privacy/example_level.py`; SGD and AdamW then
step on a noised gradient, which is post-processing (Abadi et al., arXiv 1607.00133, algorithm 1).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import numpy as np
import torch

from ..kernels.cohort import Forward, Looped, Stack
from ..privacy.accounting import too_large
from ..privacy.events import GaussianEvent
from ..privacy.example_level import ExampleLevel, example_level_of
from ..privacy.noise import Values
from ..privacy.randomness import Randomness, randomness_of
from ..protocols.errors import PrivacyError, SpecError
from ..protocols.keys import derive
from ..protocols.layout import AdapterLayout
from ..protocols.spec import Local, RunSpec
from .adapted import AdaptedModel
from .example_gradients import ExampleGradients
from .hooked import hooks_that_agree
from .tasks import Examples, Indices
from .trainer import Member, Trained, _optimizer

logger = logging.getLogger(__name__)

PROBED = 3
"""Rows on which Opacus' hooks are compared with one example after another."""


@dataclass(frozen=True)
class PrivateTrainer(ExampleGradients):
    """Trains each member by DP-SGD, one after another.

    Each entry of `Member.batches` stands for one step, and holds ALL of the node's examples: what a step trains on is
    drawn from them. `mechanism` gives a member's clip, noise and draw, and `source` its random bits.

    No loss leaves: `Trained.losses` is empty, (0,).

    Formal guarantees: a member's change has the privacy of `event(member)`, for gradients that depend on their own
    example alone; the companions of its chunk move one by the rounding of the matmuls, about 1e-7 of it.
    """

    mechanism: Callable[[Member], ExampleLevel]
    source: Callable[[Member], Randomness]

    def train(self, examples: Examples, cohort: Sequence[Member]) -> list[Trained]:
        """One Trained a member, in the order given.

        Raises PrivacyError for a member whose steps do not all draw from what its mechanism accounts for, or that comes
        with moments of steps before.
        """
        trainer = self._hooked(examples, cohort[0].batches[0]) if cohort else self
        return [trainer._alone(examples, member) for member in cohort]

    def event(self, member: Member) -> GaussianEvent:
        """What the training of a member costs: to be charged before it begins."""
        return self.mechanism(member).event(len(member.batches), secret=self.source(member).secret)

    def _hooked(self, examples: Examples, own: Indices) -> Self:
        """This trainer, with Opacus' hooks where a cohort would be a loop, if they give the loop's gradients.

        They are tried anew for each cohort, on PROBED rows, which costs less than a step.
        """
        if self.hooks is not None or not isinstance(self.forward, Looped):
            return self
        names = [self.adapted.parameter_names[tensor.name] for tensor in self.trained.tensors]
        return replace(self, hooks=hooks_that_agree(self.adapted, names, examples, own[:PROBED]))

    def _alone(self, examples: Examples, member: Member) -> Trained:
        mechanism, source = self.mechanism(member), self.source(member)
        _check(member, mechanism)
        drawn = [own[mechanism.draw(source)] for own in member.batches]
        self.adapted.prepare(examples, np.unique(np.concatenate(drawn)))
        start = self._start([member])
        values = self._spread(start)
        optimizer = _optimizer(list(values.values()), self.local)
        for batch in drawn:
            sums = (mechanism.bounded(rows) for rows in self.gradients(examples, values, batch))
            self._give(values, mechanism.release(sums, source))
            optimizer.step()
        change = (self._gathered(values, 0) - start)[0].cpu().numpy()
        return Trained(change, np.empty(0, np.float32))

    def _give(self, values: Stack, gradient: Values) -> None:
        """Hand the optimizer a gradient over the trained layout."""
        row = torch.from_numpy(gradient)[None].to(self.adapted.device)
        for parameter, own in zip(values.values(), self._spread(row).values(), strict=True):
            parameter.grad = own.detach()


def _check(member: Member, mechanism: ExampleLevel) -> None:
    sizes = {len(own) for own in member.batches}
    if sizes - {mechanism.examples}:
        raise PrivacyError(
            f"a step would draw from {min(sizes)} to {max(sizes)} examples, and {mechanism.examples} are accounted for: "
            "give all of the node's examples for each step"
        )
    if member.moments is not None:
        raise PrivacyError(
            "moments of earlier steps have no place in private training here: take a recipe that starts anew"
        )


def require_whole_rows(spec: RunSpec, examples: Examples) -> None:
    """Raises SpecError where privacy is of examples, and a long text would be several of them."""
    if spec.privacy.unit == "example" and len(np.unique(examples.rows)) < len(examples):
        raise SpecError(
            f'privacy.unit = "example": texts longer than model.max_length = {spec.model.max_length} are cut, and each '
            "piece would be an example: whoever has a text of k pieces would be promised k times ε. "
            'Way out: a larger max_length, texts that are cut where one may stand for itself, or unit = "client"'
        )


@cache  # it stands in the log once, and not for each round
def warn_of_delta(delta: float, examples: int) -> None:
    """Say in the log of this machine, and nowhere else, that a run's δ promises nothing to so many examples."""
    if warning := too_large(delta, examples, "examples held here"):
        logger.warning(warning)


def private_trainer(
    adapted: AdaptedModel, forward: Forward, trained: AdapterLayout, local: Local, spec: RunSpec
) -> PrivateTrainer:
    """The trainer of a spec. Noise is solved for as if a node took part in every round: it can take part in no more.

    Raises PrivacyError for a cap that no noise can meet.
    """

    def mechanism(member: Member) -> ExampleLevel:
        steps, examples = len(member.batches) * spec.run.rounds, len(member.batches[0])
        warn_of_delta(spec.privacy.delta, examples)
        return example_level_of(spec, examples, trained.size, steps)

    def source(member: Member) -> Randomness:
        return randomness_of(spec.privacy, derive(member.dropout_key, "private"))

    return PrivateTrainer(adapted, forward, trained, local, mechanism, source)
