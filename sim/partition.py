"""Which rows of one table each virtual client holds."""

from dataclasses import dataclass

import numpy as np

from ..client.sources import Indices, groups
from ..client.table import Table
from ..protocols.errors import DataError, SpecError
from ..protocols.keys import derive, generator
from ..protocols.spec import Partition


@dataclass(frozen=True)
class Clients:
    """The virtual clients: their names for reports, and the rows each holds (int64, ascending; may be empty)."""

    names: tuple[str, ...]
    rows: tuple[Indices, ...]


def partition(table: Table, spec: Partition, seed: int) -> Clients:
    """Give every row of `table` to exactly one client; the same seed divides in the same way.

    `iid`: equal shares of a shuffle. `dirichlet`: for each label, shares drawn from Dirichlet(`alpha`) (Hsu et al.
    2019); `by-column`: the same over `column`. `pathological`: `classes` labels a client (McMahan et al. 2017, as
    drawn by Li et al. 2022). `natural`: one client for each value of `column`, whose name it bears; `clients` is
    ignored. Raises DataError where the table cannot be divided so, SpecError where it has no labels to divide by.
    """
    if spec.kind == "natural":
        return _natural(table, spec)
    if spec.clients > len(table):
        raise DataError(
            f"data.partition.clients = {spec.clients}, but the training data has {len(table)} rows. "
            "Lower the number of clients, or add data."
        )
    order = generator(derive(seed, "partition", "order")).permutation(len(table))
    if spec.kind == "iid":
        # These are the shards of flwr_datasets' IidPartitioner, which takes a millisecond to load each of them.
        parts = np.array_split(order, spec.clients)
    else:
        from .flower_partition import flower_parts  # seconds, which the other kinds need not wait for

        # flwr cuts each class where its rows stand in the file: it is given them in keyed order.
        codes = _codes(table, spec)[order]
        parts = [order[np.asarray(part, np.int64)] for part in flower_parts(codes, spec, seed)]
    names = tuple(f"client {number}" for number in range(spec.clients))
    return Clients(names, tuple(np.sort(part) for part in parts))


def _natural(table: Table, spec: Partition) -> Clients:
    """What flwr_datasets' NaturalIdPartitioner does row by row in Python under a progress bar that cannot be hidden."""
    assert spec.column is not None  # the spec requires it for this kind
    names, member = groups(table, spec.column)
    ends = np.cumsum(np.bincount(member))
    return Clients(names, tuple(np.split(np.argsort(member, kind="stable"), ends[:-1])))


def _codes(table: Table, spec: Partition) -> Indices:
    """For each row the number of the class that it is divided by."""
    if spec.kind == "by-column":
        assert spec.column is not None  # the spec requires it for this kind
        return groups(table, spec.column)[1]
    if "label" not in table.column_names:
        raise SpecError(
            f'data.partition.kind = "{spec.kind}" divides by label, and this data has no label. '
            'Use "by-column" or "natural" with data.partition.column, or "iid".'
        )
    return groups(table, "label")[1]
