"""SST-2 under differential privacy: what each recipe reaches at one ε, three seeds each.

    python benchmarks/private.py --model MODEL_FOLDER --data SST2_FOLDER [--minutes 60]
    python benchmarks/private.py --table

Example-level: six sites, δ = 1e-5, ε in EPSILONS (examples/sst2-private.toml). Client-level: a thousand virtual clients,
a Poisson draw of a tenth of them a round, ε = 6. Every method tries RATES_OF on seed 0, at ε = 6, scored on dev; the best
rate is then run on seeds 1, 2 and 3 and scored on test after the last round, once. The sweep itself is not charged: ε is
that of one run, as in the papers, and a site that tunes on private data pays for every try.

Rows go to results/private.jsonl; what is there is not run again, so the work can stop at any time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fedapt.protocols.spec import RunSpec
from fedapt.simulation import run

HERE = Path(__file__).parent
SPEC = HERE.parent / "examples/sst2-private.toml"
EPSILONS = (3.0, 6.0)
TUNED_AT = 6.0
SEEDS = (1, 2, 3)
RECIPES = {
    "fedit": ("recipe.name=fedit",),
    "ffa, Kaiming A": ("recipe.name=ffa", "recipe.initial_a=kaiming"),
    "ffa, orthonormal A": ("recipe.name=ffa", "recipe.initial_a=orthonormal"),
    "fedsvd": ("recipe.name=fedsvd",),
    "refresh": ("recipe.name=refresh", "recipe.period=5"),
}
CLIENTS = (
    "privacy.unit=client",
    "privacy.clip=0.1",
    "data.partition.clients=1000",
    "participation.sampling=poisson",
    "participation.rate=0.1",
    "participation.minimum=0",
    "run.rounds=30",
    "run.evaluate_every=30",
    "local.batch_size=16",
    "local.steps=2",
    "local.learning_rate=0.5",
)
RATES_OF = {"example": ("local.learning_rate", (0.7, 2.0, 6.0)), "client": ("recipe.learning_rate", (1.0, 3.0, 10.0))}
"""The step that is tuned: of DP-SGD at the site, of the server on the noised mean."""

OF_CLIENTS = ("fedit", "ffa, orthonormal A", "fedsvd")


class Point(NamedTuple):
    """One run of the table."""

    phase: str
    unit: str
    method: str
    epsilon: float
    rate: float
    seed: int


def todo(rows: list[dict[str, Any]]) -> Iterator[Point]:
    """What is still to run, a method at a time: it is tested when its tuning is whole."""
    done = {Point(*(row[name] for name in Point._fields)) for row in rows}
    for unit, methods in (("example", tuple(RECIPES)), ("client", OF_CLIENTS)):
        for method in methods:
            points = [Point("tune", unit, method, TUNED_AT, rate, 0) for rate in RATES_OF[unit][1]]
            rate = best_rate(rows, unit, method)
            if rate is not None:
                epsilons = EPSILONS if unit == "example" else (TUNED_AT,)
                points += [Point("test", unit, method, eps, rate, seed) for eps in epsilons for seed in SEEDS]
            yield from (point for point in points if point not in done)


def best_rate(rows: list[dict[str, Any]], unit: str, method: str) -> float | None:
    own = [row for row in rows if (row["phase"], row["unit"], row["method"]) == ("tune", unit, method)]
    if len(own) < len(RATES_OF[unit][1]):
        return None
    return float(max(own, key=lambda row: row["accuracy"])["rate"])


def measure(point: Point, model: Path, data: Path) -> dict[str, Any]:
    held_out = "dev.jsonl" if point.phase == "tune" else "test.jsonl"
    spec = RunSpec.load(
        SPEC,
        [
            f"model.base='{model.resolve()}'",
            f"data.source='{(data / 'train.jsonl').resolve()}'",
            f"data.evaluation='{(data / held_out).resolve()}'",
            *RECIPES[point.method],
            *(CLIENTS if point.unit == "client" else ()),
            f"run.seed={point.seed}",
            f"privacy.epsilon={point.epsilon}",
            f"{RATES_OF[point.unit][0]}={point.rate}",
        ],
    )
    started = time.perf_counter()
    result = run(spec)
    last = result.metrics[-1]
    return point._asdict() | {
        "accuracy": last["evaluation"]["accuracy"],
        "loss": last["evaluation"]["loss"],
        "spent": last["epsilon"],
        "private": last["private"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± sd of the test accuracy over the seeds that are there."""
    lines = ["| unit | method | ε | rate | test accuracy | seeds | largest ε spent |", "|---|---|---|---|---|---|---|"]
    tested = [row for row in rows if row["phase"] == "test"]
    for unit, method, epsilon in dict.fromkeys((row["unit"], row["method"], row["epsilon"]) for row in tested):
        own = [row for row in tested if (row["unit"], row["method"], row["epsilon"]) == (unit, method, epsilon)]
        accuracy = [100 * row["accuracy"] for row in own]
        spread = f" ± {statistics.stdev(accuracy):.1f}" if len(own) > 1 else ""
        lines.append(
            f"| {unit} | {method} | {epsilon:g} | {own[0]['rate']:g} | {statistics.mean(accuracy):.1f}{spread} "
            f"| {len(own)} | {max(row['spent'] for row in own):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rows", type=Path, default=HERE / "results/private.jsonl")
    options = parser.parse_args()
    if not options.table and not (options.model and options.data):
        parser.error("--model and --data are needed, or --table")
    started = time.monotonic()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    while not options.table and time.monotonic() - started < 60 * options.minutes:
        point = next(todo(rows), None)
        if point is None:
            break
        rows.append(measure(point, options.model, options.data))
        with options.rows.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{' '.join(map(str, point))}: {rows[-1]['accuracy']:.4f} in {rows[-1]['seconds']:.0f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
