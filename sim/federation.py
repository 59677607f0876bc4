"""A simulated federation: one model, one source of data divided among many clients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..client.accounts import Accounts
from ..client.adapted import AdaptedModel
from ..client.client import Client, Sites
from ..client.evaluation import score
from ..client.models import load_model
from ..client.private import require_whole_rows
from ..client.sources import load_tables
from ..client.tasks import Examples, Indices
from ..protocols.errors import DataError, SpecError
from ..protocols.keys import derive, generator
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

    def under(self, spec: RunSpec) -> "Federation":
        """The same data under another spec (of the same base and task): the model is loaded anew.

        What the frozen blocks gave for an example stays known, if the base is the same to the bit.
        """
        adapted = load_model(spec)
        if spec.model == self.client.spec.model:
            adapted.prefix.share(self.adapted.prefix)
        return replace(self, client=Client(spec, adapted, self.client.sites))

    def keeping(self, accounts: Accounts) -> "Federation":
        """The same federation, its nodes charged in these accounts."""
        return replace(self, client=self.client.keeping(accounts))

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
    evaluation = _drawn(adapted.task.encode(tables.evaluation), spec.data.evaluation_limit, spec.run.seed)
    if len(examples) == 0 or len(evaluation) == 0:
        raise DataError(f"{spec.data.source}: nothing is left to train or to evaluate on after encoding")
    require_whole_rows(spec, examples)
    sites = Sites(examples, dict(enumerate(assign(examples, clients))))
    return Federation(Client(spec, adapted, sites), evaluation, clients.names)


def _drawn(examples: Examples, limit: int | None, seed: int) -> Examples:
    """At most `limit` of the examples, drawn by key, in their order."""
    if limit is None or limit >= len(examples):
        return examples
    kept = np.sort(generator(derive(seed, "evaluation")).permutation(len(examples))[:limit])
    return Examples([examples.inputs[i] for i in kept], [examples.labels[i] for i in kept], examples.rows[kept])


def assign(examples: Examples, clients: Clients) -> list[Indices]:
    """The indices of each client's examples, from the rows of the table that it holds (int64, ascending)."""
    owner = np.full(1 + max((int(rows.max(initial=-1)) for rows in clients.rows), default=-1), -1)
    for number, rows in enumerate(clients.rows):
        owner[rows] = number
    owners = owner[examples.rows]
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(len(clients.rows) + 1))
    return [order[first:last] for first, last in pairwise(bounds)]
