"""Rules that a minority of bad nodes cannot steer, through whole rounds of recipes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedapt.protocols.layout import AdapterLayout, Flat
from fedapt.protocols.legality import ON_ENTRIES, illegal
from fedapt.protocols.recipes import RECIPES
from fedapt.protocols.shared import SharedAdapter
from fedapt.protocols.spec import Recipe as Settings
from fedapt.protocols.spec import RunSpec
from fedapt.server.advance import advance
from fedapt.server.combining import combined, weighed
from fedapt.server.rounds import Contribution, Round

from .dense import Matrix, case_of, deltas, layout_of, size, start_of, values

LAYOUT = layout_of((8, 12, 2), (6, 9, 2))
ON_DISTANCES = ("krum", "multi-krum", "geometric-median", "clip")
ALL = (*ON_DISTANCES, *ON_ENTRIES)
HONEST, BAD = 8, 2


def legal(recipe: str, rule: str) -> bool:
    spec = RunSpec.parse(f'[model]\nbase = "m"\ntask = "causal-lm"\n[recipe]\nname = "{recipe}"\naggregator = "{rule}"')
    return illegal(spec, RECIPES[recipe]) == []


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
        contributions.append(Contribution(1 / (HONEST + BAD), change))
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
    ("recipe", "rule"), [row for row in LEGAL if row[1] not in ("clip", "ties", "breadcrumbs", "pcb")]
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
    """Krum needs three; below that the mean has to do."""
    shared = shared_of("ffa", rule)
    found = weighed(Round(LAYOUT, shared.sent(1), shared.start, good(shared)[:count]), shared.settings)
    weights = [c.weight for c in found.contributions]
    assert np.isfinite(weights).all()
    assert sum(weights) > 0
    if rule == "krum" and count >= 3:
        assert sorted(weights)[-2:] == [0.0, 1.0]


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
    for share, kept in ((0.0, 10), (0.1, 9), (0.3, 7), (0.49, 7)):
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
    changes = [Contribution(0.25, values(heads, 5)) for _ in range(4)]
    updates = weighed(Round(heads, heads, values(heads, 0), changes), chosen)
    found = combined(updates, chosen)
    assert found.dtype == np.float32
    kept = found != 0
    assert kept.any()
    assert kept.all() or rule in ("ties", "breadcrumbs", "pcb")
    np.testing.assert_allclose(found[kept], values(heads, 5)[kept], rtol=1e-5)
