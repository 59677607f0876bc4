"""Rules for making one change of many, through whole rounds of recipes: against bad nodes, and of model merging."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.kernels.merging import fisher_reference
from fedapt.protocols.codecs import CODECS
from fedapt.protocols.errors import SpecError
from fedapt.protocols.layout import AdapterLayout, Flat, TensorSpec
from fedapt.protocols.legality import ON_ENTRIES, illegal
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.shared import SharedAdapter
from fedapt.protocols.spec import Recipe as Settings
from fedapt.protocols.spec import RunSpec
from fedapt.protocols.update import Update
from fedapt.server.advance import advance
from fedapt.server.combining import FLOOR, combined, souped, weighed
from fedapt.server.rounds import Contribution, Round

from . import fakes
from .dense import Matrix, case_of, deltas, layout_of, size, start_of, values

LAYOUT = layout_of((8, 12, 2), (6, 9, 2))
ON_DISTANCES = ("krum", "multi-krum", "geometric-median", "clip")
ALL = (*ON_DISTANCES, *ON_ENTRIES)
HONEST, BAD = 8, 2


def legal(recipe: str, rule: str) -> bool:
    spec = RunSpec.parse('[model]\nbase = "m"\ntask = "causal-lm"\n[recipe]\nweighting = "uniform"')
    return illegal(spec.set(f"recipe.name={recipe}", f"recipe.aggregator={rule}"), RECIPES[recipe]) == []


LEGAL = [(recipe, rule) for recipe in RECIPES for rule in ALL if legal(recipe, rule)]


def shared_of(recipe: str, rule: str, layout: AdapterLayout = LAYOUT) -> SharedAdapter:
    chosen = Settings(name=recipe, aggregator=rule)  # type: ignore[arg-type]
    if RECIPES[recipe].has_frozen:
        layout = layout.with_frozen(RECIPES[recipe].budget(layout, chosen))
    start = start_of(layout, 0)
    for pair in layout.pairs if RECIPES[recipe].has_frozen else ():
        layout.split(start)[pair.frozen[0]][...] = 0
    return SharedAdapter(RECIPES[recipe], chosen, layout, start)


def in_another_gauge(shared: SharedAdapter, change: Flat, number: int, seed: int) -> Flat:
    """The same products in factors of another basis, where a node trains both: (B·G)·(G⁻¹·A)."""
    trained = shared.sent(number)
    tensors = {name: t.astype(np.float64) for name, t in trained.split(change.copy()).items()}
    start = shared.layout.split(shared.start)
    for pair in shared.layout.pairs:
        if pair.a.name not in tensors or pair.b.name not in tensors:
            continue
        gauge = np.linalg.qr(np.random.default_rng(seed).standard_normal((pair.rank, pair.rank)))[0] * 1.5
        b, a = start[pair.b.name] + tensors[pair.b.name], start[pair.a.name] + tensors[pair.a.name]
        tensors[pair.b.name] = b @ gauge - start[pair.b.name]
        tensors[pair.a.name] = np.linalg.solve(gauge, a) - start[pair.a.name]
    return trained.join(tensors)


def good(shared: SharedAdapter, *, gauges: bool = False) -> list[Contribution]:
    """Nodes that agree up to noise, each in a gauge of its own where asked."""
    trained, contributions = shared.sent(1), []
    for node in range(HONEST + BAD):
        change = np.asarray(0.3 * (values(trained, 7) + 0.2 * values(trained, 100 + node)), np.float32)
        if gauges:
            change = in_another_gauge(shared, change, 1, node)
        certain = np.ones(trained.size, np.float32)
        contributions.append(Contribution(1 / (HONEST + BAD), change, information=certain))
    return contributions


def attacked(contributions: list[Contribution], kind: str) -> list[Contribution]:
    """The last nodes send what has a hundred times the size, or ten times with the sign turned."""
    scale = np.float32({"huge": 100, "flipped": -10}[kind])
    return [replace(c, change=scale * c.change) if node >= HONEST else c for node, c in enumerate(contributions)]


def after(shared: SharedAdapter, contributions: list[Contribution]) -> list[Matrix]:
    state = shared.initial_state()
    return deltas(shared, advance(shared, state, state, {}, contributions, number=1)[0], 2)


def moved(shared: SharedAdapter, found: list[Matrix], expected: list[Matrix]) -> float:
    """The distance of two adapters, relative to how far the second is from the start."""
    start = deltas(shared, shared.initial_state(), 1)
    return size(*map(np.subtract, found, expected)) / size(*map(np.subtract, expected, start))


@pytest.mark.parametrize(("recipe", "rule"), LEGAL)
def test_with_nobody_bad_a_rule_is_near_the_mean(recipe: str, rule: str) -> None:
    """Krum takes one node; TIES, breadcrumbs and PCB leave most entries out: they are near in direction alone."""
    shared = shared_of(recipe, rule)
    mean, found = after(shared_of(recipe, "mean"), good(shared)), after(shared, good(shared))
    start = deltas(shared, shared.initial_state(), 1)
    ours, theirs = (np.concatenate([(d - s).ravel() for d, s in zip(x, start, strict=True)]) for x in (found, mean))
    sparse = rule in ("ties", "breadcrumbs", "pcb")
    assert ours @ theirs / (size(ours) * size(theirs)) > (0.3 if sparse else 0.85)
    assert size(ours) < 1.3 * size(theirs), "a step of the mean's size, and not of the sum's"
    if not sparse and rule != "krum":
        assert moved(shared, found, mean) < 0.15


@pytest.mark.parametrize("kind", ["huge", "flipped"])
@pytest.mark.parametrize(
    ("recipe", "rule"), [row for row in LEGAL if row[1] not in ("clip", "ties", "breadcrumbs", "pcb", "fisher")]
)
def test_a_fifth_of_bad_nodes_moves_the_mean_far_and_a_robust_rule_little(recipe: str, rule: str, kind: str) -> None:
    """In random gauges where nodes train both factors and the rule looks at products; the mean is the control.

    FedIT and LoRA-FAIR average the factors, so the nodes' gauges must be one there, or their mean means nothing.
    """
    products = recipe in ("flexlora", "flora")
    shared, plain = shared_of(recipe, rule), shared_of(recipe, "mean")
    honest = good(shared, gauges=products)
    expected = after(plain, good(shared))
    bad = attacked(honest, kind)
    assert moved(shared, after(plain, bad), expected) > 1.0
    assert moved(shared, after(shared, bad), expected) < 0.4


@pytest.mark.parametrize("recipe", ["ffa", "fedit", "fedsvd"])
@pytest.mark.parametrize("kind", ["huge", "flipped"])
def test_clipping_bounds_what_a_bad_node_can_do(recipe: str, kind: str) -> None:
    shared, plain = shared_of(recipe, "clip"), shared_of(recipe, "mean")
    honest = good(shared)
    expected, bad = after(plain, honest), attacked(honest, kind)
    clipped = moved(shared, after(shared, bad), expected)
    assert clipped < 0.6
    assert clipped < 0.5 * moved(shared, after(plain, bad), expected)


def test_clipping_takes_a_smaller_step_and_makes_no_error_where_one_factor_is_common() -> None:
    shared = shared_of("ffa", "clip")
    contributions = attacked(good(shared), "huge")
    state = shared.initial_state()
    _, _, error = advance(shared, state, state, {}, contributions, number=1)
    updates = Round(shared.layout, shared.sent(1), shared.start, contributions)
    assert sum(c.weight for c in weighed(updates, shared.settings).contributions) < 0.9
    assert error is not None
    assert error <= 1e-6


@pytest.mark.parametrize("rule", ON_DISTANCES)
@pytest.mark.parametrize("recipe", ["flexlora", "fedit", "ffa", "fedsvd"])
def test_rules_on_distances_do_not_see_the_gauge(recipe: str, rule: str) -> None:
    shared = shared_of(recipe, rule)
    plain, turned = good(shared), good(shared, gauges=True)
    weights = [
        [c.weight for c in weighed(Round(LAYOUT, shared.sent(1), shared.start, given), shared.settings).contributions]
        for given in (attacked(plain, "flipped")[:HONEST], attacked(turned, "flipped")[:HONEST])
    ]
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-4)


@pytest.mark.parametrize("rule", ON_DISTANCES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_nodes_are_no_trouble(rule: str, count: int) -> None:
    """Krum needs three; below that the uniform mean has to do."""
    shared = shared_of("ffa", rule)
    found = weighed(Round(LAYOUT, shared.sent(1), shared.start, good(shared)[:count]), shared.settings)
    weights = [c.weight for c in found.contributions]
    assert np.isfinite(weights).all()
    assert sum(weights) > 0
    if rule == "krum" and count >= 3:
        assert sorted(weights)[-2:] == [0.0, 1.0]


@pytest.mark.parametrize("rule", ["krum", "multi-krum"])
@pytest.mark.parametrize(
    ("count", "share", "withstood"),
    [(1, 0.2, 0), (2, 0.2, 0), (3, 0.2, 0), (4, 0.2, 0), (5, 0.2, None), (6, 0.2, 1), (7, 0.2, None), (3, 0.0, None)],
)
def test_krum_says_where_it_withstands_fewer_than_it_should(
    rule: str, count: int, share: float, withstood: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A fifth of six is two nodes, rounded up, as in the trimmed mean of codes; two need seven updates."""
    shared = shared_of("ffa", rule)
    chosen = shared.settings.model_copy(update={"byzantine": share})
    weighed(Round(LAYOUT, shared.sent(1), shared.start, good(shared)[:count]), chosen)
    told = [] if withstood is None else [f"{count} updates withstand {withstood} hostile nodes"]
    assert len(caplog.messages) == len(told)
    for expected, message in zip(told, caplog.messages, strict=True):
        assert expected in message
        assert message.startswith(f'recipe.aggregator = "{rule}": ')


