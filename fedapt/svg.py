"""Charts as inline SVG (lines with bands, a scatter against the diagonal), and numbers as a person writes them.

Colours and text sizes come from the page's style sheet (classes `c0`, `c1`, …, `line`, `grid`), so that one drawing
serves light, dark and paper. All values must be finite and at most 1e100 in size; log axes need positive ones.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10, sqrt
from typing import TypeVar

T = TypeVar("T")
Point = tuple[float, float]

WIDTH, HEIGHT = 480, 300
TOP, BOTTOM = 28, 40
MOST_POINTS = 500
MOST_MARKERS = 40
COLOURS = 8
CHARACTER = 6.3
LABEL_GAP = 14


@dataclass(frozen=True)
class Axis:
    """`whole` puts ticks at integers only; `zero` makes the axis begin there."""

    name: str
    log: bool = False
    whole: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Line:
    """One curve. `band` holds (x, low, high); a `dashed` line has no points of its own, it marks a level."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """One point of a scatter; its area is proportional to `weight`."""

    label: str
    x: float
    y: float
    weight: float = 1.0
    colour: int = 0


def line_chart(lines: Sequence[Line], *, x: Axis, y: Axis, best: float | None = None) -> str:
    """The lines in one frame, each named at its end; the first is drawn on top, and `best` is an x to mark on it.

    At most 500 points of a line are drawn: of more, the least and the greatest in each stretch of the x axis.
    """
    points = [p for line in lines for p in line.points]
    bounds = [v for line in lines for _, low, high in line.band for v in (low, high)]
    right = max((_text_width(_short(line.label)) for line in lines), default=0) + 16 if len(lines) > 1 else 22
    frame = _Frame(x, y, [p[0] for p in points], [p[1] for p in points] + bounds, right)
    parts = [frame.axes()]
    if best is not None:
        parts.append(frame.best(best, [p for p in lines[0].points if p[0] == best]))
    parts += [frame.line(line) for line in reversed(lines)]
    if len(lines) > 1:
        parts.append(frame.end_labels(lines))
    return _svg(f"{y.name} against {x.name}", parts)


def scatter(dots: Sequence[Dot], *, x: Axis, y: Axis) -> str:
    """The dots over one range on both axes, and the diagonal on which x = y. At most 500 dots, spread evenly over x."""
    both = [v for dot in dots for v in (dot.x, dot.y)]
    frame = _Frame(x, y, both, both, right=22, square=True)
    low, high = frame.x.low, frame.x.high
    diagonal = f'<path class="diagonal" d="M{frame.at(low, low)}L{frame.at(high, high)}"/>'
    shown = _every(sorted(dots, key=lambda d: d.x))
    heaviest = max(dot.weight for dot in dots)
    # large dots first: a small one is never hidden under them
    drawn = [frame.dot(dot, heaviest) for dot in sorted(shown, key=lambda d: -d.weight)]
    return _svg(f"{y.name} against {x.name}", [frame.axes(), diagonal, *drawn])


def colour(index: int) -> str:
    """The style sheet's class for the colour of a curve; colours repeat after eight."""
    return f"c{index % COLOURS}"


def show(value: float, digits: int = 4) -> str:
    """A number with that many significant digits, as a person writes it: 1,234 or 3.2·10⁻⁸."""
    text = f"{float(f'{value:.{digits}g}'):,.10g}" if _is_plain(value) else _power(value, digits)
    return text.replace("-", "−")


def measured(value: float, digits: int = 4) -> str:
    """As `show`, with the zeros at the end kept, so that a column of numbers lines up: 2.840."""
    if value == 0 or not _is_plain(value):
        return show(value, digits)
    return f"{value:,.{max(0, digits - 1 - floor(log10(abs(value))))}f}".replace("-", "−")


def _is_plain(value: float) -> bool:
    return value == 0 or 1e-3 <= abs(value) < 1e6


def _power(value: float, digits: int = 4) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def count(number: float) -> str:
    """A whole number with its thousands apart: 12,345."""
    return show(number, 9)


def size(volume: float) -> str:
    """Bytes in decimal units: 65.4 kB."""
    unit, name = byte_unit(volume)
    return f"{count(volume) if unit == 1 else measured(volume / unit, 3)} {name}"


def byte_unit(volume: float) -> tuple[float, str]:
    """The largest decimal unit that `volume` bytes fill, and its name."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next((u for u in units if volume >= u[0]), (1.0, "B"))


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.81 s, 2 min 5 s, 3 h 20 min."""
    if not 60 <= seconds < 1e9:
        return f"{measured(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


