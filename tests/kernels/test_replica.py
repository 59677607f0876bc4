from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.kernels import lattice
from fedapt.kernels.replica import Replica
from fedapt.kernels.signs import accumulate_reference
from fedapt.protocols.errors import PayloadError, RunError
from fedapt.protocols.exchange import Step, Terms
from fedapt.protocols.scalars import SCALAR_CODES

INT8 = SCALAR_CODES["int8"]
OWN, POOL, SHARED = Terms(5, "own", 4, INT8), Terms(5, "pool", 4, INT8, 9), Terms(5, "shared", 4, INT8)
START = np.linspace(-1, 1, 150, dtype=np.float32)


def step_of(terms: Terms, number: int, segment: int = 1, exponent: int = -12, seed: int = 0) -> Step:
    random = np.random.default_rng([seed, number])
    records = []
    for slot in range(3):
        picks = random.integers(0, 9, 4).astype("<u2").tobytes() if terms.mode == "pool" else b""
        records.append((slot, picks, random.integers(-127, 128, 4).astype(np.int8).tobytes()))
    body = random.integers(-300, 300, 4).astype("<i4").tobytes() if terms.mode == "shared" else terms.body(records)
    return Step(number, segment, exponent, 5, -6, body)


def steps_of(terms: Terms, count: int, seed: int = 0) -> list[Step]:
    """A new segment every third step."""
    return [step_of(terms, n, 1 + (n - 1) // 3, -12 - (n - 1) // 3, seed) for n in range(1, count + 1)]


def after(replica: Replica, steps: list[Step]) -> Replica:
    for step in steps:
        replica = replica.after(step)
    return replica


terms_ = pytest.mark.parametrize("terms", [OWN, POOL, SHARED], ids=lambda terms: terms.mode)


@terms_
@given(count=st.integers(0, 8), seed=st.integers(0, 99))
def test_numpy_and_machine_code_give_one_state(terms: Terms, count: int, seed: int) -> None:
    steps = steps_of(terms, count, seed)
    fast = after(Replica.begin(terms, START), steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lattice, "accumulate", accumulate_reference)
        slow = after(Replica.begin(terms, START), steps)
    assert fast.proof == slow.proof
    assert np.array_equal(fast.weights, slow.weights)


@terms_
def test_parameters_decay_where_a_segment_opens(terms: Terms) -> None:
    """w·(1 − decay·2⁻²⁴) in fp32, then the step; a snapshot of either form says the same."""
    steps = [replace(step, decay=n * 1000 * (n % 3 == 0)) for n, step in enumerate(steps_of(terms, 7))]
    fresh = Replica.begin(terms, START)
    before, opened = after(fresh, steps[:3]), after(fresh, steps[:4])
    start = opened.lattice.segment.start
    assert np.array_equal(start, before.weights * np.float32(1 - 3000 / 2**24))
    assert not np.array_equal(start, before.weights)
    for middle in (opened, after(fresh, steps[:5])):
        restored = fresh.restored(middle.snapshot())
        assert after(restored, steps[middle.number :]).proof == after(fresh, steps).proof


def test_parameters_decay_nowhere_else() -> None:
    steps = [step_of(OWN, 1), replace(step_of(OWN, 2), decay=1)]
    with pytest.raises(PayloadError, match="with the decay 1, and segment 1"):
        after(Replica.begin(OWN, START), steps)


def test_a_step_moves_against_the_slopes() -> None:
    terms = Terms(5, "shared", 1, INT8)
    moved = Replica.begin(terms, START).after(Step(1, 1, -10, 3, 0, np.array([7], "<i4").tobytes()))
    steps = (moved.weights - START) * 2.0**10
    assert set(np.abs(np.rint(steps)).tolist()) == {21.0}
    from fedapt.kernels.directions import Direction
    from fedapt.kernels.signs import perturb_reference

    assert np.allclose(moved.weights, perturb_reference(START, -21 / 2**10, Direction(5, 1, 0)), atol=1e-6)


@terms_
@given(count=st.integers(0, 9), cut=st.integers(0, 9))
def test_a_snapshot_and_the_tail_are_the_whole(terms: Terms, count: int, cut: int) -> None:
    steps, fresh = steps_of(terms, count), Replica.begin(terms, START)
    whole, middle = after(fresh, steps), after(fresh, steps[: min(cut, count)])
    restored = fresh.restored(middle.snapshot())
    assert restored.number == middle.number
    assert restored.proof == middle.proof
    assert after(restored, steps[middle.number :]).proof == whole.proof


def test_a_pool_makes_snapshots_short() -> None:
    pooled = after(Replica.begin(POOL, START), steps_of(POOL, 7))
    dense = after(Replica.begin(OWN, START), steps_of(OWN, 7))
    assert len(dense.snapshot()) > 8 * 150
    assert len(pooled.snapshot()) == len(dense.snapshot()) - 8 * 150 + 3 * (6 + 4 * 9)


def test_a_dense_snapshot_of_a_pooled_run_goes_on_without_its_sums() -> None:
    steps, fresh = steps_of(POOL, 7), Replica.begin(POOL, START)
    middle = replace(after(fresh, steps[:4]), sums=())
    assert after(fresh.restored(middle.snapshot()), steps[4:]).proof == after(fresh, steps).proof


@terms_
def test_what_does_not_follow_is_refused(terms: Terms) -> None:
    replica = Replica.begin(terms, START).after(step_of(terms, 1))
    with pytest.raises(RunError, match="step 3 does not follow step 1"):
        replica.after(step_of(terms, 3))
    with pytest.raises(PayloadError, match="is of segment 3"):
        replica.after(step_of(terms, 2, segment=3))
    with pytest.raises(PayloadError, match="segment 1 in units of 2\\^-12 is open"):
        replica.after(step_of(terms, 2, exponent=-13))
    with pytest.raises(PayloadError, match="in units of 2\\^120"):
        replica.after(step_of(terms, 2, segment=2, exponent=120))
    with pytest.raises(RunError, match="is not the one that its hash"):
        replica.after(replace(step_of(terms, 2), proof=bytes(32)))
    following = replica.after(step_of(terms, 2))
    assert replica.after(replace(step_of(terms, 2), proof=following.proof)).number == 2


@terms_
def test_a_malformed_snapshot_is_refused(terms: Terms) -> None:
    fresh = Replica.begin(terms, START)
    snapshot = after(fresh, steps_of(terms, 4)).snapshot()
    for wrong in (b"", snapshot[:-1], snapshot + b"\0", b"\x07" + snapshot[1:]):
        with pytest.raises(PayloadError):
            fresh.restored(wrong)
