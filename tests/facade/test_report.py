"""The report: self-contained, escaped, complete where there is data and silent where there is none."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedapt.protocols.errors import OutputError
from fedapt.report import ClientScore, Curve, Report, Row, write
from fedapt.svg import Axis, Line, count, duration, line_chart, measured, show, size

ALL = {"loss", "metric", "traffic", "training", "exactness", "clients", "rounds", "comparison", "spec"}
VOID = {"meta", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """Tags must balance; keeps ids, attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def rounds(count: int, *, score: str = "perplexity", moved: int = 1_000_000) -> list[Row]:
    rows: list[Row] = [{"round": 0, "evaluation": {"loss": 4.0, score: 0.1}}]
    for number in range(1, count + 1):
        loss = 2 + 2 * math.exp(-number / 5)
        rows.append(
            {
                "round": number,
                "nodes": 10,
                "empty": 0,
                "refused": 1,
                "train_loss": loss + 0.1,
                "train_loss_p10": loss - 0.2,
                "train_loss_p90": loss + 0.4,
                "aggregation_error": 1.2e-8,
                "bytes_down": 2 * moved,
                "bytes_up": moved,
                "seconds": 1.5,
                "evaluation": {"loss": loss, score: 0.8},
            }
        )
    return rows


def report(*curves: Curve, **fields: Any) -> Report:
    chosen = curves or (Curve("fedsvd", rounds(30)), Curve("fedit", rounds(30)))
    clients = [ClientScore(f"c{i}", 10 + i, 4.0, 3.0 + 0.1 * i) for i in range(20)]
    defaults: dict[str, Any] = {"title": "sample", "spec": "[run]\n", "facts": {"Recipe": "fedsvd"}, "clients": clients}
    return Report(curves=chosen, **defaults | fields)


def without(*keys: str) -> list[Row]:
    return [{k: v for k, v in row.items() if k not in keys} for row in rounds(30)]


def test_page_asks_nothing_of_the_network() -> None:
    text = report().html()
    page = Page(text)
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "action"}
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_every_section_is_there_with_full_data() -> None:
    ids = Page(report().html()).ids
    assert set(ids) >= ALL
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("gone", "changed"),
    [
        ({"loss", "metric", "traffic"}, report(Curve("a", without("evaluation")), Curve("b", without("evaluation")))),
        ({"traffic"}, report(Curve("a", without("bytes_up", "bytes_down")), Curve("b", []))),
        ({"training"}, report(Curve("a", without("train_loss")), Curve("b", []))),
        ({"exactness"}, report(Curve("a", without("aggregation_error")), Curve("b", []))),
        ({"clients"}, report(clients=())),
        ({"comparison"}, report(Curve("a", rounds(30)))),
        ({"spec"}, report(spec="")),
    ],
)
def test_section_without_data_is_left_out(gone: set[str], changed: Report) -> None:
    assert set(Page(changed.html()).ids) & ALL == ALL - gone


def test_an_error_and_a_rank_that_were_not_measured_are_dashes() -> None:
    measured = {"aggregation_error": 0.25, "codec_error": 0.125, "effective_rank": 3.5}
    rows: list[Row] = [{"round": 1, **measured}, {"round": 2, **dict.fromkeys(measured)}]
    text = report(Curve("a", rows)).html()
    assert "<td>2</td><td>–</td><td>–</td><td>–</td>" in text
    assert "Codec error" in text
    exact: list[Row] = [{**row, "codec_error": 0.0} for row in rows]
    assert "Codec error" not in report(Curve("a", exact)).html()
    assert "Effective rank" in text
    assert "Effective rank" not in report(Curve("a", rows[1:])).html()


def test_metric_chart_needs_more_than_a_loss() -> None:
    rows: list[Row] = [{"round": 0, "evaluation": {"loss": 2.0}}, {"round": 1, "evaluation": {"loss": 1.0}}]
    page = Page(report(Curve("a", rows)).html())
    assert "loss" in page.ids
    assert "metric" not in page.ids
    assert "Final loss" in page.text


@pytest.mark.parametrize("curves", [(), (Curve("a", ()),), (Curve("a", rounds(0)),), (Curve("a", rounds(1)[1:]),)])
def test_short_runs(curves: tuple[Curve, ...]) -> None:
    page = Page(Report(title="t", curves=curves, spec="", facts={}).html())
    assert ("loss" in page.ids) == any(curve.rows for curve in curves)
    assert "nan" not in page.text


def test_names_are_escaped_everywhere() -> None:
    evil = '<script>alert("x")</script>$title'
    text = Report(
        title=evil,
        curves=(Curve(evil, rounds(3)), Curve(evil, rounds(3))),
        spec=evil,
        facts={evil: evil},
        clients=(ClientScore(evil, 1, 1.0, 2.0),),
        note=evil,
    ).html()
    page = Page(text)
    assert "script" not in page.tags
    assert "<script" not in text
    assert page.text.count("alert(") >= 10
    assert "$title" in page.text


def test_numbers_at_the_top() -> None:
    text = Page(report(Curve("a", rounds(30, score="accuracy")), best_round=12).html()).text
    assert "80.0 %" in text
    assert "round 30, best 80.0 % in 12" in text
    assert "+70.0 points" in text
    assert "90.0 MB" in text
    assert "60.0 MB down, 30.0 MB up" in text
    assert "45 s" in text