@dataclass(frozen=True)
class _Scale:
    """A range of values, its ticks and their texts."""

    low: float
    high: float
    ticks: Sequence[float]
    texts: Sequence[str]
    log: bool = False

    def share(self, value: float) -> float:
        """How far along the axis `value` lies, from 0 to 1."""
        if self.log:
            return (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        return (value - self.low) / (self.high - self.low)


def _scale(axis: Axis, values: Sequence[float], *, rounded: bool) -> _Scale:
    """The scale that holds all values; a `rounded` one begins and ends at a tick."""
    low, high = min(values), max(values)
    if axis.log:
        return _log_scale(low, high)
    if axis.zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = 0.5 if axis.whole else 0.1 * abs(low) or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 5
    power = 10.0 ** floor(log10(raw))
    step = next((m * power for m in (1, 2, 5) if m * power >= raw), 10 * power)
    step = max(1.0, step) if axis.whole else step
    if rounded:
        low, high = floor(low / step + 1e-9) * step, ceil(high / step - 1e-9) * step
    ticks = [k * step for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]
    decimals = max(0, -floor(log10(step) + 1e-9))
    plain = step >= 1e-4 and max(abs(low), abs(high)) < 1e6
    texts = [f"{t:,.{decimals}f}".replace("-", "−") if plain else show(t, 6) for t in ticks]
    return _Scale(low, high, ticks, texts)


def _log_scale(low: float, high: float) -> _Scale:
    """At least one decade, with ticks at 1, 2 and 5 where there is room, else at powers of ten."""
    bottom, top = log10(low), log10(high)
    pad = max(0.05 * (top - bottom), (1 - (top - bottom)) / 2)
    bottom, top = bottom - pad, top + pad
    stride = max(1, ceil((top - bottom) / 6))
    exponents = [e for e in range(floor(bottom), ceil(top) + 1) if e % stride == 0]
    mantissas = (1, 2, 5) if top - bottom < 2 else (1,)
    ticks = [m * 10.0**e for e in exponents for m in mantissas if bottom <= e + log10(m) <= top]
    text = show if all(_is_plain(t) for t in ticks) else _power
    return _Scale(10.0**bottom, 10.0**top, ticks, [text(t) for t in ticks], log=True)


class _Frame:
    """The place of one chart: two scales and the box (in SVG units) they span."""

    def __init__(
        self, x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float], right: float, *, square: bool = False
    ) -> None:
        self.x_axis, self.y_axis = x, y
        self.x, self.y = _scale(x, xs, rounded=square), _scale(y, ys, rounded=True)
        self.left = 12 + max((_text_width(text) for text in self.y.texts), default=0)
        self.right = WIDTH - right
        self.bottom = HEIGHT - BOTTOM

    def place(self, x: float, y: float) -> Point:
        return (
            self.left + self.x.share(x) * (self.right - self.left),
            self.bottom - self.y.share(y) * (self.bottom - TOP),
        )

    def at(self, x: float, y: float) -> str:
        across, down = self.place(x, y)
        return f"{across:.1f},{down:.1f}"

    def axes(self) -> str:
        parts = []
        for value, text in zip(self.y.ticks, self.y.texts, strict=True):
            _, down = self.place(self.x.low, value)
            parts.append(f'<path class="grid" d="M{self.left:.1f},{down:.1f}H{self.right:.1f}"/>')
            parts.append(f'<text class="tick end" x="{self.left - 6:.1f}" y="{down + 4:.1f}">{text}</text>')
        for value, text in zip(self.x.ticks, self.x.texts, strict=True):
            across, _ = self.place(value, self.y.low)
            parts.append(f'<path class="axis" d="M{across:.1f},{self.bottom}v4"/>')
            parts.append(f'<text class="tick middle" x="{across:.1f}" y="{self.bottom + 17}">{text}</text>')
        parts.append(f'<path class="axis" d="M{self.left:.1f},{self.bottom}H{self.right:.1f}"/>')
        scale = ", log scale" if self.y.log else ""
        middle = (self.left + self.right) / 2
        parts.append(f'<text class="name" x="0" y="12">{html.escape(self.y_axis.name + scale)}</text>')
        parts.append(
            f'<text class="name middle" x="{middle:.1f}" y="{HEIGHT - 6}">{html.escape(self.x_axis.name)}</text>'
        )
        return "".join(parts)

    def line(self, line: Line) -> str:
        points, parts = _extremes(line.points), []
        if line.band:
            edge = _envelope(line.band)
            outline = [self.at(x, high) for x, _, high in edge] + [self.at(x, low) for x, low, _ in reversed(edge)]
            parts.append(f'<polygon class="band" points="{" ".join(outline)}"/>')
        style = "line dashed" if line.dashed else "line"
        parts.append(f'<polyline class="{style}" points="{" ".join(self.at(*p) for p in points)}"/>')
        # with many points the markers would hide the line: they appear under the pointer only
        marker = "marker" if len(points) <= MOST_MARKERS else "marker hidden"
        parts += [self._marker(line.label, p, marker) for p in points if not line.dashed]
        return f'<g class="{colour(line.colour)}">{"".join(parts)}</g>'

    def _marker(self, label: str, point: Point, style: str) -> str:
        across, down = self.place(*point)
        x = count(point[0]) if self.x_axis.whole else show(point[0])
        text = f"{label}: {self.y_axis.name} {show(point[1])} at {self.x_axis.name} {x}"
        return (
            f'<circle class="{style}" cx="{across:.1f}" cy="{down:.1f}" r="2.6">'
            f"<title>{html.escape(text)}</title></circle>"
        )

    def best(self, x: float, points: Sequence[Point]) -> str:
        """A dotted line over the whole height, a ring around the curve's own point, and the words at the top."""
        if not points:
            return ""
        across, down = self.place(*points[0])
        left_of_it = self.x.share(x) > 0.5
        anchor, shift = ("end", -6) if left_of_it else ("start", 6)
        return (
            f'<path class="best" d="M{across:.1f},{TOP}V{self.bottom}"/>'
            f'<circle class="ring" cx="{across:.1f}" cy="{down:.1f}" r="6"/>'
            f'<text class="note {anchor}" x="{across + shift:.1f}" y="{TOP + 9}">best: round {count(x)}</text>'
        )

    def end_labels(self, lines: Sequence[Line]) -> str:
        """Each line's name beside its last point, moved apart where two would touch."""
        ends = sorted((self.place(*line.points[-1])[1], i) for i, line in enumerate(lines) if line.points)
        heights: list[float] = []
        for down, _ in ends:
            heights.append(max(down, heights[-1] + LABEL_GAP) if heights else down)
        limit = self.bottom - 2.0
        for i in reversed(range(len(heights))):
            heights[i] = min(heights[i], limit)
            limit = heights[i] - LABEL_GAP
        return "".join(
            f'<text class="label {colour(lines[i].colour)}" x="{self.right + 11:.1f}" y="{height + 4:.1f}">'
            f"<title>{html.escape(lines[i].label)}</title>{html.escape(_short(lines[i].label))}</text>"
            for height, (_, i) in zip(heights, ends, strict=True)
        )

    def dot(self, dot: Dot, heaviest: float) -> str:
        across, down = self.place(dot.x, dot.y)
        radius = max(2.0, 6.5 * sqrt(max(dot.weight, 0.0) / heaviest)) if heaviest > 0 else 3.0
        text = f"{dot.label}: {show(dot.x)} before, {show(dot.y)} after, {count(dot.weight)} examples"
        return (
            f'<circle class="dot {colour(dot.colour)}" cx="{across:.1f}" cy="{down:.1f}" r="{radius:.1f}">'
            f"<title>{html.escape(text)}</title></circle>"
        )