@pytest.mark.parametrize("rule", ["krum", "multi-krum"])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_krum_does_not_hear_what_a_node_claims_to_weigh(rule: str, count: int) -> None:
    shared = shared_of("ffa", rule)
    plain = good(shared)[:count]
    claimed = [replace(c, weight=1 - 1e-12 if k == 0 else 1e-12) for k, c in enumerate(plain)]
    found = [
        [c.weight for c in weighed(Round(LAYOUT, shared.sent(1), shared.start, own), shared.settings).contributions]
        for own in (plain, claimed)
    ]
    assert found[0] == found[1]
    assert sum(found[0]) == pytest.approx(1)


@pytest.mark.parametrize("rule", ["krum", "geometric-median"])
def test_mixed_ranks_are_compared_as_products(rule: str) -> None:
    """A bad node among nodes of three ranks gets next to no weight, and the round goes through."""
    case = case_of(RECIPES["flexlora"], LAYOUT, 3, ranks=[1, 2, 0, 1, 2])
    bad = [replace(c, change=1000 * c.change) if k == 4 else c for k, c in enumerate(case.updates.contributions)]
    updates = replace(case.updates, contributions=[replace(c, weight=0.2) for c in bad])
    found = weighed(updates, Settings(name="flexlora", aggregator=rule))  # type: ignore[arg-type]
    assert found.contributions[4].weight < 0.01
    assert sum(c.weight for c in found.contributions) == pytest.approx(1)


