"""Codecs: a flat fp32 vector ⇄ bytes. Each knows its exact size before it runs.

A payload is the bare values (and scales), little-endian, in the layout's order: no header, because both sides hold
the layout. Decoding checks the length and that every value is finite before anything else sees it.
"""

from collections.abc import Iterator
from math import prod
from typing import Any, Protocol

import numpy as np

from .errors import PayloadError
from .keys import generator
from .layout import AdapterLayout, Flat, TensorSpec

Matrix = np.ndarray[Any, np.dtype[np.float32]]


class Codec(Protocol):
    """Update ⇄ bytes."""

    @property
    def name(self) -> str: ...

    def size(self, layout: AdapterLayout) -> int:
        """Bytes of every payload over `layout`."""

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        """`flat` (fp32, (layout.size,)) as bytes; `key` keys the rounding where the codec rounds at random."""

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
        _check_size(self, payload, layout)
        return _finite(np.frombuffer(payload, "<f4").astype(np.float32))


class Bf16:
    """The upper half of fp32, rounded to nearest even: 2 bytes a value, relative error ≤ 2⁻⁸."""

    name = "bf16"

    def size(self, layout: AdapterLayout) -> int:
        return 2 * layout.size

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        bits = flat.astype("<f4").view(np.uint32)
        rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
        return (rounded >> 16).astype("<u2").tobytes()

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        _check_size(self, payload, layout)
        return _finite((np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32))


class Int8:
    """One signed byte a value and one fp32 scale a row, rounded at random.

    A row is what shares a magnitude: one rank component of a factor (a row of A, a column of B), a row of any other
    matrix, a whole vector. Values lie in [−127, 127]; −128 is refused.

    Formal guarantees: E[decode(encode(x))] = x, and |decode(encode(x)) − x| < max|row| / 127.
    """

    name = "int8"

    def size(self, layout: AdapterLayout) -> int:
        return layout.size + 4 * sum(_rows(t) for t in layout.tensors)

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        random = generator(key)
        scales, codes = [], []
        for _, rows in _matrices(flat, layout):
            scale = np.abs(rows).max(axis=1, keepdims=True, initial=0.0) / np.float32(127)
            steps = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
            down = np.floor(steps)
            up = random.random(rows.shape, np.float32) < steps - down
            scales.append(scale.astype("<f4").ravel())
            codes.append(np.clip(down + up, -127, 127).astype(np.int8).ravel())
        return b"".join(part.tobytes() for part in (*scales, *codes))

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        _check_size(self, payload, layout)
        scale_bytes = self.size(layout) - layout.size
        scales = _finite(np.frombuffer(payload[:scale_bytes], "<f4").astype(np.float32))
        codes = np.frombuffer(payload[scale_bytes:], np.int8)
        if (codes == -128).any() or (scales < 0).any():
            raise PayloadError("an int8 payload holds the code -128 or a negative scale")
        flat = np.empty(layout.size, np.float32)
        row = value = 0
        for _, rows in _matrices(flat, layout):
            count = rows.shape[0]
            with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
                rows[...] = codes[value : value + rows.size].reshape(rows.shape) * scales[row : row + count, None]
            row, value = row + count, value + rows.size
        return _finite(flat)


CODECS: dict[str, Codec] = {"fp32": Fp32(), "bf16": Bf16(), "int8": Int8()}


def _rows(tensor: TensorSpec) -> int:
    """How many scales a tensor has."""
    if len(tensor.shape) < 2:
        return 1
    return prod(tensor.shape[1:]) if tensor.role == "B" else tensor.shape[0]


def _matrices(flat: Flat, layout: AdapterLayout) -> Iterator[tuple[TensorSpec, Matrix]]:
    """Each tensor as a writable view (rows, values in a row)."""
    views = layout.split(flat)
    for tensor in layout.tensors:
        view = views[tensor.name]
        if len(tensor.shape) < 2:
            yield tensor, view.reshape(1, -1)
        elif tensor.role == "B":
            yield tensor, view.reshape(tensor.shape[0], prod(tensor.shape[1:])).T
        else:
            yield tensor, view.reshape(tensor.shape[0], prod(tensor.shape[1:]))


def _check_size(codec: Codec, payload: bytes, layout: AdapterLayout) -> None:
    if len(payload) != codec.size(layout):
        raise PayloadError(f"{len(payload)} bytes received, {codec.name} over this layout has {codec.size(layout)}")


def _finite(values: Flat) -> Flat:
    if not np.isfinite(values).all():
        raise PayloadError("a payload holds NaN or infinity")
    return values
