"""SST-2 over eight nodes, MiniLM: accuracy against the bytes that one node sends up, zeroth order against first.

    python benchmarks/onebyte.py --model MODEL_FOLDER --data SST2_FOLDER [--minutes 60]
    python benchmarks/onebyte.py --table

Adapters are in the last layer, and what lies below runs once an example. Every method tries three rates on seed 0, scored
on dev; the best is then run on seeds 1, 2 and 3 and scored on test through the whole run. Codecs take the rate of fp32;
`kseed`, and scalars in fp32, that of `onebyte`. The latter are the plain update of MeZO, in floating point, along the
same directions. Rows go to results/onebyte.jsonl, what is there is not run again, and `--table` draws
results/onebyte.html too.

MODEL_FOLDER is MiniLM; its pooler, which was never trained, is replaced by one that centres (encoder.py).
"""

import statistics
from itertools import accumulate
from pathlib import Path
from typing import Any

from encoder import with_open_pooler
from federations import federation_of
from resumable import RESULTS, Point, Row, Sweep, command, scores

from fedapt.client.exchanger import Probe
from fedapt.client.slopes import ClientProber
from fedapt.kernels.directions import Directions
from fedapt.kernels.signs import perturb
from fedapt.progress import Silent
from fedapt.protocols.exchange import terms_of
from fedapt.protocols.spec import RunSpec
from fedapt.report import page
from fedapt.server.store import MemoryStore
from fedapt.simulation import coordinate
from fedapt.svg import Axis, Line, line_chart

NODES = 8

CODES = (
    "run.rounds=200",
    "run.evaluate_every=20",
    "local.batch_size=8",
    "zeroth.directions=16",
    "zeroth.radius=1e-2",
    "zeroth.sides=one",
)
PRIVATE = (
    "local.batch_size=16",
    "privacy.unit=example",
    "privacy.epsilon=6",
    "privacy.delta=1e-5",
    "privacy.clip=10",
)
ROUNDS = ("run.rounds=20", "run.evaluate_every=2", "local.batch_size=16", "local.steps=5")
FP32_SCALARS = "onebyte, fp32"
METHODS = {
    "onebyte": ("recipe.name=onebyte", *CODES),
    FP32_SCALARS: ("recipe.name=onebyte", *CODES),
    **{f"fedsvd, {codec}": ("recipe.name=fedsvd", *ROUNDS, f"wire.codec={codec}") for codec in ("fp32", "int8", "fp4")},
    "kseed": ("recipe.name=kseed", *CODES, "zeroth.pool=1024"),
    "dpzo, ε = 6": ("recipe.name=dpzo", *CODES, *PRIVATE),
}
TUNED_AS = {FP32_SCALARS: "onebyte", "kseed": "onebyte", "fedsvd, int8": "fedsvd, fp32", "fedsvd, fp4": "fedsvd, fp32"}
RATES = {"fedsvd, fp32": (1e-2, 3e-2, 1e-1), "dpzo, ε = 6": (0.03, 0.1, 0.3)}
RATES_OF_CODES = (0.03, 0.1, 0.3)

SPEC = """
[run]
name = "onebyte"
[model]
base = "{model}"
task = "sequence-classification"
labels = 2
max_length = 32
[adapter]
rank = 2
alpha = 8
targets = ["query", "value"]
layers = [5]
[recipe]
weighting = "uniform"
[local]
schedule = "cosine"
[data]
source = "{train}"
evaluation = "{scored}"
[data.partition]
clients = 8
"""


SWEEP = Sweep(
    METHODS,
    lambda method: TUNED_AS.get(method, method),
    lambda method: RATES.get(method, RATES_OF_CODES),
    lambda row: -row["curve"][-1][3],
)
"""The best rate has the least loss in the end."""


