"""Client-level privacy in a run: draws, charges, the cap, and rows that tell nothing of who answered."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedapt.privacy.events import GaussianEvent, Poisson, from_json
from fedapt.privacy.mechanism import Mechanism
from fedapt.protocols.errors import RunError, SpecError
from fedapt.protocols.layout import Flat
from fedapt.protocols.legality import recipe_of
from fedapt.server.coordinator import Coordinator
from fedapt.server.grid import Failure
from fedapt.server.store import MemoryStore, SqliteStore, Store

from .fakes import NODES, FakeGrid, ends, run, spec_of

PRIVATE = (
    "privacy.unit=client",
    "privacy.epsilon=8",
    "privacy.clip=0.25",
    "recipe.weighting=uniform",
    "participation.sampling=poisson",
    "participation.rate=0.5",
    "participation.minimum=0",
    "privacy.noise_multiplier=2.0",  # solving for it takes seconds, and is tested beside the mechanism
    "run.evaluate_every=3",
)
LINEAR = ("ffa", "fedsvd", "refresh", "fedit")


def grid_of(*overrides: str) -> FakeGrid:
    return FakeGrid(spec_of(*PRIVATE, *overrides))


@pytest.mark.parametrize("recipe", LINEAR)
@pytest.mark.parametrize("clipping", ["fixed", "adaptive"])
def test_every_round_is_charged_once_and_the_cap_holds(store: Store, recipe: str, clipping: str) -> None:
    grid = grid_of(f"recipe.name={recipe}", f"privacy.clipping={clipping}")
    coordinator, rows = run(grid, store, evaluate=ends)
    events = [from_json(entry.event) for entry in store.chain().entries]
    assert len(events) == len(rows) == 3
    assert all(isinstance(e, GaussianEvent) and e.sampling == Poisson(0.5) and e.secret for e in events)
    assert rows[-1]["epsilon"] <= 8
    assert rows[-1]["private"]
    assert rows[-1]["epsilon"] == pytest.approx(store.ledger("run").spent(1e-5).epsilon)
    assert np.isfinite(coordinator.adapter()).all()
    assert store.chain().verify() is None


def test_rows_tell_nothing_of_who_answered(store: Store) -> None:
    _, rows = run(grid_of("recipe.name=ffa"), store)
    hidden = {"nodes", "empty", "refused", "failed", "train_loss", "train_loss_p10", "train_loss_p90", "seconds"}
    assert all(not hidden & set(row) for row in rows)
    assert len({(row["bytes_up"], row["bytes_down"]) for row in rows}) == 1


def test_more_rounds_than_the_cap_allows_end_the_run_before_it_is_passed(store: Store) -> None:
    grid = grid_of("recipe.name=ffa", "privacy.noise_multiplier=0.8", "run.rounds=40")
    coordinator, rows = run(grid, store)
    assert 0 < len(rows) < 40
    assert store.ledger("run").spent(1e-5).epsilon <= 8
    assert coordinator.private is not None
    assert not coordinator.private.allows(store.ledger("run"))
    assert coordinator.ending == "one more round would pass privacy.epsilon = 8: the run ends here"
    assert list(Coordinator(grid.spec, grid, store).rounds()) == []


def test_an_empty_draw_takes_a_noised_step() -> None:
    grid = grid_of("recipe.name=ffa", "participation.rate=0.001", "run.rounds=1")
    store = MemoryStore()
    coordinator = Coordinator(grid.spec, grid, store)
    before = store.snapshot("run").state.copy()
    list(coordinator.rounds())
    assert grid.sent == []
    assert np.count_nonzero(store.snapshot("run").state - before) == len(before)
    assert len(store.chain().entries) == 1


def test_a_round_in_which_all_fail_is_released_as_any_other(store: Store) -> None:
    """A draw of bad nodes alone must neither end the run for ever nor tell that they were drawn."""
    grid = grid_of("recipe.name=ffa")
    grid.answer = lambda update: [Failure(update.node, "out of memory")]
    _, rows = run(grid, store)
    assert len(rows) == 3
    assert len(store.chain().entries) == 3


def test_a_fixed_cohort_waits_for_as_many_as_the_spec_says() -> None:
    grid = grid_of("recipe.name=ffa", "participation.sampling=fixed", "participation.minimum=1")
    grid.answer = lambda update: [Failure(update.node, "out of memory")]
    with pytest.raises(RunError, match="0 of 2 nodes"):
        run(grid)


def test_a_delta_that_promises_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    run(grid_of("recipe.name=ffa", "privacy.delta=0.3"))
    assert "not below 1 / 4" in caplog.text
    caplog.clear()
    run(grid_of("recipe.name=ffa", "privacy.delta=0.2"))
    assert "not below" not in caplog.text


def test_a_cohort_that_is_drawn_stays_drawn() -> None:
    grid = grid_of("recipe.name=ffa")
    store = MemoryStore()
    draws = [tuple(Coordinator(grid.spec, grid, store)._open(1)) for _ in range(20)]
    assert len(set(draws)) == 1
    fresh = {tuple(Coordinator(grid.spec, grid, MemoryStore())._open(1)) for _ in range(20)}
    assert len(fresh) > 1, "the draw is no function of the seed"


def test_the_population_is_the_one_at_the_start(store: Store) -> None:
    grid = grid_of("recipe.name=ffa", "run.rounds=1")
    run(grid, store)
    again = FakeGrid(grid.spec.set("run.rounds=2"), there=[NODES[0]])
    coordinator = Coordinator(again.spec, again, store)
    assert coordinator.private is not None
    assert coordinator.private.mechanism.expected == 2.0
    stated = Coordinator(spec_of(*PRIVATE, "recipe.name=ffa", "privacy.population=100"), grid, MemoryStore())
    assert stated.private is not None
    assert stated.private.mechanism.expected == 50.0


def test_one_node_moves_the_adapter_by_its_clip_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise in two worlds: with a node that sends a million times too much, and without it."""
    states = []
    for there in (NODES, NODES[:-1]):
        spec = spec_of(*PRIVATE, "recipe.name=ffa", "privacy.noise=simulation", "privacy.population=4", "run.rounds=1")
        grid = FakeGrid(spec, there=list(there), scale=1e5)
        monkeypatch.setattr(Mechanism, "draw", lambda _, nodes, source: tuple(sorted(nodes)))
        coordinator, rows = run(grid)
        states.append(coordinator.store.snapshot("run").state)
        assert not rows[-1]["private"]
    moved = np.linalg.norm((states[0] - states[1]).astype(np.float64))
    assert 0.12 < moved <= 0.25 / 2 * 1.01


