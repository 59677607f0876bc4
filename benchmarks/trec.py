"""TREC over twenty skewed sites of four ranks: accuracy, bytes and aggregation error of every method, three seeds each.

    python benchmarks/trec.py --model MODEL_FOLDER --data TREC_FOLDER [--minutes 60]
    python benchmarks/trec.py --table

MODEL_FOLDER is MiniLM; its pooler, which was never trained, is replaced by one that centres (encoder.py). TREC_FOLDER
holds train.jsonl and test.jsonl. Every method first tries three rates on seed 0 with a tenth of the training data held out;
the best rate is then run on seeds 1, 2 and 3 and scored on test after the last round, once; a codec takes the rate of its
recipe. Rows go to results/trec.jsonl; what is there is not run again, so the work can stop at any time (`--minutes` stops
it before a run that would start later).

Recipes that mix ranks run with {2, 4, 8, 16}; the others with one rank of 8, about the mean. Codecs run on `fedsvd`
without mixed ranks, adapter kinds on `fedit`.
"""

import statistics
from pathlib import Path
from typing import Any

from encoder import with_open_pooler
from federations import federation_of
from resumable import Point, Row, Sweep, command, scores

from fedapt.progress import Silent
from fedapt.protocols.recipes import FIRST_ORDER as RECIPES
from fedapt.protocols.spec import RunSpec
from fedapt.server.store import MemoryStore
from fedapt.simulation import coordinate

SPEC = Path(__file__).parent.parent / "examples/trec.toml"
RATES = (6e-3, 2e-2, 6e-2)
RATES_OF = {
    **dict.fromkeys(("fedsvd", "ffa", "refresh"), (2e-2, 6e-2, 2e-1)),
    **dict.fromkeys(("fedit, bias", "fedit, nola", "fedit, vera", "fedit, ia3", "fedit, prompt"), (2e-2, 6e-2, 2e-1)),
    "fedit, full": (1e-4, 3e-4, 1e-3),
}
"""Where B alone trains, and kinds whose numbers mean something else: few scales of fixed vectors, or all weights."""

ONE_RANK = ("adapter.rank=8", "adapter.ranks=[]", "adapter.alpha=8")
OUTER = ("recipe.optimizer=nesterov", "recipe.learning_rate=0.4")
"""DiLoCo's own step at the server (one fragment)."""

CODECS = {
    "fp32": (),
    "bf16": (),
    "int8": (),
    "fp4": (),
    "top-k": ("wire.density=0.1", "wire.values=int8"),
    "seed-projection": ("wire.coefficients=4096",),
}
KINDS = ("dora", "ia3", "vera", "nola", "adalora", "bias", "bottleneck")
WHOLE_KINDS = ("prompt", "head", "full")
"""Kinds that adapt no single blocks."""


def methods() -> dict[str, tuple[str, ...]]:
    """Name of each line of the table ⇒ its overrides of the spec."""
    recipes = {
        name: (f"recipe.name={name}", *(() if recipe.mixes_ranks else ONE_RANK), *(OUTER if recipe.streams else ()))
        for name, recipe in RECIPES.items()
    }
    codecs = {
        f"fedsvd, {codec}": ("recipe.name=fedsvd", *ONE_RANK, f"wire.codec={codec}", *more)
        for codec, more in CODECS.items()
    }
    kinds = {f"fedit, {kind}": ("recipe.name=fedit", *ONE_RANK, f"adapter.method={kind}") for kind in KINDS}
    whole = {
        f"fedit, {kind}": ("recipe.name=fedit", *ONE_RANK, f"adapter.method={kind}", "adapter.layers=[]")
        for kind in WHOLE_KINDS
    }
    return recipes | codecs | kinds | whole


def tuned_as(method: str) -> str:
    """The method whose rate this one takes: a codec is not to be compared at another rate."""
    recipe, _, codec = method.partition(", ")
    return recipe if codec in CODECS else method


def rates_of(method: str) -> tuple[float, ...]:
    return RATES_OF.get(method, RATES)


SWEEP = Sweep(methods(), tuned_as, rates_of, lambda row: row["accuracy"])


def measure(point: Point, model: Path, data: Path) -> Row:
    spec = RunSpec.load(
        SPEC,
        [
            f"run.seed={point.seed}",
            f"local.learning_rate={point.rate}",
            f"model.base='{with_open_pooler(model)}'",
            f"data.source='{data / 'train.jsonl'}'",
            f"data.evaluation='{data / 'test.jsonl'}'",
            *methods()[point.method],
        ],
    )
    if point.phase == "tune":
        assert spec.data is not None
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"evaluation": None})})
    federation = federation_of(spec)
    rows = coordinate(spec, federation.client, MemoryStore(), federation.evaluate, Silent()).rows
    last = rows[-1]
    errors = [error for row in rows[1:] if (error := row.get("aggregation_error")) is not None]
    return {
        "accuracy": last["evaluation"]["accuracy"],
        "loss": last["evaluation"]["loss"],
        "bytes_up": sum(row.get("bytes_up", 0) for row in rows),
        "bytes_down": sum(row.get("bytes_down", 0) for row in rows),
        "error": statistics.mean(errors) if errors else None,
        "effective_rank": last.get("effective_rank"),
    }


def table(rows: list[Row]) -> str:
    """Markdown: mean ± sd of the test accuracy over the seeds that are there."""
    lines = [
        "| method | rate | test accuracy | seeds | MB up | MB down | aggregation error | effective rank |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods():
        own = SWEEP.tested(rows, method)
        if not own:
            continue

        def mean(key: str, own: list[Row] = own) -> Any:
            return statistics.mean(row[key] for row in own)

        lines.append(
            f"| {method} | {scores(own)} "
            f"| {mean('bytes_up') / 1e6:.2f} | {mean('bytes_down') / 1e6:.2f} "
            + (f"| {mean('error'):.1e} | {mean('effective_rank'):.1f} |" if own[0]["effective_rank"] else "| – | – |")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, "trec", SWEEP.todo, measure, table)
