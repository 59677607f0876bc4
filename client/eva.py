"""EVA (Paischer et al., arXiv 2410.07170 §3): A starts as the directions in which the inputs of its layer are largest.

The rows of A are the leading right singular vectors of the layer's inputs on a sample of `adapter.public`: they are
orthonormal, and of all A's of this rank they keep most of what the layer sees there. B starts at zero, so training
begins at the base. Ranks stay as they are (the paper's ρ = 1): nodes must agree on them.

No data but that of `adapter.public` is read here. A node's own data would tell of itself in A, which is sent to all,
before any noise is added.

Two machines round differently, and directions of nearly equal weight may then turn altogether. So no node counts on
its own A: the one in the server's start, of the node that described the model, is part of what every node receives
(`protocols.recipes.Recipe.downlink`).

`peft`'s own EVA is not used: it fits a randomized PCA, centred, until it seems to have converged, and prints as it goes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..protocols.errors import DataError, ModelError
from ..protocols.keys import derive, generator
from ..protocols.spec import Data, Partition, RunSpec
from .adapted import AdaptedModel
from .sources import load_table
from .tasks import Examples, Indices, Task

Matrix = np.ndarray[Any, np.dtype[np.float32]]

EXAMPLES, ROWS = 128, 16
"""Examples that are looked at: some thousand tokens settle a few directions. They pass the model ROWS at a time."""

MARGIN = 8
"""Directions kept beyond twice the rank while batches go by: what is small in one batch may be large in all."""


@dataclass(frozen=True)
class Directions:
    """The leading right singular vectors (k, in) of the rows seen so far, and their singular values (k,), falling."""

    values: Matrix
    vectors: Matrix

    @classmethod
    def none(cls, inputs: int) -> "Directions":
        return cls(np.zeros(0, np.float32), np.zeros((0, inputs), np.float32))

    def after(self, rows: Matrix, keep: int) -> "Directions":
        """These and further rows (n, in), by an SVD of both stacked (incremental SVD, Ross et al. 2008, uncentred).

        Formal guarantees: as long as all rows seen span at most `keep` dimensions, it is the SVD of all of them.
        """
        stacked = np.concatenate([self.values[:, None] * self.vectors, rows])
        kept = min(keep, *stacked.shape)
        if kept == 0:
            return self
        from sklearn.utils.extmath import randomized_svd  # takes as long to import as everything else together

        # The key is fixed, because any start of the iteration will do that is not orthogonal to the answer.
        _, values, vectors = randomized_svd(stacked, kept, random_state=0)
        return Directions(values, vectors)


def directions_reference(rows: Matrix, rank: int) -> Matrix:
    """The `rank` leading right singular vectors (rank, in) of all rows at once."""
    return np.asarray(np.linalg.svd(rows, full_matrices=False)[2][:rank])


def start_from_public(adapted: AdaptedModel, spec: RunSpec) -> None:
    """Put the leading directions on `adapter.public` into every A of a model whose B's are zero.

    Raises DataError where that data cannot be read or is too little, ModelError where a rank exceeds a layer's inputs.
    """
    for pair in adapted.layout.pairs:
        if pair.rank > pair.a.shape[1]:
            raise ModelError(f"adapter.rank = {pair.rank}: {pair.module} has only {pair.a.shape[1]} inputs.")
    found = input_directions(adapted, public_examples(spec, adapted.task))
    flat = adapted.read()
    for pair in adapted.layout.pairs:
        vectors = found[pair.module].vectors
        if len(vectors) < pair.rank:
            raise DataError(
                f"adapter.public = {spec.adapter.public!r}: gives {pair.module} only {len(vectors)} inputs, and "
                f"adapter.rank = {pair.rank} needs as many. Name a larger source, or lower the rank."
            )
        adapted.layout.view(flat, pair.a.name)[...] = vectors[: pair.rank]
    adapted.write(flat)


def public_examples(spec: RunSpec, task: Task) -> Examples:
    """At most EXAMPLES of `adapter.public`, drawn by key; of a text for classification no label is needed, or read."""
    source = str(spec.adapter.public)
    data = (spec.data or Data(source=source)).model_copy(update={"limit": None, "partition": Partition()})
    key = derive(spec.run.seed, "public")
    try:
        if spec.model.task == "sequence-classification":
            plain = data.model_copy(update={"prompt": None, "response": None})
            table = _drawn(load_table(plain, source, "causal-lm").select_columns(["text"]), key)
            table = table.add_column("label", [0] * len(table))
        else:
            table = _drawn(load_table(data, source, spec.model.task), key)
    except DataError as error:
        raise DataError(f"adapter.public: {error}") from error
    examples = task.encode(table)
    chosen = _chosen(len(examples), key)
    return Examples([examples.inputs[i] for i in chosen], [examples.labels[i] for i in chosen], examples.rows[chosen])


def _drawn(table: Any, key: int) -> Any:
    return table.select(_chosen(len(table), key))


def _chosen(count: int, key: int) -> Indices:
    return np.sort(generator(key).permutation(count)[:EXAMPLES])


@torch.no_grad()
def input_directions(adapted: AdaptedModel, examples: Examples) -> dict[str, Directions]:
    """Module of each pair ⇒ the directions of its inputs on these examples, padding left out."""
    found = {pair.module: Directions.none(pair.a.shape[1]) for pair in adapted.layout.pairs}
    mask: Tensor | None = None

    def watch(module: str, keep: int) -> Any:
        def look(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[module] = found[module].after(_rows(inputs[0], mask), keep)

        return look

    handles = []
    for pair in adapted.layout.pairs:
        layer = adapted.model.get_submodule(adapted.parameter_names[pair.a.name].partition(".lora_A.")[0])
        handles.append(layer.register_forward_pre_hook(watch(pair.module, 2 * pair.rank + MARGIN)))
    try:
        order = np.argsort(examples.lengths, kind="stable")
        for first in range(0, len(order), ROWS):
            batch = adapted.task.collate(examples, [order[first : first + ROWS]]).inputs
            inputs = {key: value.to(adapted.device) for key, value in batch.items()}
            mask = inputs.get("attention_mask")
            adapted.model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _rows(x: Tensor, mask: Tensor | None) -> Matrix:
    """The inputs of a layer as rows (n, in): one a token, where the layer sees tokens."""
    if mask is not None and mask.shape == x.shape[:-1]:
        x = x[mask.bool()]
    rows: Matrix = x.reshape(-1, x.shape[-1]).float().cpu().numpy()
    return rows
