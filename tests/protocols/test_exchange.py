from contextlib import suppress
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.errors import PayloadError
from fedapt.protocols.exchange import DECAYS, Answer, Exchange, Step, Terms, terms_of
from fedapt.protocols.scalars import SCALAR_CODES
from fedapt.protocols.spec import RunSpec

INT8 = SCALAR_CODES["int8"]
OWN, POOL, SHARED = Terms(5, "own", 3, INT8), Terms(5, "pool", 3, INT8, 7), Terms(5, "shared", 3, INT8)

steps = st.builds(
    Step,
    st.integers(1, 2**30 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(-126, 99),
    st.integers(0, 2**16 - 1),
    st.integers(-60, 40),
    st.binary(max_size=40),
    st.sampled_from([b"", bytes(range(32))]),
    st.sampled_from([0, 1, DECAYS - 1]),
)
exchanges = st.builds(
    Exchange,
    st.text(max_size=10).filter(lambda text: text.isprintable()),
    st.just(2**64 - 1),
    st.integers(1, 2**30 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(-60, 40),
    st.sampled_from([1e-3, 0.5]).map(lambda x: float(np.float32(x))),
    st.binary(max_size=10),
    st.binary(max_size=32),
    st.binary(max_size=60),
    st.lists(steps, max_size=3).map(tuple),
)


@given(step=steps)
def test_a_step_survives_its_bytes(step: Step) -> None:
    assert Step.from_bytes(step.to_bytes()) == step


@given(exchange=exchanges)
def test_an_exchange_survives_its_bytes(exchange: Exchange) -> None:
    assert Exchange.from_bytes(exchange.node, exchange.to_bytes()) == exchange


@given(exchange=exchanges, cut=st.integers(1, 200))
def test_a_piece_of_an_exchange_is_refused(exchange: Exchange, cut: int) -> None:
    body = exchange.to_bytes()
    with pytest.raises(PayloadError):
        Exchange.from_bytes(1, body[: max(0, len(body) - cut)])


@given(data=st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (Step.from_bytes, lambda d: Exchange.from_bytes(1, d), lambda d: Answer.from_bytes(1, d, 16)):
        with suppress(PayloadError):
            read(data)


@pytest.mark.parametrize("decay", [0, DECAYS])
def test_a_decay_that_is_none_is_refused(decay: int) -> None:
    body = Step(1, 1, 0, 1, 0, b"", decay=5).to_bytes()
    with pytest.raises(PayloadError, match="a decay of"):
        Step.from_bytes(body[:-4] + decay.to_bytes(4, "little"))


@given(data=st.data(), code=st.sampled_from(sorted(SCALAR_CODES)), mode=st.sampled_from(["own", "pool"]))
def test_a_step_read_at_once_is_a_step_read_node_by_node(
    data: st.DataObject, code: str, mode: Literal["own", "pool"]
) -> None:
    """Among the shapes are a step of nobody, and one direction."""
    count = data.draw(st.integers(1, 9))
    terms = Terms(5, mode, count, SCALAR_CODES[code], 40 if mode == "pool" else 0)
    entries = [
        (
            slot,
            data.draw(indices_of(count)) if mode == "pool" else b"",
            terms.code.encode(data.draw(st.lists(st.floats(-99, 99), min_size=count, max_size=count)), -1, slot),
        )
        for slot in data.draw(st.sets(st.integers(0, 2**16 - 1), max_size=4))
    ]
    read = terms.applied(Step(7, 1, 0, 1, 0, terms.body(entries)))
    probed = [terms.probed(7, slot, picks) for slot, picks, _ in entries]
    decoded = [terms.code.decode(codes, count) for _, _, codes in entries]
    for found, parts in zip(read, [[p[0] for p in probed], [p[1] for p in probed], decoded], strict=True):
        assert found.tolist() == [number for part in parts for number in part.tolist()]


def indices_of(count: int) -> st.SearchStrategy[bytes]:
    """So many directions of a pool of 40, as an Exchange has them."""
    indices = st.lists(st.integers(0, 39), min_size=count, max_size=count)
    return indices.map(lambda own: np.array(own, "<u2").tobytes())


def test_sixteen_directions_take_twenty_bytes_up() -> None:
    answer = Answer(9, 2**30 - 1, "codes", bytes(range(16)))
    assert len(answer.to_bytes()) == 20
    assert Answer.from_bytes(9, answer.to_bytes(), 16) == answer


def test_an_answer_may_carry_an_account_or_a_reason() -> None:
    spent = Answer(9, 3, "codes", bytes(16), epsilon=1.5, private=True)
    assert Answer.from_bytes(9, spent.to_bytes(), 16) == spent
    for kind in ("lost", "refused", "empty"):
        said = Answer(9, 3, kind, reason="no data" if kind == "refused" else "")
        assert Answer.from_bytes(9, said.to_bytes(), 16) == said
    with pytest.raises(PayloadError, match="17 bytes of codes, and 16"):
        Answer.from_bytes(9, Answer(9, 3, "codes", bytes(17)).to_bytes(), 16)


def test_what_each_mode_probes() -> None:
    streams, indices = OWN.probed(4, 2)
    assert (streams.tolist(), indices.tolist()) == ([4, 4, 4], [6, 7, 8])
    streams, indices = SHARED.probed(4, 2)
    assert (streams.tolist(), indices.tolist()) == ([4, 4, 4], [0, 1, 2])
    streams, indices = POOL.probed(4, 2, np.array([6, 0, 6], "<u2").tobytes())
    assert (streams.tolist(), indices.tolist()) == ([0, 0, 0], [6, 0, 6])


def test_a_step_adds_what_its_nodes_sent_along_what_they_probed() -> None:
    body = OWN.body([(0, b"", b"\x01\x02\xff"), (2, b"", b"\x7f\x00\x81")])
    step = Step(4, 1, 0, 1, 0, body)
    streams, indices, counts = OWN.applied(step)
    assert indices.tolist() == [0, 1, 2, 6, 7, 8]
    assert counts.tolist() == [1, 2, -1, 127, 0, -127]
    assert streams.tolist() == [4] * 6
    assert OWN.answers(step) == 2
    assert SHARED.answers(replace(step, body=bytes(12))) is None


@pytest.mark.parametrize(
    ("terms", "body", "problem"),
    [
        (OWN, b"\x00\x00\x01\x02", "does not hold records of 5"),
        (OWN, b"\x00\x00\x01\x02\x80", "is −128"),
        (OWN, b"\x00\x00\x01\x02\x03" * 2, "two records of one slot"),
        (POOL, b"\x00\x00" + b"\x07\x00" * 3 + b"\x00" * 3, "direction 7 is not in a pool of 7"),
        (SHARED, bytes(11), "11 bytes where 3 numbers"),
    ],
)
def test_a_malformed_body_is_refused(terms: Terms, body: bytes, problem: str) -> None:
    with pytest.raises(PayloadError, match=problem):
        terms.applied(Step(1, 1, 0, 1, 0, body))


def test_terms_follow_from_the_spec_and_directions_from_its_seed() -> None:
    spec = RunSpec.parse('[model]\nbase = "m"\ntask = "causal-lm"\n[recipe]\nname = "kseed"')
    terms = terms_of(spec)
    assert (terms.mode, terms.directions, terms.pool, terms.code) == ("pool", 16, 1024, INT8)
    assert 0 <= terms.key < 2**64
    assert terms_of(spec.set("run.seed=1")).key != terms.key
    assert terms_of(spec.set("recipe.name=dpzo")).pool == 0
