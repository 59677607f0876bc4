"""Directions of the zeroth-order mode: vectors of random signs, named by three numbers (DESIGN §8).

A direction z has one sign ±1 for each trainable parameter of the canonical flat index. The sign of parameter i is a bit
of Philox4x32-10 (`protocols/philox.py`): a function of key, stream, direction and i, the same on every machine, whatever
the sharding and the shapes of the tensors. Generators of normal numbers differ between devices and between lengths.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..protocols.philox import BLOCK, Signs, Words, halves, philox4x32, unpack

Floats = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int32]]

TILE = 16 * BLOCK
"""Parameters in one tile. Tiles count from parameter 0 of the flat index; floats and scratch of one fit the L1 cache."""


@dataclass(frozen=True)
class Direction:
    """One sign vector z: a 64-bit key, and a stream and an index of 32 bits each."""

    key: int
    stream: int
    index: int


@dataclass(frozen=True, eq=False)
class Directions:
    """K sign vectors under one 64-bit key; `streams` and `indices` (K,) broadcast against each other.

    OverflowError where a key has more than 64 bits, or a stream or an index more than 32.
    """

    key: int
    streams: npt.ArrayLike
    indices: npt.ArrayLike

    def __post_init__(self) -> None:
        _ = self.table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, k: int) -> Direction:
        index, stream = self.table[k, :2].tolist()
        return Direction(self.key, stream, index)

    @cached_property
    def table(self) -> Words:
        """What the kernels read, uint32 (K, 4): index, stream, low and high half of the key."""
        indices, streams = np.broadcast_arrays(_word(self.indices), _word(self.streams))
        table = np.empty((indices.size, 4), np.uint32)
        table[:, 0], table[:, 1], table[:, 2:] = indices, streams, halves(self.key)
        return table


def _word(numbers: npt.ArrayLike) -> np.ndarray[Any, np.dtype[np.int64]]:
    values = np.atleast_1d(np.asarray(numbers, np.int64))
    if values.size and not 0 <= values.min() <= values.max() < 2**32:
        raise OverflowError(f"streams and indices have 32 bits; here are {values.min()} to {values.max()}")
    return values


def signs_reference(directions: Directions, count: int, first: int = 0) -> Signs:
    """The signs of parameters `first` to `first + count` in every direction: int8, (K, count), each +1 or −1."""
    skipped = first % BLOCK
    blocks = first // BLOCK + np.arange(-(-(skipped + count) // BLOCK), dtype=np.int64)
    rows = directions.table[:, None, :2].astype(np.int64)
    counters = np.broadcast_arrays(blocks & 0xFFFFFFFF, blocks >> 32, rows[..., 0], rows[..., 1])
    words = philox4x32(np.stack(counters, axis=-1).astype(np.uint32), directions.key)
    return unpack(words, skipped + count)[:, skipped:]


def tiles(first: int, count: int) -> range:
    """The tiles that parameters `first` to `first + count` touch."""
    return range(first // TILE, -(-(first + count) // TILE) if count else first // TILE)
