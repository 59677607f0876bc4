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

from .dense import Bf16, Codec, Fp4, Fp32, Int8
from .projection import SeedProjection
from .sparse import TopK
from .spec import Wire

__all__ = ["CODECS", "Bf16", "Codec", "Fp4", "Fp32", "Int8", "SeedProjection", "TopK", "codec_of"]

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
