"""The report of a run: one HTML file with its plots inside, which asks nothing of the network."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import accumulate
from numbers import Real
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from .outputs import write_text
from .svg import MOST_POINTS, Axis, Dot, Line, byte_unit, colour, count, duration, line_chart, measured, scatter, size

Row = Mapping[str, Any]
Reader = Callable[[Row], float | None]

MOST_OPEN_ROWS = 20
SIMULATED = "simulated_seconds"
"""The key of a row of a run with a fleet: what a deployment on it would have taken until then."""
CLOCK_UNITS = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))

_ROUND = Axis("round", whole=True, zero=True)
LOG_RATIO = 8  # a loss that spans more is drawn on a log scale: on a linear one its end would be flat


@dataclass(frozen=True)
class Curve:
    """One run: a line of metrics.jsonl for each round; round 0, where there is one, is the start."""

    label: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class ClientScore:
    """The mean loss on one client's own data, before and after the run."""

    client: str
    examples: int
    before: float
    after: float


@dataclass(frozen=True)
class Report:
    """What the page shows. The first curve is the run itself, the others are comparisons.

    `spec` is TOML text; `facts` are label ⇒ value. What has no data, or none that is finite, is left out.
    """

    title: str
    curves: Sequence[Curve]
    spec: str
    facts: Mapping[str, str]
    clients: Sequence[ClientScore] = ()
    best_round: int | None = None
    note: str = ""

    def html(self) -> str:
        """The whole page."""
        metric = metric_of(self.curves[:1])
        rows = self.curves[0].rows if self.curves else ()
        parts = [_header(self, rows, metric), _comparison(self.curves, metric), _charts(self, metric)]
        parts += [_rounds(rows, metric, self.best_round), _spec(self.spec)]
        return page(self.title, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A self-contained page of these parts, which are HTML; empty ones are left out."""
    frame = Template(resources.files("fedapt").joinpath("report.html").read_text(encoding="utf-8"))
    return frame.substitute(title=html.escape(title), body="\n".join(part for part in parts if part))


def write(report: Report, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises OutputError where it cannot be written."""
    write_text(path, report.html())


@dataclass(frozen=True)
class Metric:
    """What the evaluation is judged by (`metric_of`); `scale` turns a stored value into the one that is drawn."""

    key: str
    name: str
    scale: float = 1.0

    def show(self, value: float) -> str:
        return f"{value:.1f} %" if self.key == "accuracy" else measured(value)

    def of(self, row: Row) -> float | None:
        value = read(row, "evaluation", self.key)
        return None if value is None else value * self.scale

    def axis(self, lines: Sequence[Line]) -> Axis:
        return Axis(self.name, log=self.key != "accuracy" and _is_log([v for line in lines for _, v in line.points]))


_LOSS = Metric("loss", "loss")
_METRICS = (Metric("accuracy", "accuracy, %", 100.0), Metric("perplexity", "perplexity"), _LOSS)


def metric_of(curves: Sequence[Curve]) -> Metric:
    """The first that all of them have; the loss, if there is none."""

    def everywhere(metric: Metric) -> bool:
        return all(any(metric.of(row) is not None for row in curve.rows) for curve in curves)

    return next((metric for metric in _METRICS if curves and everywhere(metric)), _LOSS)


def _points(curve: Curve, of: Reader) -> list[tuple[float, float]]:
    """(round, value) of every row that has both."""
    pairs = ((read(row, "round"), of(row)) for row in curve.rows)
    return [(r, v) for r, v in pairs if r is not None and v is not None]


def seconds_of(rows: Sequence[Row]) -> list[float]:
    return [s for row in rows if (s := read(row, "seconds")) is not None]


def read(row: Row, *keys: str) -> float | None:
    """The number at a path of keys; None where there is none, or one that no axis could hold."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return _finite(value)


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not abs(number) <= 1e100:
        return None
    return number if abs(number) >= 1e-100 else 0.0


def _not_finite(row: Row) -> int:
    """How many numbers of the row no axis could hold."""
    inner = sum(_not_finite(value) for value in row.values() if isinstance(value, Mapping))
    return inner + sum(isinstance(value, float) and _finite(value) is None for value in row.values())


def bytes_moved(curve: Curve, *keys: str) -> list[float]:
    """Bytes moved so far, at each row."""
    return list(accumulate(sum(max(read(row, key) or 0.0, 0.0) for key in keys) for row in curve.rows))


def simulated(rows: Sequence[Row]) -> float | None:
    """Seconds that the run would have taken on its fleet; None where it has none."""
    clock = [seconds for row in rows if (seconds := read(row, SIMULATED)) is not None]
    return clock[-1] if clock else None


def _header(report: Report, rows: Sequence[Row], metric: Metric) -> str:
    stats = "".join(
        f'<div><dt>{name}</dt><dd class="figure {tone}">{figure}</dd><dd class="detail">{detail}</dd></div>'
        for name, figure, detail, tone in _stats(report, rows, metric)
    )
    facts = "".join(
        f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
        for label, value in report.facts.items()
    )
    parts = ["<header>", heading("Federated fine-tuning run", report.title, report.note)]
    lost = sum(_not_finite(row) for curve in report.curves for row in curve.rows)
    warning = f"{lost:,} of the numbers measured are not finite; they are left out of everything below."
    parts += [f'<p class="remark warning">{warning}</p>'] if lost else []
    parts += [f'<dl class="stats">{stats}</dl>'] if stats else []
    parts += [f'<dl class="facts">{facts}</dl>'] if facts else []
    return "\n".join([*parts, "</header>"])


def heading(over: str, title: str, note: str = "") -> str:
    """The top of a page; any text."""
    remark = f'\n<p class="remark">{html.escape(note)}</p>' if note else ""
    return f'<p class="over">{html.escape(over)}</p>\n<h1>{html.escape(title)}</h1>{remark}'


def _stats(report: Report, rows: Sequence[Row], metric: Metric) -> list[tuple[str, str, str, str]]:
    """(name, big number, small print, class) of each number at the top."""
    stats = []
    points = _points(report.curves[0], metric.of) if report.curves else []
    if points:
        last, final = points[-1]
        best = next((f", best {metric.show(v)} in {count(r)}" for r, v in points if r == report.best_round), "")
        stats.append((f"Final {metric.key}", metric.show(final), f"round {count(last)}{best}", ""))
    if len(points) > 1 and points[0][0] == 0:
        stats.append(_change(points[0][1], points[-1][1], metric))
    down, up = (bytes_moved(report.curves[0], key)[-1] if rows else 0.0 for key in ("bytes_down", "bytes_up"))
    if down + up > 0:
        stats.append(("Bytes moved", size(down + up), f"{size(down)} down, {size(up)} up", ""))
    seconds = seconds_of(rows)
    if seconds:
        each = f"{len(seconds):,} rounds, median {duration(median(seconds))}" if len(seconds) > 1 else "1 round"
        stats.append(("Time", duration(sum(seconds)), each, ""))
    if clock := simulated(rows):
        lost = sum(read(row, "lost") or 0.0 for row in rows)
        stats.append(("Simulated time", duration(clock), f"on the spec’s fleet, {count(lost)} updates lost", ""))
    return stats


def _change(start: float, final: float, metric: Metric) -> tuple[str, str, str, str]:
    if metric.key == "accuracy":
        change, figure = final - start, f"{final - start:+.1f} points"
    else:
        change = start - final
        relative = 0 < final < 1e4 * start
        figure = f"{100 * (final / start - 1):+.1f} %" if relative else "+" * (change < 0) + measured(final - start)
    word, tone = ("better", "good") if change > 0 else ("worse", "bad") if change < 0 else ("the same", "")
    return "Change in the run", figure.replace("-", "−"), f"{word}: {metric.show(start)} at the start", tone


def _comparison(curves: Sequence[Curve], metric: Metric) -> str:
    """One line for each curve, where there are several."""
    if len(curves) < 2:
        return ""
    body = []
    for i, curve in enumerate(curves):
        moved = (bytes_moved(curve, "bytes_down", "bytes_up") or [0.0])[-1]
        seconds = seconds_of(curve.rows)
        points, losses = _points(curve, metric.of), _points(curve, _LOSS.of)
        cells = [
            metric.show(points[-1][1]) if points else "–",
            *([measured(losses[-1][1]) if losses else "–"] if metric is not _LOSS else []),
            count(points[-1][0]) if points else "–",
            size(moved) if moved else "–",
            duration(sum(seconds)) if seconds else "–",
        ]
        body.append(table_row(i, curve.label, cells))
    loss = [] if metric is _LOSS else ["Final loss"]
    titles = ["", f"Final {metric.key}", *loss, "In round", "Bytes moved", "Time"]
    return f'<section id="comparison">\n<h2>Comparison</h2>\n{table(titles, body)}\n</section>'


def _rounds(rows: Sequence[Row], metric: Metric, best: int | None) -> str:
    """A line for each round; a column appears where at least one round fills it, that of codecs where one lost something."""
    if not rows:
        return ""
    lossy = any(read(row, "codec_error") for row in rows)
    own = (metric.key.capitalize(), ("evaluation", metric.key), lambda v: metric.show(v * metric.scale))
    columns: list[tuple[str, tuple[str, ...], Any]] = [
        *((key.capitalize(), (key,), count) for key in ("round", "nodes", "empty", "refused")),
        ("Training loss", ("train_loss",), measured),
        ("Evaluation loss", ("evaluation", "loss"), measured),
        *([own] if metric is not _LOSS else []),
        ("Aggregation error", ("aggregation_error",), lambda v: measured(v, 2)),
        *([("Codec error", ("codec_error",), lambda v: measured(v, 2))] if lossy else []),
        ("Effective rank", ("effective_rank",), lambda v: measured(v, 3)),
        ("ε spent", ("epsilon",), lambda v: measured(v, 3)),
        ("Down", ("bytes_down",), size),
        ("Up", ("bytes_up",), size),
        ("Time", ("seconds",), duration),
        ("Lost", ("lost",), count),
        ("Simulated time", (SIMULATED,), duration),
    ]
    columns = [c for c in columns if any(read(row, *c[1]) is not None for row in rows)]
    body = []
    for row in rows:
        values = [(read(row, *keys), text) for _, keys, text in columns]
        cells = "".join(f"<td>{'–' if value is None else text(value)}</td>" for value, text in values)
        marked = best is not None and read(row, "round") == best
        body.append(f'<tr class="marked">{cells}</tr>' if marked else f"<tr>{cells}</tr>")
    lines = table([title for title, _, _ in columns], body)
    if len(rows) <= MOST_OPEN_ROWS:
        return f'<section id="rounds">\n<h2>Rounds</h2>\n{lines}\n</section>'
    return f'<details id="rounds">\n<summary>All {len(rows):,} lines of metrics</summary>\n{lines}\n</details>'


def table_row(index: int, label: str, cells: Sequence[str]) -> str:
    """The line of a curve: its label (any text) with its colour, and cells that are HTML."""
    name = f'<span class="key {colour(index)}"></span>{html.escape(label)}'
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in [name, *cells])}</tr>"


def table(titles: Sequence[str], body: Sequence[str]) -> str:
    head = "".join(f"<th>{title}</th>" for title in titles)
    lines = "\n".join(body)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def _spec(spec: str) -> str:
    if not spec.strip():
        return ""
    return f'<details id="spec">\n<summary>The spec as run</summary>\n<pre>{html.escape(spec)}</pre>\n</details>'


def _charts(report: Report, metric: Metric) -> str:
    curves = report.curves
    figures = [_loss(curves, report.best_round), _score(curves, metric), traffic(curves, metric), _training(curves)]
    figures += [timing(curves, metric), _exactness(curves), _clients(report.clients)]
    drawn = [figure for figure in figures if figure]
    if not drawn:
        return ""
    legend = "".join(f'<li class="{colour(i)}">{html.escape(c.label)}</li>' for i, c in enumerate(curves))
    parts = ['<section id="charts">\n<h2>Charts</h2>']
    parts += [f'<ul class="legend">{legend}</ul>'] if len(curves) > 1 else []
    return "\n".join([*parts, '<div class="charts">', *drawn, "</div>\n</section>"])


def _figure(name: str, title: str, chart: str, caption: str) -> str:
    return f'<figure id="{name}">\n<h3>{title}</h3>\n{chart}\n<figcaption>{caption}</figcaption>\n</figure>'


def _lines(curves: Sequence[Curve], of: Reader) -> list[Line]:
    """A line against the round for each curve that has this number."""
    return [Line(curve.label, points, i) for i, curve in enumerate(curves) if (points := _points(curve, of))]


def _is_log(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > LOG_RATIO * min(values)


def _loss(curves: Sequence[Curve], best: int | None) -> str:
    lines = _lines(curves, _LOSS.of)
    if not lines:
        return ""
    own = best is not None and lines[0].colour == 0 and any(r == best for r, _ in lines[0].points)
    caption = "Loss of the global adapter on the evaluation data; lower is better. Round 0 is the start."
    caption += " The ring marks the best round." if own else ""
    chart = line_chart(lines, x=_ROUND, y=_LOSS.axis(lines), best=best if own else None)
    return _figure("loss", "Evaluation loss", chart, caption)


def _score(curves: Sequence[Curve], metric: Metric) -> str:
    lines = _lines(curves, metric.of)
    if not lines or metric is _LOSS:
        return ""
    chart = line_chart(lines, x=_ROUND, y=metric.axis(lines))
    caption = (
        "Share of the evaluation examples that are classified correctly; higher is better."
        if metric.key == "accuracy"
        else "exp(loss) on the evaluation data: among how many equally likely tokens the model hesitates. Lower is better."
    )
    return _figure("metric", metric.key.capitalize(), chart, caption)


def traffic(curves: Sequence[Curve], metric: Metric) -> str:
    """The metric against the bytes moved; a curve that moved none is a dashed line at its final value."""
    moved = [bytes_moved(curve, "bytes_down", "bytes_up") for curve in curves]
    most = max((sums[-1] for sums in moved if sums), default=0.0)
    if most == 0:
        return ""
    unit, name = byte_unit(most)
    lines = []
    for i, (curve, sums) in enumerate(zip(curves, moved, strict=True)):
        points = [(b / unit, v) for b, row in zip(sums, curve.rows, strict=True) if (v := metric.of(row)) is not None]
        if points and sums[-1] > 0:
            lines.append(Line(curve.label, points, i))
        elif points:
            lines.append(Line(curve.label, [(0.0, points[-1][1]), (most / unit, points[-1][1])], i, dashed=True))
    if all(line.dashed for line in lines):
        return ""
    chart = line_chart(lines, x=Axis(f"{name} moved", zero=True), y=metric.axis(lines))
    caption = "The evaluation against all bytes sent and received so far: further left is cheaper."
    if any(line.dashed for line in lines):
        caption += " A dashed line is the final value of a comparison that moves no bytes."
    return _figure("traffic", f"{metric.key.capitalize()} for its traffic", chart, caption)


def timing(curves: Sequence[Curve], metric: Metric) -> str:
    """The metric against the simulated clock, of the curves that have one."""
    most = max((clock for curve in curves if (clock := simulated(curve.rows))), default=0.0)
    if most == 0:
        return ""
    unit, name = next(pair for pair in CLOCK_UNITS if most >= 2 * pair[0] or pair[0] == 1)
    lines = []
    for i, curve in enumerate(curves):
        if simulated(curve.rows) is not None:
            times = [read(row, SIMULATED) if read(row, "round") else 0.0 for row in curve.rows]
            pairs = zip(times, map(metric.of, curve.rows), strict=True)
            points = [(t / unit, v) for t, v in pairs if t is not None and v is not None]
            lines += [Line(curve.label, points, i)] if points else []
    if not lines:
        return ""
    chart = line_chart(lines, x=Axis(f"{name}, simulated", zero=True), y=metric.axis(lines))
    caption = "The evaluation against what a deployment on the spec’s fleet would have taken: further left is sooner."
    return _figure("clock", f"{metric.key.capitalize()} over simulated time", chart, caption)


def _training(curves: Sequence[Curve]) -> str:
    lines = _lines(curves, lambda row: read(row, "train_loss"))
    if not lines:
        return ""
    spread = [[read(row, key) for key in ("round", "train_loss_p10", "train_loss_p90")] for row in curves[0].rows]
    band = [(r, low, high) for r, low, high in spread if r is not None and low is not None and high is not None]
    caption = "Mean training loss over the clients of a round."
    if len(band) > 1 and lines[0].colour == 0:
        lines[0] = replace(lines[0], band=band)
        caption += " The band spans the 10th to the 90th percentile of the clients: a wide one means that they differ."
    values = [v for line in lines for _, v in line.points] + [v for line in lines for b in line.band for v in b[1:]]
    chart = line_chart(lines, x=_ROUND, y=Axis("training loss", log=_is_log(values)))
    return _figure("training", "Training loss over clients", chart, caption)


def _exactness(curves: Sequence[Curve]) -> str:
    found = _lines(curves, lambda row: read(row, "aggregation_error"))
    lines = [replace(line, points=p) for line in found if (p := [(r, v) for r, v in line.points if v > 0])]
    if not lines:
        return ""
    zeros = sum(v == 0 for line in found for _, v in line.points)
    caption = (
        "‖mean(BA) − B̂Â‖ / ‖mean(BA)‖: how far the average of a round is from the mean of what the clients trained, before"
        " the server’s own step."
        " Around 10⁻⁸ is rounding, so the aggregation is exact; the average of A times the average of B is far above it."
    )
    caption += f" {zeros:,} rounds with an error of exactly 0 have no place on a log scale." if zeros else ""
    chart = line_chart(lines, x=_ROUND, y=Axis("relative error", log=True))
    return _figure("exactness", "Aggregation error", chart, caption)


def _clients(clients: Sequence[ClientScore]) -> str:
    read = ((c, _finite(c.before), _finite(c.after)) for c in clients)
    scores = [(c, before, after) for c, before, after in read if before is not None and after is not None]
    if not scores:
        return ""
    dots = [Dot(c.client, b, a, _finite(c.examples) or 0.0, int(a > b)) for c, b, a in scores]
    better = sum(after < before for _, before, after in scores)
    worst = max(scores, key=lambda s: s[2] - s[1])
    before, after = median(s[1] for s in scores), median(s[2] for s in scores)
    caption = (
        "Loss on each client’s own data, before and after the run: below the diagonal the client gained, and the area"
        f" is its number of examples. {better:,} of {len(scores):,} clients gained; the median went from {measured(before)}"
        f" to {measured(after)}."
    )
    if (rise := worst[2] - worst[1]) > 0:
        caption += f" The greatest rise is {measured(rise, 3)}, at {html.escape(worst[0].client)}."
    if len(scores) > MOST_POINTS:
        caption += f" {MOST_POINTS} of them are drawn."
    chart = scatter(dots, x=Axis("loss before"), y=Axis("loss after"))
    return _figure("clients", "Clients, before and after", chart, caption)
