import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.client.tasks import Examples
from fedapt.protocols.errors import DataError, ModelError, SpecError
from fedapt.protocols.layout import Flat
from fedapt.protocols.spec import RunSpec
from fedapt.server.coordinator import Coordinator
from fedapt.server.store import MemoryStore, Row
from fedapt.sim.federation import Federation, assign, build
from fedapt.sim.grid import LocalGrid
from fedapt.sim.partition import Clients

SpecOf = Callable[..., RunSpec]

# peft asks transformers for an attribute that transformers has renamed.


@st.composite
def divided(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """The owner of each row of a table, the row of each example (ascending, some rows cut up or dropped), clients."""
    clients = draw(st.integers(1, 5))
    owners = draw(st.lists(st.integers(0, clients - 1), max_size=20))
    pieces = draw(st.lists(st.integers(0, 3), min_size=len(owners), max_size=len(owners)))
    return owners, [row for row, count in enumerate(pieces) for _ in range(count)], clients


@given(divided())
def test_examples_follow_their_rows(case: tuple[list[int], list[int], int]) -> None:
    owners, rows, clients = case
    held = tuple(np.flatnonzero(np.array(owners, np.int64) == number) for number in range(clients))
    examples = Examples([np.zeros(1, np.int64)] * len(rows), [np.zeros(1, np.int64)] * len(rows), np.array(rows, int))
    assigned = assign(examples, Clients(tuple(map(str, range(clients))), held))
    assert [own.tolist() for own in assigned] == [
        [example for example, row in enumerate(rows) if owners[row] == number] for number in range(clients)
    ]
    assert all(own.dtype == np.int64 for own in assigned)


def train(federation: Federation, spec: RunSpec, **options: Any) -> tuple[Coordinator, list[Row]]:
    coordinator = Coordinator(spec, LocalGrid(federation.client), MemoryStore(), **options)
    return coordinator, list(coordinator.rounds())


def adapters(spec: RunSpec) -> list[Flat]:
    """The whole adapter after each round."""
    coordinator = Coordinator(spec, LocalGrid(build(spec).client), MemoryStore())
    return [coordinator.adapter() for _ in coordinator.rounds()]


def test_every_example_is_at_one_client(spec_of: SpecOf, folder: Path) -> None:
    federation = build(spec_of("data.partition.kind=natural", "data.partition.column=site"))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert federation.names == ("s0", "s1", "s2", "s3")
    assert federation.client.nodes() == [0, 1, 2, 3]
    for node, own in federation.client.sites.indices.items():
        assert [rows[i]["site"] for i in own] == [f"s{node}"] * len(own)
        assert [int(federation.client.sites.examples.labels[i]) for i in own] == [rows[i]["label"] for i in own]
    assert len(federation.evaluation) == 24


def test_empty_clients_are_counted_and_skipped(spec_of: SpecOf) -> None:
    spec = spec_of("data.partition.clients=40", "data.partition.alpha=0.02", "run.rounds=1")
    federation = build(spec)
    assert 0 < federation.empty < 40
    assert len(federation.client.nodes()) == 40 - federation.empty
    assert all(len(federation.client.sites.indices[node]) > 0 for node in federation.client.nodes())
    _, (row,) = train(federation, spec)
    assert (row["nodes"], row["empty"]) == (40 - federation.empty, 0)


def test_evaluation_is_of_the_adapter_that_is_given(spec_of: SpecOf) -> None:
    spec = spec_of("run.rounds=5", "local.learning_rate=0.5", "local.steps=8")
    federation = build(spec)
    coordinator, rows = train(federation, spec, evaluate=federation.evaluate)
    first = coordinator.store.rows("run")[0]
    assert first["evaluation"] == federation.evaluate(federation.client.start)
    assert rows[-1]["evaluation"] == federation.evaluate(coordinator.adapter())
    assert set(first["evaluation"]) == {"loss", "accuracy"}
    assert rows[-1]["evaluation"]["loss"] < first["evaluation"]["loss"] - 0.01, "it learns"


@pytest.mark.parametrize("recipe", ["fedsvd", "flexlora"])
def test_a_run_is_repeated_byte_for_byte(spec_of: SpecOf, recipe: str) -> None:
    overrides = (f"recipe.name={recipe}", "wire.codec=int8", "participation.sampling=poisson", "participation.rate=0.6")
    spec = spec_of(*overrides)
    (first, second), other = [adapters(spec)[-1] for _ in range(2)], adapters(spec.set("run.seed=4"))[-1]
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != other.tobytes()


def products(federation: Federation, adapter: Flat) -> np.ndarray[Any, np.dtype[np.float64]]:
    """All products `B·A`, and the heads, as one vector."""
    layout = federation.adapted.layout
    tensors = {name: tensor.astype(np.float64) for name, tensor in layout.split(adapter).items()}
    heads = [tensors[t.name].ravel() for t in layout.tensors if t.role == "other"]
    return np.concatenate([*((tensors[p.b.name] @ tensors[p.a.name]).ravel() for p in layout.pairs), *heads])


def difference(spec: RunSpec) -> float:
    """The largest relative difference between the products of fedsvd and of ffa with an orthonormal A, over rounds."""
    federation = build(spec)
    pair = [adapters(spec.set(*recipe)) for recipe in (["recipe.name=fedsvd"], ["recipe.name=ffa", INITIAL])]
    seen = [(products(federation, one), products(federation, other)) for one, other in zip(*pair, strict=True)]
    assert len(seen) == spec.run.rounds
    return max(float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in seen)


INITIAL = "recipe.initial_a=orthonormal"


def test_fedsvd_is_ffa_with_an_orthonormal_a_under_sgd(spec_of: SpecOf) -> None:
    assert difference(spec_of("run.rounds=10")) <= 1e-6


def test_under_adamw_the_two_differ(spec_of: SpecOf) -> None:
    assert difference(spec_of("run.rounds=4", "local.optimizer=adamw", "local.learning_rate=1e-2")) > 1e-3


def test_what_cannot_be_built(spec_of: SpecOf, folder: Path) -> None:
    spec = spec_of()
    with pytest.raises(SpecError, match=r"\[data\] is missing"):
        build(spec.model_copy(update={"data": None}))
    with pytest.raises(DataError, match="no such file"):
        build(spec.set("data.source=nowhere.jsonl"))
    with pytest.raises(DataError, match=r"data\.partition\.clients = 61, but the training data has 60 rows"):
        build(spec.set("data.partition.clients=61"))
    with pytest.raises(DataError, match=r"label 2 is not in the legal range 0\.\.1"):
        build(spec.set("model.labels=2"))
    with pytest.raises(ModelError, match="no such folder"):
        build(spec.set("model.base=./nowhere"))