def test_simulation_noise_repeats_and_secret_noise_does_not() -> None:
    def state(noise: str) -> Flat:
        coordinator, _ = run(grid_of("recipe.name=fedsvd", f"privacy.noise={noise}"))
        return coordinator.store.snapshot("run").state

    assert np.array_equal(state("simulation"), state("simulation"))
    assert not np.array_equal(state("secret"), state("secret"))


def test_an_adaptive_clip_survives_a_restart(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "run.sqlite")
    run(grid_of("recipe.name=refresh", "recipe.period=1", "privacy.clipping=adaptive"), store)
    bound = store.snapshot("run").buffers["clip"]
    assert bound.shape == (1,)
    assert bound[0] != np.float32(0.25)


@pytest.mark.parametrize(
    ("overrides", "nearest"),
    [
        (["recipe.weighting=examples"], "recipe.weighting=uniform"),
        (["participation.minimum=1"], "participation.minimum=0"),
        (["recipe.aggregator=krum"], "recipe.aggregator=mean"),
        (["adapter.ranks=[4, 8]", "recipe.name=fedsvd"], "adapter.ranks=[]"),
        (["privacy.unit=example", "privacy.clipping=adaptive"], "privacy.clipping=fixed"),
        (["recipe.name=flexlora"], "recipe.name=fedsvd"),
        (["recipe.name=rolora"], "recipe.name=fedsvd"),
        (["recipe.name=diloco"], "recipe.name=fedsvd"),
    ],
)
def test_what_privacy_forbids_has_a_way_out(overrides: Sequence[str], nearest: str) -> None:
    with pytest.raises(SpecError, match="Nearest legal"):
        recipe_of(spec_of(*PRIVATE, *overrides))
    assert recipe_of(spec_of(*PRIVATE, *overrides, nearest))


@pytest.mark.parametrize(
    "bad",
    [
        "privacy.epsilon=0",
        "privacy.epsilon=-1",
        "privacy.delta=0",
        "privacy.delta=1",
        "privacy.clip=0",
        "privacy.clip=-2",
    ],
)
def test_impossible_values_are_refused_at_start(bad: str) -> None:
    with pytest.raises(SpecError, match=bad.partition("=")[0]):
        spec_of(*PRIVATE, bad)


def test_a_unit_needs_a_cap_and_a_cap_needs_a_unit() -> None:
    with pytest.raises(SpecError, match="epsilon is missing"):
        spec_of("privacy.unit=client")
    with pytest.raises(SpecError, match='epsilon has no meaning with unit = "none"'):
        spec_of("privacy.epsilon=3")
