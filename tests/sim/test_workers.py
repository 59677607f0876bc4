"""Workers: the bytes of one process, whatever their number; one copy of the base; and what happens when one dies."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedapt.client.accounts import Accounts
from fedapt.client.client import Client, Kept
from fedapt.protocols.codecs import CODECS
from fedapt.protocols.errors import ModelError, PayloadError, RunError
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Update
from fedapt.server.coordinator import Coordinator
from fedapt.server.grid import NodeGrid
from fedapt.server.store import MemoryStore
from fedapt.sim import grid as grid_module
from fedapt.sim.federation import build
from fedapt.sim.grid import LocalGrid, portions
from fedapt.sim.image import ALIGNMENT, aligned, image
from fedapt.sim.workers import Portion, WorkerGrid, processes

SpecOf = Callable[..., RunSpec]


@pytest.fixture(autouse=True)
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round in several portions, so that workers share it."""
    monkeypatch.setattr(grid_module, "PORTION", 2)


def trained(spec: RunSpec, grid: NodeGrid) -> tuple[bytes, list[dict[str, Any]]]:
    coordinator = Coordinator(spec, grid, MemoryStore())
    rows = [{**row, "seconds": 0} for row in coordinator.rounds()]
    return coordinator.adapter().tobytes(), rows


PRIVATE = [
    "recipe.weighting=uniform",
    "privacy.unit=example",
    "privacy.noise=simulation",
    "privacy.epsilon=50",
    "privacy.noise_multiplier=2",
    "data.partition.kind=iid",
    "data.partition.clients=3",
    "run.evaluate_every=3",
]
"""Nodes of one size, and noise that is given: each account takes a second, and each noise that is solved for ten."""


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe.name=fedsvd", "adapter.dropout=0.1"],
        ["recipe.name=fedsvd", "wire.codec=top-k", "wire.density=0.3"],
        ["recipe.name=diloco", "local.optimizer=adamw", "local.learning_rate=0.01", "recipe.fragments=2"],
        pytest.param(["recipe.name=ffa", *PRIVATE], marks=pytest.mark.slow),
        ["recipe.name=fedit", "model.precision=bf16", "participation.sampling=fixed", "participation.rate=0.7"],
    ],
    ids=lambda overrides: " ".join(override.partition("=")[2] for override in overrides[:2]),
)
def test_the_result_does_not_depend_on_the_number_of_workers(spec_of: SpecOf, overrides: list[str]) -> None:
    """Three rounds, so that what a node keeps of one round is used in the next, by another worker."""
    spec = spec_of(*overrides, "run.rounds=3")
    alone = build(spec).client
    results = [trained(spec, LocalGrid(alone.under(spec)))]
    for count in (1, 2, 3) if spec.privacy.unit == "example" else (2,):  # a start of workers costs seconds
        client = alone.under(spec)
        with processes(client, count) as pool:
            results.append(trained(spec, WorkerGrid(client, pool)))
    assert all(result == results[0] for result in results[1:])
    assert results[0][0] != alone.start.tobytes()


