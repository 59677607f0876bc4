"""Runs side by side: what each reached, what it cost, and how exactly it aggregated."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .outputs import read_run
from .presentation import table as text_table
from .protocols.errors import DataError
from .protocols.spec import RunSpec
from .report import (
    Curve,
    Metric,
    bytes_moved,
    heading,
    metric_of,
    page,
    read,
    seconds_of,
    simulated,
    table,
    table_row,
    timing,
    traffic,
)
from .svg import count, duration, measured, size


@dataclass(frozen=True)
class Run:
    """One line of a comparison. `best` is an evaluation as it was stored; errors are relative
    and of the averaging, before the server's own step, or of the codec, a mean over nodes; None: not measured."""

    name: str
    folder: str
    recipe: str
    rounds: int
    best: float
    best_round: int
    bytes_down: int
    bytes_up: int
    bytes_moved: int
    mean_aggregation_error: float | None
    last_aggregation_error: float | None
    mean_codec_error: float | None
    effective_rank: float | None
    seconds: float
    simulated_seconds: float | None = None

    def cells(self, metric: Metric, *, clocked: bool = False) -> list[str]:
        """What follows the name, as a person reads it; `clocked`: the simulated time too."""
        simulated_time = "–" if self.simulated_seconds is None else duration(self.simulated_seconds)
        errors = (self.mean_aggregation_error, self.last_aggregation_error, self.mean_codec_error)
        return [
            self.recipe,
            count(self.rounds),
            metric.show(self.best * metric.scale),
            count(self.best_round),
            *(size(volume) for volume in (self.bytes_down, self.bytes_up, self.bytes_moved)),
            *("–" if error is None else measured(error, 2) for error in errors),
            "–" if self.effective_rank is None else measured(self.effective_rank, 3),
            duration(self.seconds),
            *([simulated_time] if clocked else []),
        ]


@dataclass(frozen=True)
class Comparison:
    """Runs of one task and their rounds, in the order in which they were named.

    `metric` is what they are judged by: accuracy, else perplexity, else loss. `note` says why the numbers may not be
    comparable; it is empty where nothing speaks against it.
    """

    runs: Sequence[Run]
    curves: Sequence[Curve]
    metric: Metric
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {"metric": self.metric.key, "note": self.note, "runs": [asdict(run) for run in self.runs]}

    def text(self) -> str:
        """One line a run."""
        rows = [[run.name, *run.cells(self.metric, clocked=self._clocked)] for run in self.runs]
        lines = text_table(self._titles(), rows)
        return f"{lines}\n{self.note}" if self.note else lines

    def html(self) -> str:
        """A page that asks nothing of the network: the table, and the metric against bytes moved and simulated time."""
        names = " · ".join(run.name for run in self.runs)
        cells = [run.cells(self.metric, clocked=self._clocked) for run in self.runs]
        body = [table_row(i, run.name, own) for i, (run, own) in enumerate(zip(self.runs, cells, strict=True))]
        parts = [f"<header>\n{heading('Federated fine-tuning runs', names, self.note)}\n</header>"]
        parts += [f'<section id="comparison">\n<h2>Runs</h2>\n{table(self._titles(), body)}\n</section>']
        charts = [chart for draw in (traffic, timing) if (chart := draw(self.curves, self.metric))]
        if charts:
            drawn = "\n".join(charts)
            title = "Chart" if len(charts) == 1 else "Charts"
            parts += [f'<section id="charts">\n<h2>{title}</h2>\n<div class="charts">\n{drawn}\n</div>\n</section>']
        return page(names, parts)

    @property
    def _clocked(self) -> bool:
        return any(run.simulated_seconds is not None for run in self.runs)

    def _titles(self) -> list[str]:
        cost = ["Down", "Up", "Bytes moved", "Mean error", "Last error", "Codec error", "Effective rank", "Time"]
        cost += ["Simulated time"] * self._clocked
        return ["Run", "Recipe", "Rounds", f"Best {self.metric.key}", "In round", *cost]


def compare(folders: Sequence[Path]) -> Comparison:
    """The runs that `fedapt simulate --out` has left in these folders.

    Raises DataError or SpecError where a folder holds no run, a run was never evaluated, or their tasks differ.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError(f"{', '.join(map(str, folders))}: a folder is named twice; name each run once")
    found = [read_run(folder) for folder in folders]
    specs = [spec for spec, _ in found]
    tasks = {spec.model.task: folder for spec, folder in zip(specs, folders, strict=True)}
    if len(tasks) > 1:
        named = "; ".join(f"{folder}: {task}" for task, folder in tasks.items())
        raise DataError(f"runs of different tasks cannot be compared ({named}); compare those of one task")
    names = _names(specs, folders)
    curves = [Curve(name, rows) for name, (_, rows) in zip(names, found, strict=True)]
    metric = metric_of(curves)
    runs = [_run(curve, metric, spec, folder) for curve, spec, folder in zip(curves, specs, folders, strict=True)]
    data = {spec.data.model_dump_json(exclude={"partition"}) if spec.data else "" for spec in specs}
    note = (
        "These runs differ in their data or how much of it is held out: their evaluations are not of the same examples."
    )
    return Comparison(runs, curves, metric, note if len(data) > 1 else "")


def _names(specs: Sequence[RunSpec], folders: Sequence[Path]) -> Sequence[str]:
    """What tells the runs apart: their own names, else those of their folders, else the whole paths."""
    for names in ([spec.run.name for spec in specs], [folder.resolve().name for folder in folders]):
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _run(curve: Curve, metric: Metric, spec: RunSpec, folder: Path) -> Run:
    scores = [(int(row["round"]), v / metric.scale) for row in curve.rows if (v := metric.of(row)) is not None]
    if not scores:
        raise DataError(f"{folder}: none of its {len(curve.rows)} rounds has an evaluation that the others have too")
    best_round, best = min(scores, key=lambda score: -score[1] if metric.key == "accuracy" else score[1])
    errors, coded, ranks = (
        [value for row in curve.rows if (value := read(row, key)) is not None]
        for key in ("aggregation_error", "codec_error", "effective_rank")
    )
    down, up = (int(bytes_moved(curve, key)[-1]) for key in ("bytes_down", "bytes_up"))
    return Run(
        name=curve.label,
        folder=str(folder),
        recipe=spec.recipe.name,
        rounds=max(int(row["round"]) for row in curve.rows),
        best=best,
        best_round=best_round,
        bytes_down=down,
        bytes_up=up,
        bytes_moved=down + up,
        mean_aggregation_error=fmean(errors) if errors else None,
        last_aggregation_error=errors[-1] if errors else None,
        mean_codec_error=fmean(coded) if coded else None,
        effective_rank=ranks[-1] if ranks else None,
        seconds=sum(seconds_of(curve.rows)),
        simulated_seconds=simulated(curve.rows),
    )
