"""A cohort of probes against as many probes made one by one, as MeZO makes them: seconds for each direction.

    python benchmarks/probes.py --model MODEL_FOLDER [--layers 4,5] [--rows 16] [--length 32] [--directions 16]

MODEL_FOLDER is an ordinary Hugging Face encoder. MeZO (arXiv 2305.17333, algorithm 1) draws normal numbers three times a
direction, adds them to the parameters in place, and runs the whole model twice; here the probes of all directions are one
batch, the frozen blocks below the lowest adapted one run once an example, and signs replace the normal numbers. `alike` runs the same cohort one probe at a
time, frozen blocks kept: what the batching alone is worth. The median of `--repeats` is printed, in one process.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fedapt.client.adapted import AdaptedModel
from fedapt.client.models import load_model
from fedapt.client.tasks import Examples, member_losses
from fedapt.client.zeroth import Ask, Probing
from fedapt.kernels.cohort import fastest
from fedapt.kernels.directions import Directions
from fedapt.protocols.spec import RunSpec

RADIUS = 1e-3


def spec_of(model: Path, layers: list[int], length: int) -> RunSpec:
    return RunSpec.check(
        {
            "model": {
                "base": str(model),
                "task": "sequence-classification",
                "labels": 2,
                "max_length": length,
            },
            "adapter": {"rank": 8, "targets": ["query", "value"], "layers": layers},
            "recipe": {"name": "onebyte"},
        }
    )


def examples_of(rows: int, length: int) -> Examples:
    random = np.random.default_rng(0)
    texts = [random.integers(1000, 20000, length) for _ in range(rows)]
    return Examples(texts, [np.array(label) for label in random.integers(0, 2, rows)], np.arange(rows))


@torch.no_grad()
def mezo(adapted: AdaptedModel, examples: Examples, directions: int) -> list[float]:
    """Algorithm 1 of MeZO, but for the update: in-place perturbations from a seed, and two forwards a direction."""
    batch = adapted.task.collate(examples, [np.arange(len(examples))])
    parameters = list(adapted.parameters.values())

    def perturb(seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.add_(torch.normal(0.0, 1.0, parameter.shape, generator=generator), alpha=scale * RADIUS)

    def loss() -> float:
        logits = adapted.model(**batch.inputs).logits.float()
        return float(member_losses(adapted.task, logits, batch.labels, 1)[0])

    slopes = []
    for seed in range(directions):
        perturb(seed, 1.0)
        up = loss()
        perturb(seed, -2.0)
        down = loss()
        perturb(seed, 1.0)
        slopes.append((up - down) / (2 * RADIUS))
    return slopes


def seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",") if part], default=[4, 5])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--directions", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    adapted = load_model(spec_of(options.model, options.layers, options.length))
    examples = examples_of(options.rows, options.length)
    rows, start = np.arange(options.rows), adapted.read()
    inputs = adapted.batch(examples, [rows[:2], rows[:2]]).inputs
    forward = fastest(adapted.model, [adapted.parameter_names[t.name] for t in adapted.layout.tensors], inputs)
    probing = Probing(adapted, forward, adapted.layout)
    table = Directions(1, 1, np.arange(options.directions))

    def cohort() -> None:
        probing.slopes(examples, start, [Ask(rows, table)], RADIUS)

    def alike() -> None:
        for k in range(options.directions):
            probing.slopes(examples, start, [Ask(rows, Directions(1, 1, np.array([k])))], RADIUS)

    print(f"{type(forward).__name__}, {adapted.layout.size:,} trainable, {torch.get_num_threads()} threads")
    each = {
        "MeZO, one by one": seconds(lambda: mezo(adapted, examples, options.directions), options.repeats),
        "alike, one by one": seconds(alike, options.repeats),
        "cohort": seconds(cohort, options.repeats),
    }
    for name, value in each.items():
        per, faster = 1e3 * value / options.directions, each["MeZO, one by one"] / value
        print(f"| {name:<18} | {per:8.2f} ms a direction | {faster:5.2f} × |")


if __name__ == "__main__":
    main()
