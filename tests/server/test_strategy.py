"""Recipes as Flower strategies: the coordinator's own result over the same updates, and replies that do not fit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import fedapt
from fedapt.kernels.lowrank import Matrix, orthonormalize
from fedapt.protocols.codecs import CODECS
from fedapt.protocols.errors import RunError, SpecError
from fedapt.protocols.layout import Flat
from fedapt.protocols.legality import initial_a, recipe_of
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.shared import SharedAdapter
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Assignment, Description, Update, version_of
from fedapt.server.coordinator import Coordinator
from fedapt.server.grid import Evaluated
from fedapt.server.store import MemoryStore

from .stock import (
    LAYOUT,
    NODES,
    ROUNDS,
    STOCK,
    Answer,
    FakeGrid,
    P,
    Tensors,
    after_training,
    answer,
    arrays_of,
    equal,
    record,
    run,
    start,
    strategy_of,
    weight_of,
)


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's launchers set it; a Message cannot be made without."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class SameNodes:
    """The same clients behind the coordinator's own protocol."""

    def __init__(self, spec: RunSpec) -> None:
        self.recipe, self.spec = recipe_of(spec), spec
        tensors = start()
        if initial_a(spec) == "orthonormal":
            for pair in LAYOUT.pairs:
                tensors[pair.b.name], tensors[pair.a.name] = orthonormalize(tensors[pair.b.name], tensors[pair.a.name])
        self.shared = SharedAdapter(self.recipe, spec.recipe, LAYOUT, LAYOUT.join(tensors))

    def nodes(self) -> Sequence[int]:
        return NODES

    def rank(self, node: int) -> int:
        return 0

    def describe(self) -> Description:
        return Description(LAYOUT, self.shared.start, {}, "")

    def send(self, assignments: Sequence[Assignment]) -> None:
        self.asked = assignments

    def replies(self, timeout: float) -> Iterator[Update]:
        for asked in self.asked:
            received, trained = self.shared.received(asked.round), self.shared.sent(asked.round)
            state = CODECS["fp32"].decode(asked.payload, received)
            adapter = self.shared.whole(state, asked.round)
            ended = after_training(LAYOUT.split(adapter), asked.round, asked.node)
            change: Flat = trained.join(ended) - trained.join(LAYOUT.split(adapter))
            own = (asked.run, asked.round, asked.attempt, asked.node, version_of(received, state))
            yield Update(*own, "delta", weight_of(asked.node), CODECS["fp32"].encode(change, trained, 0))

    def evaluate(self, assignments: Sequence[Assignment], timeout: float) -> Iterator[Evaluated]:
        raise NotImplementedError


def by_the_coordinator(recipe: str, **options: Any) -> tuple[list[dict[str, Matrix]], list[dict[str, Any]]]:
    """The adapter after each round, and the rows."""
    raw = {"model": {"base": "m", "task": "causal-lm"}, "run": {"rounds": ROUNDS}}
    spec = RunSpec.check(raw | {"recipe": {"name": recipe, **options}})
    coordinator = Coordinator(spec, SameNodes(spec), MemoryStore())
    adapters, rows = [], []
    for row in coordinator.rounds():
        rows.append(row)
        adapters.append({name: values.copy() for name, values in LAYOUT.split(coordinator.adapter()).items()})
    return adapters, rows


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        *((name, {}) for name in STOCK),
        ("fedsvd", {"optimizer": "novograd", "learning_rate": 0.1, "period": 2}),
        ("fedsvd", {"optimizer": "nesterov", "weighting": "uniform"}),
        ("ffa", {"optimizer": "adam", "learning_rate": 0.01, "initial_a": "orthonormal"}),
        ("ffa", {"aggregator": "median", "weighting": "uniform"}),
        ("fedit", {"learning_rate": 0.5}),
        ("flora", {"budget": 4}),
    ],
)
def test_it_is_the_coordinators_own_result(recipe: str, options: Mapping[str, Any]) -> None:
    expected, rows = by_the_coordinator(recipe, **options)
    grid = FakeGrid()
    adapters, metrics = run(strategy_of(recipe, **options), grid)
    assert len(adapters) == ROUNDS + 1
    for number in range(1, ROUNDS + 1):
        assert equal(adapters[number], expected[number - 1]), number
        assert metrics[number]["aggregation_error"] == rows[number - 1]["aggregation_error"]
        assert metrics[number]["effective_rank"] == rows[number - 1]["effective_rank"]
    assert not equal(adapters[1], adapters[2])
    again = arrays_of(grid.sent[-1].content.array_records["arrays"])
    assert equal(again, adapters[-2]), "what clients get is the last round's result"


