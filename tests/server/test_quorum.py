"""Rounds whose nodes have spent their own caps: who sits out, what is passed over, and when the run ends."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedapt.privacy.ledger import NO_ROOM
from fedapt.protocols.errors import RunError
from fedapt.protocols.update import Update
from fedapt.server.coordinator import Coordinator
from fedapt.server.grid import Failure
from fedapt.server.quorum import Quorum
from fedapt.server.store import MemoryStore, Store

from .fakes import NODES, Answer, FakeGrid, plain, run, spec_of

EXAMPLE = (
    "recipe.name=ffa",
    "recipe.weighting=uniform",
    "privacy.unit=example",
    "privacy.epsilon=3",
    "local.steps=1",
    "run.rounds=4",
)


def refused(update: Update, reason: str = f"{NO_ROOM} 3 at delta = 1e-05") -> Update:
    return replace(update, kind="refused", weight=0.0, payload=b"", metrics={}, reason=reason)


def spent_after(last: int, nodes: Collection[int] = NODES) -> Callable[[Update], Sequence[Answer]]:
    """These nodes' caps leave room up to round `last`."""
    return lambda update: [refused(update) if update.round > last and update.node in nodes else update]


def grid_of(answer: Callable[[Update], Sequence[Answer]], *overrides: str) -> FakeGrid:
    return FakeGrid(spec_of(*EXAMPLE, *overrides), answer)


def test_a_run_ends_with_its_last_round_where_every_cap_is_spent(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator, rows = run(grid_of(spent_after(2)), store)
    assert [row["round"] for row in rows] == [1, 2]
    assert coordinator.ending == "every site's cap on epsilon is spent: the run ends here"
    assert coordinator.ending in caplog.text
    reference, _ = run(grid_of(lambda update: [update], "run.rounds=2"))
    assert np.array_equal(coordinator.adapter(), reference.adapter())
    assert {asked.round for asked in coordinator.farewells(NODES)} == {3}


def test_a_run_that_has_ended_so_ends_again_and_goes_on_with_larger_caps(store: Store) -> None:
    run(grid_of(spent_after(2)), store)
    again, rows = run(grid_of(spent_after(2)), store)
    assert (rows, again.ending != "") == ([], True)
    raised, rows = run(grid_of(lambda update: [update]), store)
    assert ([row["round"] for row in rows], raised.ending) == ([3, 4], "")
    whole, _ = run(grid_of(lambda update: [update]))
    assert plain(store.rows("run"))[-1]["nodes"] == len(NODES)
    assert np.array_equal(raised.adapter(), whole.adapter())


def test_sites_whose_caps_are_spent_sit_out_and_the_others_go_on(store: Store) -> None:
    coordinator, rows = run(grid_of(spent_after(1, NODES[:3])), store)
    assert [row["nodes"] for row in rows] == [4, 1, 1, 1]
    assert [row["refused"] for row in rows] == [0, 3, 3, 3]
    assert coordinator.ending == ""


def test_too_few_that_have_room_end_the_run(store: Store) -> None:
    enough, rows = run(grid_of(spent_after(1, NODES[:2]), "participation.minimum=2"))
    assert (len(rows), enough.ending) == (4, "")
    coordinator, rows = run(grid_of(spent_after(1, NODES[:3]), "participation.minimum=2"), store)
    assert len(rows) == 1
    assert coordinator.ending.startswith("fewer sites than participation.minimum = 2 have room under their caps")


def test_a_node_that_may_answer_yet_is_waited_for(store: Store) -> None:
    """Three caps are spent and one node has failed: it may come back."""

    def answer(update: Update) -> Sequence[Answer]:
        failed = Failure(update.node, "out of memory")
        return [failed] if update.node == NODES[3] and update.round > 1 else spent_after(1)(update)

    with pytest.raises(RunError, match=f"round 2: 0 of 4 nodes .*, and 1 are needed .*{NO_ROOM}"):
        run(grid_of(answer), store)
    assert len(store.rows("run")) == 2


@pytest.mark.parametrize(
    ("reason", "overrides"),
    [
        ("privacy.clip = 3 is above the site's most_clip = 1", EXAMPLE),
        (NO_ROOM, ("recipe.name=ffa",)),
        (
            NO_ROOM,
            (
                "recipe.name=ffa",
                "recipe.weighting=uniform",
                "privacy.unit=client",
                "privacy.epsilon=9",
                "privacy.noise_multiplier=3",
            ),
        ),
    ],
    ids=["other reason", "none", "client"],
)
def test_no_other_refusal_ends_a_run(reason: str, overrides: tuple[str, ...]) -> None:
    with pytest.raises(RunError, match="It stays open"):
        run(FakeGrid(spec_of(*overrides), lambda update: [refused(update, reason)]))


def test_a_node_that_answers_has_room_again() -> None:
    quorum, both = Quorum(spec_of(*EXAMPLE)), [(3, NO_ROOM), (4, NO_ROOM)]
    assert quorum.taken("round 1", [3, 4], [], both, lambda: [3, 4]) is None
    update = Update("run", 1, 1, 3, "", "delta", 1.0, b"")
    assert quorum.taken("round 1", [3, 4], [update], both, lambda: [3, 4]) == [update]
    with pytest.raises(RunError, match="out of memory"):
        quorum.taken("round 2", [3], [], [(3, "out of memory")], lambda: [3, 4])
    assert quorum.taken("round 2", [4], [], [(4, "out of memory")], lambda: [4]) is None
    assert quorum.taken("round 2", [4], [], [(4, "out of memory")], lambda: [3, 4]) == []


def test_a_draw_of_spent_nodes_alone_is_passed_over(store: Store) -> None:
    """One node a round: the others have room, and have their rounds. It ends when the last one has said that it has none."""
    one = ("participation.sampling=fixed", "participation.rate=0.25", "run.rounds=12")
    grid = grid_of(spent_after(0, NODES[:3]), *one)
    coordinator, rows = run(grid, store)
    drawn = {asked.round: asked.node for asked in grid.sent}
    assert [row["nodes"] for row in rows] == [int(drawn[row["round"]] == NODES[3]) for row in rows]
    assert len(rows) == 12
    assert len(set(drawn.values())) == 4
    assert coordinator.ending == ""
    spent, rows = run(grid_of(spent_after(0), *one))
    last = spent.grid
    assert isinstance(last, FakeGrid)
    assert len(rows) < 12
    assert {asked.node for asked in last.sent} == set(NODES)
    assert len({asked.node for asked in last.sent if asked.round <= len(rows)}) == 3
    assert np.array_equal(spent.adapter(), spent.description.start)
    assert spent.ending


def test_a_run_whose_caps_are_spent_before_it_begins_hands_over_its_start() -> None:
    coordinator = Coordinator(spec_of(*EXAMPLE), grid_of(spent_after(0)), MemoryStore())
    assert list(coordinator.rounds()) == []
    assert np.array_equal(coordinator.adapter(), coordinator.description.start)
