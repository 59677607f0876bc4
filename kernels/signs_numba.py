"""The functions of `signs.py` as machine code: loops that LLVM turns into vector instructions.

Each kernel works on the tiles `begin` to `end`. With many directions a tile is copied into scratch memory that stays in
the L1 cache, so the ends of an array need no loops of their own. Philox runs on all blocks of a tile side by
side. A bit of a word is tested with the mask 1 << j from a table, because numba widens a shift of 32 bits to 64 and
halves the speed. Fast-math is off: every operation rounds as IEEE 754 says.
"""
# ruff: noqa: PLR0917 - kernels take what they work on by position

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic

from ..protocols.philox import BLOCK, Words, rounds
from .directions import TILE, Doubles, Floats, Integers

F = TypeVar("F", bound=Callable[..., Any])

BLOCKS = TILE // BLOCK
_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)


def compiled(function: F) -> F:
    """Compiled at the first call, without the interpreter's lock, and kept on disk for the next process.

    numba compiles again when this file changes, but not for what it takes from other files: TILE and the rounds of
    Philox are part of the protocol and stay as they are.
    """
    try:
        machine_code: F = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no folder that can be written to, as in a read-only container
        machine_code = njit(nogil=True)(function)
    return machine_code


def available_threads() -> int:
    """Cores that this process may use, or what NUMBA_NUM_THREADS says."""
    return int(config.NUMBA_NUM_THREADS)


@compiled
def perturb(w: Floats, first: int, epsilon: Any, direction: Words, out: Floats, begin: int, end: int) -> None:
    """Tiles `begin` to `end` of out = w + ε·z."""
    words, line = np.empty((4, BLOCKS), np.uint32), np.empty(32, np.float32)
    aligned = (np.int64(out.ctypes.data) - 4 * first) % 16 == 0
    for tile in range(begin, end):
        start = tile * TILE - first
        _philox(direction, tile, words)
        if start >= 0 and start + TILE <= w.size:
            _perturb_tile(w, start, epsilon, words, out, line, aligned)
            continue
        for i in range(max(0, -start), min(TILE, w.size - start)):
            word = words[i % BLOCK // 32, i // BLOCK]
            out[start + i] = w[start + i] + (-epsilon if word & _BITS[i % 32] else epsilon)


@compiled
def _perturb_tile(w: Floats, start: int, epsilon: Any, words: Words, out: Floats, line: Floats, aligned: bool) -> None:
    """A whole tile, which begins at `start`, in lines of 32 floats; `line` is memory for one.

    A line goes past the caches where its address allows: an ordinary store first reads what it is about to overwrite,
    and that is a third of the traffic. memcpy does the same. What such a store wrote is visible to another thread after
    the next lock, and the caller joins its threads with locks. Longer pieces than a line would let the reads wait for
    the writes.
    """
    start = max(0, start)  # tells the compiler that no index is negative
    for block in range(BLOCKS):
        for part in range(4):
            word, at = words[part, block], start + BLOCK * block + 32 * part
            for j in range(32):
                line[j] = w[at + j] + (-epsilon if word & _BITS[j] else epsilon)
            if aligned:
                for j in range(0, 32, 4):
                    _stream(line, j, out, at + j)
            else:
                for j in range(32):
                    out[at + j] = line[j]


@compiled
def accumulate(acc: Integers, first: int, table: Words, codes: Integers, begin: int, end: int) -> None:
    """Tiles `begin` to `end` of acc += Σ_k q_k·z_k, as Σ_k q_k less twice the codes whose sign is −1."""
    words, scratch = np.empty((4, BLOCKS), np.uint32), np.zeros(TILE, np.int32)
    total = np.int32(np.sum(codes))
    for tile in range(begin, end):
        start = tile * TILE - first
        low, high = max(0, -start), min(TILE, acc.size - start)
        piece = acc[start + low : start + high]
        _copy(piece, scratch[low:high])
        scratch += total
        for k in range(codes.size):
            _philox(table[k], tile, words)
            twice = np.int32(2 * codes[k])
            for block in range(BLOCKS):
                for part in range(4):
                    word, at = words[part, block], BLOCK * block + 32 * part
                    for j in range(32):
                        scratch[at + j] -= twice if word & _BITS[j] else np.int32(0)
        _copy(scratch[low:high], piece)


@compiled
def project(delta: Floats, first: int, table: Words, sums: Doubles, begin: int, end: int) -> None:
    """Columns of `sums` (K, tiles touched): each the sum of ±Δ over a tile between `begin` and `end`, folded in halves."""
    words, scratch = np.empty((4, BLOCKS), np.uint32), np.empty(TILE, np.float32)
    folded = np.empty(TILE // 2, np.float64)
    for tile in range(begin, end):
        start = tile * TILE - first
        low, high = max(0, -start), min(TILE, delta.size - start)
        scratch[:] = 0
        _copy(delta[start + low : start + high], scratch[low:high])
        for k in range(len(table)):
            _philox(table[k], tile, words)
            _first_fold(scratch, words, folded)
            half = TILE // 4
            while half > 0:
                for i in range(half):
                    folded[i] += folded[half + i]
                half //= 2
            sums[k, tile - first // TILE] = folded[0]


@compiled
def _first_fold(delta: Floats, words: Words, folded: Doubles) -> None:
    """The signs of a tile, and the first of its folds."""
    for block in range(BLOCKS // 2):
        for part in range(4):
            one, other = words[part, block], words[part, block + BLOCKS // 2]
            at = BLOCK * block + 32 * part
            for j in range(32):
                x, y = delta[at + j], delta[TILE // 2 + at + j]
                folded[at + j] = np.float64(-x if one & _BITS[j] else x) + np.float64(-y if other & _BITS[j] else y)


_rounds = njit(rounds)


@compiled
def _philox(direction: Words, tile: int, words: Words) -> None:
    """The words (4, BLOCKS) of a tile in a direction (a row of the table)."""
    index, stream = np.uint64(direction[0]), np.uint64(direction[1])
    key0, key1 = np.uint64(direction[2]), np.uint64(direction[3])
    for block in range(BLOCKS):
        counter = np.uint64(tile * BLOCKS + block)
        x0, x1, x2, x3 = _rounds(counter & _LOW, counter >> _WORD, index, stream, key0, key1)
        words[0, block] = x0
        words[1, block] = x1
        words[2, block] = x2
        words[3, block] = x3


@compiled
def _copy(source: Any, target: Any) -> None:
    """Element by element, because numba's own assignment of slices first asks whether they overlap."""
    for i in range(source.size):
        target[i] = source[i]


def _streaming(_: Any, source: Any, at: Any, target: Any, to: Any) -> tuple[Any, Callable[..., Any]]:
    """numba's way to one LLVM instruction: four floats go from source[at:] to target[to:], past the caches.

    The address of target[to] must be a multiple of 16.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def pointer(k: int) -> Any:
            array = context.make_array(signature.args[k])(context, builder, arguments[k])
            return builder.bitcast(builder.gep(array.data, [arguments[k + 1]]), four.as_pointer())

        four = ir.VectorType(ir.FloatType(), 4)
        store = builder.store(builder.load(pointer(0), align=4), pointer(2), align=16)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), generate


_stream: Any = intrinsic(_streaming)
