import hashlib
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.kernels import signs_numba
from fedapt.kernels.directions import TILE, Direction, Directions, signs_reference, tiles
from fedapt.kernels.signs import (
    accumulate,
    accumulate_reference,
    fold,
    perturb,
    perturb_reference,
    project,
    project_reference,
)
from fedapt.protocols import philox

THREADS = (1, 2, 3, 8, None)
sizes = st.sampled_from([0, 1, 127, 128, 129, TILE - 1, TILE, TILE + 1]) | st.integers(0, 4 * TILE)
# Slices may begin anywhere, also where the block number needs a second word.
firsts = st.sampled_from([0, 1, 127, 128, 129, 2**39 - 64]) | st.integers(0, 3 * TILE) | st.integers(0, 2**45)
words = st.integers(0, 2**32 - 1)
keys = st.integers(0, 2**64 - 1)
several = st.builds(
    lambda key, rows: Directions(key, [row[0] for row in rows], [row[1] for row in rows]),
    keys,
    st.lists(st.tuples(words, words), max_size=5),
)
EDGES = [(n, first) for n in (0, 1, 127, 128, 129, 3 * TILE) for first in (0, 1, 128, TILE - 1)]


def sha(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def floats(size: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Of many magnitudes, so that every sum is rounded."""
    random = np.random.default_rng(seed)
    return (random.standard_normal(size) * 10.0 ** random.integers(-8, 8, size)).astype(np.float32)


def integers(size: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, size, np.int32)


@given(keys, words, st.integers(1, 4), st.integers(0, 600), st.integers(0, 600))
def test_a_slice_of_the_signs_is_that_of_philox(key: int, stream: int, rows: int, first: int, count: int) -> None:
    whole = philox.signs(key, rows, first + count, stream)
    assert np.array_equal(signs_reference(Directions(key, stream, range(rows)), count, first), whole[:, first:])


@given(keys, words, words, sizes, firsts, st.floats(-1e3, 1e3, width=32))
def test_perturb_has_the_bits_of_its_reference(  # noqa: PLR0917 - hypothesis draws them by position
    key: int, stream: int, index: int, size: int, first: int, epsilon: float
) -> None:
    w, direction = floats(size), Direction(key, stream, index)
    expected = sha(perturb_reference(w, epsilon, direction, first))
    assert {sha(perturb(w, epsilon, direction, first, threads=threads)) for threads in THREADS} == {expected}


@given(several, sizes, firsts, st.data())
def test_accumulate_has_the_bits_of_its_reference(
    directions: Directions, size: int, first: int, data: st.DataObject
) -> None:
    row = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=len(directions), max_size=len(directions))
    codes, expected = data.draw(row), integers(size)
    accumulate_reference(expected, directions, np.array(codes, np.int64), first)
    for threads in THREADS:
        acc = integers(size)
        accumulate(acc, directions, np.array(codes, np.int64), first, threads=threads)
        assert sha(acc) == sha(expected)


@given(several, sizes, firsts)
def test_project_has_the_bits_of_its_reference(directions: Directions, size: int, first: int) -> None:
    delta = floats(size)
    expected = project_reference(delta, directions, first)
    assert expected.dtype == np.float64
    assert expected.shape == (len(directions),)
    assert {sha(project(delta, directions, first, threads=threads)) for threads in THREADS} == {sha(expected)}


@pytest.mark.parametrize(("size", "first"), EDGES)
def test_results_are_what_the_signs_say(size: int, first: int) -> None:
    """The definition once more, by loops over Python numbers."""
    directions, codes = Directions(5, [0, 3], [7, 2**32 - 1]), [-128, 1000]
    z = signs_reference(directions, size, first).tolist()
    w, acc = floats(size), np.arange(size, dtype=np.int32)
    # The sum of two fp32 numbers in float64, rounded once more to fp32, is their fp32 sum: 53 bits are enough.
    expected = [np.float32(float(x) + float(np.float32(0.1)) * s) for x, s in zip(w, z[1], strict=True)]
    assert perturb(w, 0.1, directions[1], first).tolist() == [float(x) for x in expected]
    sums = project(w, directions, first)
    depth = 12 + max(len(tiles(first, size)) - 1, 0).bit_length()
    for total, row in zip(sums.tolist(), z, strict=True):
        exact = sum((Fraction(float(x)) * s for x, s in zip(w, row, strict=True)), Fraction(0))
        assert abs(Fraction(total) - exact) <= depth * 2.0**-53 * float(np.abs(w.astype(np.float64)).sum())
    accumulate(acc, directions, codes, first)
    assert acc.tolist() == [i - 128 * z[0][i] + 1000 * z[1][i] for i in range(size)]


def test_the_parts_of_a_vector_are_treated_like_the_whole() -> None:
    w, direction, cut = floats(3 * TILE + 5), Direction(1, 2, 3), TILE + 77
    whole = perturb(w, 0.5, direction, 10)
    parts = perturb(w[:cut], 0.5, direction, 10), perturb(w[cut:], 0.5, direction, 10 + cut)
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(perturb(w[cut:], 0.5, direction, 10), whole[cut:])


@given(st.integers(1, 60), st.randoms(use_true_random=False))
def test_sums_have_no_order_and_no_groups(count: int, random: Any) -> None:
    pairs = [(random.randrange(2**32), random.randrange(50), random.randrange(-127, 128)) for _ in range(count)]
    whole, parts = np.zeros(1000, np.int32), np.zeros(1000, np.int32)
    streams, indices, codes = zip(*pairs, strict=True)
    accumulate(whole, Directions(9, streams, indices), codes)
    random.shuffle(pairs)
    while pairs:
        some = [pairs.pop() for _ in range(min(len(pairs), random.randrange(1, 20)))]
        streams, indices, codes = zip(*some, strict=True)
        accumulate(parts, Directions(9, streams, indices), codes)
    assert sha(parts) == sha(whole)


def test_the_hashes_never_change() -> None:
    """A state is compared between machines and versions: other signs, rounding or order would be another protocol."""
    directions = Directions(0x0123456789ABCDEF, [0, 1, 2, 2**32 - 1], [3, 2**32 - 1, 0, 1])
    w, acc = np.arange(-5000, 5000).astype(np.float32) / np.float32(5000), np.zeros(10_000, np.int32)
    accumulate(acc, directions, [1, -127, 5000, 77], 129)
    got = perturb(w, 1e-3, directions[3], 129), acc, project(w, directions, 129)
    assert [sha(array)[:16] for array in got] == HASHES


HASHES = ["4948168937eeaa75", "3ee533af60330362", "500677cf035fd7e3"]


@given(st.integers(0, 70), st.integers(0, 3))
def test_fold_adds_everything_in_one_order(length: int, rows: int) -> None:
    values = np.random.default_rng(length).integers(-1000, 1000, (rows, length)).astype(np.float64)
    assert np.array_equal(fold(values), values.sum(axis=1))
    assert not np.signbit(fold(np.zeros((1, length)) * -1.0)).any()
    assert fold(np.array([1e16, 1.0, -1e16, 1.0])) == 2  # (1e16 − 1e16) + (1 + 1); from left to right it is 1


def test_out_takes_the_result() -> None:
    w, direction = floats(5000), Direction(1, 0, 0)
    for offset in range(5):  # fast stores need multiples of 16 bytes
        room = np.full(5010, np.nan, np.float32)
        out = room[offset : offset + 5000]
        assert perturb(w, 0.1, direction, out=out) is out
        assert np.array_equal(out, perturb_reference(w, 0.1, direction))
        assert np.isnan(np.delete(room, np.s_[offset : offset + 5000])).all()
    with pytest.raises(ValueError, match="memory of its own"):
        perturb(w, 0.1, direction, out=w)


def test_read_only_input_is_enough() -> None:
    w = np.frombuffer(floats(100).tobytes(), np.float32)
    directions = Directions(1, 0, 0)
    assert np.array_equal(perturb(w, 0.1, directions[0]), perturb_reference(w, 0.1, directions[0]))
    assert project(w, directions) == project_reference(w, directions)


@pytest.mark.parametrize("wrong", [np.zeros(4), np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2]])
def test_arrays_that_a_kernel_would_misread_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="contiguous vector of float32"):
        perturb(wrong, 0.1, Direction(0, 0, 0))
    with pytest.raises(ValueError, match="contiguous vector of float32"):
        project(wrong, Directions(0, 0, 0))
    with pytest.raises(ValueError, match="contiguous vector of int32"):
        accumulate(wrong, Directions(0, 0, 0), [1])


def test_codes_and_directions_out_of_range_are_refused() -> None:
    directions = Directions(0, 0, [0, 1])
    for codes in ([1], [1, 2, 3], [1.0, 2.0]):
        with pytest.raises(ValueError, match="2 directions need as many integer codes"):
            accumulate(np.zeros(1, np.int32), directions, codes)
    with pytest.raises(OverflowError, match="codes must fit int32"):
        accumulate(np.zeros(1, np.int32), directions, [0, 2**31])
    for key, stream, index in ((2**64, 0, 0), (-1, 0, 0), (0, 2**32, 0), (0, 0, -1)):
        with pytest.raises(OverflowError):
            Directions(key, stream, [index])
    with pytest.raises(ValueError, match="from 0"):
        project(np.zeros(1, np.float32), directions, first=-1)


def test_machine_code_needs_no_folder_to_be_kept_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def njit(cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(signs_numba, "njit", njit)
    assert signs_numba.compiled(len) is len
    assert asked == [True, False]


def test_numba_is_loaded_by_the_first_call_alone() -> None:
    script = """
import sys
import numpy as np
from fedapt.kernels import lattice
from fedapt.kernels.directions import Directions
from fedapt.kernels.signs import project
assert not {"numba", "torch"} & set(sys.modules)
project(np.zeros(1, np.float32), Directions(0, 0, 0))
assert "numba" in sys.modules and "torch" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
