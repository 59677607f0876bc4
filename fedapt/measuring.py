"""An adapter folder on the base that it names, measured on data: what a merge by scores or by certainty looks at.

Rows are read as a run reads them: the columns `text`, or `image`, and `label`, texts as long as a spec's default.
Labels that are words are numbered in their order, as in a simulation. What the data decides, the result tells of it:
no promise of privacy holds for these rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import HEADS, read_adapter
from .client.adapted import AdaptedModel, adapt
from .client.adapters import TASK_TYPES
from .client.evaluation import score
from .client.information import FisherInformation
from .client.models import load_model
from .client.sources import check_labels, encode_labels, load_table, string_labels
from .client.table import Table
from .client.tasks import Examples
from .kernels.cohort import fastest
from .kernels.lowrank import Matrix
from .kernels.merging import fisher
from .protocols.errors import DataError, ModelError
from .protocols.spec import Data, Local, Model, RunSpec
from .server.combining import FLOOR

BASE_WEIGHT = ".base_layer.weight"


@dataclass(frozen=True)
class Measured:
    """A LoRA adapter on its base, and the examples on which it is measured."""

    adapted: AdaptedModel
    examples: Examples

    def scores(self, tensors: Mapping[str, Matrix]) -> dict[str, float]:
        """Mean loss, and accuracy or perplexity, of an adapter of the same shapes, by peft's names."""
        self.adapted.write(self.adapted.layout.join(tensors))
        return score(self.adapted, self.examples).metrics(self.adapted.task)

    def information(self) -> dict[str, Matrix]:
        """The diagonal Fisher information of each adapted module, (out, in) by its name, and of all else that is trained.

        It is that of the module's whole weight, W + s·B·A: entries of a factor of one adapter have nothing to do with
        those of another's, while entries of a weight are the same for all. Raises DataError where the loss is not finite.
        """
        model, transposed = self.adapted.model, set()
        for pair in self.adapted.layout.pairs:
            layer: Any = model.get_submodule(pair.module)
            for factor in (pair.a, pair.b):
                self.adapted.parameters[factor.name].requires_grad_(False)
            layer.base_layer.weight.requires_grad_(True)
            if layer.fan_in_fan_out:
                transposed.add(pair.module)
        dense = adapt(model, self.adapted.task)
        every = np.arange(len(self.examples), dtype=np.int64)
        names = list(dense.parameter_names.values())
        forward = fastest(model, names, dense.batch(self.examples, [every[:2], every[:2]]).inputs)
        measure = FisherInformation(dense, forward, dense.layout, Local())
        found = measure.diagonal(self.examples, every, dense.read())
        if not np.isfinite(found).all():
            raise DataError("the loss of an adapter on these rows is not finite, so how sure it is cannot be measured.")
        tensors = {name.removesuffix(BASE_WEIGHT): values for name, values in dense.layout.split(found).items()}
        return {name: values.T if name in transposed else values for name, values in tensors.items()}


def measured(folder: Path, data: Path) -> Measured:
    """Load the adapter, its base and the rows. Raises ModelError or DataError."""
    if not data.is_file():
        raise DataError(f"--data {data}: no such file.")
    config, tensors = read_adapter(folder)
    tasks = {kind: task for task, kind in TASK_TYPES.items() if task != "prompted-classification"}
    model: dict[str, Any] = {
        "base": str(config.get("base_model_name_or_path") or ""),
        "task": tasks.get(config.get("task_type"), "image-classification"),
    }
    if model["task"] != "causal-lm":
        classes = [values.shape[0] for name, values in tensors.items() if name.endswith(HEADS)]
        if not classes:
            raise ModelError(f"{folder}: holds no classifier, so what its classes are is not known.")
        model["labels"] = classes[-1]
    raw = {"model": model, "adapter": {"start": str(folder)}, "recipe": {"name": "fedit"}}
    spec = RunSpec.check(raw, where=str(folder))
    table = _rows(data, spec.model)
    adapted = load_model(spec)
    if odd := sorted(tensors.keys() ^ adapted.layout.offsets.keys()):
        raise ModelError(
            f"{folder}: {odd[0]} is in the folder or in what its base trains, and not in both; it cannot be measured."
        )
    examples = adapted.task.encode(table)
    if len(examples) == 0:
        raise DataError(f"{data}: nothing is left of it after encoding.")
    return Measured(adapted, examples)


def informed(values: Matrix, information: Matrix, weights: Matrix) -> Matrix:
    """The Fisher-weighted mean of one tensor's values, (K, n) ⇒ (n,), with the floor of the server's aggregator."""
    return fisher(values, information, weights, floor=FLOOR * float(information.mean(dtype=np.float64)) or FLOOR)


def _rows(data: Path, model: Model) -> Table:
    source = str(data)
    table = load_table(Data(source=source), source, model.task)
    if model.labels is None:
        return table
    words = string_labels(table)
    if words and len(words) != model.labels:
        raise DataError(
            f"{data}: its labels are {len(words)} different words, and the adapter has {model.labels} classes, so the "
            "number of each is not known. Write numbers, as the adapter was trained on."
        )
    table = encode_labels(table, words, source) if words else table
    check_labels(table, model.labels, source)
    return table
