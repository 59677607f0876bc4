import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from sqlalchemy import event as sql_event

from fedapt.privacy import ledger as ledger_module
from fedapt.privacy.accounting import headline, spent
from fedapt.privacy.calibration import rounds_within
from fedapt.privacy.chain import GENESIS, Chain, Charge, Entry, Head, chained, read_chain
from fedapt.privacy.events import Event, Everyone, GaussianEvent, MatrixEvent, Poisson, to_json
from fedapt.privacy.ledger import Ledger, Releases, SiteLedger
from fedapt.protocols.errors import DataError, OutputError, PayloadError, PrivacyError

DELTA = 1e-5
EVENT = GaussianEvent(
    unit="client", relation="add-remove", noise_std=6.0, sensitivity=1.5, secret=True, sampling=Everyone()
)
MATRIX = MatrixEvent(
    unit="client",
    relation="add-remove",
    noise_std=20.0,
    sensitivity=2.0,
    secret=True,
    rounds=8,
    separation=2,
    participations=4,
)
EVENTS: list[Event] = [EVENT, MATRIX, replace(EVENT, sampling=Poisson(0.1), count=3), replace(EVENT, secret=False)]


def ledger_of(*events: Event) -> Ledger:
    return Ledger(Counter(map(to_json, events)))


def copy(entry: Entry, **changes: Any) -> Entry:
    return Entry(**(asdict(entry) | changes))


def chain_of(entries: Sequence[Entry], head: Head | None = None) -> Chain:
    return Chain(entries, head or Head(count=len(entries), hash=entries[-1].hash if entries else GENESIS))


def rechained(entries: Sequence[Entry]) -> list[Entry]:
    """What somebody writes who knows how a chain is made."""
    previous, forged = GENESIS, []
    for sequence, entry in enumerate(entries, 1):
        forged.append(copy(entry, sequence=sequence))
        forged[-1].hash = previous = forged[-1].digest(previous)
    return forged


@st.composite
def chains(draw: st.DrawFn, least: int = 0) -> list[Entry]:
    head, entries = Head(), []
    for _ in range(draw(st.integers(least, 5))):
        node = draw(st.none() | st.integers(0, 2**64 - 1))
        charge = Charge(draw(st.sampled_from(EVENTS)), node)
        run, round_ = draw(st.text(st.characters(codec="utf-8"), max_size=3)), draw(st.integers(0, 3))
        entries += chained(head, run, round_, [charge])
        head = Head(count=len(entries), hash=entries[-1].hash)
    return entries


@given(chains())
def test_a_chain_as_it_was_written_has_no_fault(entries: list[Entry]) -> None:
    assert chain_of(entries).verify() is None
    assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
    for entry in [None, *entries]:
        assert chain_of(entries).verify(GENESIS if entry is None else entry.hash) is None


def changed(entries: list[Entry], at: int, data: st.DataObject) -> list[Entry]:
    other: dict[str, Any] = {
        "run": entries[at].run + "x",
        "round": entries[at].round + 1,
        "node": "7" if entries[at].node is None else None,
        "event": to_json(replace(EVENT, noise_std=9.0)),
        "time": "2020-01-01T00:00:00.000000+00:00",
        "hash": "f" * 64,
    }
    name = data.draw(st.sampled_from(sorted(other)))
    return [*entries[:at], copy(entries[at], **{name: other[name]}), *entries[at + 1 :]]


def removed(entries: list[Entry], at: int, data: st.DataObject) -> list[Entry]:
    shift = data.draw(st.integers(0, 1))
    return [*entries[:at], *(copy(entry, sequence=entry.sequence - shift) for entry in entries[at + 1 :])]


def inserted(entries: list[Entry], at: int, data: st.DataObject) -> list[Entry]:
    order = [*entries[:at], data.draw(st.sampled_from(entries[at:])), *entries[at:]]
    order[at] = copy(order[at], time="later")
    return [copy(entry, sequence=sequence) for sequence, entry in enumerate(order, 1)]


def moved(entries: list[Entry], at: int, data: st.DataObject) -> list[Entry]:
    """A later row stands here."""
    order = list(entries)
    order.insert(at, order.pop(data.draw(st.integers(at + 1, len(entries) - 1))))
    return [copy(entry, sequence=sequence) for sequence, entry in enumerate(order, 1)]


def misspelt(entries: list[Entry], at: int, data: st.DataObject) -> list[Entry]:
    """The hashes are right, and the event is none that a ledger would have written."""
    broken = data.draw(st.sampled_from([" " + entries[at].event, "{}", "", None, 7, '{"kind":"gaussian"}']))
    return rechained([*entries[:at], copy(entries[at], event=broken), *entries[at + 1 :]])


