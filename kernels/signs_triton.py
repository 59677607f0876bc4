"""The functions of `signs.py` for CUDA tensors, in Triton; without a GPU they run in its interpreter (TRITON_INTERPRET=1).

One program works on one tile of the flat index. It keeps the tile in registers and makes the signs there, so memory is
passed over once, whatever the number of directions. Nothing here multiplies floats, so no fused operation can round
differently; fusion is switched off all the same.
"""
# ruff: noqa: PLR0917 - kernels take what they work on by position

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..protocols.philox import BLOCK
from .directions import TILE, Direction, Directions, Doubles, tiles
from .signs import as_codes, fold

_TILE, _BLOCKS = tl.constexpr(TILE), tl.constexpr(TILE // BLOCK)
_EXACT = {"enable_fp_fusion": False}
_FOLDS = tl.constexpr(TILE.bit_length() - 1)


def perturb(w: Tensor, epsilon: float, direction: Direction, first: int = 0) -> Tensor:
    """w + ε·z, fp32 (n,), out of place. Formal guarantees: equal to `signs.perturb` in every bit."""
    _check(w, torch.float32)
    out, row = torch.empty_like(w), _table(Directions(direction.key, direction.stream, direction.index), w)
    touched = tiles(first, w.numel())
    if touched:
        rounded = float(np.float32(epsilon))
        _perturb[(len(touched),)](w, out, row, rounded, first, touched.start, w.numel(), **_EXACT)
    return out


def accumulate(acc: Tensor, directions: Directions, codes: npt.ArrayLike, first: int = 0) -> None:
    """acc += Σ_k codes[k]·z_k in place, int32 (n,). Formal guarantees: equal to `signs.accumulate` in every bit."""
    _check(acc, torch.int32)
    numbers = torch.from_numpy(as_codes(codes, directions)).to(acc.device)
    touched = tiles(first, acc.numel())
    if touched:
        table = _table(directions, acc)
        _accumulate[(len(touched),)](acc, table, numbers, len(directions), first, touched.start, acc.numel(), **_EXACT)


def project(delta: Tensor, directions: Directions, first: int = 0) -> Doubles:
    """⟨Δ, z_k⟩ in float64, (K,), from Δ in fp32 (n,), back on the CPU.

    Formal guarantees: equal to `signs.project` in every bit, because each sum is folded in the same order.
    """
    _check(delta, torch.float32)
    touched = tiles(first, delta.numel())
    sums = torch.zeros(len(directions), len(touched), dtype=torch.float64, device=delta.device)
    if touched:
        table = _table(directions, delta)
        _project[(len(touched),)](delta, table, sums, len(directions), first, touched.start, delta.numel(), **_EXACT)
    return fold(sums.cpu().numpy())


def _check(tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.ndim != 1 or not tensor.is_contiguous():
        raise ValueError(f"a contiguous vector of {dtype} is needed, not {tensor.dtype} {tuple(tensor.shape)}")


def _table(directions: Directions, beside: Tensor) -> Tensor:
    """The table of the directions on the device of `beside`; as int32, because torch does little with uint32."""
    return torch.from_numpy(directions.table.view(np.int32)).to(beside.device)


def _jit(function: Any) -> Any:
    """Offsets are not specialized, because every value of 1 or multiple of 16 would be compiled again."""
    return triton.jit(function, do_not_specialize=["directions", "first", "tile", "count"])


@triton.jit
def _negative(row, tile):  # type: ignore[no-untyped-def]
    """Where the signs of a tile are −1, in the direction that `row` points to: (TILE,) of booleans."""
    block = tile.to(tl.int64) * _BLOCKS + tl.arange(0, _BLOCKS)
    index, stream = tl.load(row).to(tl.uint32, bitcast=True), tl.load(row + 1).to(tl.uint32, bitcast=True)
    key0, key1 = tl.load(row + 2).to(tl.uint32, bitcast=True), tl.load(row + 3).to(tl.uint32, bitcast=True)
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    same = tl.zeros_like(low)
    x0, x1, x2, x3 = tl.philox_impl(low, high, same + index, same + stream, same + key0, same + key1)
    words = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (_BLOCKS, 4, 1))
    bits = (words >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
    return tl.reshape(bits, (_TILE,)) != 0


@triton.jit
def _places(tile, first, count):  # type: ignore[no-untyped-def]
    """Where the parameters of a tile stand in the array, and which of them it has."""
    at = tile.to(tl.int64) * _TILE - first + tl.arange(0, _TILE)
    return at, (at >= 0) & (at < count)


@_jit
def _perturb(w, out, row, epsilon, first, tile, count):  # type: ignore[no-untyped-def]
    tile = tile + tl.program_id(0).to(tl.int64)
    at, inside = _places(tile, first, count)
    value = tl.load(w + at, mask=inside, other=0.0)
    tl.store(out + at, value + tl.where(_negative(row, tile), -epsilon, epsilon), mask=inside)


@_jit
def _accumulate(acc, table, codes, directions, first, tile, count):  # type: ignore[no-untyped-def]
    tile = tile + tl.program_id(0).to(tl.int64)
    at, inside = _places(tile, first, count)
    value = tl.load(acc + at, mask=inside, other=0)
    for k in range(directions):
        code = tl.load(codes + k)
        value += tl.where(_negative(table + 4 * k, tile), -code, code)
    tl.store(acc + at, value, mask=inside)


@_jit
def _project(delta, table, sums, directions, first, tile, count):  # type: ignore[no-untyped-def]
    tile = tile + tl.program_id(0).to(tl.int64)
    at, inside = _places(tile, first, count)
    value = tl.load(delta + at, mask=inside, other=0.0).to(tl.float64)
    target = sums + tl.program_id(0)
    for k in range(directions):
        folded = tl.where(_negative(table + 4 * k, tile), -value, value)
        for level in tl.static_range(_FOLDS):
            folded = tl.sum(tl.reshape(folded, (2, _TILE >> (level + 1))), axis=0)
        tl.store(target, tl.sum(folded, axis=0))
        target += tl.num_programs(0)
