"""How sure a node is of each value that it sends: the diagonal of its empirical Fisher information.

    F = mean over examples of (∂ loss of the example / ∂ value)², at the point that training has come to

A value on which the loss hardly depends has next to none, and other nodes may decide on it (Matena & Raffel, arXiv
2111.09832 §3). The paper takes labels from the model's own predictions; here they are the data's, as in what is called
the empirical Fisher information: it needs one backward pass for an example instead of one for each class, and is the
only one that is cheap for a language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.cohort import Looped
from ..protocols.keys import derive, generator
from ..protocols.layout import Flat
from ..protocols.spec import RunSpec
from ..protocols.update import Assignment
from .private import CHUNK_BYTES
from .tasks import Examples, Indices, member_losses
from .trainer import Member, Trainer

EXAMPLES = 64
"""Of a node's examples, how many its information is measured on: a weight needs no more, and each costs a pass."""


def drawn(own: Indices, spec: RunSpec, asked: Assignment) -> Indices:
    """The examples of a round, at most EXAMPLES of the node's `own`, by key; int64, ascending."""
    key = derive(spec.run.seed, "information", asked.round, asked.node)
    return np.sort(generator(key).choice(own, min(EXAMPLES, len(own)), replace=False))


@dataclass(frozen=True)
class FisherInformation(Trainer):
    """Measures where a Trainer trains: each example is a member of a cohort, and no optimizer steps.

    The loss of an example is the mean over its own targets, as in training. Adapter dropout is not applied.
    """

    def diagonal(self, examples: Examples, own: Indices, at: Flat) -> Flat:
        """The information about each value of `at` (over the trained layout) in the examples `own`: fp32, like `at`.

        NaN or infinite where the loss is; the server refuses that.
        """
        self.adapted.prepare(examples, own)
        alone = [Member([own[i : i + 1]], 0, at) for i in range(len(own))]
        most = 1 if isinstance(self.forward, Looped) else max(1, CHUNK_BYTES // (4 * max(1, self.trained.size)))
        total = torch.zeros(self.trained.size, dtype=torch.float64, device=self.adapted.device)
        for first in range(0, len(alone), most):
            part = alone[first : first + most]
            for chunk in self._chunks(examples, part):
                total += self._gradients(examples, [part[i] for i in chunk]).square().sum(0)
        return (total / len(own)).to(torch.float32).cpu().numpy()

    def _gradients(self, examples: Examples, chunk: Sequence[Member]) -> Tensor:
        """The gradient of each member's one example, (K, trained.size)."""
        values = self._spread(self._start(chunk))
        batch = self.adapted.batch(examples, [member.batches[0] for member in chunk])
        losses = member_losses(self.adapted.task, self.forward(values, batch.inputs), batch.labels, len(chunk))
        gradients = torch.autograd.grad(losses.sum(), list(values.values()), materialize_grads=True)
        return self._gathered(dict(zip(values, gradients, strict=True)), 0)