def measure(point: Point, model: Path, data: Path) -> Row:
    """The curve of one run: exchanges, bytes that one node has sent so far, and accuracy and loss then."""
    held_out = "dev.jsonl" if point.phase == "tune" else "test.jsonl"
    text = SPEC.format(model=with_open_pooler(model), train=data / "train.jsonl", scored=data / held_out)
    overrides = [f"run.seed={point.seed}", f"local.learning_rate={point.rate}", *METHODS[point.method]]
    spec = RunSpec.parse(text, overrides=overrides)
    rows = with_fp32_scalars(spec) if point.method == FP32_SCALARS else with_product(spec)
    sent = accumulate(row.get("bytes_up", 0) / NODES for row in rows)
    curve = [
        [row["round"], round(up), row["evaluation"]["accuracy"], row["evaluation"]["loss"]]
        for row, up in zip(rows, sent, strict=True)
        if "evaluation" in row
    ]
    return {"accuracy": curve[-1][2], "epsilon": rows[-1].get("epsilon"), "curve": curve}


def with_product(spec: RunSpec) -> list[dict[str, Any]]:
    federation = federation_of(spec)
    return list(coordinate(spec, federation.client, MemoryStore(), federation.evaluate, Silent()).rows)


def with_fp32_scalars(spec: RunSpec) -> list[dict[str, Any]]:
    """w −= rate / codes · Σ slope·z in floating point: what one byte and the lattice are to be compared with."""
    federation = federation_of(spec)
    client, terms = federation.client, terms_of(spec)
    layout, probes_of = client.adapted.layout, ClientProber(client)
    trained = layout.select(client.recipe.trains)
    weights, rows = layout.cut(client.start, trained), []
    nodes = client.nodes()
    for number in range(1, spec.run.rounds + 1):
        rate = spec.local.in_round(number, spec.run.rounds).learning_rate / (len(nodes) * terms.directions)
        probes = [
            Probe(node, number, Directions(terms.key, *terms.probed(number, slot)), spec.zeroth.radius)
            for slot, node in enumerate(nodes)
        ]
        for probe, slopes in zip(probes, probes_of(weights, probes), strict=True):
            assert slopes.values is not None
            for k, slope in enumerate(slopes.values):
                weights = perturb(weights, -rate * float(slope), probe.directions[k])
        row: dict[str, Any] = {"round": number, "bytes_up": (4 + 4 * terms.directions) * len(nodes)}  # and the number
        if spec.run.is_evaluated(number):
            whole = client.start.copy()
            layout.put(whole, trained.split(weights))
            row["evaluation"] = federation.evaluate(whole)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: mean ± sd of the accuracy at the end over the seeds that are there; draws the curves beside it."""
    lines = ["| method | rate | test accuracy | seeds | bytes up a node |", "|---|---|---|---|---|"]
    curves: list[Line] = []
    for method in METHODS:
        own = SWEEP.tested(rows, method)
        if own:
            lines.append(f"| {method} | {scores(own)} | {own[0]['curve'][-1][1]:,} |")
            curves.append(mean_curve(method, own, len(curves)))
    chart = line_chart(curves, x=Axis("bytes up a node", log=True), y=Axis("test accuracy"))
    (RESULTS / "onebyte.html").write_text(page("Accuracy against bytes up", [chart]), encoding="utf-8")
    return "\n".join(lines)


def mean_curve(method: str, rows: list[Row], colour: int) -> Line:
    """Mean accuracy over the seeds against the bytes that one node has sent; the band is from the worst to the best."""
    moments = zip(*(row["curve"][1:] if row["curve"][0][1] == 0 else row["curve"] for row in rows), strict=True)
    points, band = [], []
    for moment in moments:
        up, reached = statistics.mean(at[1] for at in moment), [at[2] for at in moment]
        points.append((up, statistics.mean(reached)))
        band.append((up, min(reached), max(reached)))
    return Line(method, points, colour, band)


if __name__ == "__main__":
    command(__doc__, "onebyte", SWEEP.todo, measure, table)