@pytest.mark.parametrize("recipe", STOCK)
def test_the_config_names_what_to_train(recipe: str) -> None:
    grid = FakeGrid()
    run(strategy_of(recipe), grid, rounds=2)
    named = [grid.configs[i]["trained-factors"] for i in (0, len(NODES))]
    fixed_a, alternates = "A" not in RECIPES[recipe].trains, RECIPES[recipe].alternates
    assert named == (["B", "B"] if fixed_a else ["B", "A"] if alternates else ["AB", "AB"])


def test_the_first_round_has_the_users_own_adapter_in_another_basis() -> None:
    """fedsvd wants orthonormal rows in A: the product is what was given, also where B is not zero."""
    given = after_training(start(), 1, 1)
    grid = FakeGrid()
    run(strategy_of("fedsvd"), grid, rounds=1, initial=record(given))
    sent = arrays_of(grid.sent[0].content.array_records["arrays"])
    for pair in LAYOUT.pairs:
        a, b = sent[pair.a.name], sent[pair.b.name]
        np.testing.assert_allclose(a @ a.T, np.eye(pair.rank), atol=1e-6)
        np.testing.assert_allclose(b @ a, given[pair.b.name] @ given[pair.a.name], atol=1e-5)
    assert np.array_equal(sent[f"{P}score.bias"], given[f"{P}score.bias"])


def test_metrics_are_weighted_means_of_what_all_report() -> None:
    def talkative(message: Message) -> RecordDict:
        made = answer(message)
        made.metric_records["metrics"]["own"] = 1.0
        return made

    _, metrics = run(strategy_of("fedit"), FakeGrid({NODES[0]: talkative}), rounds=1)
    weights = [weight_of(node) for node in NODES]
    assert metrics[1]["loss"] == pytest.approx(np.average([1 + node % 3 for node in NODES], weights=weights))
    assert set(metrics[1]) == {"loss", "aggregation_error", "effective_rank"}


def test_fixed_tensors_may_be_left_out_of_a_reply() -> None:
    def short(message: Message) -> RecordDict:
        made = answer(message)
        trained = {n: a for n, a in made.array_records["arrays"].items() if not n.endswith("lora_A.weight")}
        return RecordDict({"arrays": ArrayRecord(trained), "metrics": made.metric_records["metrics"]})

    whole, _ = run(strategy_of("fedsvd"), FakeGrid())
    without, _ = run(strategy_of("fedsvd"), FakeGrid(dict.fromkeys(NODES, short)))
    assert equal(whole[-1], without[-1])


def spoiled(change: Callable[[dict[str, Array]], object]) -> Answer:
    def reply(message: Message) -> RecordDict:
        made = answer(message)
        arrays = dict(made.array_records["arrays"].items())
        change(arrays)
        return RecordDict({"arrays": ArrayRecord(arrays), "metrics": made.metric_records["metrics"]})

    return reply


def with_metrics(**values: Any) -> Answer:
    def reply(message: Message) -> RecordDict:
        metrics = MetricRecord({name.replace("_", "-"): value for name, value in values.items()})
        return RecordDict({"arrays": answer(message).array_records["arrays"], "metrics": metrics})

    return reply


def filled(name: str, values: Matrix) -> Answer:
    return spoiled(lambda arrays: arrays.update({name: Array(values)}))


A, B, BIAS = f"{P}q.lora_A.weight", f"{P}q.lora_B.weight", f"{P}score.bias"
MALFORMED: dict[str, tuple[Answer, str]] = {
    "an error": (lambda _: Error(1, "out of memory"), "the client failed (out of memory)"),
    "no record": (lambda _: RecordDict(), "it has 0 ArrayRecords and 0 MetricRecords"),
    "two records": (
        lambda m: RecordDict({**dict(answer(m).items()), "more": ArrayRecord()}),
        "it has 2 ArrayRecords and 1 MetricRecords",
    ),
    "no weight": (with_metrics(loss=1.0), 'its metric "num-examples" is None'),
    "a weight of zero": (with_metrics(num_examples=0), 'its metric "num-examples" is 0'),
    "a weight that is no number": (with_metrics(num_examples=float("nan")), "is nan"),
    "an endless weight": (with_metrics(num_examples=float("inf")), "is inf"),
    "a negative weight": (with_metrics(num_examples=-1), "is -1"),
    "a list of weights": (with_metrics(num_examples=[1, 2]), "is [1, 2]"),
    "a missing tensor": (spoiled(lambda arrays: arrays.pop(BIAS)), f"{BIAS} is missing"),
    "an unknown tensor": (filled("lora_C", np.zeros(1, np.float32)), "lora_C was not sent"),
    "another shape": (filled(B, np.zeros((2, 4), np.float32)), f"{B} has shape (2, 4), and (4, 2) was sent"),
    "another type": (filled(B, np.zeros((4, 2))), f"{B} is float64: cast the adapter to float32"),
    "NaN": (filled(B, np.full((4, 2), np.nan, np.float32)), f"{B} holds NaN"),
    "infinity": (filled(B, np.full((4, 2), -np.inf, np.float32)), f"{B} holds NaN"),
    "too large": (filled(B, np.full((4, 2), 3e38, np.float32)), f"{B} holds NaN, or a value over 1e+06"),
    "no array": (
        spoiled(lambda arrays: arrays.update({B: Array("float32", (4, 2), "numpy.ndarray", b"junk")})),
        f"{B} cannot be read",
    ),
    "a zip": (
        spoiled(lambda arrays: arrays.update({B: Array("float32", (4, 2), "numpy.ndarray", b"PK\x03\x04junk")})),
        f"{B} cannot be read",
    ),
    "a trained A": (
        filled(A, np.zeros((2, 5), np.float32)),
        f'recipe ffa keeps {A} fixed in this round, and it came back changed: train the factors that config["trained',
    ),
}