def test_the_share_of_bad_nodes_is_what_the_spec_says() -> None:
    """Multi-Krum leaves that many out; a trimmed mean bears one outlier of ten at a tenth, and not at none."""
    shared = shared_of("ffa", "multi-krum")
    updates = Round(LAYOUT, shared.sent(1), shared.start, good(shared))
    for share, kept in ((0.0, 10), (0.1, 9), (0.11, 8), (0.3, 7), (0.49, 7)):
        chosen = shared.settings.model_copy(update={"byzantine": share})
        assert sum(c.weight > 0 for c in weighed(updates, chosen).contributions) == kept
    outlier = [replace(c, change=1000 * c.change) if k == 0 else c for k, c in enumerate(updates.contributions)]
    trimmed: dict[float, Any] = {
        share: combined(replace(updates, contributions=outlier), Settings(aggregator="trimmed-mean", byzantine=share))
        for share in (0.0, 0.1)
    }
    mean = updates.mean()
    assert size(trimmed[0.1] - mean) < 0.2 * size(mean) < size(trimmed[0.0] - mean)


@pytest.mark.parametrize("rule", ["mean", *ALL])
def test_a_head_alone_is_aggregated_too(rule: str) -> None:
    heads = LAYOUT.select({"other"})
    chosen = Settings(name="fedit", aggregator=rule)  # type: ignore[arg-type]
    changes = [Contribution(0.25, values(heads, 5), information=values(heads, 6) ** 2) for _ in range(4)]
    updates = weighed(Round(heads, heads, values(heads, 0), changes), chosen)
    found = combined(updates, chosen)
    assert found.dtype == np.float32
    kept = found != 0
    assert kept.any()
    assert kept.all() or rule in ("ties", "breadcrumbs", "pcb")
    np.testing.assert_allclose(found[kept], values(heads, 5)[kept], rtol=1e-5)


