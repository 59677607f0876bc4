"""Which rows of one table each virtual client holds."""

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ..client.sources import Indices, groups
from ..protocols.errors import DataError, SpecError
from ..protocols.keys import derive, generator
from ..protocols.spec import Partition

# From here on all shares are equal to nine digits; much further on NumPy's draw overflows to zeros.
LARGEST_ALPHA = 1e18


@dataclass(frozen=True)
class Clients:
    """The virtual clients: their names for reports, and the rows each holds (int64, ascending; may be empty)."""

    names: tuple[str, ...]
    rows: tuple[Indices, ...]


class _Column(datasets.Dataset):  # type: ignore[misc]
    """A table that hands out a column as an array: flwr would have `datasets` build it row by row, in seconds."""

    def __getitem__(self, name: str) -> Any:
        return self.data.column(name).to_numpy()


def partition(table: datasets.Dataset, spec: Partition, seed: int) -> Clients:
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
        # flwr cuts each class where its rows stand in the file: it is given them in keyed order.
        codes = _codes(table, spec)[order]
        parts = [order[np.asarray(part, np.int64)] for part in _flower_parts(codes, spec, seed)]
    names = tuple(f"client {number}" for number in range(spec.clients))
    return Clients(names, tuple(np.sort(part) for part in parts))


def _natural(table: datasets.Dataset, spec: Partition) -> Clients:
    """What flwr_datasets' NaturalIdPartitioner does row by row in Python under a progress bar that cannot be hidden."""
    assert spec.column is not None  # the spec requires it for this kind
    names, member = groups(table, spec.column)
    ends = np.cumsum(np.bincount(member))
    return Clients(names, tuple(np.split(np.argsort(member, kind="stable"), ends[:-1])))


def _codes(table: datasets.Dataset, spec: Partition) -> Indices:
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


def _flower_parts(codes: Indices, spec: Partition, seed: int) -> list[Any]:
    """For each client its places in `codes`, as flwr_datasets divides them (with a generator of its own)."""
    # Its import brings in seaborn and takes seconds, which the other kinds of partition need not wait for.
    from flwr_datasets.partitioner import DirichletPartitioner, PathologicalPartitioner

    key = derive(seed, "partition", spec.kind)
    partitioner: Any
    if spec.kind == "pathological":
        _check_classes(codes, spec)
        partitioner = PathologicalPartitioner(
            num_partitions=spec.clients,
            partition_by="code",
            num_classes_per_partition=spec.classes,
            # "random" may leave a class to nobody, and drops its rows.
            class_assignment_mode="first-deterministic",
            shuffle=False,
            seed=key,
        )
    else:
        partitioner = DirichletPartitioner(
            num_partitions=spec.clients,
            partition_by="code",
            alpha=min(spec.alpha, LARGEST_ALPHA),
            min_partition_size=0,
            self_balancing=False,
            shuffle=False,
            seed=key,
        )
    partitioner.dataset = _Column.from_dict({"code": codes})
    try:
        partitioner.load_partition(0)  # the first load divides for all clients
    except ValueError as error:
        raise DataError(_too_thin(codes, spec)) from error
    return [partitioner._partition_id_to_indices[client] for client in range(spec.clients)]


def _check_classes(codes: Indices, spec: Partition) -> None:
    """Raises DataError where a pathological partition cannot give every class to somebody."""
    labels = int(codes.max()) + 1
    if spec.classes > labels:
        raise DataError(
            f"data.partition.classes = {spec.classes}, but the training data has {labels} labels. "
            f"Set it to {labels} or less."
        )
    if spec.clients < labels and spec.classes < labels:
        raise DataError(
            f"data.partition.clients = {spec.clients} is less than the {labels} labels of the training data: with "
            f"{spec.classes} labels a client, some label would belong to nobody. "
            f'Set data.partition.clients to {labels} or more, or use kind = "dirichlet".'
        )


def _too_thin(codes: Indices, spec: Partition) -> str:
    return (
        f"{spec.clients} clients of {spec.classes} labels each need more rows of some label than there are "
        f"(the rarest label has {np.bincount(codes).min()} rows). "
        'Lower data.partition.clients or data.partition.classes, or use kind = "dirichlet".'
    )
