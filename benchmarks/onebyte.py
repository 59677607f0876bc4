"""SST-2 over eight nodes, MiniLM: accuracy against the bytes that one node sends up, zeroth order against first.

    python benchmarks/onebyte.py --model MODEL_FOLDER --data SST2_FOLDER [--minutes 60]
    python benchmarks/onebyte.py --table

MODEL_FOLDER is an ordinary Hugging Face encoder; SST2_FOLDER holds train.jsonl and dev.jsonl. Adapters are in the last two
layers, and what lies below runs once an example. Rows go to results/onebyte.jsonl; what is there is not run again, so the
work can stop at any time (`--minutes` stops it before a run that would start later). Rates and clips were tried on seed 0;
the figures are of seeds 1, 2 and 3, each scored on dev through the whole run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedapt.progress import Silent
from fedapt.protocols.spec import RunSpec
from fedapt.server.store import MemoryStore
from fedapt.sim.federation import build
from fedapt.simulation import coordinate

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
NODES = 8

CODES = (
    "run.rounds=600",
    "run.evaluate_every=50",
    "local.batch_size=16",
    "local.learning_rate=0.01",
    "zeroth.directions=16",
    "zeroth.radius=1e-2",
    "recipe.weighting=uniform",
)
ROUNDS = ("run.rounds=20", "run.evaluate_every=2", "local.batch_size=16", "local.steps=5", "local.learning_rate=2e-2")
METHODS = {
    "onebyte": ("recipe.name=onebyte", *CODES),
    "onebyte, log8": ("recipe.name=onebyte", *CODES, "zeroth.code=log8"),
    "kseed": ("recipe.name=kseed", *CODES, "zeroth.pool=1024"),
    "dpzo, ε = 6": (
        "recipe.name=dpzo",
        *CODES,
        "local.batch_size=256",
        "privacy.unit=example",
        "privacy.epsilon=6",
        "privacy.delta=1e-5",
        "privacy.clip=20",
    ),
    **{f"fedsvd, {codec}": ("recipe.name=fedsvd", *ROUNDS, f"wire.codec={codec}") for codec in ("fp32", "int8", "fp4")},
}

SPEC = """
[run]
name = "onebyte"
[model]
base = "{model}"
task = "sequence-classification"
labels = 2
max_length = 64
precision = "bf16"
[adapter]
rank = 8
alpha = 16
targets = ["query", "value"]
layers = [4, 5]
[data]
source = "{train}"
evaluation = "{dev}"
evaluation_limit = 872
[data.partition]
clients = 8
"""


def spec_of(method: str, seed: int, model: Path, data: Path) -> RunSpec:
    train, dev = (data / name for name in ("train.jsonl", "dev.jsonl"))
    text = SPEC.format(model=model.resolve(), train=train.resolve(), dev=dev.resolve())
    return RunSpec.parse(text, overrides=[f"run.seed={seed}", *METHODS[method]])


def todo(rows: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    done = {(row["method"], row["seed"]) for row in rows}
    yield from ((method, seed) for seed in SEEDS for method in METHODS if (method, seed) not in done)


def measure(spec: RunSpec) -> dict[str, Any]:
    """The curve of one run: bytes that one node has sent so far, and the accuracy then."""
    began = time.perf_counter()
    federation = build(spec)
    outcome = coordinate(spec, federation.client, MemoryStore(), federation.evaluate, Silent())
    curve, up = [], 0.0
    for row in outcome.rows:
        up += row.get("bytes_up", 0) / NODES
        if "evaluation" in row:
            curve.append([row["round"], round(up), row["evaluation"]["accuracy"], row["evaluation"]["loss"]])
    spent = [row["epsilon"] for row in outcome.rows if "epsilon" in row]
    return {
        "curve": curve,
        "accuracy": curve[-1][2],
        "bytes_up": curve[-1][1],
        "epsilon": spent[-1] if spent else None,
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± sd of the accuracy at the end over the seeds that are there."""
    lines = ["| method | accuracy | seeds | bytes up a node | seconds |", "|---|---|---|---|---|"]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if own:
            scores = [100 * row["accuracy"] for row in own]
            spread = f" ± {statistics.stdev(scores):.1f}" if len(own) > 1 else ""
            up, seconds = (statistics.mean(row[key] for row in own) for key in ("bytes_up", "seconds"))
            lines.append(
                f"| {method} | {statistics.mean(scores):.1f}{spread} | {len(own)} | {up:,.0f} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rows", type=Path, default=HERE / "results/onebyte.jsonl")
    options = parser.parse_args()
    if not options.table and not (options.model and options.data):
        parser.error("--model and --data are needed, or --table")
    began = time.monotonic()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    while not options.table and time.monotonic() - began < 60 * options.minutes:
        point = next(todo(rows), None)
        if point is None:
            break
        method, seed = point
        rows.append({"method": method, "seed": seed, **measure(spec_of(method, seed, options.model, options.data))})
        with options.rows.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(f"{method} seed {seed}: {rows[-1]['accuracy']:.4f} in {rows[-1]['seconds']:.0f} s")
    print(table(rows))


if __name__ == "__main__":
    main()