@given(st.data())
@pytest.mark.parametrize("tamper", [changed, removed, inserted, moved, misspelt])
def test_the_first_bad_row_is_named(
    tamper: Callable[[list[Entry], int, st.DataObject], list[Entry]], data: st.DataObject
) -> None:
    entries = data.draw(chains(least=2))
    at = data.draw(st.integers(0, len(entries) - 1 - (tamper is moved)))
    tampered = tamper(entries, at, data)
    ends = tampered if tamper is misspelt else entries
    fault = chain_of(tampered, Head(count=len(ends), hash=ends[-1].hash)).verify()
    assert fault is not None
    assert fault.sequence == at + 1
    assert str(fault).startswith(f"row {at + 1} ")


def test_a_row_that_fits_where_it_was_put_in_is_betrayed_by_the_next() -> None:
    entries = chained(Head(), "run", 1, [EVENT] * 3)
    between = chained(Head(count=1, hash=entries[0].hash), "run", 1, [EVENT])
    tampered = [entries[0], *between, *(copy(entry, sequence=entry.sequence + 1) for entry in entries[1:])]
    assert str(chain_of(tampered).verify()).startswith("row 3 ")


def test_rows_cut_off_at_the_end_disagree_with_the_head() -> None:
    entries = chained(Head(), "run", 1, [EVENT] * 4)
    head = Head(count=4, hash=entries[-1].hash)
    assert str(chain_of(entries[:2], head).verify()).startswith("row 3 is not as it was written: the head counts 4")
    assert str(chain_of([], head).verify()).startswith("row 1 ")
    assert str(chain_of(entries, Head(count=2, hash=entries[1].hash)).verify()).startswith("row 3 ")
    assert str(chain_of(entries, Head(count=4, hash=entries[1].hash)).verify()).startswith("row 4 is not the one")
    assert chain_of(entries, head).verify() is None
    assert Chain(entries, None).verify() is not None


def test_only_a_noted_hash_finds_a_chain_that_was_computed_anew() -> None:
    entries = chained(Head(), "run", 1, [EVENT] * 4)
    forged = rechained([entries[0], copy(entries[1], run="other"), *entries[2:]])
    assert chain_of(forged).verify() is None
    assert chain_of(entries[:2]).verify() is None
    for chain in (forged, entries[:2]):
        assert "no row has the hash" in str(chain_of(chain).verify(entries[2].hash))
    assert chain_of(forged).verify(entries[0].hash) is None


def test_an_account_is_that_of_all_its_events() -> None:
    events: list[Event] = [EVENT, EVENT, MATRIX, replace(EVENT, noise_std=12.0, sensitivity=3.0, count=3)]
    merged: list[Event] = [replace(EVENT, count=5), MATRIX]
    assert ledger_of(*events).spent(DELTA) == spent(merged, DELTA)
    assert ledger_of(*events).spent(DELTA).epsilon == pytest.approx(spent(events, DELTA).epsilon, abs=1e-3)
    assert Ledger({}).spent(DELTA).epsilon == 0
    assert ledger_of(EVENT).spent(DELTA).private
    assert not ledger_of(EVENT, replace(EVENT, secret=False)).spent(DELTA).private
    with pytest.raises(PayloadError, match="not a privacy event"):
        Ledger({"{}": 1})


def test_a_changing_clip_is_one_charge() -> None:
    clips = [0.1 * 1.07**k for k in range(50)]
    releases = ledger_of(*(replace(EVENT, noise_std=4.0 * c, sensitivity=c) for c in clips))._releases
    assert list(releases.values()) == [50]


def test_a_cap_allows_as_many_rounds_as_it_promises() -> None:
    promised = rounds_within(2.5, DELTA, EVENT, [MATRIX])
    assert promised > 2
    allowed = 0
    while ledger_of(MATRIX, *[EVENT] * allowed).allows(EVENT, 2.5, DELTA):
        allowed += 1
    assert allowed == promised
    ledger = ledger_of(MATRIX, *[EVENT] * allowed)
    assert ledger.spent(DELTA).epsilon <= 2.5 < ledger_of(MATRIX, *[EVENT] * (allowed + 1)).spent(DELTA).epsilon
    ledger.require(EVENT, 100, DELTA)
    with pytest.raises(
        PrivacyError, match=r"bring epsilon from 2\.\d+ to 2\.\d+ at delta = 1e-05, and the cap is 2\.5"
    ):
        ledger.require(EVENT, 2.5, DELTA)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_a_cap_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match="a cap must be above 0"):
        Ledger({}).allows(EVENT, epsilon, DELTA)


