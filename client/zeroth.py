"""Slopes of a model's loss along random directions: probes w ± ε·z as one cohort (MeZO, arXiv 2305.17333, without its
in-place restore, which drifts).

A probe is a member of a cohort: 16 directions are 32 members that share a batch, so their rows run together, and the
frozen blocks below run once for all of them. No gradient is taken and nothing is dropped out. Directions are signs
(`kernels/signs.py`), the same on every machine; losses need not be.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.cohort import Forward, Stack
from ..kernels.directions import Directions, Doubles, Floats
from ..kernels.signs import perturb
from ..protocols.layout import AdapterLayout
from .adapted import AdaptedModel
from .tasks import Examples, Indices

PROBE_TOKENS = 2048
"""Rows × length of the probes that run together: enough to amortize Python, few enough for the caches."""

Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Ask:
    """What one node measures: the losses of its examples `rows`, along its `directions`."""

    rows: Indices
    directions: Directions


@dataclass(frozen=True)
class Losses:
    """Summed losses of each row at each point, float64 (P, rows), and the rows' counted targets, (rows,)."""

    summed: Matrix
    counted: Doubles

    def of_batch(self) -> Doubles:
        """The batch's mean loss over its targets at each point, (P,): what training minimizes."""
        result: Doubles = self.summed.sum(1) / max(self.counted.sum(), 1.0)
        return result

    def of_examples(self) -> Matrix:
        """Each example's mean loss over its own targets, (P, rows)."""
        result: Matrix = self.summed / np.maximum(self.counted, 1.0)
        return result


@dataclass(frozen=True)
class Probing:
    """Measures slopes over one model; `trained` is what the directions move. `sides` is 1 or 2."""

    adapted: AdaptedModel
    forward: Forward
    trained: AdapterLayout
    sides: int = 2

    def slopes(self, examples: Examples, weights: Floats, asks: Sequence[Ask], radius: float) -> list[Doubles]:
        """The slope of each batch's mean loss along each of its directions: float64 (K,), at `weights` (fp32, (n,)).

        Two sides: (l(w + εz) − l(w − εz)) / 2ε; one side: (l(w + εz) − l(w)) / ε, with ε = `radius`.
        """
        return [self._differences(own.of_batch(), radius) for own in self._losses(examples, weights, asks, radius)]

    def slopes_of_examples(self, examples: Examples, weights: Floats, ask: Ask, radius: float) -> Matrix:
        """The slope of each example's own loss along each direction: float64 (rows, K)."""
        (own,) = self._losses(examples, weights, [ask], radius)
        result: Matrix = self._differences(own.of_examples(), radius).T
        return result

    def _differences(self, losses: Any, radius: float) -> Any:
        """From losses at the points of `_points`, (P, …), to slopes, (K, …)."""
        if self.sides == 2:
            return (losses[0::2] - losses[1::2]) / (2 * radius)
        return (losses[1:] - losses[0]) / radius

    def _points(self, ask: Ask, radius: float) -> list[tuple[int, float]]:
        """(direction, move): w + εz and w − εz for each in turn; with one side w first, and then each w + εz."""
        each = range(len(ask.directions))
        if self.sides == 2:
            return [(k, move) for k in each for move in (radius, -radius)]
        return [(0, 0.0), *((k, radius) for k in each)]

    @torch.no_grad()
    def _losses(self, examples: Examples, weights: Floats, asks: Sequence[Ask], radius: float) -> list[Losses]:
        """All points of all asks, as few forwards as PROBE_TOKENS allows."""
        self.adapted.prepare(examples, np.concatenate([ask.rows for ask in asks]))
        summed: list[list[Doubles]] = [[] for _ in asks]
        counted: list[Doubles] = [np.zeros(len(ask.rows)) for ask in asks]
        for chunk in self._chunks(examples, asks, radius):
            points = np.empty((len(chunk), weights.size), np.float32)
            for point, (owner, k, move) in zip(points, chunk, strict=True):
                perturb(weights, move, asks[owner].directions[k], out=point)
            logits, labels = self._logits(examples, asks, [owner for owner, _, _ in chunk], points)
            loss, targets, _ = self.adapted.task.losses(logits, labels)
            rows = loss.double().view(len(chunk), -1).cpu().numpy(), targets.view(len(chunk), -1).cpu().numpy()
            for (owner, _, _), own, count in zip(chunk, *rows, strict=True):
                length = len(asks[owner].rows)
                summed[owner].append(own[:length])
                counted[owner] = count[:length].astype(np.float64)
        return [Losses(np.stack(own), count) for own, count in zip(summed, counted, strict=True)]

    def _chunks(self, examples: Examples, asks: Sequence[Ask], radius: float) -> Iterator[list[tuple[int, int, float]]]:
        """(ask, direction, move) of every point, in order, as many together as keep a forward within PROBE_TOKENS."""
        chunk: list[tuple[int, int, float]] = []
        rows = length = 0
        for owner, ask in enumerate(asks):
            own_rows, own_length = len(ask.rows), int(examples.lengths[ask.rows].max(initial=1))
            for k, move in self._points(ask, radius):
                rows, length = max(rows, own_rows), max(length, own_length)
                if chunk and (len(chunk) + 1) * rows * length > PROBE_TOKENS:
                    yield chunk
                    chunk, rows, length = [], own_rows, own_length
                chunk.append((owner, k, move))
        if chunk:
            yield chunk

    def _logits(
        self, examples: Examples, asks: Sequence[Ask], owners: Sequence[int], points: Floats
    ) -> tuple[Tensor, Tensor]:
        """Logits and labels of a batch with a member for each point: asks are collated once, and repeated for theirs."""
        used = sorted(set(owners))
        batch = self.adapted.batch(examples, [asks[owner].rows for owner in used])
        rows = torch.arange(len(batch.labels), device=self.adapted.device).view(len(used), -1)
        places = rows[[used.index(owner) for owner in owners]].flatten()
        inputs = {key: value[places] for key, value in batch.inputs.items()}
        with self.adapted.prefix.repeating(inputs, batch.inputs, places):
            return self.forward(self._stack(points), inputs), batch.labels[places]

    def _stack(self, points: Floats) -> Stack:
        """Points, fp32 (P, n), as a cohort's tensors."""
        stack, values = {}, torch.from_numpy(points).to(self.adapted.device)
        for tensor in self.trained.tensors:
            name, first = self.adapted.parameter_names[tensor.name], self.trained.offsets[tensor.name]
            own = values[:, first : first + tensor.size].reshape(-1, *tensor.shape)
            stack[name] = own.to(self.adapted.parameters[tensor.name].dtype)
        return stack
