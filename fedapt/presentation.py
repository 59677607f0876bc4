"""Results as text for people and as JSON for machines."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .protocols.methods import METHODS
from .protocols.recipes import RECIPES, Recipe, recipe_named
from .svg import duration, size

if TYPE_CHECKING:
    from .planning import Plan
    from .simulation import Result


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    cells = [list(head), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        return "  ".join(
            [first, *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(cells[0]), "  ".join("─" * width for width in widths), *map(line, cells[1:])])


def plan_text(plan: "Plan") -> str:
    """The plan of a run, one line a figure."""
    total = "in all" if plan.exact_total else "in all (expected)"
    empty = f" ({plan.empty} more have no data)" if plan.empty else ""
    rows = [
        ("recipe", plan.recipe + ("" if plan.exact else " (inexact: the error of each round is reported)")),
        ("nodes", f"{plan.nodes:,}{empty}, {plan.nodes_a_round:,} a round, {plan.rounds:,} rounds"),
        ("parameters", f"{plan.parameters:,}, of them {plan.trainable:,} in the adapter and {plan.sent:,} sent up"),
        (
            "down",
            f"{plan.down_per_node:,} bytes a node and round, {size(plan.down_total)} {total} ({plan.down_total:,})",
        ),
        ("up", f"{plan.up_per_node:,} bytes a node and round, {size(plan.up_total)} {total} ({plan.up_total:,})"),
        *_lattice(plan),
        *_clock(plan),
        ("memory", _memory(plan)),
        ("privacy", plan.privacy.text()),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _lattice(plan: "Plan") -> list[tuple[str, str]]:
    """Zeroth order: the state is integers, exact as long as a segment does not overflow."""
    if plan.longest_segment is None:
        return []
    return [
        ("lattice", f"a segment holds {plan.longest_segment:,} exchanges whatever nodes send; the next opens by itself")
    ]


def _clock(plan: "Plan") -> list[tuple[str, str]]:
    """A line where the spec has a fleet."""
    if plan.node_seconds is None:
        return []
    return [("clock", f"a round takes the median node {duration(plan.node_seconds)}; stragglers take longer")]


def _memory(plan: "Plan") -> str:
    adapters, activations = size(plan.memory_adapters), size(plan.memory_activations)
    return f"weights {size(plan.memory_weights)}, adapters and optimizer {adapters}, activations about {activations}"


def result_text(result: "Result", folder: Path) -> str:
    """The end of a run: what it reached, against where it began, and where things lie."""
    first, last = result.metrics[0].get("evaluation", {}), _last_evaluation(result.metrics)
    state = "finished" if result.outcome.complete else "interrupted; the same command goes on from here"
    lines = [f"{result.spec.run.name}: {len(result.metrics) - 1} rounds, {state}"]
    lines += [f"  {name}: {first[name]:.4g} → {value:.4g}" for name, value in last.items() if name in first]
    if result.best_round is not None:
        lines.append(f"  best round {result.best_round}, whose adapter is saved")
    lines += [f"  {curve.label}: {_describe(curve.rows)}" for curve in result.curves]
    lines += [f"  report   {folder / 'report.html'}", f"  adapter  {folder / 'adapter'}"]
    return "\n".join(lines)


def result_json(result: "Result", folder: Path) -> dict[str, Any]:
    return {
        "run": result.spec.run.name,
        "complete": result.outcome.complete,
        "rounds": len(result.metrics) - 1,
        "best_round": result.best_round,
        "metrics": result.metrics,
        "comparisons": {curve.label: [dict(row) for row in curve.rows] for curve in result.curves},
        "out": str(folder),
    }


def recipe_rows(name: str | None) -> list[dict[str, Any]]:
    """The recipe table. Raises SpecError for an unknown name."""
    return [
        {
            "name": recipe.name,
            "summary": recipe.summary,
            "paper": recipe.paper,
            "sends": ["codes"] if recipe.zeroth else sorted(recipe.trains),
            "averages": f"codes along {recipe.directions} directions" if recipe.zeroth else recipe.averages,
            "exact": recipe.exact,
            "linear": recipe.linear,
            "residual": recipe.residual,
            "downlink": _downlink(recipe),
            "initial_a": [*recipe.initial_a, *(() if recipe.streams or recipe.zeroth else ("eva",))],
            "mixed_ranks": recipe.mixes_ranks,
            "server_optimizers": list(recipe.server_optimizers),
            "privacy_units": list(recipe.units),
        }
        for recipe in (RECIPES.values() if name is None else [recipe_named(name)])
    ]


def method_rows() -> list[dict[str, str]]:
    """The table of adapter methods."""
    return [asdict(method) for method in METHODS.values()]


def method_text(rows: Sequence[Mapping[str, str]]) -> str:
    """One line a method, and what it is linear in."""
    lines = [f"{row['name']:<10} {row['summary']}  [{row['paper']}]\n{'':<10} linear: {row['linear']}" for row in rows]
    return "adapter.method, with recipe fedit but for lora:\n" + "\n".join(lines)


def _downlink(recipe: Recipe) -> str:
    if recipe.zeroth:
        return "sums of codes" if recipe.directions == "shared" else "everybody's codes"
    if recipe.refactorizes:
        return "B, head and an r×r rotation of A"
    if recipe.refreshes:
        return "B, head and the B's of earlier starts"
    return "A, B, head" + " and the frozen factors" * recipe.has_frozen if "A" in recipe.trains else "B, head"


def recipe_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a recipe, or all that is known of one; and what may be the same in all."""
    eva = 'With recipe.initial_a = "eva" A starts from adapter.public, and from no other data [EVA, arXiv 2410.07170].'
    if len(rows) > 1:
        return "\n".join(f"{row['name']:<10} {row['summary']}  [{row['paper']}]" for row in rows) + f"\n\n{eva}"
    return "\n".join(f"{key:<18} {', '.join(v) if isinstance(v, list) else v}" for key, v in rows[0].items())


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a point, the best first."""
    metrics = sorted({name for row in rows for name in row.get("evaluation", {})})

    def badness(row: Mapping[str, Any]) -> float:
        found = row.get("evaluation", {})
        return float(-found["accuracy"] if "accuracy" in found else found.get("loss", float("inf")))

    cells = [
        [
            " ".join(row["overrides"]),
            str(row.get("round", "–")),
            *(f"{row['evaluation'][name]:.4f}" if name in row.get("evaluation", {}) else "–" for name in metrics),
        ]
        for row in sorted(rows, key=badness)
    ]
    return table(["point", "best round", *metrics], cells)


def _last_evaluation(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
    found: Mapping[str, float] = next((row["evaluation"] for row in reversed(rows) if "evaluation" in row), {})
    return found


def _describe(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in _last_evaluation(rows).items())
