"""How sure a node is of each value that it sends: the diagonal of its empirical Fisher information.

    F = mean over examples of (∂ loss of the example / ∂ value)², at the point that training has come to

A value on which the loss hardly depends has next to none, and other nodes may decide on it (Matena & Raffel, arXiv
2111.09832 §3). The paper takes labels from the model's own predictions; here they are the data's, as in what is called
the empirical Fisher information: it needs one backward pass for an example instead of one for each class, and is the
only one that is cheap for a language model.
"""

from dataclasses import dataclass

import numpy as np

from ..protocols.keys import derive, generator
from ..protocols.layout import Flat
from ..protocols.spec import RunSpec
from ..protocols.update import Assignment
from .example_gradients import ExampleGradients
from .tasks import Examples, Indices
from .trainer import Member

EXAMPLES = 64
"""Of a node's examples, how many its information is measured on: a weight needs no more, and each costs a pass."""


def drawn(own: Indices, spec: RunSpec, asked: Assignment) -> Indices:
    """The examples of a round, at most EXAMPLES of the node's `own`, by key; int64, ascending."""
    key = derive(spec.run.seed, "information", asked.round, asked.node)
    return np.sort(generator(key).choice(own, min(EXAMPLES, len(own)), replace=False))


@dataclass(frozen=True)
class FisherInformation(ExampleGradients):
    """Measures where a Trainer trains; no optimizer steps."""

    def diagonal(self, examples: Examples, own: Indices, at: Flat) -> Flat:
        """The information about each value of `at` (over the trained layout) in the examples `own`: fp32, like `at`.

        NaN or infinite where the loss is; the server refuses that.
        """
        self.adapted.prepare(examples, own)
        values = self._spread(self._start([Member([own], 0, at)]))
        total = np.zeros(self.trained.size)
        for gradients in self.gradients(examples, values, own):
            total += np.square(gradients, dtype=np.float64).sum(0)
        return (total / len(own)).astype(np.float32)