def _svg(name: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(name)}">' + "".join(parts) + "</svg>"
    )


def _short(label: str) -> str:
    return label if len(label) <= 16 else label[:15] + "…"


def _text_width(text: str) -> float:
    return CHARACTER * len(text)


def _every(dots: Sequence[Dot]) -> Sequence[Dot]:
    if len(dots) <= MOST_POINTS:
        return dots
    return [dots[i * (len(dots) - 1) // (MOST_POINTS - 1)] for i in range(MOST_POINTS)]


def _extremes(points: Sequence[Point]) -> Sequence[Point]:
    """At most 500 points: thinning must not hide a spike, so every stretch keeps its least and greatest value."""
    if len(points) <= MOST_POINTS:
        return points
    kept = [points[0]]
    for stretch in _stretches(points[1:-1], MOST_POINTS // 2 - 1):
        low = min(range(len(stretch)), key=lambda i: stretch[i][1])
        high = max(range(len(stretch)), key=lambda i: stretch[i][1])
        kept += [stretch[i] for i in sorted({low, high})]
    return [*kept, points[-1]]


def _envelope(band: Sequence[tuple[float, float, float]]) -> Sequence[tuple[float, float, float]]:
    if len(band) <= MOST_POINTS:
        return band
    return [
        (stretch[0][0], min(b[1] for b in stretch), max(b[2] for b in stretch))
        for stretch in _stretches(band, MOST_POINTS)
    ]


def _stretches(values: Sequence[T], count: int) -> list[Sequence[T]]:
    cuts = [i * len(values) // count for i in range(count + 1)]
    return [values[a:b] for a, b in pairwise(cuts)]
