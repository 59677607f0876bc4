"""Aggregating a round of many nodes: time and peak memory of the server, without a d×d matrix.

    python benchmarks/aggregation.py

Two shapes: RoBERTa-large's query and value (48 modules of 1024×1024, r = 8) from 100 nodes, and a Llama-7B-like one
(64 modules of 4096×4096, r = 16) from 20 nodes. `exact` truncates the stacked factors by QR and a small SVD, `dominant` by
subspace iteration on the factored operator, whose residual is measured and printed; `round` is the whole way of the
recipe `flexlora`, its reported error included. Each runs in a process of its own, so that peaks are its own.

Nodes share a common change of the adapter's rank and add noise of their own: `--noise` is its norm relative to the
common one. More noise means a flatter spectrum, on which subspace iteration settles more slowly.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fedapt.kernels.lowrank import LowRank, weighted_sum
from fedapt.protocols.layout import AdapterLayout, TensorSpec
from fedapt.protocols.recipes import RECIPES
from fedapt.protocols.spec import Recipe
from fedapt.server.aggregation import aggregate
from fedapt.server.rounds import Contribution, Round

SHAPES = {"roberta-large": (100, 48, 1024, 8), "llama-7b": (20, 64, 4096, 16)}


def updates_of(nodes: int, modules: int, width: int, rank: int, noise: float) -> Round:
    """A round of `nodes` whose factors are a common pair and their own noise."""
    random = np.random.default_rng(0)
    layout = AdapterLayout(
        spec
        for module in range(modules)
        for spec in (
            TensorSpec(f"{module:03}.lora_A.weight", (rank, width), "A"),
            TensorSpec(f"{module:03}.lora_B.weight", (width, rank), "B"),
        )
    )
    common = random.standard_normal(layout.size, dtype=np.float32)
    contributions = []
    for _ in range(nodes):
        change = random.standard_normal(layout.size, dtype=np.float32)
        contributions.append(Contribution(1 / nodes, common + np.float32(noise) * change))
    return Round(layout, layout, np.zeros(layout.size, np.float32), contributions)


def stacks(updates: Round) -> Iterator[LowRank]:
    """Each module's mean product, stacked: rank = nodes × r, fp32."""
    views = [(c.weight, updates.layout.split(c.change)) for c in updates.contributions]
    for pair in updates.layout.pairs:
        yield weighted_sum([(w, LowRank(view[pair.b.name], view[pair.a.name])) for w, view in views])


def exact(updates: Round) -> dict[str, float]:
    for product, pair in zip(stacks(updates), updates.layout.pairs, strict=True):
        product.truncate(pair.rank)
    return {}


def dominant(updates: Round) -> dict[str, float]:
    pairs = zip(stacks(updates), updates.layout.pairs, strict=True)
    return {"largest residual": max(product.dominant(pair.rank)[1] for product, pair in pairs)}


def whole_round(updates: Round) -> dict[str, float]:
    error = aggregate(RECIPES["flexlora"], Recipe(name="flexlora"), updates).error
    assert error is not None
    return {"aggregation error": error}


def measure(way: Callable[[Round], dict[str, float]], shape: str, noise: float, results: Any) -> None:
    updates = updates_of(*SHAPES[shape], noise)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    found = way(updates)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put({"seconds": seconds, "updates MiB": before, "peak MiB": peak, **found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.3)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for shape, (nodes, modules, width, rank) in SHAPES.items():
        print(f"{shape}: {nodes} nodes, {modules} modules of {width}×{width}, r = {rank} (stacked {nodes * rank})")
        for name, way in {"exact": exact, "dominant": dominant, "round": whole_round}.items():
            results = context.Queue()
            process = context.Process(target=measure, args=(way, shape, options.noise, results))
            process.start()
            row = results.get()
            process.join()
            print(f"  {name:9}" + ", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
