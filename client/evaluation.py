"""Evaluation of the adapter that is in the model, example by example, so that any grouping is a sum."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .adapted import AdaptedModel
from .tasks import Examples, Task

EVALUATION_TOKENS = 8192
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Scores:
    """Summed loss (nats), counted targets and correct predictions of each example, each (n,)."""

    loss: Array
    counted: Array
    correct: Array

    def of(self, indices: Array) -> "Scores":
        return Scores(self.loss[indices], self.counted[indices], self.correct[indices])

    def metrics(self, task: Task) -> dict[str, float]:
        """Mean loss over all targets, and the task's metric: accuracy in 0 … 1, or perplexity."""
        targets = max(1.0, float(self.counted.sum()))
        loss = float(self.loss.sum()) / targets
        if task.metric == "accuracy":
            return {"loss": loss, "accuracy": float(self.correct.sum()) / targets}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


@torch.no_grad()
def score(adapted: AdaptedModel, examples: Examples, indices: Array | None = None) -> Scores:
    """Scores of all examples (or of `indices`), through the model's own forward; like lengths share a batch."""
    chosen = np.arange(len(examples)) if indices is None else np.asarray(indices)
    adapted.prepare(examples, chosen)
    lengths = examples.lengths[chosen]
    order = np.argsort(-lengths, kind="stable")
    result = np.zeros((3, len(chosen)))
    position = 0
    while position < len(order):
        rows = max(1, EVALUATION_TOKENS // max(1, int(lengths[order[position]])))
        own = order[position : position + rows]
        batch = adapted.batch(examples, [chosen[own]])
        logits = adapted.model(**batch.inputs).logits.float()
        result[:, own] = torch.stack(adapted.task.losses(logits, batch.labels)).cpu().numpy()
        position += rows
    return Scores(*result)
