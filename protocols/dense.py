"""Codecs that send every value: fp32, bf16, int8 and fp4.

A payload is the bare scales and values, little-endian, in the layout's order: no header, because both sides hold the
layout. Decoding checks the length and that every value is finite before anything else sees it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import prod
from typing import Any, Protocol

import numpy as np

from .errors import PayloadError
from .keys import generator
from .layout import AdapterLayout, Flat, TensorSpec

Matrix = np.ndarray[Any, np.dtype[np.float32]]
Codes = np.ndarray[Any, np.dtype[np.int8]]


class Codec(Protocol):
    """Update ⇄ bytes."""

    @property
    def name(self) -> str: ...

    def size(self, layout: AdapterLayout) -> int:
        """Bytes of every payload over `layout`."""

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        """`flat` (fp32, (layout.size,)) as bytes; `key` keys what the codec draws at random, if anything."""

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        """The fp32 vector that was meant. Raises PayloadError on a wrong length, NaN or infinity."""


class Fp32:
    """Lossless: 4 bytes a value."""

    name = "fp32"

    def size(self, layout: AdapterLayout) -> int:
        return 4 * layout.size

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        return flat.astype("<f4").tobytes()

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        check_size(self, payload, layout)
        return finite(np.frombuffer(payload, "<f4").astype(np.float32))


QUIET_NAN = 0x7FC0
"""NaN in bf16."""


class Bf16:
    """The upper half of fp32, rounded to nearest even: 2 bytes a value, relative error ≤ 2⁻⁸. NaN stays NaN."""

    name = "bf16"

    def size(self, layout: AdapterLayout) -> int:
        return 2 * layout.size

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        bits = flat.astype("<f4").view(np.uint32)
        rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
        # Rounding carries a NaN whose low bits are ones over into a zero.
        return np.where(np.isnan(flat), QUIET_NAN, rounded >> 16).astype("<u2").tobytes()

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        check_size(self, payload, layout)
        return finite((np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32))


class RowScaled(ABC):
    """One fp32 scale a row and a small code a value, rounded at random: the scales first, then the codes.

    A row is what shares a magnitude: one rank component of a factor (a row of A, a column of B), a row of any other
    matrix, a whole vector. `largest` is the code value that stands for the largest magnitude of a row.
    """

    name: str
    largest: int

    @abstractmethod
    def packed_size(self, count: int) -> int:
        """Bytes of `count` codes."""

    @abstractmethod
    def rounded(self, values: Matrix, random: Matrix) -> Codes:
        """Codes of `values` (|values| ≤ largest); up where `random`, uniform in [0, 1), says so."""

    @abstractmethod
    def packed(self, codes: Codes) -> bytes: ...

    @abstractmethod
    def unpacked(self, payload: bytes, count: int) -> Matrix:
        """The fp32 values, (count,), of packed codes. Raises PayloadError for a code that `packed` never writes."""

    def size(self, layout: AdapterLayout) -> int:
        return self.packed_size(layout.size) + 4 * sum(_rows(t) for t in layout.tensors)

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        random = generator(key)
        scales, codes = [], [np.empty(0, np.int8)]
        for rows in _matrices(flat, layout):
            scale = np.abs(rows).max(axis=1, keepdims=True, initial=0.0) / np.float32(self.largest)
            # A scale that is not finite travels as it is, and is refused where it arrives.
            values = np.divide(rows, scale, out=np.zeros_like(rows), where=(scale > 0) & np.isfinite(scale))
            scales.append(scale.astype("<f4").tobytes())
            draws = random.random(rows.size, np.float32).reshape(rows.shape)
            codes.append(self.rounded(values, draws).ravel())
        return b"".join([*scales, self.packed(np.concatenate(codes))])

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        check_size(self, payload, layout)
        scale_bytes = self.size(layout) - self.packed_size(layout.size)
        scales = finite(np.frombuffer(payload[:scale_bytes], "<f4").astype(np.float32))
        if (scales < 0).any():
            raise PayloadError(f"an {self.name} payload holds a negative scale: {scales.min()}")
        values = self.unpacked(payload[scale_bytes:], layout.size)
        flat = np.empty(layout.size, np.float32)
        row = value = 0
        for rows in _matrices(flat, layout):
            count = rows.shape[0]
            with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
                rows[...] = values[value : value + rows.size].reshape(rows.shape) * scales[row : row + count, None]
            row, value = row + count, value + rows.size
        return finite(flat)


class Int8(RowScaled):
    """One signed byte a value, in steps of max|row| / 127. Codes lie in [−127, 127]; −128 is refused.

    Formal guarantees: E[decode(encode(x))] = x, and |decode(encode(x)) − x| < max|row| / 127.
    """

    name = "int8"
    largest = 127

    def packed_size(self, count: int) -> int:
        return count

    def rounded(self, values: Matrix, random: Matrix) -> Codes:
        down = np.floor(values)
        codes: Codes = np.clip(down + (random < values - down), -127, 127).astype(np.int8)
        return codes

    def packed(self, codes: Codes) -> bytes:
        return codes.tobytes()

    def unpacked(self, payload: bytes, count: int) -> Matrix:
        codes = np.frombuffer(payload, np.int8)
        if (codes == -128).any():
            raise PayloadError("an int8 payload holds the code -128")
        return codes.astype(np.float32)


class Fp4(RowScaled):
    """E3M0, half a byte a value: a sign and three bits of exponent (Streaming DiLoCo, arXiv 2501.18512).

    With scale s = max|row|, the exponent code 0 is zero and code c is s·2^(c−7), so the magnitudes are 0, s/64, s/32,
    …, s. Two codes lie in a byte, the earlier in the low half; an odd count ends with a zero. There is one zero:
    minus zero is refused.

    Formal guarantees: E[decode(encode(x))] = x, and |decode(encode(x)) − x| < max(|x|, max|row| / 64).
    """

    name = "fp4"
    largest = 1

    def packed_size(self, count: int) -> int:
        return (count + 1) // 2

    def rounded(self, values: Matrix, random: Matrix) -> Codes:
        magnitudes = np.abs(values)
        # The mantissa, in [1/2, 1), is how far a value has come from one power of two to the next.
        mantissa, exponent = np.frexp(np.maximum(magnitudes, np.float32(1 / 128)))
        below = exponent + 6
        codes = below + (random < np.where(below > 0, 2 * mantissa - 1, 64 * magnitudes))
        return np.where((values < 0) & (codes > 0), codes + 8, codes).astype(np.int8)

    def packed(self, codes: Codes) -> bytes:
        pairs = np.zeros((self.packed_size(codes.size), 2), np.uint8)
        pairs.ravel()[: codes.size] = codes
        return (pairs[:, 0] | (pairs[:, 1] << 4)).tobytes()

    def unpacked(self, payload: bytes, count: int) -> Matrix:
        octets = np.frombuffer(payload, np.uint8)
        codes = np.stack([octets & 15, octets >> 4], axis=1).ravel()
        if (codes == 8).any() or codes[count:].any():
            raise PayloadError("an fp4 payload holds minus zero, or a code after the last value")
        return _FP4_VALUES[codes[:count]]


_FP4_MAGNITUDES = np.array([0.0, *(2.0 ** (code - 7) for code in range(1, 8))], np.float32)
_FP4_VALUES = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])


def check_size(codec: Codec, payload: bytes, layout: AdapterLayout) -> None:
    """Raises PayloadError where `payload` has not the length that `codec` announces."""
    if len(payload) != codec.size(layout):
        raise PayloadError(f"{len(payload)} bytes received, {codec.name} over this layout has {codec.size(layout)}")


def finite(values: Flat) -> Flat:
    """`values`. Raises PayloadError where one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise PayloadError("a payload holds NaN or infinity")
    return values


def _rows(tensor: TensorSpec) -> int:
    """How many scales a tensor has."""
    if len(tensor.shape) < 2:
        return 1
    return prod(tensor.shape[1:]) if tensor.role == "B" else tensor.shape[0]


def _matrices(flat: Flat, layout: AdapterLayout) -> Iterator[Matrix]:
    """Each tensor as a writable view (rows, values in a row)."""
    views = layout.split(flat)
    for tensor in layout.tensors:
        view = views[tensor.name]
        if len(tensor.shape) < 2:
            yield view.reshape(1, -1)
        elif tensor.role == "B":
            yield view.reshape(tensor.shape[0], prod(tensor.shape[1:])).T
        else:
            yield view.reshape(tensor.shape[0], prod(tensor.shape[1:]))