ENTRIES = AdapterLayout([TensorSpec("q.lora_B.weight", (3, 2), "B"), TensorSpec("score.bias", (2,), "other")])


def informed(changes: Any, information: Any, weights: Any, trained: AdapterLayout = ENTRIES) -> Flat:
    """What `fisher` makes of these rows over a layout without a pair."""
    given_ = [
        Contribution(float(w), np.asarray(c, np.float32), information=np.asarray(f, np.float32))
        for w, c, f in zip(weights, changes, information, strict=True)
    ]
    return combined(Round(trained, trained, values(trained, 0), given_), Settings(name="ffa", aggregator="fisher"))


@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 3), st.integers(0, 2**32))
def test_fisher_is_the_plain_rule_tensor_by_tensor(count: int, rows: int, own: int, seed: int) -> None:
    trained = AdapterLayout([TensorSpec("b", (rows, 2), "other"), TensorSpec("bias", (own,), "other")])
    random = np.random.default_rng(seed)
    changes = random.standard_normal((count, trained.size)).astype(np.float32)
    information = (random.standard_normal((count, trained.size)) ** 2 * 1e-9).astype(np.float32)
    weights = random.dirichlet(np.ones(count))
    expected: list[float] = []
    for part in (slice(0, 2 * rows), slice(2 * rows, trained.size)):
        moves, certain = changes[:, part], information[:, part]
        if moves.size:
            expected += fisher_reference(moves, certain, weights.tolist(), FLOOR * float(certain.mean()))
    np.testing.assert_allclose(informed(changes, information, weights, trained), expected, rtol=1e-5, atol=1e-6)


def test_a_node_that_is_surer_pulls_the_mean_towards_itself() -> None:
    """Entry by entry, and whatever the unit of the loss: information of 1e-9 in all is no reason for the plain mean."""
    changes = np.stack([np.zeros(8), np.ones(8)])
    information = np.ones((2, 8))
    information[1, 2] = 1000
    found = informed(changes, information, [0.5, 0.5])
    assert found[2] > 0.99
    np.testing.assert_allclose(np.delete(found, 2), 0.5)
    np.testing.assert_allclose(informed(changes, 1e-12 * information, [0.5, 0.5]), found, rtol=1e-5)


