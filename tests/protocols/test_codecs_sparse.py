from math import ceil, comb, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedapt.protocols.codecs import CODECS, TopK
from fedapt.protocols.errors import PayloadError
from fedapt.protocols.layout import AdapterLayout, Flat, TensorSpec
from fedapt.protocols.sparse import largest, numbers

densities = st.floats(1e-4, 1) | st.just(1.0)


def layout_of(size: int) -> AdapterLayout:
    return AdapterLayout([TensorSpec("m", (size,), "other")])


@st.composite
def vectors(draw: st.DrawFn) -> Flat:
    """Up to 3000 values with many ties, the zero among them."""
    size, levels = draw(st.integers(0, 3000)), draw(st.integers(1, 1000))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random.integers(-levels, levels, size, endpoint=True).astype(np.float32)


def plain_largest(flat: Flat, count: int) -> list[int]:
    return sorted(sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[:count])


@given(vectors(), st.data())
def test_the_largest_are_those_of_a_sort_and_of_equals_the_first(flat: Flat, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(flat)))
    assert largest(flat, count).tolist() == plain_largest(flat, count)


@given(vectors(), densities)
def test_what_is_kept_arrives_and_the_rest_is_zero(flat: Flat, density: float) -> None:
    layout, codec = layout_of(len(flat)), TopK(density, CODECS["fp32"])
    kept = plain_largest(flat, min(ceil(density * len(flat)), len(flat)))
    expected = np.zeros_like(flat)
    expected[kept] = flat[kept]
    decoded = codec.decode(codec.encode(flat, layout, 0), layout)
    assert np.array_equal(decoded, expected)
    left = np.sum((flat - decoded) ** 2, dtype=np.float64)
    assert left <= (1 - density) * np.sum(flat**2, dtype=np.float64) * (1 + 1e-9)


@given(st.integers(1, 10**7), densities)
def test_positions_are_small(size: int, density: float) -> None:
    """At most a bitmap, and at most log₂(n/k) + 2 bits a position."""
    codec, layout = TopK(density, CODECS["fp32"]), layout_of(size)
    kept = codec.kept(layout)
    bits = 8 * (codec.size(layout) - 4 * kept)
    assert bits < min(size, kept * (log2(size / kept) + 2) + 1e-6) + 8


@pytest.mark.parametrize("inner", CODECS)
@given(vectors(), densities, st.integers(0, 2**64))
def test_values_are_coded_by_the_inner_codec(inner: str, flat: Flat, density: float, key: int) -> None:
    layout, codec = layout_of(len(flat)), TopK(density, CODECS[inner])
    positions = largest(flat, codec.kept(layout))
    values = numbers(len(positions))
    assert values.size == len(positions)
    expected = np.zeros_like(flat)
    expected[positions] = CODECS[inner].decode(CODECS[inner].encode(flat[positions], values, key), values)
    payload = codec.encode(flat, layout, key)
    assert len(payload) == codec.size(layout)
    assert np.array_equal(codec.decode(payload, layout), expected)


@pytest.mark.parametrize(
    ("size", "density"), [(1, 1), (7, 0.5), (8, 0.1), (8, 1), (9, 0.2), (11, 0.9), (20, 0.1), (20, 0.05), (130, 0.001)]
)
def test_every_set_of_positions_has_one_payload_and_no_other_payload_is_read(size: int, density: float) -> None:
    """Exhaustive: of all heads of up to 11 bits, as many are accepted as there are sets of positions."""
    codec, layout = TopK(density, CODECS["fp32"]), layout_of(size)
    kept = codec.kept(layout)
    values = np.arange(1, kept + 1, dtype="<f4").tobytes()
    length = codec.size(layout) - len(values)
    sets = set()
    for head in range(2 ** min(8 * length, 11)):
        payload = head.to_bytes(length, "little") + values
        try:
            decoded = codec.decode(payload, layout)
        except PayloadError:
            continue
        sets.add(tuple(np.flatnonzero(decoded)))
        assert codec.encode(decoded, layout, 0) == payload
    assert len(sets) == comb(size, kept)


def planted(positions: list[int], count: int, low: int, upper: int) -> bytes:
    """An Elias–Fano head for any list of positions: `low` bits each, then `upper` bits of unary."""
    bits = [0] * (count * low + upper)
    for i, position in enumerate(positions):
        bits[i * low : (i + 1) * low] = [position >> j & 1 for j in range(low)]
        bits[count * low + (position >> low) + i] = 1
    return np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        ([3, 3], "do not ascend"),
        ([5, 4], "do not ascend"),
        ([3, 20], "pass the end"),
        ([23, 22], "do not ascend"),
        ([3], "marks 1 positions, not 2"),
    ],
)
def test_positions_that_no_encoder_writes_are_refused(positions: list[int], reason: str) -> None:
    """Two of 20 values: three low bits and four of unary."""
    codec, layout = TopK(0.1, CODECS["fp32"]), layout_of(20)
    values = np.array([1, 2], "<f4").tobytes()
    assert codec.decode(planted([3, 19], 2, 3, 4) + values, layout)[[3, 19]].tolist() == [1, 2]
    with pytest.raises(PayloadError, match=reason):
        codec.decode(planted(positions, 2, 3, 4) + values, layout)


def test_values_of_a_hostile_payload_are_checked_by_the_inner_codec() -> None:
    codec, layout = TopK(0.1, CODECS["fp32"]), layout_of(20)
    values = np.array([1, np.nan], "<f4").tobytes()
    with pytest.raises(PayloadError, match="NaN or infinity"):
        codec.decode(planted([3, 19], 2, 3, 4) + values, layout)
