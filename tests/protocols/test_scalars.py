import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.errors import PayloadError
from fedapt.protocols.scalars import SCALAR_CODES, SCALES, ScalarCode, rounded_power

codes = pytest.mark.parametrize("code", SCALAR_CODES.values(), ids=SCALAR_CODES.keys())
BYTES = [code for code in SCALAR_CODES.values() if not code.packs]


@codes
def test_the_table_is_exact(code: ScalarCode) -> None:
    entries = np.array(code.entries)
    assert (np.diff(entries) > 0).all()
    assert (entries == -entries[::-1]).all()
    assert len(entries) in (2, 255)


def test_what_one_code_can_say_at_most() -> None:
    assert [SCALAR_CODES[name].largest for name in ("int8", "log8", "1-bit")] == [127, 3952, 42]


@codes
@given(scale=st.integers(-20, 20), places=st.lists(st.integers(0, 10**6), max_size=40), key=st.integers(0, 2**64))
def test_what_is_in_the_table_arrives(code: ScalarCode, scale: int, places: list[int], key: int) -> None:
    counts = np.array([code.entries[place % len(code.entries)] for place in places], np.int64)
    payload = code.encode(counts * 2.0**scale, scale, key)
    assert len(payload) == code.size(len(counts))
    assert np.array_equal(code.decode(payload, len(counts)), counts)


@codes
@pytest.mark.parametrize("share", [-0.83, -0.011, 0.0, 0.29, 0.998])
def test_the_mean_over_keys_is_the_value(code: ScalarCode, share: float) -> None:
    value, scale = share * code.clip_of(-3), -3
    drawn = np.array([code.decode(code.encode(np.full(64, value), scale, key), 64) for key in range(128)]) * 2.0**scale
    error = abs(drawn.mean() - value)
    assert error <= 5 * drawn.std() / np.sqrt(drawn.size) + 1e-12


def test_rounding_to_the_nearest_would_be_seen() -> None:
    """The negative control of the test above: its bound is narrow enough for a third of a step."""
    value, scale = 0.29 * SCALAR_CODES["int8"].clip_of(-3), -3
    drawn = np.array(
        [SCALAR_CODES["int8"].decode(SCALAR_CODES["int8"].encode([value], scale, k), 1) for k in range(8192)]
    )
    error = 5 * (drawn * 2.0**scale).std() / np.sqrt(drawn.size)
    assert abs(np.rint(value / 2.0**scale) * 2.0**scale - value) > error


def test_rounding_is_keyed() -> None:
    values, code = np.linspace(-1, 1, 200), SCALAR_CODES["int8"]
    assert code.encode(values, -6, 1) == code.encode(values, -6, 1) != code.encode(values, -6, 2)


@codes
def test_beyond_the_range_is_clipped_and_what_is_no_number_says_nothing(code: ScalarCode) -> None:
    counts = code.decode(code.encode([1e300, -1e300, np.nan, np.inf], 0, 7), 4)
    assert counts[:2].tolist() == [code.largest, -code.largest]
    assert code.packs or counts[2:].tolist() == [0, 0]


@pytest.mark.parametrize("code", BYTES, ids=lambda code: code.name)
def test_minus_128_is_refused(code: ScalarCode) -> None:
    with pytest.raises(PayloadError, match=r"a code in .* is −128"):
        code.decode(b"\x00\x80", 2)
    assert code.decode(b"\x00\x81", 2)[1] == -code.largest


@codes
def test_another_length_is_refused(code: ScalarCode) -> None:
    for payload in (b"", bytes(code.size(16) - 1), bytes(code.size(16) + 1)):
        with pytest.raises(PayloadError, match="16 codes in"):
            code.decode(payload, 16)


def test_bits_behind_the_last_are_refused() -> None:
    with pytest.raises(PayloadError, match="a bit behind the last"):
        SCALAR_CODES["1-bit"].decode(b"\x10", 4)


@codes
@given(clip=st.floats(1e-6, 1e6))
def test_a_clip_becomes_the_narrowest_scale_that_holds_it(code: ScalarCode, clip: float) -> None:
    scale = code.scale_of(clip)
    assert code.clip_of(scale) >= clip > code.clip_of(scale - 1)


def test_the_range_follows_the_codes_and_settles() -> None:
    code, random, scale = SCALAR_CODES["int8"], np.random.default_rng(0), 0
    for number in range(40):
        payload = code.encode(1e-4 * random.standard_normal(128), scale, number)
        scale = code.next_scale(scale, code.decode(payload, 128))
    assert 2e-4 < code.clip_of(scale) < 1e-3
    assert code.next_scale(scale, np.full(4, 127)) == scale + 1
    assert code.next_scale(SCALES[0], np.zeros(4, np.int64)) == SCALES[0]
    assert code.next_scale(3, np.zeros(0, np.int64)) == 3
    assert SCALAR_CODES["1-bit"].next_scale(3, np.full(4, 42)) == 3


@given(value=st.floats(1e-30, 1e30))
def test_a_factor_is_an_integer_of_three_bits_times_a_power_of_two(value: float) -> None:
    multiplier, exponent = rounded_power(value)
    assert 4 <= multiplier <= 8
    assert multiplier * 2.0**exponent == pytest.approx(value, rel=1 / 8)
