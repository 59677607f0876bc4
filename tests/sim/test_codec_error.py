"""The error of a codec that a run reports, beside what its nodes lost: a second client sends the same changes whole."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fedapt.client.client import Client
from fedapt.protocols.codecs import uplink_of
from fedapt.protocols.layout import Flat
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Update
from fedapt.server.coordinator import Coordinator
from fedapt.server.store import MemoryStore
from fedapt.sim.federation import build
from fedapt.sim.grid import LocalGrid

SpecOf = Callable[..., RunSpec]
WIRES = {
    "bf16": ["wire.codec=bf16"],
    "int8": ["wire.codec=int8"],
    "fp4": ["wire.codec=fp4"],
    "top-k": ["wire.codec=top-k", "wire.density=0.1", "wire.values=int8"],
}
PRIVATE = [
    "recipe.name=ffa",
    "recipe.weighting=uniform",
    "privacy.epsilon=1000",
    "privacy.noise_multiplier=1.0",
    "privacy.clip=1.0",
]


class Watched:
    """A client whose rounds are looked at: its updates, and how far off each is, without and with what was left of before."""

    def __init__(self, spec: RunSpec) -> None:
        self.client = build(spec).client
        self.exact, self.trained = self.client.under(spec.set("wire.codec=fp32")), self.client.train
        self.updates: list[Update] = []
        self.alone: dict[int, list[float]] = {1: [], 2: []}
        self.errors: dict[int, list[float]] = {1: [], 2: []}
        self.left: dict[int, Flat] = {}
        self.client.train = self.train  # type: ignore[method-assign]

    def rows(self) -> list[dict[str, Any]]:
        return list(Coordinator(self.client.spec, LocalGrid(self.client), MemoryStore()).rounds())

    def train(self, assignments: Sequence[Assignment]) -> list[Update]:
        found = self.trained(assignments)
        for update, whole in zip(found, self.exact.train(assignments), strict=True):
            decoded, change = (_change(client, u) for client, u in ((self.client, update), (self.exact, whole)))
            meant = change + self.left.get(update.node, np.zeros_like(change))
            self.left[update.node] = meant - decoded
            self.alone[update.round].append(_off(decoded, change))
            self.errors[update.round].append(_off(decoded, meant))
        self.updates += found
        return found


def _change(client: Client, update: Update) -> Flat:
    return uplink_of(client.spec).decode(update.payload, client.shared.sent(update.round))[0]


def _off(decoded: Flat, meant: Flat) -> float:
    return float(np.linalg.norm(decoded - meant) / np.linalg.norm(meant))


@pytest.mark.parametrize("wire", WIRES)
def test_the_error_reported_is_the_mean_of_what_nodes_lost(spec_of: SpecOf, wire: str) -> None:
    watched = Watched(spec_of("recipe.name=fedit", *WIRES[wire]))
    reported = [row["codec_error"] for row in watched.rows()]
    alone, errors = ([float(np.mean(own)) for own in rounds.values()] for rounds in (watched.alone, watched.errors))
    assert len(reported) == 2
    assert min(reported) > 1e-4
    assert reported == pytest.approx(errors if wire == "top-k" else alone, rel=1e-3)
    # The control: what was left of before is part of what top-k codes, and of nothing else.
    assert reported != pytest.approx(alone if wire == "top-k" else errors, rel=1e-3)


def test_fp32_loses_nothing(spec_of: SpecOf) -> None:
    assert [row["codec_error"] for row in Watched(spec_of("recipe.name=fedit", "wire.codec=fp32")).rows()] == [0, 0]


@pytest.mark.parametrize("unit", ["client", "example"])
def test_a_private_run_neither_sends_nor_shows_it(spec_of: SpecOf, unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(*PRIVATE, f"privacy.unit={unit}", "wire.codec=int8", "run.rounds=1")
    client, sent = build(spec).client, []
    trained = client.train

    def train(assignments: Sequence[Assignment]) -> list[Update]:
        sent.extend(updates := trained(assignments))
        return updates

    monkeypatch.setattr(client, "train", train)
    (row,) = Coordinator(spec, LocalGrid(client), MemoryStore()).rounds()
    assert any(update.kind == "delta" for update in sent)
    assert not any("codec_error" in update.metrics for update in sent)
    assert "codec_error" not in row
