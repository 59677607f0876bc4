"""Residents in processes of their own, over the real link: equal to the simulation, killed, paused, refused, adopting."""

import json
import queue
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedapt.sim.grid
from fedapt.client.client import Client, Sites
from fedapt.client.loading import own_tables
from fedapt.client.models import base_folder, load_model
from fedapt.client.site import OwnData
from fedapt.client.status import read_status
from fedapt.client.tasks import Examples
from fedapt.protocols.spec import RunSpec
from fedapt.server.coordinator import Coordinator
from fedapt.server.grid import Evaluated
from fedapt.server.link.grid import LinkGrid
from fedapt.server.link.hub import Hub
from fedapt.server.store import MemoryStore
from fedapt.sim.grid import LocalGrid

from .residents import hub, make_site, node_of, resident, spec_of, until

NAMES = ("north", "south")


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as own:
        yield own


def sites(tmp_path: Path, server: Hub, extra: str = "", policy: str = "") -> list[Path]:
    return [make_site(tmp_path / name, name, server.port, extra, policy) for name in NAMES]


def simulated(spec: RunSpec, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """The same run, in this process: one client after another, because a stack of two rounds otherwise."""
    monkeypatch.setattr(fedapt.sim.grid, "PORTION", 1)
    adapted = load_model(spec)
    parts = [adapted.task.encode(own_tables(OwnData(source=str(f / "own.jsonl")), spec.model)[0]) for f in folders]
    inputs = [x for part in parts for x in part.inputs]
    everything = Examples(inputs, [x for part in parts for x in part.labels], np.arange(len(inputs)))
    ends = np.cumsum([len(part) for part in parts])
    owned = np.split(np.arange(len(inputs)), ends[:-1])
    held = Sites(everything, {node_of(name): own for name, own in zip(NAMES, owned, strict=True)})
    coordinator = Coordinator(spec, LocalGrid(Client(spec, adapted, held)), MemoryStore())
    list(coordinator.rounds())
    return coordinator


@pytest.mark.slow
def test_rounds_evaluation_and_adapter(tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds over the link are three rounds of the simulation, byte for byte; then scores, then the adapter."""
    spec, folders = spec_of(), sites(tmp_path, server)
    with resident(folders[0]) as first, resident(folders[1]):
        grid = LinkGrid(server, spec)
        coordinator = Coordinator(spec, grid, MemoryStore())
        rows = list(coordinator.rounds())
        farewells = coordinator.farewells(grid.nodes())
        scores = list(grid.evaluate(farewells, 60.0))
        grid.adopt(farewells)
        kept = tmp_path / "north" / "adapters" / "resident"
        until((kept / "evaluation.json").exists)
        until(lambda: read_status(folders[0])["rounds"][-1]["kind"] == "adopted")
        status = read_status(folders[0])
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 0
    until(lambda: read_status(folders[0])["connected"] is False)

    expected = simulated(spec, folders, monkeypatch)
    assert [row["nodes"] for row in rows] == [2, 2, 2]
    assert coordinator.adapter().tobytes() == expected.adapter().tobytes()
    assert coordinator.description.version == expected.description.version
    assert not np.array_equal(coordinator.adapter(), coordinator.description.start)

    assert all(isinstance(own, Evaluated) and own.weight == 4 for own in scores)
    assert {"loss", "perplexity"} == set(scores[0].metrics)  # type: ignore[union-attr]
    own = json.loads((kept / "evaluation.json").read_text())
    assert own["after"]["loss"] < own["before"]["loss"]
    told = next(s for s in scores if s.node == node_of("north"))
    assert own["after"]["loss"] == pytest.approx(told.metrics["loss"])  # type: ignore[union-attr]
    base = AutoModelForCausalLM.from_pretrained(base_folder("builtin:byte-llama"))
    PeftModel.from_pretrained(base, kept)

    assert status["connected"]
    assert [row["kind"] for row in status["rounds"]] == ["delta", "delta", "delta", "adopted"]
    assert json.dumps(status).count("sail") == 0


@pytest.mark.slow
def test_killed_in_a_round_and_back(tmp_path: Path, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is killed between two steps goes on from there, and the run is what it would have been."""
    spec, folders = spec_of("local.steps=40", "run.rounds=1"), sites(tmp_path, server)
    halfway = folders[0] / "halfway.safetensors"
    store = MemoryStore()
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with resident(folders[0]) as first, resident(folders[1]):
        coordinator: list[Coordinator] = []

        def run() -> None:
            coordinator.append(Coordinator(spec, LinkGrid(server, spec), store))
            found.put(list(coordinator[0].rounds()))

        Thread(target=run, daemon=True).start()
        until(halfway.exists)
        first.kill()
        first.wait()
        before = halfway.read_bytes()
        with resident(folders[0]):
            rows = found.get(timeout=120)
    assert rows[0]["nodes"] == 2
    assert halfway.read_bytes() != before
    expected = simulated(spec, folders, monkeypatch)
    assert coordinator[0].adapter().tobytes() == expected.adapter().tobytes()


@pytest.mark.slow
def test_a_refusal_reaches_the_store_and_once_leaves(tmp_path: Path, server: Hub) -> None:
    spec = spec_of("run.rounds=1", "participation.minimum=1")
    (tmp_path / "a").mkdir()
    strict = make_site(tmp_path / "north", "north", server.port, policy="most_steps = 1")
    free = make_site(tmp_path / "south", "south", server.port)
    store = MemoryStore()
    with resident(strict), resident(free, "--once") as once:
        until(lambda: len(server.nodes()) == 2)
        assert spec.local.steps == 2
        coordinator = Coordinator(spec, LinkGrid(server, spec), store)
        rows = list(coordinator.rounds())
        assert once.wait(60) == 0
    assert rows[0]["nodes"] == 1
    refusals = store.refusals("resident", 1)
    assert [node for node, _ in refusals] == [node_of("north")]
    assert "most_steps = 1" in refusals[0][1]
    assert not list((free / "results").iterdir())
    assert read_status(strict)["rounds"][-1]["kind"] == "refused"
