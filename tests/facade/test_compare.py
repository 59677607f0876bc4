"""`fedapt runs compare`: numbers against the rounds they come from, the page, one message for each mistake."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedapt.comparing import compare
from fedapt.outputs import read_run
from fedapt.protocols.errors import DataError
from fedapt.protocols.spec import RunSpec
from fedapt.server.coordinator import best_round
from fedapt.simulation import run

from .running import in_process
from .test_report import Page

SPEC = """
[run]
name = "{name}"
[model]
base = "b"
task = "{task}"
labels = 2
[recipe]
name = "{recipe}"
[data]
source = "train.jsonl"
"""


def row(number: int, **values: Any) -> dict[str, Any]:
    costs = {"bytes_down": 1000, "bytes_up": 200, "seconds": 1.5, "aggregation_error": 0.1 * number}
    return {"round": number, **costs, "codec_error": 0.01 * number, "effective_rank": 4.0 + number, **values}


def rounds(accuracies: Sequence[float], **values: Any) -> list[dict[str, Any]]:
    evaluations = [{"loss": 2.0 - a, "accuracy": a} for a in accuracies]
    rest = [row(n, evaluation=e, **values) for n, e in enumerate(evaluations[1:], 1)]
    return [{"round": 0, "evaluation": evaluations[0]}, *rest]


def folder(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    name: str = "",
    recipe: str = "fedsvd",
    task: str = "sequence-classification",
) -> Path:
    path.mkdir(parents=True)
    (path / "spec.toml").write_text(SPEC.format(name=name or path.name, recipe=recipe, task=task))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [
        folder(tmp_path / "a", rounds([0.5, 0.7, 0.9, 0.8])),
        folder(tmp_path / "b", rounds([0.5, 0.6, 0.6], bytes_up=2000), recipe="fedit"),
    ]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return in_process(capsys, "runs", "compare", *arguments)


def test_the_numbers(two: list[Path]) -> None:
    found = compare(two)
    first, second = found.runs
    assert found.metric.key == "accuracy"
    assert found.note == ""
    assert (first.name, first.recipe, first.rounds, first.best_round) == ("a", "fedsvd", 3, 2)
    assert first.best == pytest.approx(0.9)
    assert (first.bytes_down, first.bytes_up, first.bytes_moved) == (3000, 600, 3600)
    assert first.mean_aggregation_error == pytest.approx(0.2)
    assert first.last_aggregation_error == pytest.approx(0.3)
    assert first.mean_codec_error == pytest.approx(0.02)
    assert (first.effective_rank, first.seconds) == (7.0, 4.5)
    assert (second.recipe, second.rounds, second.best_round, second.bytes_moved) == ("fedit", 2, 1, 6000)


def test_the_best_round_is_the_coordinators(two: list[Path]) -> None:
    for line, path in zip(compare(two).runs, two, strict=True):
        assert line.best_round == best_round(read_run(path)[1])


@pytest.mark.parametrize("metric", ["perplexity", "loss"])
def test_without_accuracy_less_is_better(tmp_path: Path, metric: str) -> None:
    rows = [row(n, evaluation={"loss": x} | ({metric: x} if metric != "loss" else {})) for n, x in enumerate([3, 1, 2])]
    found = compare([folder(tmp_path / "a", rows)])
    assert found.metric.key == metric
    assert (found.runs[0].best, found.runs[0].best_round) == (1.0, 1)


def test_runs_are_judged_by_what_all_of_them_have(tmp_path: Path) -> None:
    losses = [row(n, evaluation={"loss": 1.0}) for n in range(3)]
    found = compare([folder(tmp_path / "a", rounds([0.5, 0.7])), folder(tmp_path / "b", losses)])
    assert found.metric.key == "loss"
    assert [line.best for line in found.runs] == [pytest.approx(1.3), 1.0]


def test_what_was_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A start without a round, a loss that is no number, and no bytes: a line, and no chart."""
    bare = folder(tmp_path / "a", [{"round": 0, "evaluation": {"loss": 2.0}}])
    nan = folder(tmp_path / "b", [{"round": n, "evaluation": {"loss": x}} for n, x in enumerate([2.0, math.nan])])
    code, out, _ = command(capsys, bare, nan, "--out", tmp_path / "page.html", "--json")
    assert code == 0
    lines = json.loads(out)["runs"]
    for line in lines:
        assert (line["best"], line["best_round"], line["bytes_moved"], line["seconds"]) == (2.0, 0, 0, 0)
        assert line["mean_aggregation_error"] is line["last_aggregation_error"] is line["effective_rank"] is None
        assert line["mean_codec_error"] is None
    assert "traffic" not in Page((tmp_path / "page.html").read_text()).ids


