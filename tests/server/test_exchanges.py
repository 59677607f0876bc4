from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedapt.client.exchanger import Probe, Slopes
from fedapt.kernels.directions import Floats
from fedapt.kernels.replica import Replica
from fedapt.privacy.ledger import NO_ROOM
from fedapt.protocols.errors import PrivacyError, RunError, SpecError
from fedapt.protocols.exchange import Answer, Step
from fedapt.server.exchanges import ZerothCoordinator
from fedapt.server.grid import Failure
from fedapt.server.log import MemoryLog, SqlLog, replay
from fedapt.server.reduction import trimmed
from fedapt.server.store import MemoryStore, SqliteStore

from .exchanging import NODES, START, TARGET, Nodes, coordinator_of, evaluate, loss, run, spec_of
from .fakes import FakeGrid

recipes = pytest.mark.parametrize("recipe", ["onebyte", "kseed", "dpzo"])
KSEED = "zeroth.pool=64"


def chosen(recipe: str, *more: str) -> list[str]:
    return [f"recipe.name={recipe}", *([KSEED] if recipe == "kseed" else []), *more]


def steps_of(coordinator: ZerothCoordinator) -> list[Step]:
    return [Step.from_bytes(row.body) for row in coordinator.log.rows("run", after=0)]


@recipes
@pytest.mark.parametrize("code", ["int8", "log8", "1-bit"])
def test_every_recipe_learns_in_every_code(recipe: str, code: str) -> None:
    grid = Nodes(spec_of(*chosen(recipe, f"zeroth.code={code}", *(["zeroth.clip=0.05"] * (code == "1-bit")))))
    rows, coordinator = run(grid.spec, grid)
    assert [row["round"] for row in rows] == [10, 20, 30, 40]
    ends = [row["evaluation"]["loss"] for row in rows]
    floor, first = evaluate(TARGET)["loss"], evaluate(START)["loss"]
    assert ends[-1] - floor < 0.8 * (first - floor)
    proofs = {node.replica.number: node.replica.proof for node in grid.replicas.values()}
    assert len(proofs) == 1, "all nodes hold one state"
    assert evaluate(coordinator.adapter())["loss"] == ends[-1]
    assert len({node.replica.proof for node in grid.replicas.values()}) == 1


@pytest.mark.parametrize("sides", ["two", pytest.param("one", marks=pytest.mark.slow)])
def test_bytes_converge_as_floats_do(sides: str) -> None:
    """Scalars in fp32, applied by the textbook, against one byte each: the same loss within the spread of the seeds."""
    ends: dict[str, list[float]] = {"bytes": [], "floats": []}
    for seed in range(4):
        spec = spec_of("run.rounds=120", "run.evaluate_every=120", f"run.seed={seed}", f"zeroth.sides={sides}")
        grid = Nodes(spec)
        ends["bytes"].append(run(spec, grid)[0][-1]["evaluation"]["loss"])
        weights = START.astype(np.float64)
        from fedapt.client.exchanger import Probe
        from fedapt.kernels.directions import Directions, signs_reference
        from fedapt.protocols.exchange import terms_of

        from .exchanging import measure

        terms = terms_of(spec)
        for number in range(1, 121):
            change = np.zeros_like(weights)
            for slot, node in enumerate(NODES):
                directions = Directions(terms.key, *terms.probed(number, slot))
                (own,) = measure(weights.astype(np.float32), [Probe(node, number, directions, 1e-3)])
                assert own.values is not None
                change += own.values @ signs_reference(directions, len(weights))
            weights -= change / (len(NODES) * 4)
        ends["floats"].append(evaluate(weights.astype(np.float32))["loss"])
    floor = evaluate(TARGET)["loss"]
    ours, theirs = (np.array(ends[name]) - floor for name in ("bytes", "floats"))
    start = evaluate(START)["loss"] - floor
    assert theirs.mean() < 0.5 * start
    assert abs(ours.mean() - theirs.mean()) < 0.05 * start


def test_the_wire_is_as_small_as_it_is_said_to_be() -> None:
    rows, _ = run(spec_of("zeroth.directions=16", "run.rounds=10"))
    assert rows[-1]["bytes_up"] == 10 * len(NODES) * 20


def test_a_straggler_is_left_out_and_stays_in_step() -> None:
    def slow(answer: Answer) -> Sequence[Answer]:
        return [] if answer.node == NODES[1] and answer.number % 3 else [answer]

    grid = Nodes(spec_of("run.rounds=12"), tamper=slow)
    _, coordinator = run(grid.spec, grid)
    assert [coordinator.terms.answers(step) for step in steps_of(coordinator)] == [3, 3, 4] * 4
    assert not any(request.snapshot for request in grid.sent)
    assert len({node.replica.proof for node in grid.replicas.values()}) == 1


