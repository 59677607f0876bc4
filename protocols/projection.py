"""The codec that sends a few inner products with random directions, which the receiver draws again from a key."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .dense import Codec, check_size, finite
from .keys import derive
from .layout import AdapterLayout, Flat
from .philox import BLOCK, Signs, signs
from .sparse import numbers

KEY_BYTES = 8
DIRECTIONS = 16
"""About how many directions a block has. The error does not depend on it, the time does."""


@dataclass(frozen=True)
class Block:
    """A piece of one tensor: values `start` … `stop` − 1 of the flat vector, seen through so many directions."""

    start: int
    stop: int
    directions: int


class SeedProjection:
    """K numbers for d values: Ferret's projection (arXiv 2409.06277, algorithm 1), with its two errors put right.

    Each block of the vector is projected on directions of random signs v, one number a direction,
    γ_k = ⟨x, v_k⟩ / K_b, and decodes as Σ γ_k·v_k. Each block has its own key: Ferret's published code gives all
    blocks the same directions, which ties their errors together. Its factor d/K belongs to values of variance 1/d,
    while the ones it draws have a third of that, so that its estimate is a third of what it should be.

    The payload is the 64-bit key of the directions, and then the coefficients, coded by the codec `values`. There
    are `coefficients` of them, or one a block where that is more; a block gets its share by its length, because
    norms are not known before the run. An empty layout has none.

    The relative error is about √(d/K): far above 1 on a whole adapter, and small only in the mean of many updates.

    Formal guarantees: E[decode(encode(x))] = x over keys, where `values` is unbiased;
    E‖decode(encode(x)) − x‖² = Σ_b ‖x_b‖²·(d_b − 1)/K_b where it is lossless.
    """

    name = "seed-projection"

    def __init__(self, coefficients: int, values: Codec) -> None:
        """`coefficients` ≥ 1."""
        self.coefficients, self.values = coefficients, values

    def size(self, layout: AdapterLayout) -> int:
        return KEY_BYTES + self.values.size(numbers(sum(b.directions for b in self.blocks(layout))))

    def encode(self, flat: Flat, layout: AdapterLayout, key: int) -> bytes:
        root = derive(key, "projection") % 2**64
        parts = [np.empty(0)]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it arrives
            for block, directions in self._directions(layout, root):
                parts.append(directions @ flat[block.start : block.stop].astype(np.float64) / block.directions)
            coefficients = np.concatenate(parts).astype(np.float32)
        coded = self.values.encode(coefficients, numbers(coefficients.size), derive(key, "rounding"))
        return root.to_bytes(KEY_BYTES, "little") + coded

    def decode(self, payload: bytes, layout: AdapterLayout) -> Flat:
        """Raises PayloadError on a wrong length, NaN or infinity."""
        check_size(self, payload, layout)
        count = sum(block.directions for block in self.blocks(layout))
        coefficients = self.values.decode(payload[KEY_BYTES:], numbers(count)).astype(np.float64)
        flat, used = np.empty(layout.size, np.float32), 0
        for block, directions in self._directions(layout, int.from_bytes(payload[:KEY_BYTES], "little")):
            with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
                flat[block.start : block.stop] = coefficients[used : used + block.directions] @ directions
            used += block.directions
        return finite(flat)

    def blocks(self, layout: AdapterLayout) -> list[Block]:
        """The blocks of a layout, in order: they depend on the sizes of its tensors alone."""
        target = DIRECTIONS * layout.size // self.coefficients
        length = max(-(-target // BLOCK), 1) * BLOCK
        pieces = [
            (start, min(start + length, offset + tensor.size))
            for tensor, offset in zip(layout.tensors, layout.offsets.values(), strict=True)
            for start in range(offset, offset + tensor.size, length)
        ]
        rest = max(self.coefficients - len(pieces), 0)
        return [
            Block(start, stop, 1 + rest * stop // layout.size - rest * start // layout.size) for start, stop in pieces
        ]

    def _directions(self, layout: AdapterLayout, root: int) -> Iterator[tuple[Block, Signs]]:
        """Each block with its directions, (directions, values)."""
        for index, block in enumerate(self.blocks(layout)):
            key = derive(root, "block", index) % 2**64
            yield block, signs(key, block.directions, block.stop - block.start)
