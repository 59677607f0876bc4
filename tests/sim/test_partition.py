import random
from typing import Any

import datasets
import numpy as np
import pytest
from flwr_datasets.partitioner import IidPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.protocols.errors import DataError, SpecError
from fedapt.protocols.spec import Partition
from fedapt.sim.partition import Clients, partition

SEEDS = st.integers(0, 2**63 - 1)


def table(labels: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"label": labels, "site": [f"site {label}" for label in labels]})


def divide(labels: list[int], seed: int = 0, **spec: Any) -> Clients:
    return partition(table(labels), Partition.model_validate(spec), seed)


def plain(clients: Clients) -> list[list[int]]:
    return [rows.tolist() for rows in clients.rows]


def assert_complete(clients: Clients, count: int) -> None:
    """Every row in exactly one client, ascending."""
    assert len(clients.names) == len(clients.rows)
    assert len(set(clients.names)) == len(clients.names)
    assert sorted(np.concatenate(clients.rows).tolist()) == list(range(count))
    for rows in clients.rows:
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()


@settings(max_examples=25, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), data=st.data(), seed=SEEDS)
def test_iid_gives_equal_shares_of_every_row(labels: list[int], data: st.DataObject, seed: int) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    divided = divide(labels, seed, clients=clients)
    assert_complete(divided, len(labels))
    assert {len(rows) for rows in divided.rows} <= {len(labels) // clients, -(-len(labels) // clients)}
    assert plain(divided) == plain(divide(labels, seed, clients=clients))


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    data=st.data(),
    alpha=st.one_of(st.sampled_from([5e-324, 1e-300, 1e-3, 1e9, 1e300, 1.7e308]), st.floats(1e-3, 1e3)),
    seed=SEEDS,
    kind=st.sampled_from(["dirichlet", "by-column"]),
)
def test_dirichlet_gives_every_row_once(
    labels: list[int], data: st.DataObject, alpha: float, seed: int, kind: str
) -> None:
    spec = {"kind": kind, "column": "site", "clients": data.draw(st.integers(1, len(labels))), "alpha": alpha}
    divided = divide(labels, seed, **spec)
    assert len(divided.rows) == spec["clients"]
    assert_complete(divided, len(labels))
    assert plain(divided) == plain(divide(labels, seed, **spec))


@settings(max_examples=25, deadline=None)
@given(classes=st.integers(1, 4), labels=st.integers(4, 6), clients=st.integers(6, 12), seed=SEEDS)
def test_pathological_gives_each_client_its_number_of_labels(
    classes: int, labels: int, clients: int, seed: int
) -> None:
    rows = [i % labels for i in range(labels * clients)]
    spec = {"kind": "pathological", "clients": clients, "classes": classes}
    divided = divide(rows, seed, **spec)
    assert_complete(divided, len(rows))
    assert all(len(set(np.array(rows)[own])) == classes for own in divided.rows)
    assert plain(divided) == plain(divide(rows, seed, **spec))


@settings(max_examples=25, deadline=None)
@given(labels=st.lists(st.integers(0, 30), min_size=1, max_size=80), seed=SEEDS)
def test_natural_gives_one_client_for_each_value(labels: list[int], seed: int) -> None:
    divided = divide(labels, seed, kind="natural", column="site", clients=999)
    assert_complete(divided, len(labels))
    assert list(divided.names) == sorted({f"site {label}" for label in labels})
    for name, own in zip(divided.names, divided.rows, strict=True):
        assert {f"site {labels[row]}" for row in own} == {name}


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "by-column"])
def test_another_seed_divides_otherwise(kind: str) -> None:
    labels = [i % 4 for i in range(200)]
    first, other = (divide(labels, seed, kind=kind, column="site", clients=8) for seed in (1, 2))
    assert plain(first) != plain(other)
    assert first.names == tuple(f"client {i}" for i in range(8))


@pytest.mark.parametrize(("rows", "clients"), [(10, 3), (7, 7), (100, 13)])
def test_iid_shards_are_flowers(rows: int, clients: int) -> None:
    flower = IidPartitioner(clients)
    flower.dataset = datasets.Dataset.from_dict({"row": list(range(rows))})
    sizes = [len(flower.load_partition(client)) for client in range(clients)]
    assert [len(own) for own in divide([0] * rows, clients=clients).rows] == sizes


def test_alpha_sets_how_uneven_clients_are() -> None:
    labels = [i % 2 for i in range(2000)]

    def spread(alpha: float) -> float:
        return float(np.std([len(rows) for rows in divide(labels, kind="dirichlet", clients=20, alpha=alpha).rows]))

    assert spread(0.1) > 3 * spread(10.0) > 3 * spread(1e300)


def test_rows_of_a_class_are_not_dealt_in_file_order() -> None:
    divided = divide([0] * 1000, kind="dirichlet", clients=2, alpha=1e6)
    assert np.diff(divided.rows[0]).max() > 1


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "by-column"])
def test_more_clients_than_rows(kind: str) -> None:
    with pytest.raises(DataError, match=r"clients = 4, but the training data has 3 rows"):
        divide([0, 1, 0], kind=kind, column="site", clients=4)


@pytest.mark.parametrize("kind", ["dirichlet", "pathological"])
def test_text_without_labels(kind: str) -> None:
    text = datasets.Dataset.from_dict({"text": ["a", "b"]})
    with pytest.raises(SpecError, match=f'"{kind}" divides by label.*"by-column" or "natural".*"iid"'):
        partition(text, Partition.model_validate({"kind": kind, "clients": 2}), 0)


@pytest.mark.parametrize("kind", ["natural", "by-column"])
def test_an_unknown_column(kind: str) -> None:
    with pytest.raises(DataError, match=r'no column "sites"; the columns are label, site\. Set .* = "site"'):
        divide([0, 1], kind=kind, column="sites", clients=2)


def test_pathological_partitions_that_cannot_be() -> None:
    with pytest.raises(DataError, match=r"classes = 3, but the training data has 2 labels"):
        divide([0, 1] * 5, kind="pathological", clients=2, classes=3)
    with pytest.raises(DataError, match=r"clients = 2 is less than the 4 labels.*Set data.partition.clients to 4"):
        divide([0, 1, 2, 3] * 5, kind="pathological", clients=2, classes=2)
    with pytest.raises(DataError, match=r"10 clients of 2 labels.*rarest label has 1 rows"):
        divide([0] * 30 + [1], kind="pathological", clients=10, classes=2)


def test_no_global_generator_is_touched() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    for kind in ("iid", "dirichlet", "pathological", "by-column", "natural"):
        divide([0, 1] * 20, kind=kind, column="site", clients=4)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
