"""Exact discrete Gaussian noise beside floating-point noise: samples a second on one core.

    python benchmarks/noise.py [--count 1000000] [--repeat 7] [--json]

`secret` draws its bits from the operating system, `simulation` from a key; the law is the same. The generators take
turns, so that a busy machine slows all of them; figures are medians. `whole release` is a vector on the grid with its
noise: rounding, sum, noise and values.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from fedapt.privacy.discrete import discrete_gaussian
from fedapt.privacy.noise import Grid, total
from fedapt.privacy.randomness import SecretRandomness, SimulationRandomness

DEVIATION = 2**20


def release(vector: np.ndarray, grid: Grid) -> np.ndarray:
    counts = total([grid.rounded(vector)], vector.size)
    return grid.values(grid.noised(counts, 1.0, SecretRandomness()))


def methods(count: int) -> dict[str, Callable[[], object]]:
    random, simulated, vector = np.random.default_rng(0), SimulationRandomness(0), np.zeros(count, np.float32)
    grid = Grid.fitting(1.0, 1.0, count)
    return {
        "discrete Gaussian, secret": lambda: discrete_gaussian(DEVIATION, count, SecretRandomness()),
        "discrete Gaussian, simulation": lambda: discrete_gaussian(DEVIATION, count, simulated),
        "discrete Gaussian, secret, whole release": lambda: release(vector, grid),
        "numpy normal, float64": lambda: random.standard_normal(count),
        "torch.normal, float32": lambda: torch.normal(0.0, 1.0, (count,)),
    }


def seconds(method: Callable[[], object]) -> float:
    started = time.perf_counter()
    method()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compared = methods(arguments.count)
    for method in compared.values():
        method()  # compiled and warm
    turns = [{name: seconds(method) for name, method in compared.items()} for _ in range(arguments.repeat)]
    rates = {name: arguments.count / median(turn[name] for turn in turns) for name in compared}
    if arguments.json:
        print(json.dumps(rates))
        return
    for name, rate in rates.items():
        print(f"{name:42} {rate / 1e6:8.2f} million samples a second")


if __name__ == "__main__":
    main()
