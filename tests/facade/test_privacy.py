"""Privacy as a user meets it: the plan says what it will cost, report and folder say what was promised."""

import json
import math
from pathlib import Path

import pytest

from fedapt.forecast import forecast
from fedapt.privacy.ledger import Ledger
from fedapt.promise import Promise, promise
from fedapt.protocols.errors import SpecError
from fedapt.protocols.spec import RunSpec
from fedapt.server.store import Row, SqliteStore
from fedapt.sim.federation import build
from fedapt.simulation import run

CLIENT = (
    "privacy.unit=client",
    "privacy.epsilon=6",
    "recipe.weighting=uniform",
    "recipe.name=ffa",
    "participation.sampling=all",
)
SHORT = Path(__file__).with_name("short.jsonl")  # a text that is cut is no unit of privacy
EXAMPLE = (*CLIENT[1:], "privacy.unit=example", "local.steps=2", f"data.source='{SHORT}'")


def spec_of(path: Path, *overrides: str) -> RunSpec:
    return RunSpec.load(path, [*overrides])


@pytest.mark.parametrize("unit", [CLIENT, pytest.param(EXAMPLE, marks=pytest.mark.slow)], ids=["client", "example"])
def test_the_plan_foretells_what_the_run_then_spends(tiny: Path, unit: tuple[str, ...]) -> None:
    spec = spec_of(tiny, *unit, "privacy.noise=simulation", "data.partition={kind='iid',clients=2}")
    result = run(spec)
    sizes = [len(own) for own in result.federation.client.sites.indices.values()]
    foretold = forecast(spec, sizes, result.federation.client.shared.sent(1).size)
    assert foretold.epsilon is not None
    assert result.privacy.epsilon is not None
    assert foretold.epsilon <= 6
    assert result.privacy.epsilon == pytest.approx(foretold.epsilon, rel=1e-3)
    assert foretold.text().startswith("NOT private (simulation noise)")
    assert result.privacy.text().startswith("NOT private (simulation noise)")


def test_a_run_says_what_it_promises(tiny: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny, *CLIENT, "run.rounds=3", "run.evaluate_every=2")  # rows state no ε of the last round
    result = run(spec, tmp_path / "out")
    assert "client-level, ε = " in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    told = json.loads((tmp_path / "out/adapter/privacy.json").read_text(encoding="utf-8"))
    assert told == result.privacy.as_dict()
    assert told["private"]
    assert 0 < told["epsilon"] <= 6
    store = SqliteStore(tmp_path / "out/run.sqlite")
    assert told["epsilon"] == store.ledger(spec.run.name).spent(spec.privacy.delta).epsilon
    store.close()


@pytest.mark.parametrize("stated", [[8.9, 3.0], [math.nan], []])
def test_the_promise_for_examples_is_the_cap_whatever_nodes_state(stated: list[float]) -> None:
    raw = {"model": {"base": "m", "task": "causal-lm"}, "recipe": {"name": "ffa", "weighting": "uniform"}}
    spec = RunSpec.check(raw).set("privacy.unit=example", "privacy.epsilon=9", "local.steps=1")
    rows: list[Row] = [
        {"round": 0},
        *({"round": 1 + i, "epsilon": e, "private": True} for i, e in enumerate(stated)),
        {"round": 9},
    ]
    assert promise(spec, rows, Ledger({})) == Promise("example", 9.0, 1e-5, True)
    assert promise(spec, rows[:1], Ledger({})) == Promise("example")
    assert not promise(spec, [*rows, {"round": 10, "epsilon": 1.0, "private": False}], Ledger({})).private


@pytest.mark.parametrize(("noise", "rounds"), [(4.0, 6), (0.5, 0)])
def test_a_run_whose_sites_have_spent_their_caps_ends_with_what_it_has(
    tiny: Path, tmp_path: Path, noise: float, rounds: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Every example is in every batch, so all nodes spend alike; each says so itself."""
    steps = ("local.batch_size=64", "local.steps=1", "run.rounds=9", f"privacy.noise_multiplier={noise}")
    spec = spec_of(tiny, *EXAMPLE, *steps, "privacy.epsilon=1.8", "privacy.noise=simulation", "privacy.delta=0.001")
    result = run(spec, tmp_path / "out")
    assert [row["round"] for row in result.metrics] == [*range(rounds + 1)]
    assert "every site's cap on epsilon is spent: the run ends here" in caplog.text
    assert result.outcome.complete
    told = json.loads((tmp_path / "out/adapter/privacy.json").read_text(encoding="utf-8"))
    assert told["epsilon"] == (1.8 if rounds else None)
    assert (tmp_path / "out/report.html").exists()


def test_a_run_without_privacy_promises_nothing(tiny: Path, tmp_path: Path) -> None:
    run(spec_of(tiny), tmp_path / "out")
    assert "no formal guarantee" in (tmp_path / "out/report.html").read_text(encoding="utf-8")
    told = json.loads((tmp_path / "out/adapter/privacy.json").read_text(encoding="utf-8"))
    assert told == {"unit": "none", "epsilon": None, "delta": None, "private": False}


def test_a_text_that_gives_several_examples_is_no_unit_of_privacy() -> None:
    raw = {
        "model": {"base": "builtin:byte-llama", "task": "causal-lm", "max_length": 16},
        "adapter": {"targets": ["q_proj"]},
        "recipe": {"name": "ffa", "weighting": "uniform"},
        "data": {"source": "builtin:stdlib", "limit": 12, "partition": {"clients": 2}},
    }
    with pytest.raises(SpecError, match="k times ε"):
        build(RunSpec.check(raw).set("privacy.unit=example", "privacy.epsilon=6"))
    build(RunSpec.check(raw).set("privacy.unit=client", "privacy.epsilon=6"))


def test_the_plan_warns_of_noise_that_drowns() -> None:
    raw = {"model": {"base": "m", "task": "causal-lm"}, "recipe": {"name": "ffa", "weighting": "uniform"}}
    spec = RunSpec.check(raw).set("privacy.unit=client", "privacy.epsilon=1", "run.rounds=5")
    assert "such a run cannot learn" in forecast(spec, [5] * 10, 100_000).text()
    assert "cannot learn" not in forecast(spec, [5] * 10_000, 100).text()
    assert "delta = 1e-05 is not below 1 / 200,000" in forecast(spec, [5] * 200_000, 100).text()
    assert forecast(RunSpec.check(raw), [5], 10).text() == "none: no formal guarantee"
