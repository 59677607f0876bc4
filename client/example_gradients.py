"""The gradient of each example by itself: each is one member of a cohort, a stack of K copies of the same values.

DP-SGD clips them one by one (`private.py`), and Fisher information is the mean of their squares (`information.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ..kernels.cohort import Looped, Stack
from ..privacy.noise import Floats
from .chunks import chunk_tokens
from .hooked import Hooked
from .tasks import Batch, Examples, Indices, member_losses
from .trainer import Trainer

LONGER = 1.4
"""How much longer than the shortest an example may be that runs beside it: padding costs more than another forward."""

GRADIENT_BYTES = 2**26
"""What the gradients of the examples that run together may take."""


@dataclass(frozen=True)
class ExampleGradients(Trainer):
    """Per-example gradients where a Trainer trains. The loss of an example is the mean over its own targets.

    `hooks` take the place of `forward` where they are given (`client/hooked.py`). Adapter dropout is not applied.
    """

    hooks: Hooked | None = field(default=None, kw_only=True)

    def gradients(self, examples: Examples, values: Stack, batch: Indices) -> Iterator[Floats]:
        """Per-example gradients of `batch`, by increasing length, some rows at a time, each (K, trained.size).

        `values` is what is trained, as a stack of one.
        """
        for chunk in self._parts(examples, batch):
            inputs = self.adapted.batch(examples, [chunk[i : i + 1] for i in range(len(chunk))])
            each = self.hooks(values, inputs) if self.hooks else self._of_cohort(values, inputs)
            yield self._gathered(each, 0).cpu().numpy()

    def _of_cohort(self, values: Stack, batch: Batch) -> Stack:
        """Each example is a member with the same values."""
        count = len(batch.shapes)
        stack = {name: one.detach().expand(count, *one.shape[1:]).requires_grad_() for name, one in values.items()}
        losses = member_losses(self.adapted.task, self.forward(stack, batch.inputs), batch.labels, count)
        gradients = torch.autograd.grad(losses.sum(), list(stack.values()), materialize_grads=True)
        return dict(zip(stack, gradients, strict=True))

    def _parts(self, examples: Examples, batch: Indices) -> Iterator[Indices]:
        """The batch by increasing length, in parts of like length, within `chunk_tokens` and GRADIENT_BYTES, or of one."""
        alone = isinstance(self.forward, Looped) and self.hooks is None
        most = 1 if alone else max(1, GRADIENT_BYTES // (4 * max(1, self.trained.size)))
        ordered = batch[np.argsort(examples.lengths[batch], kind="stable")]
        lengths = examples.lengths[ordered]
        first, tokens = 0, chunk_tokens(self.adapted.model)
        for i in range(1, len(ordered)):
            fits = i - first < most and (i - first + 1) * lengths[i] <= tokens
            if not fits or lengths[i] > LONGER * lengths[first]:
                yield ordered[first:i]
                first = i
        if len(ordered):
            yield ordered[first:]
