import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.errors import PayloadError, SpecError
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.records import (
    assignment_from_records,
    assignment_to_records,
    description_from_records,
    description_to_records,
    rank_from_records,
    rank_to_records,
    spec_from_context,
    update_from_records,
    update_to_records,
)
from fedapt.protocols.update import Assignment, Description, Update, version_of

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
whole = st.integers(0, 2**63 - 1)
nodes = st.integers(0, 2**64 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
assignments = st.builds(Assignment, text, whole, whole, nodes, text, st.binary(max_size=40), whole)
metrics = st.dictionaries(text, numbers, max_size=3)
kinds = st.sampled_from(["delta", "empty"])
updates = st.builds(Update, text, whole, whole, nodes, text, kinds, numbers, st.binary(max_size=40), metrics)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)

LAYOUT = AdapterLayout([TensorSpec("q.lora_A.weight", (1, 2), "A"), TensorSpec("q.lora_B.weight", (2, 1), "B")])
ASSIGNMENT = Assignment("run", 1, 0, 3, "v", b"abc")
UPDATE = Update("run", 1, 0, 3, "v", "delta", 2.0, b"abc", {"loss": 1.0})
DESCRIPTION = Description(LAYOUT, np.arange(4, dtype=np.float32), {"r": 1}, "base")


def over_the_wire(records: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(records))


@given(assignments)
def test_assignment_round_trip(assignment: Assignment) -> None:
    assert assignment_from_records(over_the_wire(assignment_to_records(assignment))) == assignment


@given(whole)
def test_rank_round_trip(rank: int) -> None:
    assert rank_from_records(over_the_wire(rank_to_records(rank))) == rank


def test_a_negative_rank_is_none() -> None:
    with pytest.raises(PayloadError, match="rank = -1 in a message: 0 or more expected"):
        rank_from_records(rank_to_records(-1))
    with pytest.raises(PayloadError, match="rank = -2"):
        assignment_from_records(assignment_to_records(replace(ASSIGNMENT, rank=-2)))
    with pytest.raises(PayloadError, match="the message has no stated"):
        rank_from_records(RecordDict({}))


@given(updates)
def test_update_round_trip(update: Update) -> None:
    assert update_from_records(over_the_wire(update_to_records(update))) == update


@given(st.from_type(AdapterLayout), st.dictionaries(text, json_values, max_size=3), text)
def test_description_round_trip(layout: AdapterLayout, config: dict[str, Any], base: str) -> None:
    start = np.arange(layout.size, dtype=np.float32)
    sent = Description(layout=layout, start=start, config=config, base=base)
    got = description_from_records(over_the_wire(description_to_records(sent)))
    assert (got.layout, got.config, got.base, got.version) == (layout, config, base, sent.version)
    assert np.array_equal(got.start, start)


def test_a_payload_is_one_array_of_bytes() -> None:
    """Each further array costs about 60 µs in a Flower message."""
    records = update_to_records(UPDATE)
    assert [(a.dtype, a.shape) for r in records.array_records.values() for a in r.values()] == [("uint8", (3,))]


def test_a_version_depends_on_layout_and_values() -> None:
    values = np.arange(4, dtype=np.float32)
    other = AdapterLayout([TensorSpec("m", (4,), "other")])
    versions = {version_of(LAYOUT, values), version_of(other, values), version_of(LAYOUT, values + 1)}
    assert len(versions) == 3
    assert DESCRIPTION.version == version_of(LAYOUT, values)


KINDS: dict[str, tuple[RecordDict, Callable[[RecordDict], object]]] = {
    "assignment": (assignment_to_records(ASSIGNMENT), assignment_from_records),
    "update": (update_to_records(UPDATE), update_from_records),
    "description": (description_to_records(DESCRIPTION), description_from_records),
}
FIELDS = [(kind, name) for kind, (records, _) in KINDS.items() for name in records.config_records[kind]]
every_kind = pytest.mark.parametrize("kind", KINDS)


def changed(kind: str, **parts: Any) -> RecordDict:
    """The good records with some replaced, or (None) taken away."""
    return RecordDict({k: v for k, v in {**KINDS[kind][0], **parts}.items() if v is not None})


