"""Codecs: a flat fp32 vector ⇄ bytes. Each knows its exact size before it runs.

| codec           | bytes a value                | error                                | file            |
|-----------------|------------------------------|--------------------------------------|-----------------|
| fp32            | 4                            | none                                 | `dense.py`      |
| bf16            | 2                            | ≤ 2⁻⁸ of the value                   | `dense.py`      |
| int8            | 1                            | unbiased, < max|row| / 127           | `dense.py`      |
| fp4             | 1/2                          | unbiased, < max(|x|, max|row| / 64)  | `dense.py`      |
| top-k           | density·(`values` + about 1) | biased: needs feedback               | `sparse.py`     |
| seed-projection | `coefficients`·`values` / d  | unbiased, about √(d/K) of the vector | `projection.py` |
"""

import math
from dataclasses import dataclass

import numpy as np

from .dense import Bf16, Codec, Fp4, Fp32, Int8
from .errors import PayloadError
from .layout import AdapterLayout, Flat
from .projection import SeedProjection
from .sparse import TopK
from .spec import RunSpec, Wire

__all__ = [
    "CODECS",
    "Bf16",
    "Codec",
    "Fp4",
    "Fp32",
    "Int8",
    "SeedProjection",
    "TopK",
    "Uplink",
    "codec_of",
    "uplink_of",
]

CODECS: dict[str, Codec] = {"fp32": Fp32(), "bf16": Bf16(), "int8": Int8(), "fp4": Fp4()}
"""The codecs without settings: each may stand alone, or code the numbers of the other two."""


def codec_of(wire: Wire) -> Codec:
    """The codec of the updates."""
    match wire.codec:
        case "top-k":
            return TopK(wire.density, CODECS[wire.values])
        case "seed-projection":
            return SeedProjection(wire.coefficients, CODECS[wire.values])
        case name:
            return CODECS[name]


@dataclass(frozen=True)
class Uplink:
    """What a node sends: its change in a codec, and after it, where the run is `informed`, its information.

    The information is a number for each value of the change, not negative: how sure the node is of that value (the
    diagonal of its Fisher information). It travels as bf16, because weights need no more than its 2 bytes a value.
    """

    codec: Codec
    informed: bool = False

    def size(self, layout: AdapterLayout) -> int:
        """Bytes of every payload over `layout`."""
        return self.codec.size(layout) + (CODECS["bf16"].size(layout) if self.informed else 0)

    def encode(self, change: Flat, information: Flat | None, layout: AdapterLayout, key: int) -> bytes:
        """Both as bytes; each is fp32, (layout.size,), and `information` is None where the run is not informed."""
        payload = self.codec.encode(change, layout, key)
        return payload if information is None else payload + CODECS["bf16"].encode(information, layout, key)

    def error(self, change: Flat, payload: bytes, layout: AdapterLayout) -> float:
        """‖decoded − change‖ / ‖change‖ (L2, over the whole layout): what the codec lost of what it was given.

        0 where there was nothing to code, NaN where the payload will be refused. The information does not count.
        """
        if isinstance(self.codec, Fp32):
            return 0.0 if np.isfinite(change).all() else math.nan
        try:
            decoded = self.codec.decode(payload[: self.codec.size(layout)], layout)
        except PayloadError:
            return math.nan
        exact = change.astype(np.float64)
        wanted = float(np.linalg.norm(exact))
        return float(np.linalg.norm(decoded - exact)) / wanted if wanted > 0 else 0.0

    def decode(self, payload: bytes, layout: AdapterLayout) -> tuple[Flat, Flat | None]:
        """The change and the information that were meant.

        Raises PayloadError on a wrong length, NaN or infinity in either, and on information that is negative.
        """
        if not self.informed:
            return self.codec.decode(payload, layout), None
        end = self.codec.size(layout)
        change = self.codec.decode(payload[:end], layout)
        try:
            information = CODECS["bf16"].decode(payload[end:], layout)
        except PayloadError as error:
            raise PayloadError(f"Fisher information: {error}") from error
        lowest = float(np.min(information, initial=0.0))
        if lowest < 0:
            raise PayloadError(f"Fisher information holds {lowest:g}; a mean of squares is not negative")
        return change, information


def uplink_of(spec: RunSpec) -> Uplink:
    """What nodes send under a spec."""
    return Uplink(codec_of(spec.wire), informed=spec.recipe.aggregator == "fisher")
