from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.kernels.directions import Directions
from fedapt.kernels.lattice import EXPONENTS, LIMIT, Lattice, Segment, advance_reference, check_plan, longest_segment
from fedapt.protocols.errors import RunError, SpecError

Entry = tuple[int, int, int]
"""One line of a log: exchange (stream), direction, code."""

entries = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 200), st.integers(-127, 127)), max_size=40)
START = np.arange(-150, 150).astype(np.float32) / np.float32(150)


def advanced(state: Lattice, log: list[Entry]) -> Lattice:
    streams, indices, codes = ([entry[k] for entry in log] for k in range(3))
    return state.advance(Directions(7, streams, indices), np.array(codes, np.int64))


def replayed(state: Lattice, log: list[Entry], cuts: list[int]) -> Lattice:
    """The same log in the chunks that `cuts` make of it; chunks may be empty."""
    edges = [0, *sorted(cut % (len(log) + 1) for cut in cuts), len(log)]
    for begin, end in pairwise(edges):
        state = advanced(state, log[begin:end])
    return state


@given(entries, st.randoms(use_true_random=False), st.lists(st.integers(0, 100), max_size=6))
def test_order_and_grouping_of_updates_change_nothing(log: list[Entry], random: Any, cuts: list[int]) -> None:
    state = Lattice.begin(START, -10)
    whole, shuffled = advanced(state, log), random.sample(log, len(log))
    for other in (replayed(state, log, cuts), replayed(state, shuffled, cuts)):
        assert other.state_hash() == whole.state_hash()
        assert other.weights().tobytes() == whole.weights().tobytes()
        assert other.reach == whole.reach == sum(abs(code) for _, _, code in log)


@given(entries)
def test_advance_equals_its_reference(log: list[Entry]) -> None:
    state = advanced(Lattice.begin(START, 0), [(0, 0, 3)])
    streams, indices, codes = ([entry[k] for entry in log] for k in range(3))
    plain = advance_reference(state, Directions(7, streams, indices), np.array(codes, np.int64))
    assert advanced(state, log).state_hash() == plain.state_hash()


@given(entries, entries, st.lists(st.integers(0, 100), max_size=6), st.sampled_from([1.0, 0.99, 0.5]))
def test_a_log_of_two_segments_replays_to_the_same_hash(
    first: list[Entry], second: list[Entry], cuts: list[int], keep: float
) -> None:
    live = advanced(advanced(Lattice.begin(START, -9), first).next_segment(-11, keep), second)
    replay = replayed(replayed(Lattice.begin(START, -9), first, cuts).next_segment(-11, keep), second, cuts)
    assert replay.state_hash() == live.state_hash()
    snapshot = Lattice(live.segment, live.acc, live.reach)
    assert advanced(snapshot, first).state_hash() == advanced(live, first).state_hash()