def refused(kind: str, records: RecordDict, reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        KINDS[kind][1](records)


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_field_that_is_missing_or_of_another_type_is_refused(kind: str, name: str) -> None:
    good = dict(KINDS[kind][0].config_records[kind])
    refused(kind, changed(kind, **{kind: ConfigRecord({k: v for k, v in good.items() if k != name})}), f"{name} = None")
    for wrong in (True, 1, 1.5, "1", b"1", [1]):
        if type(wrong) is not type(good[name]):
            refused(kind, changed(kind, **{kind: ConfigRecord({**good, name: wrong})}), name)


@every_kind
def test_a_missing_part_is_refused(kind: str) -> None:
    refused(kind, RecordDict({}), f"the message has no {kind}")
    refused(kind, changed(kind, **{kind: None}), f"the message has no {kind}")
    refused(kind, changed(kind, **{kind: MetricRecord({"round": 1})}), f"the message has no {kind}")
    refused(kind, changed(kind, payload=None), "no payload of bytes")
    refused(kind, changed(kind, payload=ConfigRecord({"flat": b"abc"})), "no payload of bytes")
    refused(kind, changed(kind, payload=ArrayRecord({"other": Array(np.zeros(3, np.uint8))})), "no payload of bytes")


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "uint16", "bool"])
def test_a_payload_of_another_dtype_is_refused(kind: str, dtype: str) -> None:
    array = Array(np.zeros(16, dtype))
    refused(kind, changed(kind, payload=ArrayRecord({"flat": array})), "no payload of bytes")
    lying = Array("uint8", (16,), "numpy.ndarray", array.data)
    refused(kind, changed(kind, payload=ArrayRecord({"flat": lying})), "no payload of bytes")


def npy(header: str) -> bytes:
    """A NumPy file that announces `header` and holds nothing."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


UNREADABLE = {
    "not NumPy": b"garbage",
    "empty": b"",
    "half a header": b"\x93NUMPY\x01\x00v\x00{",
    "no values": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (16,)}\n"),
    "a petabyte": npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**50},)}}\n"),
    "pickled": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"),
}


@every_kind
@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_payload_that_cannot_be_read_is_refused(kind: str, data: bytes) -> None:
    array = Array("uint8", (3,), "numpy.ndarray", data)
    refused(kind, changed(kind, payload=ArrayRecord({"flat": array})), "payload cannot be read")


@every_kind
def test_a_payload_of_another_serialization_is_refused(kind: str) -> None:
    array = Array("uint8", (3,), "pickle", b"abc")
    refused(kind, changed(kind, payload=ArrayRecord({"flat": array})), "payload cannot be read")


@given(st.binary(max_size=60))
def test_whatever_bytes_come_as_an_array_only_payload_errors_come(data: bytes) -> None:
    array = Array("uint8", (3,), "numpy.ndarray", b"\x93NUMPY" + data)
    refused("update", changed("update", payload=ArrayRecord({"flat": array})), "payload")


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight: float) -> None:
    refused("update", update_to_records(replace(UPDATE, weight=weight)), "not an update: kind 'delta', weight")


def test_an_unknown_kind_is_refused() -> None:
    config = ConfigRecord({**KINDS["update"][0].config_records["update"], "kind": "pickle"})
    refused("update", changed("update", update=config), "kind 'pickle'")


def test_metrics_are_optional_but_of_their_type() -> None:
    assert update_from_records(changed("update", metrics=None)) == replace(UPDATE, metrics={})
    with_list = changed("update", metrics=MetricRecord({"loss": 1, "curve": [1.0, 2.0]}))
    assert update_from_records(with_list).metrics == {"loss": 1.0}
    refused("update", changed("update", metrics=ConfigRecord({"loss": 1.0})), "metrics are none")


@pytest.mark.parametrize("config", ["", "{", "5", "null", "[1]", '"x"', "[" * 100_000])
def test_an_adapter_config_that_is_no_object_is_refused(config: str) -> None:
    fields = ConfigRecord({**KINDS["description"][0].config_records["description"], "config": config})
    refused("description", changed("description", description=fields), "not a description: the adapter's config")


def test_a_description_whose_start_does_not_fit_its_layout_is_refused() -> None:
    short = ArrayRecord({"flat": Array(np.zeros(12, np.uint8))})
    refused("description", changed("description", payload=short), "12 bytes received, fp32 over this layout has 16")
    nan = ArrayRecord({"flat": Array(np.full(4, np.nan, "<f4").view(np.uint8))})
    refused("description", changed("description", payload=nan), "NaN or infinity")


def test_the_spec_of_a_run_is_text_or_a_path(tmp_path: Path) -> None:
    def context(**config: str | int) -> Context:
        return Context(run_id=1, node_id=2, node_config={}, state=RecordDict({}), run_config={**config})

    text = '[model]\nbase = "m"\ntask = "causal-lm"\n'
    (tmp_path / "spec.toml").write_text(text, encoding="utf-8")
    assert spec_from_context(context(spec=text)) == spec_from_context(context(spec=str(tmp_path / "spec.toml")))
    for wrong in (context(), context(spec=3)):
        with pytest.raises(SpecError, match="no `spec`: put TOML text or a path"):
            spec_from_context(wrong)