def test_a_node_that_joins_late_or_begins_again_is_brought_up() -> None:
    spec = spec_of("run.rounds=40")
    grid = Nodes(spec, there=NODES[:3])

    def come_and_go(answer: Answer) -> Sequence[Answer]:
        if answer.number == 20:
            grid.there = NODES
        if answer.number == 25:
            grid.replicas.pop(NODES[0], None)
        if answer.number == 30:
            grid.there = NODES[1:]
        return [answer]

    grid.tamper = come_and_go
    _, coordinator = run(spec, grid)
    late = next(request for request in grid.sent if request.node == NODES[3])
    assert late.snapshot or len(late.steps) == 20
    assert late.proof
    assert grid.replicas[NODES[0]].replica.number < grid.replicas[NODES[3]].replica.number == 39
    assert [a.kind for a in grid.answered if a.node == NODES[0] and a.number > 20].count("lost") == 1
    assert grid.replicas[NODES[3]].replica.proof == grid.replicas[NODES[1]].replica.proof
    assert [coordinator.terms.answers(step) for step in steps_of(coordinator)][-1] == 3


def test_a_state_that_differs_is_found_and_replaced_and_nobody_waits() -> None:
    spec = spec_of("run.rounds=70")
    grid = Nodes(spec)

    def spoil(answer: Answer) -> Sequence[Answer]:
        if (answer.node, answer.number) == (NODES[2], 50):
            replica = grid.replicas[NODES[2]].replica
            acc = replica.lattice.acc.copy()
            acc[0] += 1
            grid.replicas[NODES[2]].replica = replace(replica, lattice=replace(replica.lattice, acc=acc))
        return [answer]

    grid.tamper = spoil
    _, coordinator = run(spec, grid)
    lost = [(a.node, a.number) for a in grid.answered if a.kind == "lost"]
    assert lost == [(NODES[2], 65)], "the hash of the state is in every 64th step"
    assert [coordinator.terms.answers(s) for s in steps_of(coordinator)[62:68]] == [4, 4, 3, 4, 4, 4]
    assert len({node.replica.proof for node in grid.replicas.values()}) == 1


def test_what_is_wrong_is_refused_and_stops_nobody() -> None:
    wrong = {
        NODES[0]: lambda a: [replace(a, codes=b"\x80" + a.codes[1:])],
        NODES[1]: lambda a: [replace(a, number=a.number - 1)],
        NODES[2]: lambda a: [a, a, replace(a, node=77), Failure(a.node, "down"), replace(a, codes=b"")],
    }
    spec = spec_of("run.rounds=10")
    _, coordinator = run(spec, Nodes(spec, tamper=lambda a: wrong.get(a.node, lambda a: [a])(a)))
    reasons = coordinator.store.refusals("run", 3)
    assert [node for node, _ in reasons] == [NODES[0], NODES[1], NODES[2], 77, NODES[2]]
    for (_, reason), part in zip(
        reasons, ["−128", "stale: exchange 2", "duplicate", "was not asked", "take 4"], strict=True
    ):
        assert part in reason
    assert all(coordinator.terms.answers(step) == 2 for step in steps_of(coordinator))


def test_nobody_is_an_error_that_can_be_gone_on_from() -> None:
    spec, log, store = spec_of("run.rounds=10"), MemoryLog(), MemoryStore()
    with pytest.raises(RunError, match=r"exchange 1: 0 of 4 nodes took part .* It stays open"):
        list(coordinator_of(spec, Nodes(spec, tamper=lambda _: []), store, log).rounds())
    assert len(list(coordinator_of(spec, Nodes(spec), store, log).rounds())) == 1