def nearest(exact: Fraction) -> np.float32:
    """The fp32 number nearest to a rational one, ties to even, by comparing neighbours."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


@given(
    st.lists(
        st.tuples(st.floats(-1e6, 1e6, width=32), st.integers(1 - LIMIT, LIMIT - 1)),
        max_size=20,
    ),
    st.integers(-40, 10),
)
def test_weights_are_the_exact_sum_rounded_once(rows: list[tuple[float, int]], exponent: int) -> None:
    start, acc = np.array([r[0] for r in rows], np.float32), np.array([r[1] for r in rows], np.int32)
    got = Lattice(Segment(0, exponent, start), acc).weights()
    assert got.dtype == np.float32
    unit = Fraction(2) ** exponent
    assert got.tolist() == [
        float(nearest(Fraction(w) + unit * a)) for w, a in zip(start.tolist(), acc.tolist(), strict=True)
    ]


@pytest.mark.parametrize("exponent", [EXPONENTS[0], EXPONENTS[-1]])
def test_the_product_is_exact_up_to_the_limit_and_not_beyond(exponent: int) -> None:
    counts = np.array([1, -1, LIMIT - 1, 1 - LIMIT], np.int32)
    moved = Lattice(Segment(0, exponent, np.zeros(4, np.float32)), counts).weights().astype(np.float64)
    assert np.array_equal(moved, np.ldexp(counts.astype(np.float64), exponent))
    beyond = np.array([LIMIT + 1], np.int32)
    assert int(Lattice(Segment(0, 0, np.zeros(1, np.float32)), beyond).weights()[0]) != LIMIT + 1


def test_a_new_segment_starts_where_the_last_one_stood() -> None:
    state = advanced(Lattice.begin(START, -12), [(0, 0, 127), (1, 0, -5)])
    after = state.next_segment(-15, keep=0.75)
    assert after.weights().tobytes() == (state.weights() * np.float32(0.75)).tobytes()
    assert (after.segment.number, after.segment.exponent, after.reach) == (1, -15, 0)
    assert not after.acc.any()


def test_a_hash_sees_every_constant_and_every_count() -> None:
    base, one = Lattice.begin(START, -10), np.eye(1, START.size, dtype=np.int32)[0]
    others = [
        Lattice.begin(START, -11),
        Lattice.begin(START, -10, number=1),
        Lattice.begin(np.nextafter(START, np.float32(2)), -10),
        Lattice.begin(START[:-1], -10),
        Lattice(base.segment, one),
        Lattice(base.segment, np.roll(one, 1)),
    ]
    assert len({state.state_hash() for state in [base, *others]}) == 1 + len(others)
    assert base.state_hash() == Lattice.begin(START.copy(), -10).state_hash()


def test_the_hash_never_changes() -> None:
    state = advanced(Lattice.begin(START, -10), [(1, 2, 3), (4, 5, -127)]).next_segment(-12, 0.9)
    assert advanced(state, [(6, 7, 8)]).state_hash()[:16] == HASH


HASH = "dd1a9747de98bb58"


def test_states_cannot_be_written_to() -> None:
    start = START.copy()
    state = Lattice.begin(start, -10)
    before = state.state_hash()
    start[0] = 5
    assert state.state_hash() == before
    assert state.segment.start[0] == START[0]
    for array in (state.acc, state.segment.start):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_plan_that_may_overflow_is_refused_with_value_limit_and_way_out() -> None:
    change = 8 * 16 * 127
    most = longest_segment(change)
    check_plan(change, most)
    with pytest.raises(SpecError, match=rf"reach {change * (most + 1)}, .* 16777216.* every {most} exchanges"):
        check_plan(change, most + 1)
    check_plan(LIMIT - 1, 1)
    check_plan(0, 10**9)
    with pytest.raises(SpecError, match="fewer nodes or directions"):
        check_plan(LIMIT, 1)


def test_a_segment_that_fills_up_is_an_error_and_never_wraps() -> None:
    state = Lattice.begin(START, -10).advance(Directions(1, 0, 0), [1 - LIMIT])
    assert np.abs(state.acc).max() == LIMIT - 1
    with pytest.raises(RunError, match=r"segment 0 sum up to 16777216, .* new segment"):
        state.advance(Directions(1, 0, 0), [1])
    with pytest.raises(RunError, match="4294967296"):
        Lattice.begin(START, -10).advance(Directions(1, 0, [0, 1]), [-(2**31), -(2**31)])


@pytest.mark.parametrize("exponent", [EXPONENTS[0] - 1, EXPONENTS[-1] + 1])
def test_units_that_fp32_cannot_be_exact_in_are_refused(exponent: int) -> None:
    with pytest.raises(SpecError, match=rf"2\^{exponent} .* -126 to 99"):
        Lattice.begin(START, exponent)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shape"):
        Lattice(Segment(0, 0, START), np.zeros(2, np.int32))


@pytest.mark.parametrize("size", [0, 1])
def test_the_smallest_states(size: int) -> None:
    state = advanced(Lattice.begin(START[:size], 0), [(0, 0, 1)])
    assert len(state.weights()) == size
    assert len(state.state_hash()) == 64
