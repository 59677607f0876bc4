"""The demo: a federation of Python's own modules, offline, with two recipes side by side."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from .outputs import RunFolder
from .presentation import table
from .progress import Watch
from .protocols.spec import RunSpec
from .report import Curve
from .server.store import MemoryStore
from .simulation import coordinate, run
from .svg import size

COMPARED = "fedit"


def demo_spec() -> RunSpec:
    return RunSpec.parse(files("fedapt").joinpath("demo.toml").read_text(encoding="utf-8"), where="demo.toml")


def run_demo(out: Path, watch: Watch) -> dict[str, Any]:
    """Run the demo into `out`; a summary for people (`text`) and for machines."""
    spec = demo_spec()
    RunFolder(out)
    result = run(spec, out / "fedsvd", watch)
    complete = result.outcome.complete
    if complete:
        other = spec.set(f"recipe.name={COMPARED}", f"run.name={COMPARED}")
        federation = result.federation.under(other)
        outcome = coordinate(other, federation.client, MemoryStore(), federation.evaluate, watch)
        result.curves.append(Curve(COMPARED, outcome.rows))
        complete = outcome.complete
    report = result.report(out / "report.html")
    rows = {spec.recipe.name: result.metrics, **{curve.label: [dict(r) for r in curve.rows] for curve in result.curves}}
    return {
        "complete": complete,
        "report": str(report),
        "adapter": str(out / "fedsvd" / "adapter"),
        "recipes": rows,
        "text": _text(rows, out, report),
    }


def _text(rows: dict[str, list[dict[str, Any]]], out: Path, report: Path) -> str:
    cells = []
    for recipe, metrics in rows.items():
        before, after = (metrics[i]["evaluation"]["perplexity"] for i in (0, -1))
        moved = sum(row.get("bytes_down", 0) + row.get("bytes_up", 0) for row in metrics)
        error = metrics[-1].get("aggregation_error", 0.0)
        cells.append(
            [recipe, f"{before:.2f}", f"{after:.2f}", f"{after / before - 1:+.0%}", size(moved), f"{error:.1e}"]
        )
    head = ["recipe", "perplexity before", "after", "change", "moved", "aggregation error"]
    return "\n".join(
        [
            "",
            "Held-out perplexity a byte, on modules that no client holds:",
            table(head, cells),
            "",
            f"The report with its plots: {report}",
            f"The adapter, as peft loads it: {out / 'fedsvd' / 'adapter'}",
            "",
            "Three commands to try next:",
            f"  fedapt adapter show {out / 'fedsvd' / 'adapter'}",
            "  fedapt init spec.toml && fedapt plan spec.toml",
            "  fedapt simulate spec.toml --set recipe.name=flexlora --baselines",
        ]
    )
