"""SST-2 over ten skewed sites with a real encoder: test accuracy and wall time of a run, for each recipe and seed.

    python benchmarks/sst2.py --model MODEL_FOLDER --data SST2_FOLDER

MODEL_FOLDER is an ordinary Hugging Face encoder (MiniLM-L6 here); SST2_FOLDER holds train.jsonl, dev.jsonl and
test.jsonl. The specs are examples/sst2.toml and examples/sst2-fedit.toml. A run chooses its best round on dev; test is
scored once, after the run. Rows go to results/sst2.jsonl; what is there already is not run again.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from fedapt.client.evaluation import score
from fedapt.client.sources import load_table
from fedapt.protocols.spec import RunSpec
from fedapt.simulation import run

HERE = Path(__file__).parent
SPECS = {"fedsvd": HERE.parent / "examples/sst2.toml", "fedit": HERE.parent / "examples/sst2-fedit.toml"}


def measure(recipe: str, seed: int, model: Path, data: Path) -> dict[str, Any]:
    spec = RunSpec.load(
        SPECS[recipe],
        [
            f"run.seed={seed}",
            f"model.base='{model.resolve()}'",
            f"data.source='{(data / 'train.jsonl').resolve()}'",
            f"data.evaluation='{(data / 'dev.jsonl').resolve()}'",
        ],
    )
    started = time.perf_counter()
    result = run(spec)
    seconds = time.perf_counter() - started
    adapted = result.federation.adapted
    adapted.write(result.outcome.adapter)
    assert spec.data is not None
    test = adapted.task.encode(load_table(spec.data, str(data / "test.jsonl"), spec.model.task))
    best = result.best_round or 0
    return {
        "recipe": recipe,
        "seed": seed,
        "test_accuracy": score(adapted, test).metrics(adapted.task)["accuracy"],
        "dev_accuracy": result.metrics[best]["evaluation"]["accuracy"],
        "best_round": best,
        "rounds": len(result.metrics) - 1,
        "seconds": round(seconds, 1),
        "bytes": sum(row.get("bytes_down", 0) + row.get("bytes_up", 0) for row in result.metrics),
        "spec": spec.local.model_dump(exclude_none=True) | {"recipe": spec.recipe.model_dump(exclude_none=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipes", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--rows", type=Path, default=HERE / "results/sst2.jsonl")
    options = parser.parse_args()

    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    done = {(row["recipe"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for recipe in options.recipes:
            if (recipe, seed) in done:
                continue
            rows.append(measure(recipe, seed, options.model, options.data))
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(
                f"{recipe} seed {seed}: test {rows[-1]['test_accuracy']:.4f} in {rows[-1]['seconds']:.0f} s", flush=True
            )
    for recipe in options.recipes:
        own = [row for row in rows if row["recipe"] == recipe]
        accuracy = statistics.median(row["test_accuracy"] for row in own)
        print(
            f"{recipe}: median test accuracy {accuracy:.4f} of {len(own)} seeds, slowest {max(r['seconds'] for r in own):.0f} s"
        )


if __name__ == "__main__":
    main()
