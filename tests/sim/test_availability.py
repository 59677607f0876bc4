"""Who is there: neighbours in the order of coming against everybody looked at; traces against their lines."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.errors import DataError
from fedapt.sim.availability import DAY, FOREVER, SECOND, Always, Daily, Trace, looked_through, microseconds

moments = st.integers(0, 20 * DAY)
dailies = st.builds(
    Daily,
    st.sets(st.integers(0, 1000), min_size=1, max_size=40).map(sorted),
    st.floats(1e-6, 0.999),
    st.integers(0, 99),
)


@given(dailies, moments)
def test_who_is_there_is_who_is_found_by_looking_at_everybody(daily: Daily, at: int) -> None:
    there = daily.nodes(at)
    assert len(there) == len(list(there)) == len(set(there))
    assert set(there) == looked_through(daily, at)
    assert there[:2] == list(there)[:2]


@given(dailies, moments)
def test_a_node_is_there_until_it_leaves(daily: Daily, at: int) -> None:
    for node in daily.everybody:
        until = daily.until(node, at)
        assert (until > at) == (node in looked_through(daily, at))
        if until > at:
            assert node in daily.nodes(until - 1)
            assert node not in daily.nodes(until)
            assert daily.back(node, at) == at
        else:
            back = daily.back(node, at)
            assert at < back <= at + DAY
            assert node in daily.nodes(back)
            assert node not in daily.nodes(back - 1)


@given(dailies, moments, st.integers(1, 5))
def test_the_clock_stops_at_the_first_moment_with_enough(daily: Daily, at: int, least: int) -> None:
    found = daily.when(at, least)
    starts = [place * DAY // len(daily.everybody) for place in range(len(daily.everybody))]
    later = sorted({at, *(start + day * DAY for start in starts for day in range(22))})
    expected = [moment for moment in later if at <= moment <= at + DAY and len(daily.nodes(moment)) >= least]
    assert found == (expected[0] if expected else None)


def test_a_day_of_a_node_is_its_share_and_the_key_deals_them() -> None:
    daily = Daily(range(10), 0.25, 0)
    for node in range(10):
        assert sum(node in daily.nodes(tick * DAY // 1000) for tick in range(1000)) == pytest.approx(250, abs=1)
    assert list(daily.nodes(0)) != list(Daily(range(10), 0.25, 1).nodes(0))


def test_a_million_cost_no_more_to_look_at_than_ten() -> None:
    class Counted(list[int]):
        looked_at = 0

        def __getitem__(self, index: Any) -> Any:
            type(self).looked_at += 1
            return super().__getitem__(index)

    nodes = Counted(range(1_000_000))
    daily = Daily(nodes, 0.1, 0)
    there = daily.nodes(5 * DAY // 7)
    assert len(there) == 100_000
    node = there[77_777]
    assert daily.until(node, 5 * DAY // 7) > 5 * DAY // 7
    assert Counted.looked_at < 50


def test_always_is_always() -> None:
    always = Always([1, 2])
    assert always.nodes(DAY) == [1, 2]
    assert always.until(1, 5) == FOREVER
    assert always.when(7, 2) == 7
    assert always.when(7, 3) is None


def trace(
    folder: Path, *lines: Any, nodes: tuple[int, ...] = (0, 1, 2), known: tuple[int, ...] = (0, 1, 2, 3)
) -> Trace:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return Trace(path, nodes, known)


def line(node: int, start: float, until: float) -> dict[str, Any]:
    return {"node": node, "from": start, "until": until}


def test_a_trace_says_who_is_there(tmp_path: Path) -> None:
    found = trace(tmp_path, line(2, 5, 10), "", line(0, 0, 2), line(0, 8.5, 9), line(3, 0, 100))
    there = {at: found.nodes(int(at * SECOND)) for at in (0, 1.999, 2, 5, 8.5, 9, 10, 50)}
    assert there == {0: [0], 1.999: [0], 2: [], 5: [2], 8.5: [0, 2], 9: [2], 10: [], 50: []}
    assert found.until(0, SECOND) == 2 * SECOND
    assert found.until(0, 3 * SECOND) == 3 * SECOND
    assert found.until(1, 0) == 0
    assert found.when(3 * SECOND, 1) == 5 * SECOND
    assert found.when(6 * SECOND, 1) == 6 * SECOND
    assert found.when(0, 2) == microseconds(8.5)
    assert found.when(9 * SECOND, 2) is None
    assert found.when(10 * SECOND, 1) is None


@given(st.data())
def test_a_trace_is_its_lines(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    lines = []
    for node in range(3):
        cuts = sorted(data.draw(st.sets(st.integers(0, 30), max_size=6)))
        lines += [line(node, a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    shuffled = data.draw(st.permutations(lines))
    found = trace(tmp_path_factory.mktemp("trace"), *shuffled)
    for at in range(32):
        there = {own["node"] for own in lines if own["from"] <= at < own["until"]}
        assert set(found.nodes(at * SECOND)) == there
        assert {node for node in range(3) if found.until(node, at * SECOND) > at * SECOND} == there
        for node in range(3):
            later = [t for t in range(at, 32) if node in found.nodes(t * SECOND)]
            assert found.back(node, at * SECOND) == (later[0] * SECOND if later else FOREVER)
    counts = [len(found.nodes(at * SECOND)) for at in range(32)]
    for least in (1, 2, 3):
        expected = next((at for at in range(7, 32) if counts[at] >= least), None)
        assert found.when(7 * SECOND, least) == (None if expected is None else expected * SECOND)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("not json", "line 2 is not JSON"),
        ("[1]", "line 2: .*valid dictionary"),
        ({"node": 1, "from": 0}, "line 2: until: Field required"),
        ({"node": "1", "from": 0, "until": 1}, "line 2: node: .*valid integer"),
        ({"node": True, "from": 0, "until": 1}, "line 2: node"),
        ({"node": -1, "from": 0, "until": 1}, "line 2: node: .*greater than or equal to 0"),
        ({"node": 1, "from": 0, "until": 1e300}, "line 2: until: .*less than or equal to"),
        ('{"node": 1, "from": 0, "until": NaN}', "line 2: until"),
        ({"node": 1, "from": 0, "until": 1, "speed": 2}, "line 2: speed: Extra inputs"),
        (line(1, 3, 3), "line 2: from = 3 is not before until = 3"),
        (line(4, 0, 1), "line 2: node 4: the federation has none of this number"),
        (line(0, 3, 9), "line 2: node 0 is there already until 5"),
        ('{"node": ' + "1" * 2000 + "}", "line 2: a trace has at most"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, bad: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        trace(tmp_path, line(0, 0, 5), bad)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; fleet\.trace"):
        Trace(tmp_path / "none.jsonl", [0], [0])
