"""Descriptions, Assignments and Updates ⇄ Flower's RecordDict.

A payload travels as ONE uint8 array over the layout's flat index: each further array in a Flower message costs about
25 µs to read and 36 µs to write. What comes from outside is typed and bounded here, before anything uses it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict

from .codecs import CODECS
from .errors import PayloadError, SpecError
from .layout import AdapterLayout
from .spec import RunSpec
from .update import Assignment, Description, Kind, Update

LONGEST_REASON = 1000
"""Characters of a node's reason that are kept."""

DESCRIBE = "query.describe"
RANK = "query.rank"
TRAIN = "train"
EVALUATE = "evaluate"


def message(content: RecordDict | Error, metadata: Metadata) -> Message:
    """A Flower message with metadata of our own: without them, Message() reads a process-global identity, which only
    Flower's own launchers set. (Its constructor takes metadata; its type stubs do not say so.)"""
    part = {"error": content} if isinstance(content, Error) else {"content": content}
    made: Message = Message(**part, metadata=metadata)  # type: ignore[call-overload]
    return made


def spec_from_context(context: Context) -> RunSpec:
    """The spec of a Flower run. Raises SpecError where the run's config has none."""
    text = context.run_config.get("spec")
    if not isinstance(text, str):
        raise SpecError("the run's config has no `spec`: put TOML text or a path under [tool.flwr.app.config]")
    return RunSpec.parse(text) if "\n" in text else RunSpec.load(Path(text))


def assignment_to_records(assignment: Assignment) -> RecordDict:
    fields: dict[str, Any] = {
        "run": assignment.run,
        "round": assignment.round,
        "attempt": assignment.attempt,
        "node": assignment.node,
        "version": assignment.version,
        "rank": assignment.rank,
    }
    return RecordDict({"payload": _payload(assignment.payload), "assignment": ConfigRecord(fields)})


def assignment_from_records(records: RecordDict) -> Assignment:
    """Raises PayloadError where the records are no assignment."""
    config = _config(records, "assignment")
    return Assignment(
        run=_field(config, "run", str),
        round=_field(config, "round", int),
        attempt=_field(config, "attempt", int),
        node=_field(config, "node", int),
        version=_field(config, "version", str),
        payload=_bytes(records),
        rank=_rank(config),
    )


def update_to_records(update: Update) -> RecordDict:
    fields: dict[str, Any] = {
        "run": update.run,
        "round": update.round,
        "attempt": update.attempt,
        "node": update.node,
        "version": update.version,
        "kind": update.kind,
        "weight": float(update.weight),
        "reason": update.reason,
    }
    return RecordDict(
        {
            "payload": _payload(update.payload),
            "update": ConfigRecord(fields),
            "metrics": MetricRecord(dict(update.metrics)),
        }
    )


def update_from_records(records: RecordDict) -> Update:
    """Raises PayloadError where the records are no update."""
    config = _config(records, "update")
    kind = _field(config, "kind", str)
    weight = _field(config, "weight", float)
    if kind not in get_args(Kind) or not math.isfinite(weight):
        raise PayloadError(f"not an update: kind {kind!r}, weight {weight!r}")
    return Update(
        run=_field(config, "run", str),
        round=_field(config, "round", int),
        attempt=_field(config, "attempt", int),
        node=_field(config, "node", int),
        version=_field(config, "version", str),
        kind=cast(Kind, kind),
        weight=weight,
        payload=_bytes(records),
        metrics=_metrics(records),
        reason=_field(config, "reason", str)[:LONGEST_REASON],
    )


def evaluation_to_records(asked: Assignment, examples: int, metrics: Mapping[str, float]) -> RecordDict:
    """A node's scores of an adapter: means over its `examples`."""
    fields: dict[str, Any] = {"node": asked.node, "version": asked.version, "weight": float(examples)}
    return RecordDict({"metrics": MetricRecord(dict(metrics)), "evaluated": ConfigRecord(fields)})


def evaluation_from_records(records: RecordDict) -> tuple[float, dict[str, float]]:
    """Number of examples, and the metrics that are finite. Raises PayloadError where the records are no scores."""
    weight = _field(_config(records, "evaluated"), "weight", float)
    if not (math.isfinite(weight) and weight >= 0):
        raise PayloadError(f"scores of {weight} examples")
    return weight, _metrics(records)


def description_to_records(description: Description) -> RecordDict:
    fields: dict[str, Any] = {
        "layout": description.layout.to_json(),
        "config": json.dumps(dict(description.config), sort_keys=True),
        "base": description.base,
    }
    start = CODECS["fp32"].encode(description.start, description.layout, key=0)
    return RecordDict({"payload": _payload(start), "description": ConfigRecord(fields)})


def description_from_records(records: RecordDict) -> Description:
    """Raises PayloadError where the records are no description."""
    config = _config(records, "description")
    layout = AdapterLayout.from_json(_field(config, "layout", str))
    try:
        adapter_config = json.loads(_field(config, "config", str))
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"not a description: the adapter's config is no JSON ({error})") from error
    if not isinstance(adapter_config, dict):
        raise PayloadError("not a description: the adapter's config is no JSON object")
    start = CODECS["fp32"].decode(_bytes(records), layout)
    return Description(layout=layout, start=start, config=adapter_config, base=_field(config, "base", str))


def rank_to_records(rank: int) -> RecordDict:
    """The largest rank that a node can afford; 0: any."""
    return RecordDict({"stated": ConfigRecord({"rank": rank})})


def rank_from_records(records: RecordDict) -> int:
    """Raises PayloadError where the records state no rank."""
    return _rank(_config(records, "stated"))


def _rank(config: ConfigRecord) -> int:
    rank: int = _field(config, "rank", int)
    if rank < 0:
        raise PayloadError(f"rank = {rank} in a message: 0 or more expected")
    return rank


def _metrics(records: RecordDict) -> dict[str, float]:
    metrics = records.get("metrics", MetricRecord())
    if not isinstance(metrics, MetricRecord):
        raise PayloadError("the message's metrics are none")
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def _payload(payload: bytes) -> ArrayRecord:
    return ArrayRecord({"flat": Array(np.frombuffer(payload, np.uint8))})


def _bytes(records: RecordDict) -> bytes:
    record = records.get("payload")
    array = record.get("flat") if isinstance(record, ArrayRecord) else None
    try:
        flat = None if array is None else array.numpy()
    except (ValueError, TypeError, EOFError, MemoryError) as error:
        raise PayloadError(f"the message's payload cannot be read: {error}") from error
    if flat is None or flat.dtype != np.uint8:
        raise PayloadError("the message has no payload of bytes")
    return flat.tobytes()


def _config(records: RecordDict, name: str) -> ConfigRecord:
    record = records.get(name)
    if not isinstance(record, ConfigRecord):
        raise PayloadError(f"the message has no {name}")
    return record


def _field(config: ConfigRecord, name: str, kind: type[Any]) -> Any:
    value = config.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PayloadError(f"{name} = {value!r} in a message: {kind.__name__} expected")
    return value
