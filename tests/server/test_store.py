"""How stores behave: one suite for memory, SQLite and PostgreSQL."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from fedapt.privacy.chain import Charge
from fedapt.privacy.events import Event, to_json
from fedapt.privacy.ledger import Ledger
from fedapt.protocols.errors import RunError
from fedapt.protocols.layout import AdapterLayout, Flat, TensorSpec
from fedapt.protocols.update import Description, Update
from fedapt.server.store import MemoryStore, Snapshot, Store, open_store

from .crashing_store import EVENT

Place = Callable[[], str]
"""The fixture `place`: says with each call where another store can be made."""

LAYOUT = AdapterLayout([TensorSpec("q.lora_A.weight", (2, 3), "A"), TensorSpec("q.lora_B.weight", (4, 2), "B")])
DESCRIPTION = Description(LAYOUT, np.linspace(0, 5, 14, dtype=np.float32), {"r": 2, "name": "ü"}, "digest")
LARGEST_NODE = 2**64 - 1
FIRST = Update("run", 1, 1, 5, "version", "delta", 2.5, b"\x00payload\xff", {"loss": 1.25, "steps": 3.0}, rank=3)


def state(value: float) -> Flat:
    return np.full(3, value, np.float32)


def begin(store: Store, run: str = "run") -> None:
    store.create(run, '{"spec": 1}', DESCRIPTION, Snapshot(0, state(0)), {"round": 0})


def commit(
    store: Store,
    round_: int,
    kept: tuple[int, ...] = (),
    run: str = "run",
    events: Sequence[Event | Charge] = (),
) -> None:
    store.open_round(run, round_, [1])
    store.commit(run, Snapshot(round_, state(round_)), {"round": round_, "loss": round_ / 3}, kept, events=events)


class StoreSuite(ABC):
    """How every store behaves."""

    @pytest.fixture
    @abstractmethod
    def store(self, tmp_path: Path) -> Store | Iterator[Store]: ...

    def test_what_is_created_is_found(self, store: Store) -> None:
        assert store.find("run") is None
        begin(store)
        found = store.find("run")
        assert found is not None
        spec, description = found
        assert spec == '{"spec": 1}'
        assert description.layout == LAYOUT
        assert description.start.dtype == np.float32
        assert np.array_equal(description.start, DESCRIPTION.start)
        assert (description.config, description.base) == (DESCRIPTION.config, DESCRIPTION.base)
        assert description.version == DESCRIPTION.version
        assert store.rows("run") == [{"round": 0}]

    def test_a_run_is_created_once(self, store: Store) -> None:
        begin(store)
        with pytest.raises(ValueError, match="run 'run' exists"):
            begin(store)

    def test_snapshots_and_buffers_come_back_as_they_were(self, store: Store) -> None:
        begin(store)
        store.open_round("run", 1, [1])
        tensors = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
        store.commit("run", Snapshot(1, tensors[0], {"first": tensors[1], "second": tensors[2]}), {"round": 1}, [])
        back = store.snapshot("run")
        assert back.round == 1
        assert set(back.buffers) == {"first", "second"}
        for tensor, expected in zip([back.state, back.buffers["first"], back.buffers["second"]], tensors, strict=True):
            assert tensor.dtype == np.float32
            assert tensor.tobytes() == expected.tobytes()

    def test_an_open_round_is_never_redrawn(self, store: Store) -> None:
        begin(store)
        assert store.open_round("run", 1, [7, LARGEST_NODE]) == (7, LARGEST_NODE)
        assert store.open_round("run", 1, [1]) == (7, LARGEST_NODE)
        assert store.open_round("run", 2, []) == ()
        assert store.open_round("run", 2, [1]) == ()
        assert store.rows("run") == [{"round": 0}]

    def test_the_first_update_of_a_node_stands(self, store: Store) -> None:
        begin(store)
        store.open_round("run", 1, [5, 2, LARGEST_NODE])
        assert store.contribute("run", FIRST)
        assert not store.contribute("run", replace(FIRST, payload=b"other", weight=9.0))
        assert not store.contribute("run", FIRST)
        assert store.contributions("run", 1) == [FIRST]

    def test_contributions_are_in_node_id_order(self, store: Store) -> None:
        begin(store)
        store.open_round("run", 1, [])
        nodes = [2**63 + 1, 5, LARGEST_NODE, 0, 2**63 - 1, 10]
        updates = {node: replace(FIRST, node=node, kind="empty", payload=b"", metrics={}) for node in nodes}
        assert all(store.contribute("run", update) for update in updates.values())
        assert store.contributions("run", 1) == [updates[node] for node in sorted(nodes)]
        assert store.contributions("run", 2) == []

    def test_refusals_are_in_order_of_arrival(self, store: Store) -> None:
        begin(store)
        given = [(LARGEST_NODE, "NaN"), (3, "stale"), (3, "stale")]
        for node, reason in given:
            store.refuse("run", 1, node, reason)
        store.refuse("run", 2, 1, "later")
        assert store.refusals("run", 1) == given
        assert store.refusals("run", 3) == []

    def test_a_commit_releases_the_round(self, store: Store) -> None:
        begin(store)
        store.open_round("run", 1, [5])
        store.contribute("run", FIRST)
        store.contribute("run", replace(FIRST, round=2))
        store.refuse("run", 1, 3, "stale")
        commit(store, 1)
        assert store.rows("run") == [{"round": 0}, {"round": 1, "loss": 1 / 3}]
        assert store.snapshot("run").round == 1
        assert store.contributions("run", 1) == []
        assert [update.round for update in store.contributions("run", 2)] == [2]
        assert store.refusals("run", 1) == [(3, "stale")]

    @pytest.mark.parametrize("unit", ["client", "example"])
    def test_who_took_part_is_forgotten_with_the_release_of_a_round_that_hides_it(
        self, store: Store, unit: str
    ) -> None:
        spec = json.dumps({"privacy": {"unit": unit}})
        store.create("run", spec, DESCRIPTION, Snapshot(0, state(0)), {"round": 0})
        begin(store, "other")
        for run, round_ in (("run", 1), ("run", 2), ("run", 3), ("other", 1)):
            store.open_round(run, round_, [5, 8])
            store.refuse(run, round_, 5, "stale")
        store.commit("run", Snapshot(2, state(2)), {"round": 2}, [])
        hides = unit == "client"
        for round_ in (1, 2):
            assert store.open_round("run", round_, [9]) == (() if hides else (5, 8))
            assert store.refusals("run", round_) == ([] if hides else [(5, "stale")])
        assert store.open_round("run", 3, [9]) == (5, 8), "a round that is open keeps its draw"
        assert store.open_round("other", 1, [9]) == (5, 8)
        assert store.refusals("run", 3) == store.refusals("other", 1) == [(5, "stale")]

    def test_only_the_last_and_the_kept_snapshots_stay(self, store: Store) -> None:
        begin(store)
        for round_, kept in [(1, (0,)), (2, (0,)), (3, (2,)), (4, (2,)), (5, (5,))]:
            commit(store, round_, kept)
            there = {round_, *kept}
            for old in range(round_ + 1):
                if old in there:
                    assert np.array_equal(store.snapshot("run", old).state, state(old))
                else:
                    with pytest.raises(KeyError):
                        store.snapshot("run", old)
            assert store.snapshot("run").round == round_
        assert [row["round"] for row in store.rows("run")] == [0, 1, 2, 3, 4, 5]

    def test_two_runs_in_one_store_do_not_mix(self, store: Store) -> None:
        begin(store)
        begin(store, "other")
        store.open_round("run", 1, [1])
        assert store.open_round("other", 1, [2]) == (2,)
        store.contribute("run", FIRST)
        assert store.contribute("other", replace(FIRST, run="other"))
        store.refuse("run", 1, 9, "stale")
        commit(store, 1)
        assert [update.run for update in store.contributions("other", 1)] == ["other"]
        assert store.refusals("other", 1) == []
        assert (len(store.rows("run")), len(store.rows("other"))) == (2, 1)
        assert (store.snapshot("run").round, store.snapshot("other").round) == (1, 0)
        with pytest.raises(KeyError):
            store.snapshot("run", 0)

    def test_a_release_is_charged_with_its_events(self, store: Store) -> None:
        begin(store)
        commit(store, 1)
        assert store.chain().entries == []
        commit(store, 2, events=[EVENT, EVENT])
        commit(store, 3, events=[EVENT])
        chain = store.chain()
        assert chain.verify() is None
        assert [(e.sequence, e.run, e.round, e.node) for e in chain.entries] == [
            (1, "run", 2, None),
            (2, "run", 2, None),
            (3, "run", 3, None),
        ]
        assert {entry.event for entry in chain.entries} == {to_json(EVENT)}
        thrice = replace(EVENT, count=3)
        assert store.ledger("run").spent(1e-5).epsilon == Ledger({to_json(thrice): 1}).spent(1e-5).epsilon > 0

    def test_accounts_of_runs_and_nodes_do_not_mix(self, store: Store) -> None:
        begin(store)
        begin(store, "other")
        commit(store, 1, events=[EVENT, Charge(EVENT, LARGEST_NODE)])
        commit(store, 1, run="other", events=[EVENT] * 3)
        commit(store, 2, events=[Charge(EVENT, 3), Charge(EVENT, LARGEST_NODE)])
        rows = {
            (run, node): sum(store.ledger(run, node)._releases.values())
            for run in ("run", "other", "none")
            for node in (None, 3, LARGEST_NODE)
        }
        assert {key: number for key, number in rows.items() if number} == {
            ("run", None): 1,
            ("run", 3): 1,
            ("run", LARGEST_NODE): 2,
            ("other", None): 3,
        }
        assert store.chain().verify() is None
        assert len(store.chain().entries) == 7

    def test_a_run_has_a_status(self, store: Store) -> None:
        for name in ("status", "set_status"):
            with pytest.raises(KeyError, match="run"):
                getattr(store, name)("run", *["failed"][: name == "set_status"])
        before = datetime.now(UTC)
        begin(store)
        begin(store, "other")
        assert store.status("run") == "running"
        store.set_status("run", "failed", "none of 3 nodes\0 \ud800")
        assert (store.status("run"), store.status("other")) == ("failed", "running")
        states = {state.name: state for state in store.runs()}
        assert states["run"].reason == "none of 3 nodes? ?"
        assert before <= states["run"].created < states["run"].updated <= datetime.now(UTC)
        store.set_status("run", "running")
        assert [(state.status, state.reason) for state in store.runs()] == [("running", "")] * 2

    def test_runs_are_listed_with_their_rounds(self, store: Store) -> None:
        assert store.runs() == []
        for name in ("second", "first"):
            begin(store, name)
        store.open_round("first", 1, [1])
        begun = {state.name: state for state in store.runs()}
        assert [(state.name, state.rounds) for state in store.runs()] == [("second", 0), ("first", 0)]
        assert begun["first"].created == begun["first"].updated
        commit(store, 1, run="second")
        commit(store, 2, run="second")
        after = {state.name: state for state in store.runs()}
        assert after["first"] == begun["first"]
        assert after["second"] == replace(begun["second"], rounds=2, updated=after["second"].updated)
        assert after["second"].updated > begun["second"].updated

    def test_a_round_is_released_once(self, store: Store) -> None:
        """Of two processes that work on one run the second is told, and nothing of its release is kept."""
        begin(store)
        commit(store, 1, events=[EVENT])
        store.contribute("run", FIRST)
        with pytest.raises(RunError, match='run "run": round 1 is released already'):
            store.commit("run", Snapshot(1, state(7)), {"round": 1, "loss": 7}, [], events=[EVENT])
        assert store.rows("run") == [{"round": 0}, {"round": 1, "loss": 1 / 3}]
        assert np.array_equal(store.snapshot("run").state, state(1))
        assert len(store.chain().entries) == 1
        assert store.contributions("run", 1) == [FIRST]

    def test_a_refusal_may_be_of_any_words(self, store: Store) -> None:
        """Nodes give reasons, and no reason may stop a round."""
        begin(store)
        store.refuse("run", 1, 3, "a\0b \udfff ü 🙂")
        assert store.refusals("run", 1) == [(3, "a?b ? ü 🙂")]


class TestMemoryStore(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return MemoryStore()


class TestSqlStore(StoreSuite):
    @pytest.fixture
    def store(self, place: Place) -> Iterator[Store]:
        store = open_store(place())
        yield store
        store.close()


class TestReopenedSqlStore(StoreSuite):
    """The same behaviour where every call is made by a process that has just opened the database."""

    @pytest.fixture
    def store(self, place: Place) -> Store:
        return cast(Store, Reopened(place()))


class Reopened:
    def __init__(self, where: str) -> None:
        self._where = where

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object, **options: object) -> object:
            store = open_store(self._where)
            try:
                return getattr(store, name)(*arguments, **options)
            finally:
                store.close()

        return call


def test_a_kept_snapshot_has_no_buffers(store: Store) -> None:
    """They would tell of a private run's noise long after it has ended."""
    begin(store)
    for round_ in (1, 2, 3):
        store.open_round("run", round_, [3])
        state = np.full(4, round_, np.float32)
        store.commit("run", Snapshot(round_, state, {"noise": state}), {"round": round_}, kept=[1])
    assert store.snapshot("run", 1).buffers == {}
    np.testing.assert_array_equal(store.snapshot("run", 1).state, np.full(4, 1, np.float32))
    assert set(store.snapshot("run").buffers) == {"noise"}
