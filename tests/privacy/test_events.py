import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.privacy.events import (
    Event,
    Everyone,
    FixedSize,
    GaussianEvent,
    MatrixEvent,
    Poisson,
    Relation,
    Sampling,
    Unit,
    from_json,
    sum_multiplier,
    to_json,
)
from fedapt.protocols.errors import PayloadError, PrivacyError

GAUSSIAN = GaussianEvent(
    unit="client",
    relation="add-remove",
    noise_std=1.5,
    sensitivity=0.5,
    secret=True,
    sampling=Poisson(0.1),
    count=30,
)
MATRIX = MatrixEvent(
    unit="client",
    relation="replace-one",
    noise_std=8.0,
    sensitivity=2.0,
    secret=True,
    rounds=100,
    separation=20,
    participations=5,
)
POISSON_TEXT = (
    '{"count":30,"kind":"gaussian","noise_std":1.5,"relation":"add-remove","sampling":{"kind":"poisson","rate":0.1},'
    '"secret":true,"sensitivity":0.5,"unit":"client"}'
)

units: st.SearchStrategy[Unit] = st.sampled_from(["example", "client"])
relations: st.SearchStrategy[Relation] = st.sampled_from(["add-remove", "replace-one"])
counts = st.integers(1, 10**9)
stds = st.floats(0, allow_infinity=False)
sensitivities = st.floats(0, exclude_min=True, allow_infinity=False)
poisson = st.builds(Poisson, st.floats(0, 1, exclude_min=True))
fixed_size = counts.flatmap(lambda size: st.builds(FixedSize, st.just(size), st.integers(size, 10**9)))


@st.composite
def gaussian_events(draw: st.DrawFn) -> GaussianEvent:
    relation = draw(relations)
    drawn: st.SearchStrategy[Sampling] = poisson if relation == "add-remove" else fixed_size
    return GaussianEvent(
        unit=draw(units),
        relation=relation,
        noise_std=draw(stds),
        sensitivity=draw(sensitivities),
        secret=draw(st.booleans()),
        sampling=draw(drawn | st.just(Everyone())),
        count=draw(st.integers(0, 10**9)),
    )


matrix_events = st.builds(
    MatrixEvent,
    unit=units,
    relation=relations,
    noise_std=stds,
    sensitivity=sensitivities,
    secret=st.booleans(),
    rounds=counts,
    separation=counts,
    participations=counts,
)
events: st.SearchStrategy[Event] = gaussian_events() | matrix_events


@given(events)
def test_json_and_back(event: Event) -> None:
    again = from_json(to_json(event))
    assert again == event
    assert type(again) is type(event)
    assert to_json(again) == to_json(event)


def test_the_text_is_canonical() -> None:
    assert to_json(GAUSSIAN) == POISSON_TEXT
    whole = replace(GAUSSIAN, noise_std=1, sensitivity=2, sampling=Poisson(1))
    assert '"noise_std":1.0' in to_json(whole)
    assert from_json(to_json(whole)) == whole


def test_numpy_numbers_are_written_as_numbers() -> None:
    numbers: dict[str, Any] = {"noise_std": np.float32(1.5), "count": np.int64(30)}
    assert to_json(replace(GAUSSIAN, **numbers)) == POISSON_TEXT


@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(PayloadError):
        from_json(text)


@given(
    event=events,
    key=st.integers(0, 20),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers()),
)
def test_a_changed_value_is_refused_or_stated(event: Event, key: int, value: object) -> None:
    row = json.loads(to_json(event))
    row[sorted(row)[key % len(row)]] = value
    text = json.dumps(row, sort_keys=True, separators=(",", ":"))
    with suppress(PayloadError):
        assert to_json(from_json(text)) == text


def changed(**values: Any) -> str:
    return json.dumps(json.loads(POISSON_TEXT) | values, sort_keys=True, separators=(",", ":"))


