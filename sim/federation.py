"""A simulated federation: one model, one source of data divided among many clients."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..client.client import Client, Sites
from ..client.evaluation import score
from ..client.models import AdaptedModel, load_model
from ..client.sources import load_tables
from ..client.tasks import Examples, Indices
from ..protocols.errors import DataError, SpecError
from ..protocols.layout import Flat
from ..protocols.spec import RunSpec
from .partition import Clients, partition


@dataclass(frozen=True)
class Federation:
    """`client` holds the data of all nodes; node i is `names[i]`. `evaluation` is held by nobody."""

    client: Client
    evaluation: Examples
    names: Sequence[str]

    @property
    def adapted(self) -> AdaptedModel:
        return self.client.adapted

    @property
    def empty(self) -> int:
        """Clients without a single example: they are left out."""
        return len(self.names) - len(self.client.nodes())

    def evaluate(self, adapter: Flat) -> dict[str, float]:
        """The metrics of an adapter (fp32, the whole layout) on the evaluation data; leaves it in the model."""
        self.adapted.write(adapter)
        return score(self.adapted, self.evaluation).metrics(self.adapted.task)


def build(spec: RunSpec) -> Federation:
    """Load, divide and encode what the spec names. Raises SpecError, ModelError or DataError."""
    if spec.data is None:
        raise SpecError('[data] is missing: a simulation needs a source, for example source = "train.jsonl"')
    tables = load_tables(spec.data, spec.model, spec.run.seed)
    clients = partition(tables.train, spec.data.partition, spec.run.seed)
    adapted = load_model(spec)
    examples = adapted.task.encode(tables.train)
    evaluation = adapted.task.encode(tables.evaluation)
    if len(examples) == 0 or len(evaluation) == 0:
        raise DataError(f"{spec.data.source}: nothing is left to train or to evaluate on after encoding")
    sites = Sites(examples, dict(enumerate(assign(examples, clients))))
    return Federation(Client(spec, adapted, sites), evaluation, clients.names)


def assign(examples: Examples, clients: Clients) -> list[Indices]:
    """The indices of each client's examples, from the rows of the table that it holds (int64, ascending)."""
    owner = np.full(1 + max((int(rows.max(initial=-1)) for rows in clients.rows), default=-1), -1)
    for number, rows in enumerate(clients.rows):
        owner[rows] = number
    owners = owner[examples.rows]
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(len(clients.rows) + 1))
    return [order[first:last] for first, last in pairwise(bounds)]