@recipes
def test_one_byte_moves_the_model_at_most_as_far_as_the_bound(recipe: str) -> None:
    """A node that sends the largest codes in place of the smallest, once: the state after that exchange."""

    def ended(codes: bytes) -> ZerothCoordinator:
        def lie(answer: Answer) -> Sequence[Answer]:
            return [replace(answer, codes=codes) if answer.node == NODES[0] else answer]

        grid = Nodes(spec_of(*chosen(recipe, "run.rounds=1", "zeroth.clip=0.1")), tamper=lie)
        return run(grid.spec, grid)[1]

    largest, smallest = ended(b"\x7f" * 4), ended(b"\x81" * 4)
    moved = np.abs(largest.replica.weights.astype(np.float64) - smallest.replica.weights).max()
    bound = 2 * 4 * largest.pace.bound(1, largest.scale)
    assert 0.3 * bound < moved <= bound + 2.0**-23


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9])
def test_the_trimmed_mean_stays_among_the_honest(rows: int) -> None:
    random = np.random.default_rng(rows)
    for _ in range(50):
        counts = random.integers(-127, 128, (rows, 6))
        bad = min(int(np.ceil(0.2 * rows)), (rows - 1) // 2)
        counts[:bad] = 127 * random.choice([-1, 1], (bad, 6))
        honest = counts[bad:]
        result = trimmed(counts, 0.2, 10)
        assert (result >= 10 * honest.min(axis=0)).all()
        assert (result <= 10 * honest.max(axis=0)).all()
        other = counts.copy()
        other[-1] = random.integers(-127, 128, 6)
        cut = bad
        assert np.abs(trimmed(other, 0.2, 10) - result).max() <= 10 * 254 / (rows - 2 * cut) + 1
    assert trimmed(np.array([[1, -5]]), 0.2, 3).tolist() == [3, -15]


def test_a_liar_has_less_say_in_a_trimmed_mean() -> None:
    def lie(answer: Answer) -> Sequence[Answer]:
        return [replace(answer, codes=b"\x7f" * 4) if answer.node == NODES[0] else answer]

    ends = {}
    for aggregator in ("mean", "trimmed-mean"):
        spec = spec_of(
            "recipe.name=dpzo", f"recipe.aggregator={aggregator}", "recipe.byzantine=0.25", "zeroth.clip=1.0"
        )
        ends[aggregator] = run(spec, Nodes(spec, tamper=lie))[0][-1]["evaluation"]["loss"]
    assert ends["trimmed-mean"] < 0.5 * ends["mean"]


class StoppedError(Exception):
    pass


@recipes
@pytest.mark.parametrize("stop", ["before the log", "after the log", "before the row"])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(recipe: str, stop: str, tmp_path: Path) -> None:
    spec = spec_of(*chosen(recipe, "run.rounds=30"))
    whole, reference = run(spec)
    store = SqliteStore(tmp_path / "run.sqlite")

    class Dying(SqlLog):
        def append(self, run, step, events=()):  # type: ignore[no-untyped-def]
            if stop == "before the log" and step.number == 13:
                raise StoppedError
            row = super().append(run, step, events)
            if stop == "after the log" and step.number in (13, 20):
                raise StoppedError
            return row

        def keep(self, run, number, snapshot):  # type: ignore[no-untyped-def]
            super().keep(run, number, snapshot)
            if stop == "before the row" and number == 20:
                raise StoppedError

    with pytest.raises(StoppedError):
        list(coordinator_of(spec, Nodes(spec), store, Dying(store.engine)).rounds())
    if stop == "after the log":
        with pytest.raises(StoppedError):
            list(coordinator_of(spec, Nodes(spec), store, Dying(store.engine)).rounds())
    coordinator = coordinator_of(spec, Nodes(spec), store)
    assert isinstance(coordinator.log, SqlLog)
    list(coordinator.rounds())
    assert coordinator.replica.proof == reference.replica.proof
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in store.rows("run")[1:]]
    assert rows == [{k: v for k, v in row.items() if k != "seconds"} for row in whole]
    assert replay(coordinator.start, coordinator.log.rows("run")).proof == reference.replica.proof
    store.close()


@recipes
def test_weight_decay_is_that_of_every_exchange(recipe: str, tmp_path: Path) -> None:
    """Where no slope moves anything, w ends at w·(1 − rate·decay)^exchanges, less what is due with the next segment; and
    a run that was stopped between two segments ends with the same bits."""
    decaying = ("local.learning_rate=0.5", "local.weight_decay=0.01", "zeroth.clip=1.0", "run.evaluate_every=130")
    spec = spec_of(*chosen(recipe, *decaying, "run.rounds=130"))

    def still(weights: Floats, probes: Sequence[Probe]) -> list[Slopes]:
        return [Slopes(np.zeros(4))] * len(probes)

    whole = run(spec, Nodes(spec, prober=still))[1]
    np.testing.assert_allclose(whole.adapter(), START * (1 - 0.5 * 0.01) ** 128, rtol=1e-5)
    assert [step.number for step in steps_of(whole) if step.decay] == [65, 129]

    store, short = SqliteStore(tmp_path / "run.sqlite"), spec.set("run.rounds=100")
    list(coordinator_of(short, Nodes(short, prober=still), store).rounds())
    again = coordinator_of(spec, Nodes(spec, prober=still), store)
    list(again.rounds())
    assert again.replica.proof == whole.replica.proof
    assert replay(again.start, again.log.rows("run")).proof == whole.replica.proof
    store.close()


def test_a_decay_that_leaves_nothing_is_refused() -> None:
    spec = spec_of("local.learning_rate=2.0", "local.weight_decay=0.5")
    with pytest.raises(SpecError, match=r"local\.weight_decay = 0\.5 times local.learning_rate = 2 is not below 1"):
        coordinator_of(spec)


