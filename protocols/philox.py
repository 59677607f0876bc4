"""Philox4x32-10: random signs that are the same on every machine.

A counter-based generator in integers alone (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
it has no state, so a sign is a function of its key, stream, direction and index, whatever was drawn before. NumPy's
own Philox is the 4x64 variant, which other libraries and GPUs do not offer.

A block is 128 signs. Index i of a direction lies in the block with the counter (i div 128: low word, high word;
direction; stream), at bit i mod 32 of word (i mod 128) div 32. A bit that is set means −1.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint32]]
Signs = np.ndarray[Any, np.dtype[np.int8]]

BLOCK = 128
"""Signs in one block."""

_ROUNDS = 10
_MASK, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_INCREMENTS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def philox4x32(counters: Words, key: int) -> Words:
    """The blocks of `counters` (uint32, (…, 4), low word first) under a 64-bit `key`: uint32, the same shape.

    Formal guarantees: the known answers of the Random123 distribution.
    """
    x0, x1, x2, x3 = np.moveaxis(counters.astype(np.uint64), -1, 0)
    return np.stack(rounds(x0, x1, x2, x3, *halves(key)), axis=-1).astype(np.uint32)


def rounds(  # noqa: PLR0917 - two vectors, spelled out
    x0: Any, x1: Any, x2: Any, x3: Any, key0: Any, key1: Any
) -> tuple[Any, Any, Any, Any]:
    """The ten rounds of one counter, or of arrays of counters: each word is a 32-bit number in a uint64.

    It stands alone because compiled loops, here and in the kernels, take it in as it is.
    """
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2
        x0, x1 = (second >> _WORD) ^ x1 ^ key0, second & _MASK
        x2, x3 = (first >> _WORD) ^ x3 ^ key1, first & _MASK
        key0, key1 = (key0 + _INCREMENTS[0]) & _MASK, (key1 + _INCREMENTS[1]) & _MASK
    return x0, x1, x2, x3


def signs_reference(key: int, directions: int, count: int, stream: int = 0) -> Signs:
    """`signs` in NumPy alone."""
    index = np.arange(-(-count // BLOCK), dtype=np.uint64)
    direction = np.arange(directions, dtype=np.uint64)[:, None]
    counters = np.broadcast_arrays(index & _MASK, index >> _WORD, direction, np.uint64(np.uint32(stream)))
    return unpack(philox4x32(np.stack(counters, axis=-1).astype(np.uint32), key), count)


def signs(key: int, directions: int, count: int, stream: int = 0) -> Signs:
    """Fair, independent signs: int8, (directions, count), each +1 or −1.

    `key` has 64 bits and `stream` 32; OverflowError beyond. The first call in a process compiles for a second.

    Formal guarantees: equal to `signs_reference` in every bit.
    """
    words = np.empty((directions, -(-count // BLOCK), 4), np.uint32)
    _compiled()(*halves(key), np.uint64(np.uint32(stream)), words)
    return unpack(words, count)


def halves(key: int) -> tuple[np.uint64, np.uint64]:
    """The low and the high 32 bits of a 64-bit `key`; OverflowError beyond."""
    return np.uint64(np.uint32(key & 0xFFFFFFFF)), np.uint64(np.uint32(key >> 32))


def unpack(words: Words, count: int) -> Signs:
    """The first `count` bits of each row of blocks (directions, blocks, 4), as signs: int8, (directions, count)."""
    octets = words.astype("<u4", copy=False).reshape(len(words), words.shape[1] * 4).view(np.uint8)
    bits = np.unpackbits(octets, axis=1, count=count, bitorder="little").view(np.int8)
    bits *= -2
    bits += 1
    return bits


@cache
def _compiled() -> Callable[[np.uint64, np.uint64, np.uint64, Words], None]:
    """A loop over all blocks of (directions, blocks, 4) words: once compiled, a block stays in registers.

    numba is imported here alone, because what needs no signs should start without it.
    """
    from numba import njit

    block_of = njit(rounds)

    def fill(key0: np.uint64, key1: np.uint64, stream: np.uint64, words: Words) -> None:
        for direction in range(words.shape[0]):
            for block in range(words.shape[1]):
                low, high = np.uint64(block) & _MASK, np.uint64(block) >> _WORD
                x0, x1, x2, x3 = block_of(low, high, np.uint64(direction), stream, key0, key1)
                words[direction, block, 0] = x0
                words[direction, block, 1] = x1
                words[direction, block, 2] = x2
                words[direction, block, 3] = x3

    compiled: Callable[[np.uint64, np.uint64, np.uint64, Words], None] = njit(fill)
    return compiled
