"""The codec that sends the largest values alone: where they are, and what they are."""

from math import ceil
from typing import Any

import numpy as np

from .dense import Codec, check_size
from .errors import PayloadError
from .layout import AdapterLayout, Flat, TensorSpec

Positions = np.ndarray[Any, np.dtype[np.int64]]
Bits = np.ndarray[Any, np.dtype[np.uint8]]

ROW = 256
"""Numbers that share a scale, where the inner codec has scales."""


class TopK:
    """The k = ⌈density·n⌉ values of largest magnitude of the whole vector; the rest decode as 0.

    Of equal magnitudes the first is kept. The payload is the positions, as a bitmap or in Elias–Fano form, whichever
    is smaller for this n and k, and then the values in ascending position, coded by the codec `values`.

    This codec is biased: the client adds what was not sent to the next change (`client/feedback.py`).

    Formal guarantees: ‖x − decode(encode(x))‖² ≤ (1 − density)·‖x‖² where `values` is lossless, the contraction that
    error feedback needs (Stich et al., arXiv 1809.07599, definition 2.1).
    """

    name = "top-k"

    def __init__(self, density: float, values: Codec) -> None:
        """`density` in (0, 1]."""
        self.density, self.values = density, values

    def kept(self, layout: AdapterLayout) -> int:
        """k: how many values are sent."""
        return min(ceil(self.density * layout.size), layout.size)

    def size(self, layout: AdapterLayout) -> int:
        return self._positions_size(layout) + self.values.size(numbers(self.kept(layout)))

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        kept = self.kept(layout)
        positions = largest(flat, kept)
        head = np.packbits(_position_bits(positions, layout.size), bitorder="little").tobytes()
        return head + self.values.encode(flat[positions], numbers(kept), key)

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        """Raises PayloadError, also for positions that are out of range, repeated, too many or too few."""
        check_size(self, payload, layout)
        kept, head = self.kept(layout), self._positions_size(layout)
        bits = np.unpackbits(np.frombuffer(payload[:head], np.uint8), bitorder="little")
        flat = np.zeros(layout.size, np.float32)
        flat[_read_positions(bits, layout.size, kept)] = self.values.decode(payload[head:], numbers(kept))
        return flat

    def _positions_size(self, layout: AdapterLayout) -> int:
        return (_bit_count(layout.size, self.kept(layout)) + 7) // 8


def numbers(count: int) -> AdapterLayout:
    """The layout in which `count` bare numbers are coded: rows of 256, and what is left."""
    rows, rest = divmod(count, ROW)
    return AdapterLayout([TensorSpec("0", (rows, ROW), "other"), TensorSpec("1", (rest,), "other")])


def largest(flat: Flat, count: int) -> Positions:
    """The positions (int64, ascending) of the `count` values of largest magnitude, the first of equals.

    NaN counts as infinite, so that it is sent, and refused where it arrives.
    """
    if count == 0:
        return np.empty(0, np.int64)
    magnitudes = np.nan_to_num(np.abs(flat), nan=np.inf, posinf=np.inf)
    least = np.partition(magnitudes, -count)[-count]
    keep = magnitudes > least
    equal = np.flatnonzero(magnitudes == least)
    keep[equal[: count - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


# Elias–Fano: the low bits of each position as they are, and the high parts, which ascend, in unary: position i sets
# bit high_i + i. That takes log₂(n/k) + 2 bits a position, within half a bit or so of the least there is, and its
# length depends on n and k alone. From a quarter of the values on, a bitmap of n bits is smaller.


def _low_bits(size: int, count: int) -> int:
    """Bits of a position that are sent as they are; −1 where a bitmap is smaller."""
    low = max((size // max(count, 1)).bit_length() - 1, 0)
    return low if _elias_fano_bits(size, count, low) < size else -1


def _elias_fano_bits(size: int, count: int, low: int) -> int:
    return count * low + count + (max(size - 1, 0) >> low)


def _bit_count(size: int, count: int) -> int:
    """Bits in which `count` of `size` positions are coded."""
    low = _low_bits(size, count)
    return size if low < 0 else _elias_fano_bits(size, count, low)


def _position_bits(positions: Positions, size: int) -> Bits:
    """Ascending positions in 0 … size − 1 as bits."""
    count = len(positions)
    low = _low_bits(size, count)
    upper = np.zeros(_bit_count(size, count) - count * max(low, 0), np.uint8)
    if low < 0:
        upper[positions] = 1
        return upper
    upper[(positions >> low) + np.arange(count)] = 1
    lower = (positions[:, None] >> np.arange(low)) & 1
    return np.concatenate([lower.ravel().astype(np.uint8), upper])


def _read_positions(bits: Bits, size: int, count: int) -> Positions:
    """The inverse, from whole bytes of bits. Raises PayloadError for bits that `_position_bits` never writes."""
    low = _low_bits(size, count)
    split, end = count * max(low, 0), _bit_count(size, count)
    positions = np.flatnonzero(bits[split:end])
    if len(positions) != count or bits[end:].any():
        raise PayloadError(f"a top-k payload marks {len(positions)} positions, not {count}, or bits after the last")
    if low >= 0:
        lower = bits[:split].reshape(count, low).astype(np.int64) << np.arange(low)
        positions = ((positions - np.arange(count)) << low) + lower.sum(axis=1)
    if (np.diff(positions) <= 0).any() or (positions >= size).any():
        raise PayloadError("the positions of a top-k payload do not ascend, or pass the end of the layout")
    return positions
