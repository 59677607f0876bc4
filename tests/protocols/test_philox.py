import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.philox import BLOCK, Signs, philox4x32, signs, signs_reference

# The file kat_vectors of the Random123 distribution, lines `philox4x32 10`: counter, key, answer.
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]
keys = st.integers(0, 2**64 - 1)
both = pytest.mark.parametrize("draw", [signs, signs_reference])


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_known_answers(line: str) -> None:
    words = np.array([int(word, 16) for word in line.split()], np.uint32)
    key = int(words[4]) | int(words[5]) << 32
    assert philox4x32(words[:4], key).tolist() == words[6:].tolist()
    stacked = np.broadcast_to(words[:4], (2, 3, 4))
    assert (philox4x32(stacked, key) == words[6:]).all()


@given(keys, st.integers(0, 5), st.integers(0, 5 * BLOCK), st.integers(0, 2**32 - 1))
def test_the_compiled_loop_equals_the_reference(key: int, directions: int, count: int, stream: int) -> None:
    fast, plain = signs(key, directions, count, stream), signs_reference(key, directions, count, stream)
    assert fast.dtype == plain.dtype == np.int8
    assert fast.shape == plain.shape == (directions, count)
    assert np.array_equal(fast, plain)


@both
@given(keys, st.integers(0, 3), st.integers(0, 1000), st.integers(0, 2**32 - 1))
def test_a_sign_is_the_bit_that_the_docstring_names(
    draw: Callable[..., Signs], key: int, direction: int, index: int, stream: int
) -> None:
    counter = np.array([index // 128, 0, direction, stream], np.uint32)
    word = int(philox4x32(counter, key)[index % 128 // 32])
    assert draw(key, direction + 1, index + 1, stream)[direction, index] == 1 - 2 * (word >> index % 32 & 1)


@both
@pytest.mark.parametrize(("key", "stream"), [(2**64, 0), (-1, 0), (0, 2**32), (0, -1)])
def test_keys_and_streams_that_are_too_wide_are_errors(draw: Callable[..., Signs], key: int, stream: int) -> None:
    with pytest.raises(OverflowError):
        draw(key, 1, 1, stream)


def largest_correlation(rows: Signs) -> float:
    """Of any two rows, and of any row with the constant 1, in standard deviations."""
    values = np.vstack([np.ones(rows.shape[1]), rows.astype(np.float64)])
    correlations = values @ values.T / np.sqrt(rows.shape[1])
    return float(np.abs(correlations[np.triu_indices(len(values), 1)]).max())


def test_signs_are_fair_and_rows_independent_and_the_test_would_see_otherwise() -> None:
    count = 100_000
    rows = np.vstack([signs(key, 5, count, stream) for key in (0, 1, 2**32, 2**63) for stream in (0, 1)])
    assert largest_correlation(rows) < 5
    shifted = np.vstack([rows[0], np.roll(rows[0], BLOCK), np.roll(rows[0], 1)])
    assert largest_correlation(shifted) < 5
    assert largest_correlation(np.vstack([rows, rows[:1]])) > 100
    biased = np.where(np.random.default_rng(0).random(count) < 0.02, np.int8(1), rows[0])
    assert largest_correlation(biased[None]) > 5


def test_numba_is_loaded_by_the_first_sign_alone() -> None:
    script = """
import sys
import fedapt.protocols.codecs, fedapt.server.admission
from fedapt.protocols.philox import signs
assert "numba" not in sys.modules
signs(0, 1, 1)
assert "numba" in sys.modules
"""
    ran = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
