import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedapt.protocols.codecs import CODECS, Uplink
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.records import update_from_records, update_to_records
from fedapt.protocols.update import Assignment, Update
from fedapt.server.admission import MAX_WEIGHT, refusal

TRAINED = AdapterLayout([TensorSpec("q.lora_B.weight", (4, 2), "B"), TensorSpec("score.bias", (3,), "other")])
ASSIGNMENT = Assignment("run", 3, 1, 7, "a" * 64, b"")
FLAT = np.random.default_rng(0).standard_normal(TRAINED.size).astype(np.float32)
codecs = pytest.mark.parametrize("codec", CODECS)


def valid(codec: str = "fp32") -> Update:
    return Update("run", 3, 1, 7, "a" * 64, "delta", 5.0, CODECS[codec].encode(FLAT, TRAINED, 1), {"loss": 1.0})


def asked(update: Update, assignment: Assignment | None = ASSIGNMENT, codec: str = "fp32") -> str | None:
    return refusal(update, assignment, Uplink(CODECS[codec]), TRAINED)


def payload(*planted: float) -> bytes:
    """An fp32 payload that begins with these values."""
    flat = FLAT.copy()
    flat[: len(planted)] = planted
    return flat.tobytes()


@codecs
def test_what_was_asked_for_is_admitted(codec: str) -> None:
    assert asked(valid(codec), codec=codec) is None
    assert asked(replace(valid(codec), metrics={}), codec=codec) is None
    assert asked(replace(valid(codec), weight=MAX_WEIGHT), codec=codec) is None
    for weight in (0.0, 5.0):
        assert asked(replace(valid(codec), kind="empty", payload=b"", weight=weight), codec=codec) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": "other"}, "stale"),
        ({"round": 2}, "stale: round 2 attempt 1, not 3 attempt 1"),
        ({"round": 4}, "stale"),
        ({"attempt": 2}, "stale"),
        ({"version": "b" * 64}, "trained from adapter bbbbbbbbbbbb, not aaaaaaaaaaaa"),
        ({"version": ""}, "trained from adapter"),
        ({"weight": -1.0}, "weight -1.0 is not in 0 … 1e"),
        ({"weight": float("nan")}, "weight nan"),
        ({"weight": float("inf")}, "weight inf"),
        ({"weight": -float("inf")}, "weight -inf"),
        ({"weight": 1.01 * MAX_WEIGHT}, "is not in 0"),
        ({"weight": 0.0}, "a trained update has weight 0"),
        ({"kind": "empty"}, "an empty update carries a payload"),
        ({"kind": "empty", "payload": b"", "weight": -1.0}, "weight -1.0"),
        ({"payload": b""}, "0 bytes received, fp32 over this layout has 44"),
        ({"payload": payload()[:-1]}, "43 bytes received"),
        ({"payload": payload() + b"\0"}, "45 bytes received"),
        ({"payload": payload(float("nan"))}, "NaN or infinity"),
        ({"payload": payload(1.0, float("inf"))}, "NaN or infinity"),
        ({"payload": payload(-float("inf"))}, "NaN or infinity"),
    ],
)
def test_each_reason_to_refuse(changes: dict[str, Any], reason: str) -> None:
    found = asked(replace(valid(), **changes))
    assert found is not None
    assert reason in found


def informed(*planted: float) -> bytes:
    """An int8 payload with information that begins with these values."""
    information = np.ones(TRAINED.size, np.float32)
    information[: len(planted)] = planted
    return Uplink(CODECS["int8"], informed=True).encode(FLAT, information, TRAINED, 1)


INFORMED = Uplink(CODECS["int8"], informed=True)


