"""Refactoring `B·A` by QR and a small SVD, against the dense SVD of the whole matrix.

    python benchmarks/refactorization.py [--out 1024] [--in 1024] [--rank 8] [--repeat 7] [--json]

`refactor` needs an orthonormal A, `truncate` any factors. The methods take turns, so that a busy machine slows all of
them; times are medians. Each method's error is ‖B·A − B′·A′‖/‖B·A‖ in float64; a method that is off by more than 1e-6
gets no ratio, because speed without the right answer is none.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np

from fedapt.kernels.lowrank import LowRank, Matrix, refactor, refactor_reference

LIMIT = 1e-6
Method = Callable[[Matrix, Matrix], tuple[Matrix, Matrix]]


@dataclass(frozen=True)
class Result:
    """One method on one dtype: seconds a call (median), and the relative error of the product."""

    method: str
    dtype: str
    seconds: float
    error: float
    dense: bool


def by_refactor(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    new_b, rotation = refactor(b, b.dtype)
    return new_b, rotation @ a


def by_truncate(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    product = LowRank(b, a).truncate(a.shape[0])
    return product.b, product.a


def by_torch(b: Matrix, a: Matrix) -> tuple[Matrix, Matrix]:
    torch: Any = import_module("torch")
    u, s, vt = torch.linalg.svd(torch.from_numpy(b) @ torch.from_numpy(a), full_matrices=False)
    rank = a.shape[0]
    return (u[:, :rank] * s[:rank]).numpy(), vt[:rank].numpy()


FAST: dict[str, Method] = {"refactor": by_refactor, "truncate": by_truncate}
DENSE: dict[str, Method] = {"numpy SVD": refactor_reference}
if find_spec("torch"):
    DENSE["torch SVD"] = by_torch


def timed(method: Method, b: Matrix, a: Matrix, calls: int) -> float:
    """Seconds a call, over as many calls as a clock needs."""
    start = time.perf_counter()
    for _ in range(calls):
        method(b, a)
    return (time.perf_counter() - start) / calls


def error_of(method: Method, b: Matrix, a: Matrix) -> float:
    new_b, new_a = (factor.astype(np.float64) for factor in method(b, a))
    product = b.astype(np.float64) @ a.astype(np.float64)
    return float(np.linalg.norm(new_b @ new_a - product) / np.linalg.norm(product))


def measure(outputs: int, inputs: int, rank: int, repeat: int, dtype: type[Any]) -> list[Result]:
    random = np.random.default_rng(0)
    b = random.standard_normal((outputs, rank)).astype(dtype)
    a = np.ascontiguousarray(np.linalg.qr(random.standard_normal((inputs, rank)))[0].T.astype(dtype))
    methods = FAST | DENSE
    errors = {name: error_of(method, b, a) for name, method in methods.items()}  # and a first call, not timed
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeat):
        for name, method in methods.items():
            times[name].append(timed(method, b, a, calls=50 if name in FAST else 1))
    return [Result(n, np.dtype(dtype).name, median(times[n]), errors[n], n in DENSE) for n in methods]


def ratios(results: list[Result]) -> dict[str, float]:
    """How many times faster each factored method is than each dense one of its dtype; none where an error is large."""
    return {
        f"{fast.method} over {dense.method}, {fast.dtype}": dense.seconds / fast.seconds
        for fast in results
        for dense in results
        if dense.dense and not fast.dense and dense.dtype == fast.dtype and max(fast.error, dense.error) <= LIMIT
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=int, default=1024, help="rows of B")
    parser.add_argument("--in", type=int, default=1024, dest="inputs", help="columns of A")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args()
    shape = (options.out, options.inputs, options.rank)
    results = [r for dtype in (np.float32, np.float64) for r in measure(*shape, options.repeat, dtype)]
    if options.json:
        print(json.dumps({"shape": shape, "results": [asdict(r) for r in results], "ratios": ratios(results)}))
        return
    print(f"{'method':<12}{'dtype':<10}{'ms a call':>12}{'error':>12}")
    for r in results:
        print(f"{r.method:<12}{r.dtype:<10}{1000 * r.seconds:>12.3f}{r.error:>12.1e}")
    print()
    for name, ratio in ratios(results).items():
        print(f"{name:<36}{ratio:>8.0f}×")
    for r in results:
        if not r.error <= LIMIT:
            print(f"{r.method}, {r.dtype}: error {r.error:.1e} above {LIMIT:.0e}, so no ratio")


if __name__ == "__main__":
    main()