def test_another_spec_or_another_grid_is_refused() -> None:
    store, log = MemoryStore(), MemoryLog()
    list(coordinator_of(spec_of("run.rounds=10"), None, store, log).rounds())
    assert len(list(coordinator_of(spec_of("run.rounds=20"), None, store, log).rounds())) == 1
    with pytest.raises(SpecError, match="exists with another spec"):
        coordinator_of(spec_of("run.seed=6"), None, store, log)
    with pytest.raises(SpecError, match="FakeGrid carries rounds, and no exchanges"):
        ZerothCoordinator(spec_of(), FakeGrid(spec_of()), MemoryStore())


CLIENT = ("recipe.name=dpzo", "privacy.unit=client", "privacy.epsilon=50", "privacy.clip=0.2")


def test_client_level_sends_and_logs_noised_sums_alone() -> None:
    spec = spec_of(*CLIENT, "run.rounds=10", "privacy.noise_multiplier=2")
    grid = Nodes(spec)
    rows, coordinator = run(spec, grid)
    assert {"answers", "refused", "nodes"}.isdisjoint(rows[-1])
    assert rows[-1]["private"] is True
    sums = np.array([coordinator.terms.applied(step)[2] for step in steps_of(coordinator)])
    codes = {n: [a.codes for a in grid.answered if a.number == n] for n in range(1, 11)}
    exact = np.array([sum(coordinator.terms.code.decode(c, 4) for c in codes[n]) for n in range(1, 11)])
    noise = (sums - exact) * 2.0**coordinator.scale
    assert 0.25 < noise.std() < 1.6, "2 × the sensitivity of 0.2 under replace-one is 0.8"
    ledger = coordinator.log.ledger("run")
    assert ledger.spent(1e-5).epsilon == rows[-1]["epsilon"] > 0
    drawn = [coordinator.store.open_round("run", number, [1]) for number in range(1, 11)]
    assert drawn == [()] * 10, "who was drawn is forgotten with the row"


def test_two_runs_of_one_seed_have_other_noise_unless_it_is_said_to_be_none() -> None:
    secret = [run(spec_of(*CLIENT, "run.rounds=10"))[1].replica.proof for _ in range(2)]
    assert secret[0] != secret[1]
    seeded = [run(spec_of(*CLIENT, "run.rounds=10", "privacy.noise=simulation"))[1].replica.proof for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_the_cap_ends_the_run_before_it_is_passed() -> None:
    spec = spec_of(*CLIENT, "privacy.noise_multiplier=5", "privacy.epsilon=1", "run.evaluate_every=100")
    rows, coordinator = run(spec)
    assert 0 < coordinator.replica.number < 40
    assert rows[-1]["round"] == coordinator.replica.number
    assert rows[-1]["epsilon"] <= 1
    with pytest.raises(PrivacyError):
        coordinator.log.ledger("run").require(coordinator.private.event, 1, 1e-5)  # type: ignore[union-attr]


EXAMPLE = ("recipe.name=dpzo", "privacy.unit=example", "privacy.epsilon=3", "privacy.clip=0.2")


def spent_after(last: int, nodes: Sequence[int]) -> Callable[[Answer], Sequence[Answer]]:
    """These nodes' own caps leave room up to exchange `last`."""
    return lambda a: [
        replace(a, kind="refused", codes=b"", reason=NO_ROOM) if a.number > last and a.node in nodes else a
    ]


def test_a_run_ends_where_every_sites_cap_is_spent() -> None:
    spec = spec_of(*EXAMPLE)
    rows, coordinator = run(spec, Nodes(spec, tamper=spent_after(25, NODES)))
    assert coordinator.ending == "every site's cap on epsilon is spent: the run ends here"
    assert [row["round"] for row in rows] == [10, 20, 25]


def test_sites_whose_caps_are_spent_sit_out() -> None:
    """Also an exchange that drew nobody else is only passed over."""
    spec = spec_of(*EXAMPLE, "participation.sampling=fixed", "participation.rate=0.25")
    _, coordinator = run(spec, Nodes(spec, tamper=spent_after(10, NODES[:2])))
    assert coordinator.ending == ""
    moved = [coordinator.terms.applied(step)[2].any() for step in steps_of(coordinator)]
    assert len(moved) == 40
    assert all(moved[:10])
    assert 0 < sum(moved[10:]) < 30


def test_the_replica_is_the_adapter() -> None:
    _, coordinator = run(spec_of("run.rounds=10"))
    fresh = Replica.begin(coordinator.terms, START)
    state = replay(fresh, coordinator.log.rows("run"))
    assert np.array_equal(state.weights, coordinator.adapter())
    assert loss(state.weights, NODES[0]) != loss(START, NODES[0])
