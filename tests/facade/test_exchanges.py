"""Zeroth-order recipes from spec to result, on a federation that answers in seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedapt.planning import plan
from fedapt.presentation import plan_text
from fedapt.protocols.spec import RunSpec
from fedapt.server.exchanges import ZerothCoordinator
from fedapt.server.log import replay
from fedapt.server.store import SqliteStore
from fedapt.sim.federation import build
from fedapt.sim.grid import LocalGrid
from fedapt.simulation import run

SPEC = """
[run]
name = "codes"
rounds = 6
seed = 5
evaluate_every = 3
[model]
base = "builtin:byte-llama"
task = "causal-lm"
max_length = 16
[adapter]
rank = 2
targets = ["q_proj"]
layers = [3]
[recipe]
name = "{recipe}"
weighting = "uniform"
[zeroth]
directions = 4
radius = 1e-2
[local]
learning_rate = 1e-3
batch_size = 2
{more}
[data]
source = "builtin:stdlib"
limit = 12
evaluation_limit = 6
[data.partition]
clients = 3
"""
MORE = {
    "onebyte": "",
    "kseed": "",
    "dpzo": '[privacy]\nunit = "example"\nepsilon = 1000\nnoise_multiplier = 0.2\nclip = 4.0\nnoise = "simulation"\ndelta = 1e-3',
}
SHORT = Path(__file__).with_name("short.jsonl")
recipes = pytest.mark.parametrize("recipe", MORE)


def spec_of(recipe: str, *overrides: str) -> RunSpec:
    text = SPEC.format(recipe=recipe, more=MORE[recipe])
    if recipe == "dpzo":  # texts that are cut are no unit of privacy
        text = text.replace("builtin:stdlib", str(SHORT))
    if recipe == "kseed":
        text = text.replace("radius", "pool = 16\nradius")
    return RunSpec.parse(text, overrides=overrides)


def without_time(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize(
    "recipe", ["onebyte", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kseed", "dpzo"))]
)
def test_a_run_leaves_everything_and_goes_on_to_the_same_bytes(recipe: str, tmp_path: Path) -> None:
    spec = spec_of(recipe)
    result = run(spec, tmp_path / "whole")
    assert [row["round"] for row in result.metrics] == [0, 3, 6]
    adapter = load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    assert adapter.keys() == result.adapter.keys()
    assert (tmp_path / "whole/report.html").stat().st_size > 1000
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 3, 6]
    if recipe == "dpzo":
        assert "NOT private" in result.privacy.text()
        assert result.metrics[-1]["epsilon"] > 0

    run(spec_of(recipe, "run.rounds=3"), tmp_path / "parts")
    resumed = run(spec, tmp_path / "parts")
    assert without_time(resumed.metrics) == without_time(result.metrics)
    again = load_file(tmp_path / "parts/adapter/adapter_model.safetensors")
    assert all(np.array_equal(again[name], adapter[name]) for name in adapter)


@recipes
def test_the_plan_counts_the_bytes_that_the_run_does(recipe: str) -> None:
    spec = spec_of(recipe)
    planned = plan(spec)
    rows = run(spec).metrics
    assert planned.up_total == sum(row.get("bytes_up", 0) for row in rows)
    assert planned.down_total == sum(row.get("bytes_down", 0) for row in rows)
    assert planned.sent == 4
    text = plan_text(planned)
    assert "a segment holds" in text
    if recipe == "dpzo":
        assert planned.privacy.epsilon is not None
        assert 0 < planned.privacy.epsilon < 1000


def test_a_store_and_a_start_are_enough_for_the_adapter(tmp_path: Path) -> None:
    spec = spec_of("onebyte")
    result = run(spec, tmp_path / "run")
    store = SqliteStore(tmp_path / "run/run.sqlite")
    coordinator = ZerothCoordinator(spec, LocalGrid(build(spec).client), store)
    state = replay(coordinator.start, coordinator.log.rows("codes"))
    assert state.proof.hex() == result.metrics[-1]["state"]
    store.close()