def warnings_in(log: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in log.records if entry.levelname == "WARNING" and "fraction" not in entry.msg]


@pytest.mark.parametrize(("bad", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_bad_reply_is_left_out_with_its_reason(bad: Answer, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    honest, metrics = run(strategy_of("ffa"), FakeGrid(nodes=[NODES[0], NODES[2], NODES[3]]), rounds=2)
    spoilt, spoilt_metrics = run(strategy_of("ffa"), FakeGrid({NODES[1]: bad}), rounds=2)
    assert equal(honest[-1], spoilt[-1])
    assert metrics == spoilt_metrics
    first, second = warnings_in(caplog)
    assert first.startswith(f"round 1: the reply of node {NODES[1]} is left out: ")
    assert second.startswith(f"round 2: the reply of node {NODES[1]} is left out: ")
    assert reason in first


@pytest.mark.parametrize("recipe", ["fedsvd", "flora"])
def test_a_round_without_a_usable_reply_changes_nothing(recipe: str, caplog: pytest.LogCaptureFixture) -> None:
    """All fail in round 2: the run is then the same as one whose clients were never asked in it."""
    failing: set[int] = {1, 2}

    def unreliable(message: Message) -> RecordDict | Error:
        round_ = message.content.config_records["config"]["server-round"]
        return Error(1, "gone") if round_ in failing else answer(message)

    strategy = strategy_of(recipe, optimizer="sgd")
    adapters, metrics = run(strategy, FakeGrid(dict.fromkeys(NODES, unreliable)), rounds=4)
    assert sorted(metrics) == [3, 4]
    assert equal(adapters[0], start())
    assert equal(adapters[1], adapters[0])
    assert equal(adapters[2], adapters[0])
    assert not equal(adapters[3], adapters[2])
    assert "round 2: no reply is usable; the adapter stays as it is" in warnings_in(caplog)


def test_a_run_starts_anew() -> None:
    """Momentum and residuals of an earlier run have no part in the next one."""
    strategy = strategy_of("fedsvd", optimizer="nesterov")
    first, _ = run(strategy, FakeGrid())
    second, _ = run(strategy, FakeGrid())
    assert equal(first[-1], second[-1])


def test_arrays_that_something_else_has_changed_are_refused() -> None:
    strategy, grid = strategy_of("ffa"), FakeGrid()
    run(strategy, grid, rounds=1)
    with pytest.raises(RunError, match="round 2 is to start from other arrays"):
        list(strategy.configure_train(2, record(start()), ConfigRecord(), grid))


def test_a_round_that_was_never_configured() -> None:
    with pytest.raises(RunError, match="never configured"):
        strategy_of("ffa").aggregate_train(1, [])


def test_flower_decides_who_takes_part() -> None:
    grid = FakeGrid()
    strategy = fedapt.strategy("ffa", fraction_train=0.5, fraction_evaluate=0.25, min_evaluate_nodes=1)
    strategy.start(grid=grid, initial_arrays=record(start()), num_rounds=1)
    assert [m.metadata.message_type for m in grid.sent] == ["train", "train", "evaluate"]


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("fedsdv", {}, 'did you mean "fedsvd"'),
        ("fedsvd", {"optimizer": "adam"}, 'Nearest legal: "novograd"'),
        ("fedsvd", {"learning_rat": 1.0}, 'did you mean "learning_rate"'),
        ("flora", {"learning_rate": 0.5}, "Nearest legal: 1.0"),
        ("ffa", {"period": 2}, "has no period"),
        ("fedex", {}, 'Nearest legal: "flora"'),
        ("refresh", {}, 'Nearest legal: "fedsvd"'),
    ],
)
def test_what_is_refused_at_construction(recipe: str, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        fedapt.strategy(recipe, **options)
    assert message in str(caught.value)


def dora() -> dict[str, Matrix]:
    return start() | {f"{p.module}.lora_magnitude_vector": np.ones(p.b.shape[0], np.float32) for p in LAYOUT.pairs}


@pytest.mark.parametrize(
    ("recipe", "initial", "message"),
    [
        ("ffa", {}, "no pair of plain LoRA factors among its 0 tensors"),
        ("ffa", {BIAS: np.zeros(3, np.float32)}, 'Nearest legal: "fedit"'),
        ("ffa", dora(), 'Nearest legal: "fedit"'),
        ("ffa", {A: np.zeros((2, 5), np.float32), B: np.zeros((4, 3), np.float32)}, "no pair of plain LoRA factors"),
        ("ffa", {A: np.zeros((2, 5), np.float16), B: np.zeros((4, 2), np.float16)}, "is float16: cast the adapter"),
        ("ffa", start() | {B: np.full((4, 2), np.nan, np.float32)}, "holds NaN"),
        ("fedsvd", {A: np.zeros((3, 2), np.float32), B: np.zeros((4, 3), np.float32)}, "Nearest legal: rank 2"),
    ],
)
def test_what_a_recipe_cannot_work_on_is_refused(recipe: str, initial: Tensors, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        run(strategy_of(recipe), FakeGrid(), initial=record(initial))
    assert message in str(caught.value)


def renamed(old: str, new: str) -> dict[str, Matrix]:
    return {name.replace(old, new): values for name, values in start().items()}


LONE: dict[str, tuple[Tensors, str, tuple[int, ...]]] = {
    "a transposed A": (start() | {A: start()[A].T}, A, (5, 2)),
    "A without B": ({name: values for name, values in start().items() if name != B}, A, (2, 5)),
    "B without A": ({name: values for name, values in start().items() if name != A}, B, (4, 2)),
    "the adapter's own name": (renamed("q.lora_A.", "q.lora_A.default."), f"{P}q.lora_A.default.weight", (2, 5)),
    "an embedding": (
        start() | {f"{P}e.lora_embedding_{f}": np.zeros((2, 2), np.float32) for f in "AB"},
        f"{P}e.lora_embedding_A",
        (2, 2),
    ),
    "DoRA in one module": (start() | {f"{P}q.lora_magnitude_vector": np.ones(4, np.float32)}, A, (2, 5)),
}


@pytest.mark.parametrize("recipe", [name for name in STOCK if name != "fedit"])
@pytest.mark.parametrize(("initial", "name", "shape"), LONE.values(), ids=LONE)
def test_a_factor_without_its_other_is_refused_beside_a_good_pair(
    recipe: str, initial: Tensors, name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(SpecError) as caught:
        run(strategy_of(recipe), FakeGrid(), initial=record(initial))
    assert str(caught.value).startswith(f"initial_arrays: {name} of shape {shape} is in no pair")
    assert 'Nearest legal: "fedit"' in str(caught.value)


@pytest.mark.parametrize("initial", [initial for initial, _, _ in LONE.values()], ids=LONE)
def test_fedit_takes_a_factor_without_its_other(initial: Tensors) -> None:
    adapters, _ = run(strategy_of("fedit"), FakeGrid(), rounds=1, initial=record(initial))
    assert not equal(adapters[1], initial)


@pytest.mark.parametrize("rule", ["fisher", "greedy-soup"])
def test_what_a_stock_federation_lacks_is_refused_at_start(rule: str) -> None:
    with pytest.raises(SpecError, match="Nearest legal"):
        strategy_of("ffa", aggregator=rule)


def test_fedit_takes_any_adapter() -> None:
    """The mean of what is trained needs no factors: DoRA's tensors are averaged each for itself."""
    adapters, metrics = run(strategy_of("fedit"), FakeGrid(), rounds=1, initial=record(dora()))
    weights = [weight_of(node) for node in NODES]
    for name in dora():
        ends = [after_training(dora(), 1, node)[name] for node in NODES]
        expected = np.average(ends, axis=0, weights=weights)
        np.testing.assert_allclose(adapters[1][name], expected, atol=1e-6)
    assert set(metrics[1]) == {"loss"}, "no product, so neither an error of it nor a rank"


@pytest.mark.parametrize("recipe", ["onebyte", "kseed", "dpzo"])
def test_a_stock_client_exchanges_no_codes(recipe: str) -> None:
    with pytest.raises(SpecError, match="exchanges codes"):
        fedapt.strategy(recipe)