@pytest.mark.parametrize("certain", [0.0, 1e-6, 3.0])
@pytest.mark.parametrize("recipe", ["ffa", "fedsvd", "refresh", "rolora"])
def test_equal_information_gives_the_plain_mean(recipe: str, certain: float) -> None:
    shared, plain = shared_of(recipe, "fisher"), shared_of(recipe, "mean")
    weights = np.arange(1.0, HONEST + BAD + 1) / np.arange(1.0, HONEST + BAD + 1).sum()
    trained = shared.sent(1)
    contributions = [
        replace(c, weight=float(w), information=np.full(trained.size, certain, np.float32))
        for c, w in zip(good(shared), weights, strict=True)
    ]
    state = shared.initial_state()
    ours, theirs = (advance(s, state, state, {}, contributions, number=1)[0] for s in (shared, plain))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert size(theirs - advance(plain, state, state, {}, [], number=1)[0]) > 0.1


def test_without_information_fisher_is_refused() -> None:
    shared = shared_of("ffa", "fisher")
    contributions = [replace(c, information=None) if k < 2 else c for k, c in enumerate(good(shared))]
    state = shared.initial_state()
    with pytest.raises(SpecError, match=r"2 of 10 nodes sent no Fisher information.*Nearest legal"):
        advance(shared, state, state, {}, contributions, number=1)


SOUPS = [recipe for recipe in RECIPES if legal(recipe, "greedy-soup")]


def nearer_to(shared: SharedAdapter, honest: list[Contribution], asked: list[Flat] | None = None) -> Any:
    """A score: how near an adapter is to what the mean of the honest nodes gives."""
    plain = replace(shared, settings=shared.settings.model_copy(update={"aggregator": "mean"}))
    state = shared.initial_state()
    goal = deltas(shared, advance(plain, state, state, {}, honest, number=1)[0], 2)

    def score(adapter: Flat) -> float:
        if asked is not None:
            asked.append(adapter)
        tensors = {name: t.astype(np.float64) for name, t in shared.layout.split(adapter).items()}
        products = [tensors[p.b.name] @ tensors[p.a.name] for p in shared.layout.pairs]
        if shared.recipe.has_frozen:
            frozen = [tensors[p.frozen[0]] @ tensors[p.frozen[1]] for p in shared.layout.pairs]
            products = [p + f for p, f in zip(products, frozen, strict=True)]
        distance = size(*(p - g for p, g in zip(products, goal, strict=False)))
        return float("nan") if distance > 1e3 else -distance

    return score


def test_the_soup_is_for_recipes_that_average_tensors() -> None:
    assert sorted(SOUPS) == ["diloco", "fedit", "fedsvd", "ffa", "refresh", "rolora"]


@pytest.mark.parametrize("recipe", SOUPS)
@pytest.mark.parametrize("kind", ["huge", "flipped"])
def test_the_soup_leaves_a_poisoned_node_out(recipe: str, kind: str) -> None:
    """The mean is the control. The adapters that are tried are those that would result: one of them is what comes."""
    shared, plain = shared_of(recipe, "greedy-soup"), shared_of(recipe, "mean")
    honest = good(shared)
    bad, expected = attacked(honest, kind), after(plain, honest[:HONEST])
    asked: list[Flat] = []
    score, state = nearer_to(shared, honest[:HONEST], asked), shared.initial_state()
    found = advance(shared, state, state, {}, bad, number=1, score=score)[0]
    assert len(asked) == 2 * len(bad) + 1
    assert any(np.allclose(shared.whole(found, 2), tried, atol=1e-5) for tried in asked)
    assert moved(shared, after(plain, bad), expected) > 1.0
    assert moved(shared, deltas(shared, found, 2), expected) < 0.4


@pytest.mark.parametrize("recipe", SOUPS)
def test_where_all_are_bad_the_soup_is_the_start(recipe: str) -> None:
    shared, plain = shared_of(recipe, "greedy-soup"), shared_of(recipe, "mean")
    honest, state = good(shared), shared.initial_state()
    bad = [replace(c, change=-10 * c.change) for c in honest]
    found, _, error = advance(shared, state, state, {}, bad, number=1, score=nearer_to(shared, honest))
    np.testing.assert_allclose(found, advance(plain, state, state, {}, [], number=1)[0], atol=1e-6)
    assert error is not None
    assert error <= 1e-6