def test_what_does_not_compose_is_not_allowed() -> None:
    with pytest.raises(PrivacyError, match="account for each on its own"):
        ledger_of(EVENT).allows(replace(EVENT, unit="example"), 8, DELTA)
    assert not Ledger({}).allows(replace(EVENT, noise_std=0.0), 8, DELTA)
    with pytest.raises(PrivacyError, match="releases in one account"):
        ledger_of(replace(EVENT, count=9_999_999)).allows(replace(EVENT, count=9), 8, DELTA)


counts = st.dictionaries(st.sampled_from([1.0, 2.0, 5.0]), st.integers(0, 300))


@given(counts, st.floats(0.1, 40), st.floats(0, 0.1))
def test_few_questions_decide_as_one_does(counts: dict[float, int], epsilon: float, slack: float) -> None:
    """Whatever the accountant, if more releases cost more and a coarse grid says more."""

    def cost(releases: frozenset[tuple[Event, int]], _delta: float, coarseness: float = 1.0) -> float:
        total = sum(count / event.noise_multiplier for event, count in releases)
        return float(total**0.5 * (1 + slack * (coarseness > 1)))

    releases: Releases = Counter({replace(EVENT, noise_std=z, sensitivity=1.0): number for z, number in counts.items()})
    with patch.object(ledger_module, "_epsilon", cost):
        fits = ledger_module._fit(releases, epsilon, DELTA)
        assert fits == ledger_module._fit_reference(releases, epsilon, DELTA)


def test_a_thousand_rounds_ask_the_accountant_few_times() -> None:
    asked = []

    def accountant(events: Sequence[Event], delta: float, coarseness: float = 1.0) -> tuple[float, str]:
        asked.append(coarseness)
        return sum(event.count for event in events if isinstance(event, GaussianEvent)) / 1000, "PLD"

    ledger_module._epsilon.cache_clear()
    with patch.object(ledger_module, "headline", accountant):
        allowed = [Ledger({to_json(EVENT): rounds}).allows(EVENT, 1.0, DELTA) for rounds in range(1, 1001)]
    ledger_module._epsilon.cache_clear()
    assert allowed == [True] * 999 + [False]
    assert 0 < len(asked) < 40


def test_a_coarse_grid_costs_more() -> None:
    """What the fast path relies on."""
    for event in EVENTS[:3]:
        assert headline([event], DELTA)[0] <= headline([event], DELTA, ledger_module.COARSE)[0]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SiteLedger]:
    ledger = SiteLedger(tmp_path / "50% of a?b=c#d ü.sqlite")
    yield ledger
    ledger.close()


def path_of(site: SiteLedger) -> Path:
    return Path(site.engine.url.database or "")


def test_a_site_keeps_one_chain_over_all_runs(site: SiteLedger) -> None:
    for run, round_ in [("a", 1), ("b", 1), ("a", 2)]:
        site.append(run, round_, EVENT)
        assert read_chain(path_of(site)).entries[-1].run == run, "another connection sees it at once"
    chain = site.chain()
    assert chain.verify() is None
    assert [(e.sequence, e.run, e.round, e.node) for e in chain.entries] == [
        (1, "a", 1, None),
        (2, "b", 1, None),
        (3, "a", 2, None),
    ]
    assert [entry.event for entry in chain.entries] == [to_json(EVENT)] * 3
    assert site.ledger().spent(DELTA) == ledger_of(EVENT, EVENT, EVENT).spent(DELTA)
    assert site.ledger("a").spent(DELTA) == ledger_of(EVENT, EVENT).spent(DELTA)
    with site.engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL


def test_a_charge_that_a_cap_refuses_is_not_written(site: SiteLedger) -> None:
    one, two = (ledger_of(*[EVENT] * number).spent(DELTA).epsilon for number in (1, 2))
    site.charge("a", 1, EVENT, DELTA, per_run=one, in_all=two)
    with pytest.raises(PrivacyError, match="the cap is"):
        site.charge("a", 2, EVENT, DELTA, per_run=one, in_all=9)
    site.charge("b", 1, EVENT, DELTA, per_run=one, in_all=two)
    with pytest.raises(PrivacyError, match="the cap is"):
        site.charge("c", 1, EVENT, DELTA, per_run=one, in_all=two)
    assert [entry.run for entry in site.chain().entries] == ["a", "b"]
    assert site.chain().verify() is None


def test_charges_at_once_queue_up(site: SiteLedger) -> None:
    """Threads with connections of their own, as processes have: the chain is one, and what is left is taken once."""
    cap = ledger_of(*[EVENT] * 10).spent(DELTA).epsilon

    def charge(run: int) -> int:
        own, written = SiteLedger(path_of(site)), 0
        for round_ in range(5):
            try:
                own.charge(str(run), round_, EVENT, DELTA, per_run=cap, in_all=cap)
                written += 1
            except PrivacyError:
                break
        own.close()
        return written

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(charge, range(4))) == 10
    assert site.chain().verify() is None
    assert len(site.chain().entries) == 10