def test_what_a_node_keeps_must_travel(spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without it, error feedback is another computation, and the test above would see it."""
    spec = spec_of("recipe.name=fedsvd", "wire.codec=top-k", "wire.density=0.3", "run.rounds=3")
    client = build(spec).client
    whole = trained(spec, LocalGrid(client.under(spec)))
    grid = WorkerGrid(client.under(spec), Here(client.under(spec)))
    assert trained(spec, grid) == whole
    forgetful = WorkerGrid(client.under(spec), Here(client.under(spec)))
    monkeypatch.setattr(forgetful.client, "keep", lambda assignments, kept: None)
    assert trained(spec, forgetful)[0] != whole[0]


class Here:
    """A pool that is no process."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def train(self, work: Sequence[Portion]) -> Iterator[tuple[list[Update], Kept]]:
        return (portion.train(self.client) for portion in work)


@pytest.mark.slow
def test_ledgers_are_charged_once(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of("recipe.name=ffa", *PRIVATE)
    client = build(spec).client.keeping(Accounts(tmp_path / "two"))
    with processes(client, 2) as pool:
        trained(spec, WorkerGrid(client, pool))
    alone = client.keeping(Accounts(tmp_path / "one"))
    trained(spec, LocalGrid(alone))
    for accounts in (client.accounts, alone.accounts):
        for node in client.nodes():
            rows = [(entry.run, entry.round, entry.event) for entry in accounts._file(node).chain().entries]
            assert [round_ for _, round_, _ in rows] == [1, 2]


def test_a_round_is_cut_into_parts_of_like_size() -> None:
    for count in range(12):
        asked = [Assignment("run", 1, 1, node, "", b"") for node in range(count)]
        for most in (1, 2, 9):
            cut = portions(asked, most)
            assert [assignment for own in cut for assignment in own] == asked
            assert all(0 < len(own) <= min(2, most) for own in cut)  # of two at most, see above
            assert len(cut) == count or len(cut) % 4 == 0, "two or four workers have as many each"


def test_an_error_in_a_worker_comes_back_as_it_is(spec_of: SpecOf) -> None:
    spec = spec_of()
    client = build(spec).client
    with processes(client, 2) as pool:
        grid = WorkerGrid(client, pool)
        grid.send([Assignment("run", 1, 1, 0, "", b"")])
        with pytest.raises(PayloadError, match="0 bytes received"):
            list(grid.replies(1.0))


def test_a_worker_that_is_killed_ends_the_run_and_it_goes_on(spec_of: SpecOf) -> None:
    spec = spec_of("recipe.name=fedsvd")
    client = build(spec).client
    store = MemoryStore()
    with processes(client, 2) as pool:
        coordinator = Coordinator(spec, WorkerGrid(client, pool), store)
        rounds = coordinator.rounds()
        next(rounds)
        os.kill(pool.pids[1], signal.SIGKILL)
        with pytest.raises(RunError, match=r"worker 2 \(process \d+\) was killed by signal 9.*start the run again"):
            next(rounds)
        pids = pool.pids
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with processes(client, 2) as pool:
        resumed = Coordinator(spec, WorkerGrid(client, pool), store)
        assert len(list(resumed.rounds())) == 1
    assert resumed.adapter().tobytes() == trained(spec, LocalGrid(build(spec).client))[0]


def test_who_stops_listening_leaves_no_answers_behind(spec_of: SpecOf) -> None:
    """As a coordinator does that has enough of a round with spares."""
    client = build(spec_of()).client
    state, own = client.shared.initial_state(), client.shared.delivered(1)
    payload = CODECS["fp32"].encode(state, own, 0)
    work = [Portion([Assignment("run", 1, 1, node, "", payload)], client.kept([])) for node in range(4)]
    with processes(client, 2) as pool:
        first = pool.train(work)
        assert next(first)[0][0].node == 0
        del first
        assert [updates[0].node for updates, _ in pool.train(work[2:])] == [2, 3]


def test_workers_ignore_ctrl_c_and_end_with_the_pool(spec_of: SpecOf) -> None:
    spec = spec_of()
    client = build(spec).client
    with processes(client, 2) as pool:
        before = trained(spec, WorkerGrid(client, pool))
        for pid in pool.pids:
            os.kill(pid, signal.SIGINT)
        assert trained(spec, WorkerGrid(client, pool)) == before
        pids = pool.pids
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_an_image_shares_what_is_frozen_and_nothing_else(spec_of: SpecOf) -> None:
    client = build(spec_of()).client
    start = client.start.copy()
    before = [parameter.data_ptr() % ALIGNMENT for parameter in client.adapted.model.parameters()]
    assert any(before), "the weights stand where the file has them, or there is nothing to see here"
    found, block = image(client, aligned)
    first, second = found.client(block), found.client(block)
    adapters = {id(parameter) for parameter in first.adapted.parameters.values()}
    for one, two, own in zip(
        first.adapted.model.parameters(),
        second.adapted.model.parameters(),
        client.adapted.model.parameters(),
        strict=True,
    ):
        assert torch.equal(one, own)
        assert (one.data_ptr() == two.data_ptr()) == (id(one) not in adapters)
        assert id(one) in adapters or one.data_ptr() == own.data_ptr(), "the first process keeps no copy either"
    assert [parameter.data_ptr() % ALIGNMENT for parameter in first.adapted.model.parameters()] == before
    first.adapted.write(start + 1)
    assert np.array_equal(second.adapted.read(), start)
    assert np.array_equal(client.adapted.read(), start)
    assert first.sites.examples.inputs[0].base is not None
    assert len(found.skeleton) < len(block)


@pytest.mark.parametrize("method", ["dora", "ia3", "vera", "adalora", "bottleneck", "prefix", "prompt", "nola", "bias"])
def test_every_kind_of_adapter_can_be_copied(spec_of: SpecOf, method: str) -> None:
    more = {"ia3": ["adapter.targets=['key', 'value']"]}
    more["prefix"] = more["prompt"] = ["adapter.virtual_tokens=4"]
    client = build(spec_of("recipe.name=fedit", f"adapter.method={method}", *more.get(method, []))).client
    found, block = image(client, aligned)
    copy = found.client(block)
    assert np.array_equal(copy.start, client.start)
    assert copy.describe().base == client.describe().base


def test_a_model_that_cannot_be_copied_is_refused(spec_of: SpecOf) -> None:
    client = build(spec_of()).client
    client.adapted.model.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="run it with --workers 1"):
        image(client, aligned)