def test_the_soup_weighs_those_it_takes_alike_and_nan_is_the_worst() -> None:
    scores = {1.0: 3.0, 2.0: float("nan"), 3.0: 1.0}
    nodes = [Contribution(w, np.full(2, v, np.float32)) for w, v in ((0.7, 1.0), (0.2, 2.0), (0.1, 3.0))]

    def score(change: Flat) -> float:
        return scores.get(float(change[0]), 0.0)

    assert [c.weight for c in souped(nodes, score)] == [1.0, 0.0, 0.0]
    assert [c.weight for c in souped(nodes, lambda _: 1.0)] == pytest.approx([1 / 3] * 3)
    assert [c.weight for c in souped(nodes, lambda c: -abs(float(c[0]) - 2.5))] == [0.0, 0.5, 0.5]
    assert [c.weight for c in souped(nodes, lambda c: -float(c[0]))] == [0.0] * 3
    assert [c.weight for c in souped(nodes[:1], score)] == [1.0]


def test_without_a_score_the_soup_is_refused_at_the_start() -> None:
    spec = fakes.spec_of("recipe.name=ffa", "recipe.aggregator=greedy-soup")
    grid = fakes.FakeGrid(spec)
    with pytest.raises(SpecError, match=r"cannot evaluate.*nearest legal"):
        fakes.run(grid)
    assert grid.sent == []
    shared = shared_of("ffa", "greedy-soup")
    state = shared.initial_state()
    with pytest.raises(SpecError, match=r"cannot evaluate.*nearest legal"):
        advance(shared, state, state, {}, good(shared), number=1)


def test_a_run_of_soups_never_gets_worse() -> None:
    """FakeGrid's nodes pull to random places, and the norm is judged: the mean's is the control."""
    rows = {
        rule: fakes.run(
            fakes.FakeGrid(fakes.spec_of("recipe.name=ffa", f"recipe.aggregator={rule}"), scale=2.0),
            evaluate=fakes.ends,
        )[1]
        for rule in ("mean", "greedy-soup")
    }
    losses = {rule: [float(row["evaluation"]["loss"]) for row in own] for rule, own in rows.items()}
    start = fakes.ends(fakes.start())["loss"]
    soups = [start, *losses["greedy-soup"]]
    assert all(after_ <= before + 1e-6 for before, after_ in pairwise(soups))
    assert max(losses["mean"]) > start


def test_a_run_weighs_by_what_nodes_send_and_refuses_what_none_can_know() -> None:
    """Node 4 is a million times as sure as node 5: the run is its own. Node 3 sends a negative number."""
    sent: dict[int, Flat] = {}

    def certain(update: Update) -> list[fakes.Answer]:
        change = np.frombuffer(update.payload, np.float32)
        sent[update.node] = change
        information = np.full(len(change), {3: -1.0, 4: 1e3, 5: 1e-3}[update.node], np.float32)
        return [replace(update, payload=update.payload + CODECS["bf16"].encode(information, ENTRIES, 0))]

    spec = fakes.spec_of("recipe.name=ffa", "recipe.aggregator=fisher", "run.rounds=1")
    coordinator, (row,) = fakes.run(fakes.FakeGrid(spec, certain, there=[3, 4, 5]))
    assert (row["nodes"], row["refused"]) == (2, 1)
    assert "Fisher information holds -1" in coordinator.store.refusals("run", 1)[0][1]
    trained = coordinator.shared.sent(1)
    start, end = (trained.join(fakes.LAYOUT.split(x)) for x in (fakes.start(), coordinator.adapter()))
    np.testing.assert_allclose(end - start, sent[4], atol=1e-4)
    assert size(sent[4] - sent[5]) > 0.1
