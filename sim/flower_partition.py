"""The divisions by label that flwr_datasets makes: Dirichlet and pathological.

Its import brings in the datasets library and seaborn, and takes seconds: `partition.py` imports this where it is needed.
"""

from typing import Any

import datasets
import numpy as np
from flwr_datasets.partitioner import DirichletPartitioner, PathologicalPartitioner

from ..client.sources import Indices
from ..protocols.errors import DataError
from ..protocols.keys import derive
from ..protocols.spec import Partition

# From here on all shares are equal to nine digits; much further on NumPy's draw overflows to zeros.
LARGEST_ALPHA = 1e18


class _Column(datasets.Dataset):  # type: ignore[misc]
    """A table that hands out a column as an array: flwr would have `datasets` build it row by row, in seconds."""

    def __getitem__(self, name: str) -> Any:
        return self.data.column(name).to_numpy()


def flower_parts(codes: Indices, spec: Partition, seed: int) -> list[Any]:
    """For each client its places in `codes`, as flwr_datasets divides them (with a generator of its own).

    Raises DataError where they cannot be divided so.
    """
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
