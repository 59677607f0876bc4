"""The path that an audit of example-level privacy runs: a step of a node's PrivateTrainer, over a model of its own.

    gradients ─► PrivateTrainer.train (draw, gradients, bounded, release, step) ─► the change that leaves: the sum

The trainer is the one of a run; the model is one whose loss is linear, so that an example IS its gradient and a canary
can have any: far beyond the clip, in a direction of its own. The node's step is plain SGD of rate 1, as nothing that is
done with a noised gradient can show more. An example that is not there is one whose gradient is zero: how many examples
a node has is public.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from ..kernels.cohort import Dropout, Inputs, Stack
from ..privacy.events import GaussianEvent
from ..privacy.noise import Values
from ..protocols.keys import derive
from ..protocols.layout import A_SUFFIX, B_SUFFIX, AdapterLayout, Flat, TensorSpec
from ..protocols.legality import recipe_of
from ..protocols.spec import RunSpec
from .adapted import AdaptedModel
from .private import PrivateTrainer, private_trainer
from .table import Table
from .tasks import Array, Batch, Examples
from .trainer import Member

LAYOUT = AdapterLayout(
    [
        TensorSpec("score.weight", (8, 16), "other"),
        TensorSpec("q_proj" + A_SUFFIX, (4, 16), "A"),
        TensorSpec("q_proj" + B_SUFFIX, (96, 4), "B"),
    ]
)


class Linear:
    """The task, and the forward, of a model whose loss on an example is its product with what is trained."""

    metric: Literal["accuracy", "perplexity"] = "perplexity"

    def encode(self, table: Table) -> Examples:
        raise NotImplementedError("examples of an audit are made as gradients")

    def collate(self, examples: Examples, members: Sequence[Array]) -> Batch:
        rows = torch.from_numpy(np.concatenate([examples.inputs[i] for own in members for i in own]))
        return Batch({"gradients": rows}, torch.zeros(len(rows)), tuple((len(own), 1) for own in members))

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logits, torch.ones_like(logits), torch.zeros_like(logits)

    def __call__(self, stack: Stack, inputs: Inputs, dropout: Dropout | None = None) -> Tensor:
        """The products of one row a member, (C,)."""
        return (torch.cat([values.flatten(1) for values in stack.values()], 1) * inputs["gradients"]).sum(1)


@dataclass(frozen=True)
class AuditedStep:
    """Steps of a spec's private training at a node with `population` examples, of which one draws `batch_size`.

    The spec has a noise multiplier. A gradient is fp32 (size,), and all that are not given are zeros.
    """

    spec: RunSpec
    population: int
    batch_size: int

    def again(self, **privacy: Any) -> Self:
        """The same with these settings of privacy."""
        changed = self.spec.model_copy(update={"privacy": self.spec.privacy.model_copy(update=privacy)})
        return type(self)(changed, self.population, self.batch_size)

    @property
    def size(self) -> int:
        """Numbers that are trained together."""
        return self._trained.size

    @property
    def event(self) -> GaussianEvent:
        """What a step charges."""
        return self._trainer.event(self._member(0))

    @property
    def noise_std(self) -> float:
        """The noise on the sum that the event charges."""
        return self.event.noise_std

    def arrived(self, change: Flat, *parts: int | str) -> Flat:
        """Nothing is between an example's gradient and the mechanism."""
        return change

    def release(self, changes: Sequence[Flat], number: int) -> Values:
        """The noised sum of the drawn gradients as it is read off the change that leaves: float64 (size,)."""
        rows = np.zeros((self.population, self.size), np.float32)
        rows[: len(changes)] = np.reshape(changes, (len(changes), self.size))
        examples = Examples(list(rows[:, None]), [np.zeros(1)] * len(rows), np.arange(len(rows)))
        (trained,) = self._trainer.train(examples, [self._member(number)])
        return -trained.change.astype(np.float64) * self._trainer.mechanism(self._member(number)).expected

    def scores(self, directions: Values, released: Values) -> Values:
        """How much each of `directions` (float64 (K, size), of norm 1) is in a release: float64 (K,)."""
        return directions @ released

    def draw(self, nodes: Sequence[int], number: int) -> tuple[int, ...]:
        """The batch of a step, of as many `nodes` as there are examples."""
        member = self._member(number)
        drawn = self._trainer.mechanism(member).draw(self._trainer.source(member))
        return tuple(nodes[position] for position in drawn)

    @cached_property
    def _trained(self) -> AdapterLayout:
        return LAYOUT.select(recipe_of(self.spec).trains)

    @cached_property
    def _trainer(self) -> PrivateTrainer:
        """Its forward and its task are `Linear`; all else is what a client trains with."""
        model = nn.Module()
        names = {tensor.name: f"p{i}" for i, tensor in enumerate(self._trained.tensors)}
        parameters = {tensor.name: nn.Parameter(torch.zeros(tensor.shape)) for tensor in self._trained.tensors}
        for name, parameter in parameters.items():
            model.register_parameter(names[name], parameter)
        linear = Linear()
        adapted = AdaptedModel(cast(PeftModel, model), linear, self._trained, parameters, names)
        plain = {"optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "batch_size": self.batch_size}
        local = self.spec.local.model_copy(update=plain)
        spec = self.spec.model_copy(update={"local": local})
        return private_trainer(adapted, linear, self._trained, local, spec)

    def _member(self, number: int) -> Member:
        return Member([np.arange(self.population)], derive(self.spec.run.seed, "audit", number))