def test_rows_and_head_are_read_as_of_one_moment(site: SiteLedger) -> None:
    """While somebody looks, somebody else appends: after the rows were read, and before the head is."""
    site.append("a", 1, EVENT)
    other, statements = SiteLedger(path_of(site)), []

    def append(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)
        if "FROM ledger ORDER BY" in " ".join(statement.split()):
            other.append("b", 1, EVENT)

    sql_event.listen(site.engine, "after_cursor_execute", append)
    chain = site.chain()
    sql_event.remove(site.engine, "after_cursor_execute", append)
    other.close()
    assert "ledger_head" in statements[-1]
    assert (chain.verify(), len(chain.entries)) == (None, 1)
    assert (site.chain().verify(), len(site.chain().entries)) == (None, 2)


def test_rows_can_be_added_and_nothing_else(site: SiteLedger) -> None:
    site.append("a", 1, EVENT)
    for statement in ("UPDATE ledger SET round = 2", "DELETE FROM ledger"):
        with pytest.raises(Exception, match="append-only"), site.engine.begin() as connection:
            connection.execute(text(statement))
    assert site.chain().verify() is None


TAMPERINGS = [
    ("UPDATE ledger SET round = 9 WHERE sequence = 2", "row 2 "),
    ("UPDATE ledger SET event = x'00ff' WHERE sequence = 3", "row 3 "),
    ("UPDATE ledger SET run = 7.5 WHERE sequence = 1", "row 1 "),
    ("UPDATE ledger SET sequence = -1 WHERE sequence = 2", "row -1 "),
    ("DELETE FROM ledger WHERE sequence = 1", "row 1 "),
    ("DELETE FROM ledger WHERE sequence = 3", "row 3 "),
    ("DELETE FROM ledger_head", "row 1 "),
    ("UPDATE ledger_head SET count = 'three'", "row 1 "),
    ("UPDATE ledger_head SET count = 2", "row 3 "),
    ("UPDATE ledger_head SET hash = 'x'", "row 3 "),
]


@pytest.mark.parametrize(("statement", "named"), TAMPERINGS, ids=[statement for statement, _ in TAMPERINGS])
def test_a_broken_ledger_is_not_opened(site: SiteLedger, statement: str, named: str) -> None:
    for round_ in range(3):
        site.append("a", round_, EVENT)
    SiteLedger(path_of(site)).close()
    with sqlite3.connect(path_of(site)) as connection:
        for action in ("update", "delete"):
            connection.execute(f"DROP TRIGGER ledger_refuses_{action}")
        connection.execute(statement)
    connection.close()
    assert str(read_chain(path_of(site)).verify()).startswith(named)
    with pytest.raises(PrivacyError, match=rf"the ledger's {named}.*restore the file from a copy"):
        SiteLedger(path_of(site))


def test_a_file_that_is_no_ledger(tmp_path: Path) -> None:
    letter, foreign = tmp_path / "letter", tmp_path / "foreign.sqlite"
    letter.write_text("this is a letter, not a database; it is long enough to have a header" * 9)
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE ledger (amount INTEGER)")
    connection.close()
    for path in (letter, foreign, tmp_path / "nowhere" / "ledger"):
        with pytest.raises(OutputError, match="cannot be used as a ledger"):
            SiteLedger(path)
        with pytest.raises(DataError, match="name a run's folder, or a site's ledger"):
            read_chain(path)


def test_looking_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_chain(tmp_path / "ledger.sqlite")
    assert not list(tmp_path.iterdir())


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_while_the_file_is_made(tmp_path: Path) -> None:
    for at in count(1):
        path, statements = tmp_path / str(at), iter(range(1, 10**6))

        def crash(*_: Any, statements: Iterator[int] = statements, at: int = at) -> None:
            if next(statements) == at:
                raise Crash

        hooks: list[tuple[str, Callable[..., None]]] = [("before_cursor_execute", crash), ("commit", crash)]
        for name, hook in hooks:
            sql_event.listen(Engine, name, hook)
        try:
            SiteLedger(path).close()
            ended = True
        except Crash:
            ended = False
        finally:
            for name, hook in hooks:
                sql_event.remove(Engine, name, hook)
        again = SiteLedger(path)
        again.append("run", 1, EVENT)
        assert again.chain().verify() is None
        with pytest.raises(Exception, match="append-only"), again.engine.begin() as connection:
            connection.execute(text("DELETE FROM ledger"))
        again.close()
        if ended:
            break
    assert at > 5