def test_the_table_and_the_page(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    code, out, _ = command(capsys, *two, "--out", page)
    assert code == 0
    assert f"{page} written" in out
    shown = Page(page.read_text())
    for cell in (
        "Best accuracy",
        "90.0 %",
        "60.0 %",
        "3.60 kB",
        "6.00 kB",
        "0.20",
        "0.30",
        "0.020",
        "7.00",
        "4.5 s",
        "fedit",
    ):
        assert cell in out
        assert cell in shown.text
    assert {"comparison", "traffic"} <= set(shown.ids)
    assert shown.tags.count("polyline") == 2
    assert "script" not in shown.tags
    assert not {name for name, _ in shown.attributes} & {"src", "href"}


def test_the_plot_is_accuracy_against_bytes(two: list[Path]) -> None:
    text = compare(two).html()
    for label, kilobytes, accuracy in (("a", "3.6", "80"), ("b", "6", "60")):
        assert f"<title>{label}: accuracy, % {accuracy} at kB moved {kilobytes}</title>" in text


def test_json_is_one_document(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, *two, "--out", tmp_path / "page.html", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["metric"], document["page"]) == ("accuracy", str(tmp_path / "page.html"))
    assert [line["folder"] for line in document["runs"]] == [str(path) for path in two]
    assert document["runs"][0]["best"] == pytest.approx(0.9)


def test_names_that_tell_runs_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / "one", tmp_path / "x" / "two", tmp_path / "y" / "two"]
    for path in paths:
        folder(path, rounds([0.5, 0.6]), name="same")
    assert [line.name for line in compare(paths[:1]).runs] == ["same"]
    assert [line.name for line in compare(paths[:2]).runs] == ["one", "two"]
    assert [line.name for line in compare(paths).runs] == [str(path) for path in paths]


def test_other_data_is_noted(two: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = two[1] / "spec.toml"
    spec.write_text(spec.read_text() + 'holdout = 0.2\n[data.partition]\nkind = "iid"\n')
    _, out, _ = command(capsys, *two, "--out", tmp_path / "page.html")
    assert "not of the same examples" in out
    assert "not of the same examples" in (tmp_path / "page.html").read_text()
    spec.write_text(spec.read_text().replace("holdout = 0.2\n", ""))
    assert compare(two).note == "", "another partition of the same data is a fair comparison"


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (lambda b: b.rename(b.with_name("gone")), "no such folder; name a folder that `fedapt simulate"),
    "no spec": (lambda b: (b / "spec.toml").unlink(), "it has no spec.toml"),
    "a spec of another version": (lambda b: (b / "spec.toml").write_text("[rum]"), 'did you mean "run"'),
    "no metrics": (lambda b: (b / "metrics.jsonl").unlink(), "it has no metrics.jsonl"),
    "empty metrics": (lambda b: (b / "metrics.jsonl").write_text(""), "none of its 0 rounds has an evaluation"),
    "no evaluation": (lambda b: (b / "metrics.jsonl").write_text('{"round": 1}'), "none of its 1 rounds has an eval"),
    "a cut line": (lambda b: (b / "metrics.jsonl").write_text('{"round": 0}\n{"rou'), "line 2 is no round of a run"),
    "no round": (lambda b: (b / "metrics.jsonl").write_text("[]"), "line 1 is no round of a run"),
    "no text": (lambda b: (b / "metrics.jsonl").write_bytes(b"\xff\xfe"), "cannot be read"),
    "another task": (
        lambda b: (b / "spec.toml").write_text(SPEC.format(name="b", recipe="ffa", task="image-classification")),
        "runs of different tasks cannot be compared",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_clear_message(
    two: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    message: str,
) -> None:
    spoil(two[1])
    code, out, errors = command(capsys, *two, "--out", tmp_path / "page.html")
    assert (code, out) == (2, "")
    assert message in errors
    assert errors.startswith("fedapt: ")
    assert not (tmp_path / "page.html").exists()


def test_a_folder_named_twice(two: list[Path]) -> None:
    with pytest.raises(DataError, match="named twice"):
        compare([two[0], two[0] / ".." / "a"])


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "--help")
    assert code == 0
    assert "Example:" in out


@pytest.mark.slow
def test_real_runs(tiny: Path, tmp_path: Path) -> None:
    """What a simulation writes is what a comparison reads."""
    paths = []
    for codec in ("fp32", "int8"):
        paths.append(tmp_path / codec)
        run(RunSpec.load(tiny, [f"wire.codec={codec}"]), paths[-1])
    found = compare(paths)
    exact, coded = found.runs
    assert [line.name for line in found.runs] == ["fp32", "int8"]
    assert exact.rounds == coded.rounds == 2
    assert exact.bytes_down == coded.bytes_down > 0
    assert exact.bytes_up > 3 * coded.bytes_up > 0
    assert exact.mean_aggregation_error is not None
    assert exact.mean_aggregation_error < 1e-6
    assert "traffic" in Page(found.html()).ids
