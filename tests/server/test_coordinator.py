"""The coordinator over a scripted grid."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedapt.protocols.codecs import CODECS, codec_of
from fedapt.protocols.errors import RunError, SpecError
from fedapt.protocols.layout import Flat
from fedapt.protocols.legality import rank_of
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.update import Assignment, Update
from fedapt.server.coordinator import Coordinator, Progress
from fedapt.server.grid import Evaluated, Failure
from fedapt.server.store import MemoryStore, Store

from .fakes import LAYOUT, NODES, Answer, FakeGrid, ends, plain, run, shared_of, spec_of, start


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run(store: Store, recipe: str) -> None:
    grid = FakeGrid(spec_of(f"recipe.name={recipe}"))
    coordinator, rows = run(grid, store, evaluate=ends)
    assert plain(coordinator.store.rows("run"))[1:] == plain(rows)
    assert [row["round"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert (row["nodes"], row["empty"], row["refused"], row["failed"]) == (4, 0, 0, 0)
        assert row["train_loss"] == pytest.approx(np.mean([1.0 + node % 3 for node in NODES]))
        assert 1.0 <= row["train_loss_p10"] <= row["train_loss"] <= row["train_loss_p90"] <= 3.0
        assert set(row["evaluation"]) == {"loss"}
        # What flora's rank cannot hold is late, not lost: it stays at the server for the next round.
        assert (row["aggregation_error"] < 1e-6) == (RECIPES[recipe].exact and recipe != "flora")
        assert 1.0 <= row["effective_rank"] <= (4.0 if RECIPES[recipe].has_frozen else 2.0)
    assert rows[-1]["evaluation"] == ends(coordinator.adapter())
    assert [a.node for a in grid.sent] == [*NODES] * 3
    assert store.contributions("run", 3) == []


def test_where_fragments_stream_scores_and_farewells_are_of_the_whole() -> None:
    """Two fragments in turn: what the nodes know is of two rounds, and the adapter is of one."""
    spec = spec_of("recipe.name=diloco", "recipe.fragments=2", "participation.evaluates=true")
    scored: list[Flat] = []

    class Scoring(FakeGrid):
        def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated | Failure]:
            shared = shared_of(spec)
            for asked in assignments[:1]:
                scored.append(CODECS["fp32"].decode(asked.payload, shared.received(asked.round)))
            return super().evaluate(assignments, timeout)

    losses = iter([5.0, 1.0, 2.0, 3.0])
    coordinator, _ = run(Scoring(spec), evaluate=lambda _: {"loss": next(losses)})
    assert coordinator.best_round() == 1
    shared, adapters = coordinator.shared, [coordinator.adapter(1), coordinator.adapter()]
    assert not np.array_equal(adapters[0], adapters[1])
    assert [shared.whole(scored[i], i + 2).tobytes() for i in (0, 2)] == [own.tobytes() for own in adapters]
    for asked in coordinator.farewells(NODES):
        state = CODECS["fp32"].decode(asked.payload, shared.received(asked.round))
        assert np.array_equal(shared.whole(state, asked.round), adapters[0])


@pytest.mark.parametrize(("weighting", "weights"), [("examples", [2.0, 3.0]), ("uniform", [1.0, 1.0])])
def test_nodes_weigh_what_the_recipe_says(weighting: str, weights: list[float]) -> None:
    grid = FakeGrid(spec_of("recipe.name=ffa", f"recipe.weighting={weighting}", "run.rounds=1"), there=[4, 5])
    given: list[Update] = []

    def noted(update: Update) -> Sequence[Answer]:
        given.append(update)
        return [update]

    grid.answer = noted
    coordinator, _ = run(grid)
    changes = [np.frombuffer(update.payload, np.float32) for update in sorted(given, key=lambda u: u.node)]
    trained = RECIPES["ffa"].trained(LAYOUT, 1)
    expected = trained.join(LAYOUT.split(start())) + np.average(changes, axis=0, weights=weights)
    np.testing.assert_allclose(trained.join(LAYOUT.split(coordinator.adapter())), expected, rtol=1e-5, atol=1e-6)


def broken(update: Update) -> list[Answer]:
    """In each round one node fails, three answers are refused, one node answers twice."""
    by_node: dict[int, list[Answer]] = {
        NODES[0]: [Failure(update.node, "out of memory")],
        NODES[1]: [replace(update, version="0" * 64), replace(update, weight=math.nan), update],
        NODES[2]: [replace(update, payload=b"\xff" * len(update.payload))],
        NODES[3]: [update, update],
    }
    return by_node[update.node]


def test_refused_and_failed_replies_never_end_a_round(store: Store) -> None:
    _, rows = run(FakeGrid(spec_of("recipe.name=ffa"), broken), store)
    assert [(row["nodes"], row["refused"], row["failed"]) for row in rows] == [(2, 4, 1)] * 3
    starts = ("a payload holds NaN", "duplicate", "trained from adapter 000000000000, not", "weight nan is not in")
    reasons = sorted(reason for _, reason in store.refusals("run", 2))
    assert len(reasons) == len(starts)
    assert all(reason.startswith(start) for reason, start in zip(reasons, starts, strict=True))


def test_what_is_refused_has_no_effect() -> None:
    spoiled, _ = run(FakeGrid(spec_of("recipe.name=ffa"), broken))
    honest = FakeGrid(spec_of("recipe.name=ffa"), lambda u: [u] if u.node in (NODES[1], NODES[3]) else [])
    assert run(honest)[0].adapter().tobytes() == spoiled.adapter().tobytes()


def test_an_answer_of_a_node_that_was_not_asked_is_refused(store: Store) -> None:
    _, rows = run(FakeGrid(spec_of("run.rounds=1"), lambda u: [u, replace(u, node=99)]), store)
    assert (rows[0]["nodes"], rows[0]["refused"]) == (4, 4)
    assert store.refusals("run", 1) == [(99, "node 99 was not asked in this round")] * 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda u: [], "no answer"),
        (lambda u: [Failure(u.node, "out of memory")], "out of memory"),
        (lambda u: [replace(u, round=9)], "stale: round 9"),
    ],
)
def test_a_round_without_an_update_stays_open_and_resumes(store: Store, answer: Any, reason: str) -> None:
    spec = spec_of("participation.sampling=fixed", "participation.rate=0.5", "participation.deadline_seconds=7")
    expected, _ = run(FakeGrid(spec))
    silent = FakeGrid(spec)
    silent.answer = lambda u: [u] if u.round == 1 else answer(u)
    with pytest.raises(RunError, match=rf"round 2: 0 of 2 nodes .* within 7 s, .* \({reason}.*It stays open"):
        run(silent, store)
    assert len(store.rows("run")) == 2
    again = FakeGrid(spec)
    coordinator, rest = run(again, store)
    assert [row["round"] for row in rest] == [2, 3]
    assert [a.node for a in again.sent[:2]] == [a.node for a in silent.sent[2:]]
    assert coordinator.adapter().tobytes() == expected.adapter().tobytes()


def test_no_node_is_a_run_error() -> None:
    with pytest.raises(RunError, match="no node can train"):
        run(FakeGrid(spec_of(), there=[]))


def test_an_empty_draw_leaves_the_state(store: Store) -> None:
    spec = spec_of("participation.sampling=poisson", "participation.rate=1e-9", "participation.minimum=0")
    grid = FakeGrid(spec)
    coordinator, rows = run(grid, store)
    assert grid.sent == []
    assert [(row["nodes"], row["bytes_down"], row["bytes_up"], row["aggregation_error"]) for row in rows] == [
        (0, 0, 0, 0.0)
    ] * 3
    assert np.array_equal(coordinator.adapter(), start())


def test_nodes_without_data_leave_the_state_and_count(store: Store) -> None:
    spec = spec_of("recipe.optimizer=nesterov", "run.rounds=2")
    grid = FakeGrid(
        spec, lambda u: [u if u.round == 1 else replace(u, kind="empty", payload=b"", weight=0.0, metrics={})]
    )
    coordinator, rows = run(grid, store, evaluate=ends)
    assert [(row["nodes"], row["empty"]) for row in rows] == [(4, 0), (0, 4)]
    assert rows[1]["evaluation"] == rows[0]["evaluation"]
    assert rows[1]["bytes_up"] == 0
    assert "train_loss" not in rows[1]
    assert set(store.snapshot("run").buffers) == {"momentum"}
    assert not np.array_equal(coordinator.adapter(), start())


def test_losses_that_are_not_finite_do_not_poison_the_row() -> None:
    losses = {NODES[0]: math.nan, NODES[1]: 2.0, NODES[2]: math.inf, NODES[3]: 1.7e308}
    grid = FakeGrid(spec_of("run.rounds=2"))
    grid.answer = lambda u: [replace(u, metrics={"loss": losses[u.node] if u.round == 1 else math.nan})]
    _, rows = run(grid)
    assert (rows[0]["train_loss"], rows[0]["train_loss_p10"], rows[0]["train_loss_p90"]) == (2.0, 2.0, 2.0)
    assert "train_loss" not in rows[1]
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("codec", [*CODECS, "top-k", "seed-projection"])
@pytest.mark.parametrize("downlink", ["fp32", "bf16"])
def test_bytes_are_the_codecs_sizes(codec: str, downlink: str) -> None:
    spec = spec_of(f"wire.codec={codec}", f"wire.downlink={downlink}", "run.rounds=1")
    grid = FakeGrid(spec, lambda u: [u] if u.node != NODES[1] else [Failure(u.node, "gone")])
    _, (row,) = run(grid)
    shared = shared_of(spec)
    assert row["bytes_down"] == 4 * CODECS[downlink].size(shared.received(1))
    assert row["bytes_up"] == 3 * codec_of(spec.wire).size(shared.sent(1))


@pytest.mark.parametrize("downlink", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.mixes_ranks])
def test_each_node_is_sent_and_sends_its_own_rank(store: Store, recipe: str, downlink: str) -> None:
    spec = spec_of(f"recipe.name={recipe}", "adapter.ranks=[1, 2]", "adapter.rank=2", f"wire.downlink={downlink}")
    there = range(20)
    grid = FakeGrid(spec, there=there)
    coordinator, rows = run(grid, store, evaluate=ends)
    shared, ranks = shared_of(spec), [rank_of(spec, node) for node in there]
    assert set(ranks) == {1, 2}
    sizes = {rank: CODECS[downlink].size(shared.received(1, rank)) for rank in (1, 2)}
    assert sizes[1] < sizes[2]
    for row in rows:
        assert row["refused"] == 0
        assert row["bytes_down"] == sum(sizes[rank] for rank in ranks)
        assert row["bytes_up"] == sum(CODECS["fp32"].size(shared.sent(1, rank)) for rank in ranks)
    by_node = {a.node: a for a in grid.sent}
    assert all(len(by_node[node].payload) == sizes[rank] for node, rank in zip(there, ranks, strict=True))
    assert len({by_node[node].version for node in there}) == 2
    assert coordinator.adapter().shape == (LAYOUT.size,)


def test_an_update_of_another_rank_is_refused() -> None:
    spec = spec_of("recipe.name=flexlora", "adapter.ranks=[1, 2]", "adapter.rank=2", "run.rounds=1")
    full = shared_of(spec).sent(1)
    grid = FakeGrid(spec, there=range(20))
    grid.answer = lambda u: [replace(u, payload=bytes(4 * full.size))]
    _, (row,) = run(grid)
    of_rank_1 = sum(rank_of(spec, node) == 1 for node in range(20))
    assert (row["refused"], row["nodes"]) == (of_rank_1, 20 - of_rank_1)


def test_what_travels_down_grows_with_each_fresh_start() -> None:
    spec = spec_of("recipe.name=refresh", "recipe.period=2", "recipe.budget=4", "adapter.rank=2", "run.rounds=8")
    coordinator, rows = run(FakeGrid(spec), evaluate=ends)
    starts = [0, 0, 1, 1, 2, 2, 2, 2]
    assert [row["bytes_down"] for row in rows] == [4 * 4 * (8 + 3 + 8 * count) for count in starts]
    assert [row["bytes_up"] for row in rows] == [4 * 4 * (8 + 3)] * 8
    assert coordinator.adapter().shape == (coordinator.layout.size,)


def test_rolora_sends_one_factor_a_round() -> None:
    _, rows = run(FakeGrid(spec_of("recipe.name=rolora")))
    assert [row["bytes_up"] for row in rows] == [4 * 4 * (values + 3) for values in (8, 10, 8)]


@pytest.mark.parametrize("rule", ["krum", "multi-krum", "geometric-median", "clip", "median", "trimmed-mean"])
def test_a_bad_node_moves_a_robust_run_little(rule: str) -> None:
    def attacked(update: Update) -> Sequence[Answer]:
        values = np.frombuffer(update.payload, np.float32)
        return [replace(update, payload=(1000 * values).tobytes()) if update.node == 3 else update]

    adapters = {}
    for name in ("mean", rule):
        spec = spec_of("recipe.name=ffa", f"recipe.aggregator={name}", "run.rounds=1", "recipe.weighting=uniform")
        adapters[name] = run(FakeGrid(spec, attacked, there=range(9)))[0].adapter()
    assert np.linalg.norm(adapters[rule]) < 0.1 * np.linalg.norm(adapters["mean"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_nodes_start_from_what_they_received(recipe: str) -> None:
    grid = FakeGrid(spec_of(f"recipe.name={recipe}", "wire.downlink=bf16"))
    coordinator, _ = run(grid)
    state = coordinator.store.snapshot("run").state
    shared = shared_of(grid.spec)
    downlink = shared.received(4)
    rounded = CODECS["bf16"].decode(CODECS["bf16"].encode(state, downlink, 0), downlink)
    grid.spec = grid.spec.set("run.rounds=4")
    again, _ = run(grid, coordinator.store)
    assert np.array_equal(grid.received[-1], shared.whole(rounded, 4))
    assert not np.array_equal(state, rounded)
    assert again.adapter().shape == (shared.layout.size,)


@pytest.mark.parametrize("recipe", ["ffa", "fedit", "rolora"])
def test_a_lossy_downlink_does_not_wear_the_state_away(recipe: str) -> None:
    """Nodes that change nothing: what was rounded away on the way down is still at the server."""
    spec = spec_of(f"recipe.name={recipe}", "wire.downlink=bf16")
    coordinator, _ = run(FakeGrid(spec, scale=0.0))
    assert np.array_equal(coordinator.adapter(), start())


def test_a_truncated_product_is_of_what_nodes_received() -> None:
    grid = FakeGrid(spec_of("recipe.name=flexlora", "wire.downlink=bf16", "run.rounds=1"))
    store = MemoryStore()
    run(grid, store)
    grid.spec, grid.scale = grid.spec.set("run.rounds=2"), 0.0
    coordinator, _ = run(grid, store)
    after, seen = (LAYOUT.split(flat) for flat in (coordinator.adapter(), grid.received[-1]))
    np.testing.assert_allclose(
        after["q.lora_B.weight"] @ after["q.lora_A.weight"],
        seen["q.lora_B.weight"] @ seen["q.lora_A.weight"],
        atol=1e-6,
    )


def scripted(accuracies: Sequence[float]) -> Callable[[Flat], Mapping[str, float]]:
    left = iter(accuracies)
    return lambda _: {"accuracy": next(left), "loss": 1.0}


def test_the_best_round_is_kept_and_the_first_of_equals(store: Store) -> None:
    coordinator, _ = run(FakeGrid(spec_of("run.rounds=5")), store, evaluate=scripted([0.1, 0.5, 0.7, 0.7, 0.2, 0.6]))
    assert coordinator.best_round() == 2
    best = coordinator.adapter(coordinator.best_round())
    shorter, _ = run(FakeGrid(spec_of("run.rounds=2")))
    assert best.tobytes() == shorter.adapter().tobytes()
    assert best.tobytes() != coordinator.adapter().tobytes()
    with pytest.raises(KeyError):
        coordinator.adapter(1)


def test_without_evaluation_there_is_no_best_round() -> None:
    coordinator, rows = run(FakeGrid(spec_of()))
    assert coordinator.best_round() is None
    assert not any("evaluation" in row for row in coordinator.store.rows("run"))
    assert len(rows) == 3


def test_a_round_that_diverged_is_not_the_best() -> None:
    losses = iter([math.nan, 3.0, 2.0, math.nan])
    coordinator, _ = run(FakeGrid(spec_of()), evaluate=lambda _: {"loss": next(losses)})
    assert coordinator.best_round() == 2


@pytest.mark.parametrize(("patience", "rounds"), [(0, 8), (1, 4), (2, 5), (3, 8)])
def test_patience(patience: int, rounds: int) -> None:
    spec = spec_of("run.rounds=8", f"run.patience={patience}")
    _, rows = run(FakeGrid(spec), evaluate=scripted([0.1, 0.2, 0.3, 0.6, 0.5, 0.4, 0.7, 0.1, 0.2]))
    assert len(rows) == rounds


def test_evaluate_every(store: Store) -> None:
    coordinator, _ = run(FakeGrid(spec_of("run.rounds=5", "run.evaluate_every=2")), store, evaluate=ends)
    rows = coordinator.store.rows("run")
    assert [row["round"] for row in rows if "evaluation" in row] == [0, 2, 4, 5]


def test_progress_counts_every_answer() -> None:
    seen: list[Progress] = []
    run(FakeGrid(spec_of("run.rounds=1")), progress=seen.append)
    assert seen == [Progress(1, answered, 4) for answered in range(5)]


def test_more_rounds_go_on_from_where_the_run_ended(store: Store) -> None:
    run(FakeGrid(spec_of("run.rounds=1")), store)
    longer = FakeGrid(spec_of("run.rounds=3", "run.patience=2", "run.evaluate_every=3"))
    coordinator, rows = run(longer, store)
    assert [row["round"] for row in rows] == [2, 3]
    assert coordinator.adapter().tobytes() == run(FakeGrid(spec_of("run.rounds=3")))[0].adapter().tobytes()
    assert run(FakeGrid(spec_of("run.rounds=2")), store)[1] == []


@pytest.mark.parametrize(
    "other", ["run.seed=6", "recipe.name=ffa", "local.learning_rate=0.1", "wire.codec=int8", "model.base=n"]
)
def test_another_spec_under_the_same_name_is_refused(store: Store, other: str) -> None:
    run(FakeGrid(spec_of("run.rounds=1")), store)
    with pytest.raises(SpecError, match='run "run" exists with another spec'):
        Coordinator(spec_of(other), FakeGrid(spec_of(other)), store)
    assert run(FakeGrid(spec_of(other, "run.name=another", "run.rounds=1")), store)[1][0]["round"] == 1


def test_the_slowest_of_spare_nodes_are_not_waited_for() -> None:
    spec = spec_of("participation.sampling=fixed", "participation.rate=0.5", "participation.spare=0.5", "run.rounds=2")
    late: list[int] = []

    def answer(update: Update) -> Sequence[Update]:
        late.append(update.node)
        return [update]

    grid = FakeGrid(spec, answer)
    _, rows = run(grid)
    assert [row["nodes"] for row in rows] == [2, 2]
    assert len(grid.sent) == 2 * 3
    assert len(late) == 2 * 2


def test_fewer_answers_than_the_minimum_leave_the_round_open() -> None:
    spec = spec_of("participation.minimum=3", "run.rounds=1")
    store = MemoryStore()

    def answer(update: Update) -> Sequence[Update | Failure]:
        return [update] if update.node in NODES[:2] else [Failure(update.node, "out of memory")]

    with pytest.raises(RunError, match=r"2 of 4 nodes .* and 3 are needed \(out of memory\)"):
        run(FakeGrid(spec, answer), store)
    assert len(store.rows("run")) == 1
    assert len(store.contributions("run", 1)) == 2, "what was delivered is kept"
    run(FakeGrid(spec), store)
    assert len(store.rows("run")) == 2


def test_nodes_score_the_adapter_on_their_own_data() -> None:
    _, rows = run(FakeGrid(spec_of("participation.evaluates=true", "run.evaluate_every=2", "run.rounds=2")))
    weights = [node % 3 for node in NODES]
    assert "federated" not in rows[0]
    scored = rows[1]["federated"]
    assert scored["examples"] == sum(weights)
    assert scored["nodes"] == sum(weight > 0 for weight in weights)
    assert scored["loss"] == pytest.approx(sum(w * node for w, node in zip(weights, NODES, strict=True)) / sum(weights))
