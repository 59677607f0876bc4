"""A fleet from the spec to the page: the clock in rows, report, comparison and plan; what nodes keep in the run's folder."""

import shutil
from pathlib import Path

import pytest

from fedapt.comparing import compare
from fedapt.planning import plan
from fedapt.protocols.errors import SpecError
from fedapt.protocols.spec import RunSpec
from fedapt.report import Curve, Metric, timing
from fedapt.server.store import Row
from fedapt.simulation import STANDINGS, Result, run

from .running import in_process

FLEET = ["fleet.examples_per_second=2", "fleet.uplink_mbps=0.01", "fleet.speed_spread=0.5", "fleet.dropout=0.2"]
KEEPING = {
    "top-k": ["recipe.name=fedit", "wire.codec=top-k"],
    "diloco": ["recipe.name=diloco", "recipe.fragments=2", "wire.codec=fp32"],
}


def timeless(result: Result) -> list[Row]:
    """All rows, without what a clock on the wall has measured."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.metrics]


@pytest.mark.parametrize(
    "overrides", [KEEPING["top-k"], pytest.param(KEEPING["diloco"], marks=pytest.mark.slow)], ids=KEEPING
)
def test_a_run_goes_on_with_what_its_nodes_kept(tiny: Path, tmp_path: Path, overrides: list[str]) -> None:
    spec = RunSpec.load(tiny, [*overrides, *FLEET])
    whole = run(spec)
    run(spec.set("run.rounds=1"), tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "forgetful")
    resumed = run(spec, tmp_path / "out")
    assert resumed.outcome.adapter.tobytes() == whole.outcome.adapter.tobytes()
    assert timeless(resumed) == timeless(whole)
    (tmp_path / "forgetful" / STANDINGS).unlink()
    assert timeless(run(spec, tmp_path / "forgetful")) != timeless(whole), "the control: what they kept matters"


@pytest.mark.slow
def test_a_run_that_begins_anew_finds_nothing_kept(tiny: Path, tmp_path: Path) -> None:
    spec = RunSpec.load(tiny, KEEPING["top-k"])
    whole = run(spec, tmp_path / "out")
    for file in (tmp_path / "out").glob("run.sqlite*"):
        file.unlink()
    assert run(spec, tmp_path / "out").outcome.adapter.tobytes() == whole.outcome.adapter.tobytes()


def test_the_clock_is_shown(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [part for setting in FLEET for part in ("--set", setting)]
    code, _, err = in_process(capsys, "simulate", tiny, "--out", tmp_path / "a", *settings)
    assert code == 0, err
    assert " · clock " in err
    page = (tmp_path / "a" / "report.html").read_text()
    assert "over simulated time" in page
    assert "<th>Simulated time</th>" in page
    assert "<th>Lost</th>" in page
    assert in_process(capsys, "simulate", tiny, "--out", tmp_path / "b", "--set", "run.name=without")[0] == 0
    assert "simulated" not in (tmp_path / "b" / "report.html").read_text().lower()
    both = compare([tmp_path / "a", tmp_path / "b"])
    assert both.runs[0].simulated_seconds
    assert both.runs[1].simulated_seconds is None
    assert "Simulated time" in both.text()
    assert "over simulated time" in both.html()
    alone = compare([tmp_path / "b"])
    assert "imulated time" not in alone.text() + alone.html()


def test_a_curve_of_seconds_is_drawn_in_the_unit_that_fits() -> None:
    metric = Metric("loss", "loss")
    start = {"round": 0, "evaluation": {"loss": 2.0}}
    for most, unit in ((100.0, "seconds"), (1e3, "minutes"), (1e4, "hours"), (1e6, "days")):
        rows = [start, {"round": 1, "evaluation": {"loss": 1.0}, "simulated_seconds": most}]
        assert f"{unit}, simulated" in timing([Curve("a", rows)], metric)
    assert timing([Curve("a", [start, {"round": 1, "simulated_seconds": 0.0}])], metric) == ""
    assert timing([Curve("a", [start])], metric) == ""


def test_plan_says_what_a_round_takes_the_median_node(tiny: Path) -> None:
    spec = RunSpec.load(tiny)
    assert plan(spec).node_seconds is None
    planned = plan(spec.set("fleet.examples_per_second=0.5", "fleet.uplink_mbps=0.008", "fleet.latency_seconds=1"))
    assert planned.node_seconds == pytest.approx(2 + 2 / 0.5 + planned.up_per_node / 1000, abs=0.01)
    assert not planned.exact_total


def test_what_cannot_be_is_refused_before_anything_is_loaded(tiny: Path) -> None:
    with pytest.raises(SpecError, match=r"available = 0\.5 and trace are both set"):
        RunSpec.load(tiny, ["fleet.available=0.5", "fleet.trace=t.jsonl"])
    with pytest.raises(SpecError, match=r'fleet\.up_link_mbps = 3: unknown key; did you mean "uplink_mbps"'):
        RunSpec.load(tiny, ["fleet.up_link_mbps=3"])
    private = ["recipe.name=ffa", "recipe.weighting=uniform", "privacy.unit=client", "privacy.epsilon=8"]
    sampled = ["participation.sampling=poisson", "participation.minimum=0", "fleet.available=0.5"]
    with pytest.raises(SpecError, match="the draw is accounted as one from all clients"):
        run(RunSpec.load(tiny, [*private, *sampled, "model.base=nowhere"]))


def test_a_trace_lies_beside_its_spec(tiny: Path) -> None:
    (tiny.parent / "trace.jsonl").write_text('{"node": 1, "from": 30, "until": 1000}')
    spec = RunSpec.load(tiny, ["fleet.trace=trace.jsonl", "run.rounds=1"])
    assert spec.fleet is not None
    assert spec.fleet.trace == str(tiny.parent / "trace.jsonl")
    (_, row) = run(spec).metrics
    assert (row["nodes"], row["simulated_seconds"]) == (1, 30.0)
