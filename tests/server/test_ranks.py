"""A node states the rank that it can afford; the server chooses, asks, and remembers with each update what it asked for."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update as sql_update
from sqlalchemy.orm import Session

from fedapt.protocols.errors import RunError, SpecError
from fedapt.protocols.exchange import Answer, Exchange
from fedapt.protocols.legality import RANKED, rank_for, rank_of
from fedapt.protocols.methods import METHODS
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Update
from fedapt.server.link.exchanging import Exchanges
from fedapt.server.link.hub import Hub
from fedapt.server.store import MemoryStore, SqliteStore, Store
from fedapt.server.store.tables import Contribution

from .fakes import NODES, FakeGrid, run, spec_of
from .fakes import Answer as Reply

MIXING = [name for name, recipe in RECIPES.items() if recipe.mixes_ranks]
SINGLE = [name for name, recipe in RECIPES.items() if not recipe.mixes_ranks]
ONE_ROUND = ("run.rounds=1", "adapter.rank=2")
FIRST, SECOND, *REST = NODES

mixing = pytest.mark.parametrize("recipe", MIXING)


def state_of(grid: FakeGrid, store: Store | None = None) -> bytes:
    coordinator, _ = run(grid, store)
    return coordinator.store.snapshot("run").state.tobytes()


# ---------------------------------------------------------------------------------------------- the choice of a rank


@given(st.sampled_from(MIXING), st.sets(st.integers(1, 64), min_size=1), st.integers(0, 80))
def test_the_largest_rank_that_fits(recipe: str, ranks: set[int], most: int) -> None:
    spec = spec_of(f"recipe.name={recipe}", f"adapter.ranks={sorted(ranks)}", f"adapter.rank={max(ranks)}")
    fitting = [rank for rank in ranks if most == 0 or rank <= most]
    if fitting:
        assert rank_for(spec, most) == max(fitting)
    else:
        with pytest.raises(SpecError, match=rf"rank {most}, and the smallest of adapter\.ranks .+ is {min(ranks)}\."):
            rank_for(spec, most)


@given(st.sampled_from(MIXING), st.integers(1, 64), st.integers(0, 80))
def test_without_ranks_a_node_gets_what_it_states(recipe: str, rank: int, most: int) -> None:
    spec = spec_of(f"recipe.name={recipe}", f"adapter.rank={rank}")
    assert rank_for(spec, most) == (most if 0 < most < rank else 0)


@given(st.sampled_from(SINGLE), st.integers(1, 64), st.integers(0, 80))
def test_a_recipe_of_one_rank_has_no_other(recipe: str, rank: int, most: int) -> None:
    spec = spec_of(f"recipe.name={recipe}", f"adapter.rank={rank}")
    if 0 < most < rank:
        with pytest.raises(SpecError, match=rf"rank {most}, and this run needs rank {rank}: .+ one rank"):
            rank_for(spec, most)
    else:
        assert rank_for(spec, most) == 0


@pytest.mark.parametrize("override", ["recipe.aggregator=median", "wire.codec=top-k", "adapter.start=runs/before"])
def test_what_forbids_ranks_forbids_a_smaller_one(override: str) -> None:
    spec = spec_of("recipe.name=fedsvd", override)
    assert rank_for(spec, 8) == 0
    with pytest.raises(SpecError, match=r"this run needs rank 8: .+ is illegal"):
        rank_for(spec, 4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_without_a_rank_suits_everybody(method: str) -> None:
    spec = spec_of("recipe.name=fedit", f"adapter.method={method}")
    if method in RANKED:
        with pytest.raises(SpecError):
            rank_for(spec, 1)
    else:
        assert rank_for(spec, 1) == 0


# ---------------------------------------------------------------------------------------------- rounds


@mixing
def test_what_a_node_states_is_all_that_its_rank_comes_from(recipe: str) -> None:
    """Said by the nodes or drawn by key in a simulation: the same ranks give the same bytes."""
    drawn = spec_of(f"recipe.name={recipe}", "adapter.ranks=[1, 2]", "adapter.rank=2")
    free = spec_of(f"recipe.name={recipe}", "adapter.rank=2")
    stated = {node: rank_of(drawn, node) for node in NODES}
    assert set(stated.values()) == {1, 2}
    expected = state_of(FakeGrid(drawn))
    assert state_of(FakeGrid(free, stated=stated)) == expected
    assert state_of(FakeGrid(drawn, stated={node: 9 * rank for node, rank in stated.items()})) != expected
    assert state_of(FakeGrid(free)) != expected, "the ranks make a difference"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("recipe.name=flexlora", "adapter.ranks=[2]"), "the smallest of adapter.ranks = [2] is 2"),
        (("recipe.name=fedit",), "this run needs rank 2"),
        (("recipe.name=ffa", "participation.sampling=fixed", "participation.rate=1.0"), "this run needs rank 2"),
    ],
    ids=["ranks", "one-rank", "drawn"],
)
def test_a_node_that_can_afford_no_rank_of_the_run_is_left_out(
    store: Store, overrides: tuple[str, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(*overrides, *ONE_ROUND)
    grid = FakeGrid(spec, stated={SECOND: 1})
    _, (row,) = run(grid, store)
    assert [asked.node for asked in grid.sent] == [FIRST, *REST]
    ((node, told),) = store.refusals("run", 1)
    assert node == SECOND
    assert reason in told
    assert f"node {SECOND} is left out: the node can afford rank 1" in caplog.text
    assert (row["nodes"], row["refused"]) == (3, 1)
    assert store.snapshot("run").state.tobytes() == state_of(FakeGrid(spec, there=[FIRST, *REST]))


def test_nobody_can_afford_it(store: Store) -> None:
    spec = spec_of("recipe.name=fedit", *ONE_ROUND)
    small = FakeGrid(spec, stated=dict.fromkeys(NODES, 1))
    for _ in range(2):
        with pytest.raises(RunError, match=r"no node can train: the node can afford rank 1, and this run needs rank 2"):
            run(small, store)
    assert [node for node, _ in store.refusals("run", 1)] == [*NODES], "once, however often it is tried"
    assert small.sent == []
    assert state_of(FakeGrid(spec), store) == state_of(FakeGrid(spec))


def test_the_final_adapter_goes_to_whom_it_fits() -> None:
    spec = spec_of("recipe.name=fedit", *ONE_ROUND)
    coordinator, _ = run(FakeGrid(spec, stated={SECOND: 1}))
    assert [asked.node for asked in coordinator.farewells(NODES)] == [FIRST, *REST]
    mixed, _ = run(FakeGrid(spec_of("recipe.name=flexlora", *ONE_ROUND), stated={SECOND: 1}))
    assert [asked.rank for asked in mixed.farewells(NODES)] == [0, 1, 0, 0]


# ---------------------------------------------------------------------------------------------- restarts


class Crash(BaseException):
    """The process ends here."""


def crashed(spec: RunSpec, store: Store, stated: Mapping[int, int], taken: Sequence[int]) -> dict[int, Update]:
    """A process that ends when the updates of `taken` are in the store. What every node has trained meanwhile."""
    trained: dict[int, Update] = {}

    def answer(update: Update) -> Sequence[Reply]:
        trained[update.node] = update
        return [update] if update.node in taken else []

    class Ends(FakeGrid):
        def replies(self, timeout: float) -> Any:
            yield from super().replies(timeout)
            raise Crash

    with pytest.raises(Crash):
        run(Ends(spec, answer, stated=stated), store)
    assert [update.node for update in store.contributions("run", 1)] == sorted(taken)
    return trained


@mixing
def test_an_update_is_read_at_the_rank_it_was_trained_at(store: Store, recipe: str) -> None:
    """Whoever has answered may state another rank after the restart; whoever has not trains at the new one."""
    spec = spec_of(f"recipe.name={recipe}", *ONE_ROUND)
    crashed(spec, store, {FIRST: 1, SECOND: 1}, [FIRST, REST[0]])
    assert {u.node: u.rank for u in store.contributions("run", 1)} == {FIRST: 1, REST[0]: 0}
    after = FakeGrid(spec, stated={REST[0]: 1, REST[1]: 1})
    found = state_of(after, store)
    assert {asked.node: asked.rank for asked in after.sent} == {SECOND: 0, REST[1]: 1}
    assert found == state_of(FakeGrid(spec, stated={FIRST: 1, REST[1]: 1}))
    assert store.refusals("run", 1) == []


def test_who_has_answered_counts_whatever_it_can_afford_now(store: Store) -> None:
    spec = spec_of("recipe.name=fedit", *ONE_ROUND)
    crashed(spec, store, {}, [FIRST])
    found = state_of(FakeGrid(spec, stated={FIRST: 1, SECOND: 1}), store)
    assert found == state_of(FakeGrid(spec, there=[FIRST, *REST]))
    assert [node for node, _ in store.refusals("run", 1)] == [SECOND], "it was drawn, and has not answered"


@mixing
def test_an_answer_at_the_old_rank_is_stale(store: Store, recipe: str) -> None:
    spec = spec_of(f"recipe.name={recipe}", *ONE_ROUND)
    old = crashed(spec, store, {SECOND: 1}, [])
    after = FakeGrid(spec, lambda update: [old[SECOND], update] if update.node == SECOND else [update])
    assert state_of(after, store) == state_of(FakeGrid(spec))
    ((node, reason),) = store.refusals("run", 1)
    assert node == SECOND
    assert reason.startswith("trained from adapter")


class Earlier(MemoryStore):
    """A store from before ranks were kept with the updates."""

    def contribute(self, run: str, update: Update) -> bool:
        return super().contribute(run, replace(update, rank=None))


@mixing
def test_what_was_kept_without_a_rank_has_the_drawn_one(recipe: str) -> None:
    spec = spec_of(f"recipe.name={recipe}", "adapter.ranks=[1, 2]", "adapter.rank=2")
    assert state_of(FakeGrid(spec), Earlier()) == state_of(FakeGrid(spec))


def test_a_row_without_a_rank_is_read(tmp_path: Path) -> None:
    spec, store = spec_of("recipe.name=flora", "adapter.ranks=[1, 2]", *ONE_ROUND), SqliteStore(tmp_path / "s.sqlite")
    crashed(spec, store, {}, NODES)
    with Session(store.engine) as session, session.begin():
        for row in session.query(Contribution):
            fields = json.loads(row.fields)
            assert fields.pop("rank") == rank_of(spec, row.node)
            session.execute(
                sql_update(Contribution).where(Contribution.node == row.node).values(fields=json.dumps(fields))
            )
    after = FakeGrid(spec)
    assert state_of(after, store) == state_of(FakeGrid(spec))
    assert after.sent == []
    store.close()


# ---------------------------------------------------------------------------------------------- exchanges


class Quiet:
    """A hub with nodes that have stated ranks, and that answer nothing."""

    def __init__(self, stated: Mapping[int, int | None]) -> None:
        self.stated, self.asked = stated, list[int]()

    def rank(self, node: int) -> int | None:
        return self.stated[node]

    def ask(self, questions: Sequence[Any]) -> None:
        self.asked += [question.node for question in questions]

    def close(self, node: int, questions: Sequence[bytes], reason: str = "") -> None:
        pass

    def exchange(self, frames: Sequence[Any], deliver: Any) -> None:
        assert not frames


def test_an_exchange_asks_nobody_who_cannot_hold_the_adapter() -> None:
    text = '[model]\nbase = "m"\ntask = "causal-lm"\n[adapter]\nrank = 4\n[recipe]\nname = "onebyte"'
    spec, hub = RunSpec.parse(text), Quiet({1: 2, 2: 4, 3: 0, 4: None})
    exchanges = Exchanges(cast(Hub, hub), spec, b"spec", threading.Event())
    requests = [Exchange(spec.run.name, node, 1, 0, 0, 1.0) for node in hub.stated]
    (answer,) = exchanges.run(requests, timeout=0.0)
    assert isinstance(answer, Answer)
    assert (answer.node, answer.number, answer.kind) == (1, 1, "refused")
    assert "can afford rank 2, and this run needs rank 4" in answer.reason
    assert hub.asked == [2, 3, 4]
