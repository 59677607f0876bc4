"""Vectors of random signs over the canonical flat index: perturb, accumulate, project (DESIGN §8).

No direction (`directions.py`) is ever stored or sent: a kernel makes the signs that it needs while the parameters pass
by. Signs serve as well as the Gaussians of MeZO (arXiv 2305.17333): SPSA was defined with them, E[z·zᵀ] = I for both,
and with signs the estimate of a gradient g in d dimensions has the mean square d·‖g‖² instead of (d + 2)·‖g‖².

| function     | what it does         | shapes and dtypes                                      |
|--------------|----------------------|--------------------------------------------------------|
| `perturb`    | w + ε·z              | w and result fp32 (n,)                                 |
| `accumulate` | acc += Σ_k q_k·z_k   | acc int32 (n,), q int32 (K,); in place, one pass       |
| `project`    | ⟨Δ, z_k⟩ for every k | Δ fp32 (n,), result float64 (K,)                       |

All arrays may be a slice of the flat index that starts at parameter `first`. There are three ways to the same bits: the
NumPy references in this file, which define the result; machine code by numba (`signs_numba.py`), which the functions
of this file run in threads; and Triton for CUDA tensors (`signs_triton.py`).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from .directions import TILE, Direction, Directions, Doubles, Floats, Integers, signs_reference, tiles

WORTH_A_THREAD = 1 << 22
"""Signs that take about as long to apply as ten starts of a thread."""


def perturb(
    w: Floats,
    epsilon: float,
    direction: Direction,
    first: int = 0,
    *,
    out: Floats | None = None,
    threads: int | None = None,
) -> Floats:
    """w + ε·z, fp32 (n,), out of place; −ε gives the other probe. Nothing is ever restored, so nothing drifts.

    ε is rounded to fp32. `out` takes the result, so that a loop need not ask for fresh memory. `threads` is for
    benchmarks and tests: by itself the function takes as many as pay.

    Formal guarantees: equal to `perturb_reference` in every bit, for every number of threads.
    """
    result = np.empty_like(w) if out is None else out
    _check(first, w=(w, np.float32), out=(result, np.float32))
    if result.shape != w.shape or np.may_share_memory(w, result):
        raise ValueError("out must have the shape of w, and memory of its own")
    from . import signs_numba

    row = Directions(direction.key, direction.stream, direction.index).table[0]
    _in_threads(signs_numba.perturb, w.size, first, threads, 1, w, first, np.float32(epsilon), row, result)
    return result


def accumulate(
    acc: Integers, directions: Directions, codes: npt.ArrayLike, first: int = 0, *, threads: int | None = None
) -> None:
    """acc += Σ_k codes[k]·z_k, in place: acc int32 (n,), codes (K,) integers that fit int32.

    A tile of acc is loaded once and takes all K directions before it is stored. Sums wrap as int32 does;
    `kernels/lattice.py` keeps them far from that.

    Formal guarantees: equal to `accumulate_reference` in every bit, for every number of threads, every order of the
    directions and every grouping into calls, because the sum of integers has no order.
    """
    _check(first, acc=(acc, np.int32))
    from . import signs_numba

    table, numbers = directions.table, as_codes(codes, directions)
    _in_threads(signs_numba.accumulate, acc.size, first, threads, len(table), acc, first, table, numbers)


def project(delta: Floats, directions: Directions, first: int = 0, *, threads: int | None = None) -> Doubles:
    """⟨Δ, z_k⟩ for every k, float64 (K,), from Δ in fp32 (n,).

    The order of summation is part of the definition: each tile is folded in halves (x[:h] + x[h:], until one number is
    left), zeros standing where Δ ends, and the sums of the tiles are folded in halves again.

    Formal guarantees: equal to `project_reference` in every bit, for every number of threads. The error against the
    exact sum is at most (12 + ⌈log2 tiles⌉)·2⁻⁵³·Σ|Δ|.
    """
    _check(first, delta=(delta, np.float32))
    from . import signs_numba

    table = directions.table
    sums = np.zeros((len(table), len(tiles(first, delta.size))), np.float64)
    _in_threads(signs_numba.project, delta.size, first, threads, len(table), delta, first, table, sums)
    return fold(sums)


def perturb_reference(w: Floats, epsilon: float, direction: Direction, first: int = 0) -> Floats:
    """`perturb` in NumPy alone."""
    z = signs_reference(Directions(direction.key, direction.stream, direction.index), w.size, first)[0]
    result: Floats = w + np.float32(epsilon) * z
    return result


def accumulate_reference(acc: Integers, directions: Directions, codes: npt.ArrayLike, first: int = 0) -> None:
    """`accumulate` in NumPy alone, one direction after the other."""
    for code, z in zip(as_codes(codes, directions), signs_reference(directions, acc.size, first), strict=True):
        acc += code * z


def project_reference(delta: Floats, directions: Directions, first: int = 0) -> Doubles:
    """`project` in NumPy alone."""
    touched = tiles(first, delta.size)
    begin = first - touched.start * TILE
    padded = np.zeros((len(directions), len(touched) * TILE), np.float64)
    padded[:, begin : begin + delta.size] = delta * signs_reference(directions, delta.size, first)
    return fold(fold(padded.reshape(len(directions), len(touched), TILE)))


def fold(values: Doubles) -> Doubles:
    """The sum over the last axis, always in the same order: halves are added until one number is left.

    The axis is filled up with zeros to a power of two; an empty one sums to 0, and no sum is −0.
    """
    length = values.shape[-1]
    width = 1 << max(length - 1, 0).bit_length()
    folded = np.zeros((*values.shape[:-1], width), np.float64)
    folded[..., :length] = values
    while (half := folded.shape[-1] // 2) > 0:
        folded = folded[..., :half] + folded[..., half:]
    result: Doubles = folded[..., 0] + 0.0
    return result


def as_codes(codes: npt.ArrayLike, directions: Directions) -> Integers:
    """`codes` as int32 (K,); ValueError unless there is one integer for each direction, OverflowError beyond int32."""
    values = np.asarray(codes)
    if values.shape != (len(directions),) or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"{len(directions)} directions need as many integer codes, not {values.dtype} {values.shape}")
    if values.size and not -(2**31) <= int(values.min()) <= int(values.max()) < 2**31:
        raise OverflowError(f"codes must fit int32; here are {values.min()} to {values.max()}")
    return values.astype(np.int32)


def _check(first: int, **arrays: tuple[np.ndarray[Any, Any], type]) -> None:
    """Machine code trusts its arguments, so they are looked at here."""
    if first < 0:
        raise ValueError(f"first counts parameters of the flat index from 0, and is {first}")
    for name, (array, dtype) in arrays.items():
        if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous or not array.flags.aligned:
            wanted = np.dtype(dtype).name
            raise ValueError(f"{name} must be a contiguous vector of {wanted}, not {array.dtype} {array.shape}")


def _in_threads(
    kernel: Callable[..., None], size: int, first: int, threads: int | None, directions: int, *arguments: Any
) -> None:
    """Runs `kernel(*arguments, begin, end)` on runs of tiles that together are all of them.

    These are plain threads and not numba's own: they end with the call, so a process may fork afterwards, and several
    callers may run at once. Which thread takes which tile changes no bit.
    """
    from .signs_numba import available_threads

    touched = tiles(first, size)
    wanted = max(1, min(available_threads(), size * directions // WORTH_A_THREAD)) if threads is None else threads
    edges = [touched.start + len(touched) * part // wanted for part in range(wanted + 1)]
    if wanted == 1:
        kernel(*arguments, *edges)
        return
    with ThreadPoolExecutor(wanted) as pool:
        parts = [pool.submit(kernel, *arguments, *edges[part : part + 2]) for part in range(wanted)]
    for part in parts:
        part.result()
