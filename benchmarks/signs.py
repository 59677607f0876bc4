"""Random signs on the CPU: perturb against memcpy and against stored Gaussians; accumulate; project.

    python benchmarks/signs.py [--parameters 100000000] [--directions 64] [--threads 2] [--repeat 9] [--json]

The methods take turns, so that a busy machine slows all of them. Each time is printed as median and minimum: a median
says what the machine gave while others used it, a minimum what the code needs. memcpy is `np.copyto` into memory that
was touched before, of the same array; MeZO's way is `torch.normal`, a product and a sum, on as many threads. Before
anything is timed the results are compared with the NumPy references, because speed without the right answer is none.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np

from fedapt.kernels import signs
from fedapt.kernels.directions import Directions

MILLION = 1_000_000
EPSILON = 1e-3


@dataclass(frozen=True)
class Result:
    """One method: milliseconds a call, or a direction and million parameters."""

    method: str
    unit: str
    median: float
    minimum: float


def check() -> None:
    """AssertionError unless the machine code gives the bits of the references, away from any border."""
    directions, codes, first = Directions(1, [2, 3], [4, 5]), [7, -127], 1001
    w = np.random.default_rng(0).standard_normal(100_003, dtype=np.float32)
    acc, expected = np.zeros(w.size, np.int32), np.zeros(w.size, np.int32)
    signs.accumulate(acc, directions, codes, first, threads=2)
    signs.accumulate_reference(expected, directions, codes, first)
    assert np.array_equal(acc, expected)
    moved = signs.perturb(w, EPSILON, directions[0], first, threads=2)
    assert np.array_equal(moved, signs.perturb_reference(w, EPSILON, directions[0], first))
    sums = signs.project(w, directions, first, threads=2)
    assert np.array_equal(sums, signs.project_reference(w, directions, first))


def gaussian(w: Any, threads: int) -> Callable[[], object]:
    """w + ε·z with a fresh Gaussian z, as MeZO's code makes it."""
    torch: Any = import_module("torch")
    torch.set_num_threads(threads)
    tensor = torch.from_numpy(w)
    return lambda: tensor + EPSILON * torch.normal(mean=0.0, std=1.0, size=tensor.size())


def measure(parameters: int, count: int, threads: int, repeat: int) -> list[Result]:
    w = np.random.default_rng(0).standard_normal(parameters, dtype=np.float32)
    out, part = np.zeros_like(w), w[:MILLION]
    acc, directions, codes = np.zeros(part.size, np.int32), Directions(1, 0, range(count)), np.arange(count) % 127
    each = count * part.size / MILLION
    methods: dict[str, tuple[float, Callable[[], object]]] = {
        "memcpy": (1, lambda: np.copyto(out, w)),
        "perturb": (1, lambda: signs.perturb(w, EPSILON, directions[0], out=out, threads=threads)),
        "perturb, 1 thread": (1, lambda: signs.perturb(w, EPSILON, directions[0], out=out, threads=1)),
        "accumulate": (each, lambda: signs.accumulate(acc, directions, codes, threads=threads)),
        "accumulate, 1 thread": (each, lambda: signs.accumulate(acc, directions, codes, threads=1)),
        "project": (each, lambda: signs.project(part, directions, threads=threads)),
        "project, 1 thread": (each, lambda: signs.project(part, directions, threads=1)),
    }
    if find_spec("torch"):
        methods["torch.normal + add"] = (1, gaussian(w, threads))
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeat + 1):
        for name, (units, call) in methods.items():
            start = time.perf_counter()
            call()
            if turn:  # the first turn touches memory and compiles
                times[name].append(1000 * (time.perf_counter() - start) / units)
    unit = {name: "ms" if units == 1 else "ms / direction / 1M" for name, (units, _) in methods.items()}
    return [Result(name, unit[name], median(taken), min(taken)) for name, taken in times.items()]


def ratios(results: list[Result]) -> dict[str, tuple[float, float]]:
    """Of medians and of minima: perturb over memcpy, and Gaussians over perturb."""
    by = {result.method: result for result in results}
    fast, copy, slow = by["perturb"], by["memcpy"], by.get("torch.normal + add")
    found = {"perturb over memcpy": (fast.median / copy.median, fast.minimum / copy.minimum)}
    if slow:
        found["torch.normal + add over perturb"] = (slow.median / fast.median, slow.minimum / fast.minimum)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, default=100 * MILLION, help="of perturb and memcpy")
    parser.add_argument("--directions", type=int, default=64, help="of accumulate and project, on a million parameters")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args()
    check()
    results = measure(options.parameters, options.directions, options.threads, options.repeat)
    load = os.getloadavg()[0]
    if options.json:
        print(json.dumps({"results": [asdict(r) for r in results], "ratios": ratios(results), "load": load}))
        return
    print(f"{options.parameters:,} parameters, {options.threads} threads, load average at the end {load:.1f}")
    print(f"{'method':<34}{'median':>10}{'minimum':>10}")
    for r in results:
        print(f"{r.method:<34}{r.median:>10.3f}{r.minimum:>10.3f}  {r.unit}")
    for name, (of_medians, of_minima) in ratios(results).items():
        print(f"{name:<34}{of_medians:>9.2f}×{of_minima:>9.2f}×")


if __name__ == "__main__":
    main()