def test_worse_is_said() -> None:
    rows: list[Row] = [{"round": 0, "evaluation": {"loss": 2.0}}, {"round": 1, "evaluation": {"loss": 3.0}}]
    text = Page(report(Curve("a", rows)).html()).text
    assert "+50.0 %" in text
    assert "worse: 2.000 at the start" in text


def test_values_that_are_not_finite_are_left_out_and_counted() -> None:
    rows = [dict(row) for row in rounds(4)]
    rows[2] |= {"train_loss": math.nan, "evaluation": {"loss": math.inf, "perplexity": 6.0}}
    rows[3] |= {"aggregation_error": -math.inf}
    text = report(Curve("a", rows), clients=[ClientScore("c", 1, math.nan, 1.0), ClientScore("d", 1, 2.0, 1.0)]).html()
    assert "3 of the numbers measured are not finite" in Page(text).text
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', text)
    assert "1 of 1 clients gained" in text


def test_best_round_is_marked() -> None:
    assert "best: round 12" in Page(report(best_round=12).html()).text
    assert "best:" not in Page(report(best_round=99).html()).text


def test_curve_without_traffic_is_a_dashed_line() -> None:
    page = Page(report(Curve("fedsvd", rounds(5)), Curve("centralized", rounds(5, moved=0))).html())
    assert ("class", "line dashed") in page.attributes
    assert "moves no bytes" in page.text


def test_long_table_is_collapsed() -> None:
    assert '<section id="rounds">' in report(Curve("a", rounds(10))).html()
    assert '<details id="rounds">' in report(Curve("a", rounds(30))).html()


def test_many_points_are_thinned_but_spikes_stay() -> None:
    points = [(float(i), 1.0) for i in range(20_000)]
    points[7_777] = (7_777.0, 9.0)
    line = Line("a", points, band=[(x, y, y + 1) for x, y in points])
    chart = line_chart([line], x=Axis("round", whole=True), y=Axis("y"))
    assert chart.count("<circle") <= 500
    assert "y 9 at round 7,777" in chart
    assert "at round 19,999" in chart
    band = re.search(r'<polygon class="band" points="([^"]+)"', chart)
    assert band is not None
    assert len(band[1].split()) <= 1000


@pytest.mark.parametrize("number", [1, 500, 2_000])
def test_clients_of_any_number(number: int) -> None:
    clients = [ClientScore(f"c{i}", i, 3.0, 2.0) for i in range(number)]
    page = Page(report(clients=clients).html())
    assert f"{number:,} of {number:,} clients gained" in page.text
    dots = sum(name == "class" and str(value).startswith("dot") for name, value in page.attributes)
    assert dots == min(number, 500)


def test_numbers_as_text() -> None:
    assert [show(v) for v in (0, 1234.56, -0.5, 1.25e-8, 1e-8, 2e6)] == [
        "0",
        "1,235",
        "−0.5",
        "1.25·10⁻⁸",
        "10⁻⁸",
        "2·10⁶",
    ]
    assert [size(v) for v in (0, 999, 65_432, 1.3e9)] == ["0 B", "999 B", "65.4 kB", "1.30 GB"]
    assert [duration(v) for v in (0.812, 75, 4000)] == ["0.81 s", "1 min 15 s", "1 h 6 min"]
    assert [measured(v) for v in (0, 2.84, -12.0, 54_321.0, 1e-8)] == ["0", "2.840", "−12.00", "54,321", "10⁻⁸"]
    assert count(123_456) == "123,456"


def test_write_is_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write(report(title="a lone surrogate \ud800"), path)
    assert Page(path.read_text(encoding="utf-8")).ids
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_path_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "file" / "report.html", tmp_path / "missing" / "report.html", tmp_path / "taken"):
        with pytest.raises(OutputError, match=re.escape(str(path))):
            write(report(), path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken"}


NUMBERS = st.one_of(
    st.floats(), st.floats(-10, 10), st.integers(-(10**400), 10**400), st.integers(0, 100), st.none(), st.booleans()
)
KEYS = [
    "round",
    "nodes",
    "train_loss",
    "train_loss_p10",
    "train_loss_p90",
    "aggregation_error",
    "codec_error",
    "bytes_down",
    "seconds",
]
EVALUATIONS = st.dictionaries(st.sampled_from(["loss", "perplexity", "accuracy"]), NUMBERS)
ROWS = st.builds(
    lambda row, evaluation: row | {"evaluation": evaluation},
    st.dictionaries(st.sampled_from(KEYS), NUMBERS),
    EVALUATIONS,
)
CURVES = st.builds(Curve, st.text(max_size=30), st.lists(ROWS, max_size=6))
CLIENTS = st.builds(ClientScore, st.text(max_size=9), st.integers(0, 10**9), st.floats(), st.floats())
REPORTS = st.builds(
    Report,
    title=st.text(),
    curves=st.lists(CURVES, max_size=3),
    spec=st.text(),
    facts=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
    clients=st.lists(CLIENTS, max_size=5),
    best_round=st.one_of(st.none(), st.integers(0, 5)),
)


@settings(max_examples=150, deadline=None)
@given(REPORTS)
def test_any_data_make_a_sound_page(chosen: Report) -> None:
    text = chosen.html()
    page = Page(text)
    assert len(page.text) > 0
    for name, value in page.attributes:
        if name in {"x", "y", "cx", "cy", "r", "points", "d"}:
            assert value is not None
            assert not re.search("nan|inf|e", value), (name, value)
