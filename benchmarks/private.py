"""SST-2 under differential privacy: what each recipe reaches at one ε, three seeds each.

    python benchmarks/private.py --model MODEL_FOLDER --data SST2_FOLDER [--minutes 60]
    python benchmarks/private.py --table

Example-level: six sites, δ = 1e-5, ε of 3 and 6 (examples/sst2-private.toml). Client-level: a thousand virtual clients, of
which a Poisson draw of half takes one step a round, ε = 6. Every method tries RATES_OF on seed 0, at ε = 6, scored on
dev; the best rate is then run on seeds 1, 2 and 3 and scored on test after the last round, once. The sweep itself is not
charged: ε is that of one run, as in the papers, and a site that tunes on private data pays for every try.

MODEL_FOLDER is MiniLM; its pooler, which was never trained, is replaced by one that centres (encoder.py).
"""

from pathlib import Path

from encoder import with_open_pooler
from federations import federation_of
from resumable import Point, Row, Sweep, command, scores

from fedapt.progress import Silent
from fedapt.protocols.spec import RunSpec
from fedapt.server.store import MemoryStore
from fedapt.simulation import coordinate

SPEC = Path(__file__).parent.parent / "examples/sst2-private.toml"
TUNED_AT = 6
RECIPES = {
    "fedit": ("recipe.name=fedit",),
    "ffa, Kaiming A": ("recipe.name=ffa", "recipe.initial_a=kaiming"),
    "ffa, orthonormal A": ("recipe.name=ffa", "recipe.initial_a=orthonormal"),
    "fedsvd": ("recipe.name=fedsvd",),
    "refresh": ("recipe.name=refresh", "recipe.period=4"),
}
OF_CLIENTS = ("fedit", "ffa, orthonormal A", "fedsvd")
CLIENTS = (
    "privacy.unit=client",
    "data.partition.clients=1000",
    "participation.sampling=poisson",
    "participation.rate=0.5",
    "participation.minimum=0",
    "run.rounds=24",
    "run.evaluate_every=24",
    "local.batch_size=16",
    "local.steps=1",
    "local.schedule=constant",
    "local.learning_rate=1",
)
"""A client's step is its whole gradient, of about seven sentences; what is tuned is the server's step on the noised mean."""

RATES_OF = {"example": (2.0, 4.0, 8.0), "client": (0.5, 1.0, 2.0)}


def methods() -> dict[str, tuple[str, ...]]:
    """Name of each line of the table ⇒ its overrides of the spec, but for the step that is tuned."""
    examples = {
        f"example, {name}, ε = {epsilon}": (*recipe, f"privacy.epsilon={epsilon}")
        for name, recipe in RECIPES.items()
        for epsilon in (TUNED_AT, 3)
    }
    clients = {f"client, {name}, ε = 6": (*RECIPES[name], *CLIENTS, "privacy.epsilon=6") for name in OF_CLIENTS}
    return examples | clients


def tuned_as(method: str) -> str:
    """The method whose rate this one takes."""
    return method.replace("ε = 3", f"ε = {TUNED_AT}")


def unit_of(method: str) -> str:
    return method.partition(",")[0]


SWEEP = Sweep(
    methods(), tuned_as, lambda method: RATES_OF[unit_of(method)], lambda row: (row["accuracy"], -row["loss"])
)


def measure(point: Point, model: Path, data: Path) -> Row:
    held_out = "dev.jsonl" if point.phase == "tune" else "test.jsonl"
    step = "local.learning_rate" if unit_of(point.method) == "example" else "recipe.learning_rate"
    spec = RunSpec.load(
        SPEC,
        [
            f"model.base='{with_open_pooler(model)}'",
            f"data.source='{data / 'train.jsonl'}'",
            f"data.evaluation='{data / held_out}'",
            *methods()[point.method],
            f"run.seed={point.seed}",
            f"{step}={point.rate}",
        ],
    )
    federation = federation_of(spec)
    last = coordinate(spec, federation.client, MemoryStore(), federation.evaluate, Silent()).rows[-1]
    return {
        "accuracy": last["evaluation"]["accuracy"],
        "loss": last["evaluation"]["loss"],
        "spent": last["epsilon"],
        "private": last["private"],
    }


def table(rows: list[Row]) -> str:
    """Markdown: mean ± sd of the test accuracy over the seeds that are there."""
    lines = ["| unit and method | rate | test accuracy | seeds | largest ε spent |", "|---|---|---|---|---|"]
    for method in methods():
        own = SWEEP.tested(rows, method)
        if own:
            lines.append(f"| {method} | {scores(own)} | {max(row['spent'] for row in own):.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, "private", SWEEP.todo, measure, table)
