"""Noise that is correlated over rounds, in a run: turns, one charge, the cap, and what a crash must not change."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fedapt.privacy.events import MatrixEvent, from_json
from fedapt.protocols.errors import PrivacyError, RunError, SpecError
from fedapt.protocols.legality import recipe_of
from fedapt.server.coordinator import Coordinator
from fedapt.server.private import NOISE, BandedLevel
from fedapt.server.store import MemoryStore, Snapshot, SqliteStore, Store

from .fakes import FakeGrid, ends, run, spec_of

BANDED = (
    "privacy.unit=client",
    "privacy.epsilon=8",
    "privacy.clip=0.25",
    "privacy.mechanism=banded",
    "privacy.separation=3",
    "recipe.name=ffa",
    "recipe.weighting=uniform",
    "run.rounds=7",
)


def grid_of(*overrides: str) -> FakeGrid:
    return FakeGrid(spec_of(*BANDED, *overrides), there=range(1, 31))


@pytest.mark.parametrize("recipe", ["ffa", "fedit"])
def test_a_run_is_charged_once_and_whole(store: Store, recipe: str) -> None:
    grid = grid_of(f"recipe.name={recipe}")
    coordinator, rows = run(grid, store, evaluate=ends)
    (entry,) = store.chain().entries
    event = from_json(entry.event)
    assert isinstance(event, MatrixEvent)
    assert event.secret
    assert (entry.round, event.rounds, event.separation, event.participations) == (1, 7, 3, 3)
    account = store.ledger("run").spent(1e-5)
    assert account.method == "matrix bound"
    assert 7.9 < account.epsilon <= 8
    assert [row["epsilon"] for row in rows] == [account.epsilon] * 7
    assert np.isfinite(coordinator.adapter()).all()
    assert store.chain().verify() is None


def test_each_node_has_its_turn_once_in_each_separation() -> None:
    grid = grid_of()
    run(grid)
    for node in grid.there:
        turns = [asked.round for asked in grid.sent if asked.node == node]
        assert {later - earlier for earlier, later in pairwise(turns)} == {3}
    assert {asked.node for asked in grid.sent} == set(grid.there)


def test_the_noise_of_rounds_before_is_kept_and_forgotten_at_the_end() -> None:
    grid = grid_of()
    store = MemoryStore()
    coordinator = Coordinator(grid.spec, grid, store)
    rows = coordinator.rounds()
    shapes: list[tuple[int, ...]] = []
    for _ in range(6):
        next(rows)
        shapes.append(store.snapshot("run").buffers[NOISE].shape)
    dimensions = coordinator.shared.sent(1).size
    assert shapes == [(1, 2 * dimensions)] + [(2, 2 * dimensions)] * 5  # two rounds are taken back, 8 bytes a number
    next(rows)
    assert NOISE not in store.snapshot("run").buffers


def test_a_run_that_is_resumed_takes_back_the_noise_that_it_had_added(tmp_path: Path) -> None:
    """With simulated noise a run repeats itself, unless what a crash lost was drawn again or forgotten."""
    simulated = grid_of("privacy.noise=simulation")
    expected, _ = run(simulated)
    for _ in range(4):  # a new process for every round or two
        store = SqliteStore(tmp_path / "run.sqlite")
        rows = Coordinator(simulated.spec, simulated, store).rounds()
        next(rows, None)
        next(rows, None)
        store.close()
    resumed = SqliteStore(tmp_path / "run.sqlite").snapshot("run")
    assert resumed.round == 7
    assert np.array_equal(resumed.state, expected.store.snapshot("run").state)


def test_noise_that_was_lost_ends_the_run() -> None:
    grid = grid_of()
    level = BandedLevel(grid.spec, 30, 10)
    change = np.ones(10, np.float32)
    _, kept, charged = level.release([change], {}, 1)
    assert len(charged) == 1
    blob = Snapshot(1, change, kept).to_bytes()
    restored = Snapshot.from_bytes(1, blob).buffers
    _, _, charged = level.release([change], restored, 2)
    assert charged == []
    with pytest.raises(RunError, match="lost the noise of 1 rounds"):
        level.release([change], {}, 2)


@pytest.mark.parametrize("rounds", [5, 9])
def test_a_run_that_has_begun_keeps_its_length(store: Store, rounds: int) -> None:
    grid = grid_of()
    next(Coordinator(grid.spec, grid, store).rounds())
    longer = FakeGrid(grid.spec.set(f"run.rounds={rounds}"), there=grid.there)
    with pytest.raises(PrivacyError, match=f"run.rounds = {rounds}: this run is charged as a whole"):
        next(Coordinator(longer.spec, longer, store).rounds())
    assert len(list(Coordinator(grid.spec, grid, store).rounds())) == 6


def test_too_little_noise_for_the_cap_never_begins(store: Store) -> None:
    _, rows = run(grid_of("privacy.noise_multiplier=0.3"), store)
    assert rows == []
    assert not store.chain().entries


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("recipe.name=fedsvd", "recipe.name=ffa"),
        ("recipe.name=refresh", "recipe.name=ffa"),
        ("participation.sampling=fixed", "participation.sampling=all"),
        ("privacy.clipping=adaptive", "privacy.clipping=fixed"),
    ],
)
def test_what_a_banded_mechanism_forbids_has_a_way_out(override: str, nearest: str) -> None:
    with pytest.raises(SpecError, match="Nearest legal"):
        recipe_of(spec_of(*BANDED, override))
    assert recipe_of(spec_of(*BANDED, override, nearest))


def test_a_banded_mechanism_is_the_servers() -> None:
    with pytest.raises(SpecError, match=r'privacy.mechanism = "banded" is of unit = "client"'):
        recipe_of(spec_of(*BANDED, "privacy.unit=example"))