HOSTILE = {
    "spaces": POISSON_TEXT.replace(",", ", "),
    "a repeated key": POISSON_TEXT.replace('"count":30', '"count":1,"count":30'),
    "an unknown key": changed(extra=1),
    "a missing key": POISSON_TEXT.replace('"count":30,', ""),
    "a bool for a number": changed(noise_std=True),
    "a bool for a count": changed(count=True),
    "a number for a bool": changed(secret=1),
    "a text for a number": changed(sensitivity="0.5"),
    "a fraction for a count": changed(count=1.5),
    "NaN": changed(noise_std=math.nan),
    "infinity": changed(noise_std=math.inf),
    "a number that overflows": POISSON_TEXT.replace('"noise_std":1.5', '"noise_std":1e999'),
    "an integer that overflows": changed(noise_std=10**400),
    "an integer of too many digits": POISSON_TEXT.replace("30", "3" * 5000),
    "negative noise": changed(noise_std=-1.0),
    "a negative count": changed(count=-1),
    "no sensitivity": changed(sensitivity=0.0),
    "an unknown unit": changed(unit="group"),
    "a list for a unit": changed(unit=["client"]),
    "an unknown kind": changed(kind="laplace"),
    "sampling without a kind": changed(sampling={}),
    "sampling as a list": changed(sampling=["poisson", 0.1]),
    "an unknown sampling": changed(sampling={"kind": "shuffle"}),
    "a rate above one": changed(sampling={"kind": "poisson", "rate": 1.5}),
    "a draw that its relation does not allow": changed(sampling={"kind": "fixed-size", "population": 9, "size": 3}),
    "a nest": "[" * 100_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json(text: str) -> None:
    with pytest.raises(PayloadError, match="not a privacy event"):
        from_json(text)


def test_the_hostile_texts_differ_from_a_good_one_by_their_fault_alone() -> None:
    assert from_json(changed()) == GAUSSIAN


IMPOSSIBLE: dict[str, tuple[Callable[[], object], str]] = {
    "rate 0": (lambda: Poisson(0.0), "rate of 0.0"),
    "rate above 1": (lambda: Poisson(1.01), "rate of 1.01"),
    "rate NaN": (lambda: Poisson(math.nan), "rate of nan"),
    "more than there are": (lambda: FixedSize(7, 6), "draw of 7 from 6"),
    "a draw of nobody": (lambda: FixedSize(0, 6), "draw of 0 from 6"),
    "negative noise": (lambda: replace(GAUSSIAN, noise_std=-1.0), "noise_std = -1.0"),
    "infinite noise": (lambda: replace(GAUSSIAN, noise_std=math.inf), "noise_std = inf"),
    "no clip": (lambda: replace(GAUSSIAN, sensitivity=math.inf), "sensitivity = inf: .* clip"),
    "sensitivity 0": (lambda: replace(GAUSSIAN, sensitivity=0.0), "sensitivity = 0.0"),
    "negative count": (lambda: replace(GAUSSIAN, count=-1), "count = -1"),
    "unknown unit": (lambda: replace(GAUSSIAN, unit=cast(Unit, "group")), "unit = 'group'.*example, client"),
    "Poisson, replace-one": (lambda: replace(GAUSSIAN, relation="replace-one"), "Poisson .* add-remove"),
    "fixed size, add-remove": (lambda: replace(GAUSSIAN, sampling=FixedSize(3, 6)), "fixed-size .* replace-one"),
    "no rounds": (lambda: replace(MATRIX, rounds=0), "rounds = 0"),
    "no participation": (lambda: replace(MATRIX, participations=0), "participations = 0"),
}


@pytest.mark.parametrize(("build", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_an_impossible_statement_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        build()


def test_an_event_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        GAUSSIAN.count = 1  # type: ignore[misc]


def test_the_noise_multiplier_is_relative_to_the_stated_sensitivity() -> None:
    assert GAUSSIAN.noise_multiplier == 3.0
    assert MATRIX.noise_multiplier == 4.0
    assert replace(GAUSSIAN, noise_std=1e308, sensitivity=1e-308).noise_multiplier == math.inf


@given(st.floats(0.1, 20), st.floats(1.01, 100))
def test_the_two_releases_of_an_adaptive_clip_cost_one(noise_multiplier: float, more: float) -> None:
    """Two Gaussian releases over one draw are one: the squared signal-to-noise ratios add up to z⁻²."""
    quantile_std = more * noise_multiplier / 2
    left = sum_multiplier(noise_multiplier, quantile_std)
    assert left > noise_multiplier
    assert math.isclose(left**-2 + (0.5 / quantile_std) ** 2, noise_multiplier**-2, rel_tol=1e-9)


@pytest.mark.parametrize(("noise_multiplier", "quantile_std"), [(1.0, 0.5), (1.0, 0.1), (0.0, 1.0), (2.0, math.nan)])
def test_a_split_that_leaves_nothing_is_refused(noise_multiplier: float, quantile_std: float) -> None:
    with pytest.raises(PrivacyError, match=r"must be above|raise it above"):
        sum_multiplier(noise_multiplier, quantile_std)