def test_information_is_admitted_as_it_was_sent() -> None:
    """Zeros of either sign, and huge values, which bf16 holds; sizes are exact."""
    sent = replace(valid(), payload=informed(0.0, -0.0, 2.0**100, 0.5))
    assert refusal(sent, ASSIGNMENT, INFORMED, TRAINED) is None
    change, information = INFORMED.decode(sent.payload, TRAINED)
    assert information is not None
    assert information.tolist() == [0.0, 0.0, 2.0**100, 0.5, *[1.0] * (TRAINED.size - 4)]
    assert np.array_equal(change, CODECS["int8"].decode(valid("int8").payload, TRAINED))
    assert len(sent.payload) == INFORMED.size(TRAINED) == CODECS["int8"].size(TRAINED) + 2 * TRAINED.size


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (informed(1.0, -0.5), "Fisher information holds -0.5; a mean of squares is not negative"),
        (informed(float("nan")), "Fisher information: a payload holds NaN or infinity"),
        (informed(float("inf")), "Fisher information: a payload holds NaN or infinity"),
        (informed(-float("inf")), "Fisher information: a payload holds NaN or infinity"),
        (informed()[:-1], "Fisher information: 21 bytes received, bf16 over this layout has 22"),
        (informed() + b"\0", "Fisher information: 23 bytes received"),
        (valid("int8").payload, "Fisher information: 0 bytes received"),
        (valid("int8").payload[:-1], "bytes received, int8 over this layout has"),
    ],
)
def test_hostile_information_is_refused(sent: bytes, reason: str) -> None:
    found = refusal(replace(valid(), payload=sent), ASSIGNMENT, INFORMED, TRAINED)
    assert found is not None
    assert reason in found


def test_a_node_that_was_not_asked_is_refused() -> None:
    assert asked(valid(), None) == "node 7 was not asked in this round"


Corruption = Callable[[Update, random.Random], Update]


def _planted(update: Update, chance: random.Random, pattern: bytes, first: int = 0) -> Update:
    """`pattern` written over a value of the payload, from byte `first` on, aligned to the pattern's own size."""
    place = chance.randrange(first // len(pattern), len(update.payload) // len(pattern)) * len(pattern)
    return replace(update, payload=update.payload[:place] + pattern + update.payload[place + len(pattern) :])


COMMON: list[Corruption] = [
    lambda u, c: replace(u, run=u.run + chr(c.randrange(32, 127))),
    lambda u, c: replace(u, round=u.round + c.choice([-1, 1]) * c.randrange(1, 2**40)),
    lambda u, c: replace(u, attempt=u.attempt + c.choice([-1, 1]) * c.randrange(1, 2**40)),
    lambda u, c: replace(u, version=f"{c.getrandbits(256):064x}"),
    lambda u, c: replace(u, weight=c.choice([-1e-9, -5e-324, -c.random(), float("nan"), float("inf"), 1e13, 1e308])),
    lambda u, c: replace(u, weight=c.choice([0.0, -0.0])),
    lambda u, c: replace(u, kind="empty"),
    lambda u, c: replace(u, payload=u.payload[: c.randrange(len(u.payload))]),
    lambda u, c: replace(u, payload=u.payload + c.randbytes(c.randrange(1, 99))),
]
SCALES = CODECS["int8"].size(TRAINED) - TRAINED.size
NOT_FINITE = [bytes.fromhex(h) for h in ("0000c07f", "0100807f", "0000807f", "000080ff", "ffffffff")]


def _bad_scale(update: Update, chance: random.Random) -> Update:
    head = _planted(replace(update, payload=update.payload[:SCALES]), chance, chance.choice(NOT_FINITE))
    return replace(update, payload=head.payload + update.payload[SCALES:])


OWN: dict[str, list[Corruption]] = {
    "fp32": [lambda u, c: _planted(u, c, c.choice(NOT_FINITE))],
    "bf16": [lambda u, c: _planted(u, c, c.choice(NOT_FINITE)[2:])],
    "int8": [lambda u, c: _planted(u, c, b"\x80", SCALES), _bad_scale],
    "fp4": [lambda u, c: _planted(u, c, c.choice([b"\x08", b"\x80"]), SCALES), _bad_scale],
}


@codecs
def test_no_corruption_is_admitted(codec: str) -> None:
    chance = random.Random(0)
    kinds = [*COMMON, *OWN[codec] * 3]
    admitted = 0
    for _ in range(400):
        corrupt = chance.choice(kinds)
        admitted += asked(corrupt(valid(codec), chance), codec=codec) is None
    assert admitted == 0


def test_metrics_that_are_not_finite_are_dropped_on_arrival() -> None:
    metrics = {"loss": float("nan"), "steps": 3.0, "up": float("inf"), "down": -float("inf"), "small": 5e-324}
    read = update_from_records(update_to_records(replace(valid(), metrics=metrics)))
    assert read.metrics == {"steps": 3.0, "small": 5e-324}
