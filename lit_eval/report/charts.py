"""Charts: an SVG that stretches to the width of its box, with the texts of its axes beside it as HTML.

The SVG is drawn in a square of SIZE x SIZE that the browser stretches; strokes keep their width (non-scaling-stroke).
So one drawing fits a phone, a screen and a sheet of paper, texts keep their size, and no script is needed to see it.
A script adds the values under the pointer or the arrow keys, from the JSON that each chart carries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lit_eval.formats import brief, linear_ticks, log_ticks, number, scale_of, short, tick_labels, whole
from lit_eval.report.elements import (
    Cell,
    Column,
    details,
    escape,
    number_cell,
    paragraph,
    script_json,
    table,
    text_cell,
)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SIZE = 1000
COLOURS = 6  # in page.css: --c1 to --c6; the seventh line is dashed, the thirteenth dotted
LOG_FROM = 100  # positive values that span more than this factor are shown on a logarithmic axis
SMOOTH_FROM = 400  # points; a longer noisy line is drawn faint, under its moving average
SMOOTH_POINTS = 150
MOST_DOTS = 40


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        x, y: float64 [n], ascending in x. Points that are not finite are not drawn.
        steps: float64 [n], the steps to show beside the values; None if x is all there is to know.
        colour: number of its colour, from 1.
        noisy: many points may be drawn faint, with their moving average on top.
        dots: mark each point (few points).
        quiet: dashed and grey, not listed among the values.
        low, high: a band around the line.
        breaks: places in x where a value could not be drawn; the line is not drawn across them.
    """

    name: str
    x: FloatArray
    y: FloatArray
    steps: FloatArray | None = None
    colour: int = 1
    noisy: bool = False
    dots: bool = False
    quiet: bool = False
    low: FloatArray | None = None
    high: FloatArray | None = None
    breaks: FloatArray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Mark:
    """A vertical line at something that happened."""

    x: float
    kind: Literal["resume", "rollback"]


@dataclass
class Chart:
    """A line chart.

    Attributes:
        id: unique on the page.
        unit: of the values, for the axis.
        x_title: unit of the horizontal axis.
        from_zero: the vertical axis begins at 0.
        log: whether the vertical axis is logarithmic; None: if the values ask for it.
        right: a second axis: its title, and the conversion of a value on the left (loss to perplexity) and back.
        shown: how a value is written.
        x_end: the horizontal axis reaches at least this far.
    """

    id: str
    title: str
    unit: str
    lines: list[Line]
    x_title: str = "Tokens seen"
    from_zero: bool = False
    log: bool | None = None
    right: tuple[str, Callable[[float], float], Callable[[float], float]] | None = None
    shown: Callable[[float | None], str] = number
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    x_end: float = 0.0

    def render(self, points: int) -> str:
        """As HTML; "" if there is nothing to draw. `points`: largest number kept of a line."""
        lines = [line for line in self.lines if np.isfinite(line.y).any()]
        return _Drawing(self, lines, points).html() if lines else ""


def keep_extremes(x: FloatArray, y: FloatArray, buckets: int) -> IntArray:
    """Indices of the points to draw: the first, the last, and of each of `buckets` equal parts of x the smallest and
    the largest value, so that no spike is lost. Ascending; all of y must be finite and x ascending."""
    n = len(x)
    if n <= 2 * buckets + 2 or not x[-1] > x[0]:
        return np.arange(n)
    column = np.minimum(((x - x[0]) / (x[-1] - x[0]) * buckets).astype(np.int64), buckets - 1)
    starts = np.flatnonzero(np.append(True, column[1:] != column[:-1]))
    group = np.cumsum(np.append(False, column[1:] != column[:-1]))
    kept = [np.array([0, n - 1])]
    for extreme in (np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)):
        at = np.flatnonzero(y == extreme[group])
        kept.append(at[np.unique(group[at], return_index=True)[1]])
    found: IntArray = np.unique(np.concatenate(kept))
    return found


def moving_average(y: FloatArray, points: int) -> tuple[IntArray, FloatArray]:
    """Means of `points` equal runs of consecutive values, and the index in the middle of each."""
    edges = np.linspace(0, len(y), min(points, len(y)) + 1).astype(np.int64)
    means = np.add.reduceat(y, edges[:-1]) / np.diff(edges)
    return (edges[:-1] + edges[1:] - 1) // 2, means


@dataclass(frozen=True)
class Axis:
    """A range of values on an axis of length SIZE."""

    low: float
    high: float
    log: bool = False

    def place(self, values: npt.ArrayLike) -> FloatArray:
        """Values -> 0..SIZE, from low to high."""
        numbers: FloatArray = np.asarray(values, dtype=np.float64)
        low, high = self.low, self.high
        if self.log:
            numbers, low, high = np.log(np.maximum(numbers, 1e-300)), math.log(low), math.log(high)
        return SIZE * (numbers - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        return (log_ticks if self.log else linear_ticks)(self.low, self.high, most)


def value_axis(values: FloatArray, *, from_zero: bool = False, log: bool | None = None, room: float = 0.04) -> Axis:
    """An axis that holds all values, with a little room at both ends."""
    low, high = float(values.min()), float(values.max())
    if log is None:
        log = low > 0 and high / low > LOG_FROM
    if log and low > 0:
        spread = (high / low) ** room if high > low else 2.0
        return Axis(low / spread, high * spread, True)
    if from_zero and low >= 0:
        return Axis(0.0, high * (1 + room) if high > 0 else 1.0)
    spread = (high - low) * room if high > low else (abs(high) * 0.1 or 1.0)
    low, high = low - spread, high + spread
    return Axis(low, high) if math.isfinite(high - low) else Axis(-1e308, 1e308)


class _Drawing:
    """One chart being drawn."""

    def __init__(self, chart: Chart, lines: list[Line], points: int) -> None:
        self.chart, self.points = chart, points
        self.lines = [_finite(line) for line in lines]
        x = np.concatenate([line.x for line in self.lines])
        y = np.concatenate([a for line in self.lines for a in (line.y, line.low, line.high) if a is not None])
        low, high = float(x.min()), max(float(x.max()), chart.x_end)
        low = 0.0 if 0 <= low < 0.25 * high else low
        self.x = Axis(low, high) if high > low else Axis(low - 0.5, high + 0.5)
        self.y = value_axis(y, from_zero=chart.from_zero, log=chart.log)
        self.data: list[dict[str, Any]] = []

    def html(self) -> str:
        chart = self.chart
        drawn = "".join(map(self._band, self.lines))
        drawn += "".join(self._line(line) for line in sorted(self.lines, key=lambda line: not line.quiet))
        y_ticks, x_ticks = self.y.ticks(5), self.x.ticks(6)
        grid = "".join(f"M0 {_c(SIZE - p)}H{SIZE}" for p in self.y.place(y_ticks))
        marks = "".join(
            f'<path class="mark {mark.kind}" d="M{_c(self.x.place(mark.x))} 0V{SIZE}"/>'
            for mark in chart.marks
            if self.x.low <= mark.x <= self.x.high
        )
        divisor, word, _ = scale_of(self.x.high)
        x_title = f"{chart.x_title} ({word})" if word else chart.x_title
        x_labels = tick_labels([t / divisor for t in x_ticks])
        right = self._right_axis() if chart.right is not None else ""
        facts = {
            "x": [self.x.low, self.x.high, self.x.log],
            "y": [self.y.low, self.y.high, self.y.log],
            "title": chart.x_title,
            "lines": self.data,
        }
        title = f"{chart.id}-title"
        return (
            f'<figure class="chart" id="{chart.id}" aria-labelledby="{title}">'
            f'<figcaption><h3 id="{title}">{escape(chart.title)}</h3>{self._legend()}</figcaption>'
            f'<p class="unit"><span>{escape(self._unit())}</span>'
            + (f"<span>{escape(chart.right[0])}</span>" if chart.right is not None else "")
            + "</p>"
            f'<div class="frame{" two" if right else ""}">{self._labels("y", y_ticks)}'
            f'<div class="plot" tabindex="0" role="img" aria-label="{escape(self.description())}">'
            f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" aria-hidden="true">'
            f'<path class="grid" d="{grid}"/>{marks}{drawn}</svg></div>{right}'
            f"{_axis_labels('x', self.x.place(x_ticks), x_labels)}</div>"
            f'<p class="x-title">{escape(x_title)}</p>{self._notes()}{self._values()}'
            f'<script type="application/json">{script_json(facts)}</script></figure>'
        )

    def _unit(self) -> str:
        return f"{self.chart.unit}, log scale" if self.y.log else self.chart.unit

    def description(self) -> str:
        """A description of the chart in words, for screen readers."""
        parts = []
        for line in self.lines:
            if not line.quiet:
                low, high = int(line.y.argmin()), int(line.y.argmax())
                parts.append(
                    f"{line.name}: from {self.chart.shown(line.y[0])} at {short(line.x[0])} to "
                    f"{self.chart.shown(line.y[-1])} at {short(line.x[-1])}, lowest {self.chart.shown(line.y[low])}, "
                    f"highest {self.chart.shown(line.y[high])}"
                )
        return f"{self.chart.title} ({self.chart.unit}) over {self.chart.x_title.lower()}. {'; '.join(parts)}."

    def _band(self, line: Line) -> str:
        if line.low is None or line.high is None:
            return ""
        kept = keep_extremes(line.x, line.y, self.points // 2)
        x = self.x.place(line.x[kept])
        edge = _path(x, SIZE - self.y.place(line.high[kept]))
        back = _path(x[::-1], SIZE - self.y.place(line.low[kept])[::-1]).replace("M", "L", 1)
        return f'<path class="band {style_of(line.colour)}" d="{edge}{back}Z"/>'

    def _line(self, line: Line) -> str:
        kept = keep_extremes(line.x, line.y, self.points // 2)
        x, y = line.x[kept], line.y[kept]
        px, py = self.x.place(x), SIZE - self.y.place(y)
        style = style_of(line.colour)
        if line.quiet:
            return f'<path class="line quiet" d="{_path(px, py)}"/>'
        self.data.append(_values_of(line, kept, self.chart))
        drawn, begins = "", _begins(x, line.breaks)
        if line.noisy and len(line.x) > SMOOTH_FROM:
            drawn += f'<path class="line faint {style}" d="{_path(px, py, begins)}"/>'
            middle, means = moving_average(line.y, SMOOTH_POINTS)
            px, py = self.x.place(line.x[middle]), SIZE - self.y.place(means)
            begins = _begins(line.x[middle], line.breaks)
        drawn += f'<path class="line {style}" d="{_path(px, py, begins)}"/>'
        if len(x) == 1 or (line.dots and len(x) <= MOST_DOTS):
            drawn += f'<path class="dots {style}" d="{_dots(px, py)}"/>'
        return drawn

    def _legend(self) -> str:
        entries = [(style_of(line.colour), line.name) for line in self.lines if not line.quiet]
        if any(line.quiet for line in self.lines):
            entries.append(("quiet", next(line.name for line in self.lines if line.quiet)))
        kinds = list(dict.fromkeys(mark.kind for mark in self.chart.marks))
        if len(entries) == 1 and not kinds:
            return ""
        shown = "".join(
            f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="line {style}" d="M1 4H23"/></svg>'
            f"{escape(name)}</li>"
            for style, name in entries
        )
        shown += "".join(
            f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="mark {kind}" d="M12 0V8"/></svg>'
            f"{kind}</li>"
            for kind in kinds
        )
        return f'<ul class="legend">{shown}</ul>'

    def _labels(self, side: str, ticks: Sequence[float]) -> str:
        return _axis_labels(side, SIZE - self.y.place(ticks), tick_labels(ticks))

    def _right_axis(self) -> str:
        assert self.chart.right is not None
        _, forward, back = self.chart.right
        low, high = forward(self.y.low), forward(self.y.high)
        if not (math.isfinite(high) and low > 0 and high > low):
            return ""
        ticks = log_ticks(low, high, 5) if high / low > 5 else linear_ticks(low, high, 5)
        return _axis_labels("right", SIZE - self.y.place([back(t) for t in ticks]), [brief(t) for t in ticks])

    def _notes(self) -> str:
        notes = list(self.chart.notes)
        smoothed = [line for line in self.lines if line.noisy and len(line.x) > SMOOTH_FROM]
        if smoothed:
            width = math.ceil(max(len(line.x) for line in smoothed) / SMOOTH_POINTS)
            notes.append(f"Bold: mean over {width} logged steps; faint: each logged step.")
        return "".join(map(paragraph, notes))

    def _values(self) -> str:
        """A table of each line's first, last, smallest and largest value."""
        columns = [
            Column("Line", numeric=False),
            *(Column(t) for t in ("Points", "First", "Last", "Lowest", "Highest")),
        ]
        rows = []
        for line in self.lines:
            low, high = int(line.y.argmin()), int(line.y.argmax())
            picked = [0, len(line.y) - 1, low, high]
            cells: list[Cell] = [text_cell(line.name), number_cell(whole(len(line.y)), len(line.y))]
            for i in picked:
                at = line.x[i] if line.steps is None else line.steps[i]
                where = f"at {short(at)}" if line.steps is None else f"at step {whole(at)}"
                cells.append(number_cell(f"{self.chart.shown(line.y[i])} {where}", float(line.y[i])))
            rows.append(cells)
        return details("Values", table(f"{self.chart.title}: values", columns, rows))


def style_of(colour: int) -> str:
    """Class names for the n-th line, from 1: a colour, and from the seventh line on a pattern."""
    pattern = ("", " dashed", " dotted")[min((colour - 1) // COLOURS, 2)]
    return f"c{(colour - 1) % COLOURS + 1}{pattern}"


def _finite(line: Line) -> Line:
    """The line without the points that cannot be drawn, and with a break at each."""
    keep = np.isfinite(line.x) & np.isfinite(line.y)

    def cut(values: FloatArray | None) -> FloatArray | None:
        return None if values is None else values[keep]

    return dataclasses.replace(
        line,
        x=line.x[keep],
        y=line.y[keep],
        steps=cut(line.steps),
        low=cut(line.low),
        high=cut(line.high),
        breaks=line.x[~keep & np.isfinite(line.x)],
    )


def _values_of(line: Line, kept: IntArray, chart: Chart) -> dict[str, Any]:
    """A line for the script: its drawn points with their values."""
    facts: dict[str, Any] = {
        "name": line.name,
        "style": style_of(line.colour),
        "x": [_value(v) for v in line.x[kept]],
        "y": [_value(v) for v in line.y[kept]],
    }
    if line.steps is not None:
        facts["steps"] = [round(float(v)) for v in line.steps[kept]]
    if chart.right is not None:
        facts["right"] = chart.right[0]
    if line.low is not None and line.high is not None:
        facts["low"], facts["high"] = [_value(v) for v in line.low[kept]], [_value(v) for v in line.high[kept]]
    return facts


def _value(value: float) -> float | int:
    """A value for JSON: whole numbers as such, others with 6 significant digits."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")


def _c(value: Any) -> str:
    return f"{float(value):.1f}".removesuffix(".0")


def _begins(x: FloatArray, breaks: FloatArray) -> set[int]:
    """The points before which the line is interrupted."""
    return set(np.searchsorted(x, breaks, side="right").tolist())


def _path(x: FloatArray, y: FloatArray, begins: Collection[int] = ()) -> str:
    """A line through all points, restarted at some of them."""
    points = enumerate(zip(x.tolist(), y.tolist(), strict=True))
    return "".join(f"{'M' if not i or i in begins else 'L'}{_c(a)} {_c(b)}" for i, (a, b) in points)


def _dots(x: FloatArray, y: FloatArray) -> str:
    """Zero-length strokes: with round caps of a fixed width, circles whatever the stretch."""
    return "".join(f"M{_c(a)} {_c(b)}h0" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _axis_labels(side: str, places: FloatArray, labels: Sequence[str]) -> str:
    at = "left" if side == "x" else "top"
    every = [p for p in zip(places.tolist(), labels, strict=True) if -1 <= p[0] <= SIZE + 1]
    shown = "".join(
        f'<span{" class=odd" if i % 2 else ""} style="{at}:{_c(100 * place / SIZE)}%">{escape(label)}</span>'
        for i, (place, label) in enumerate(every)
    )
    return f'<div class="labels {side}" aria-hidden="true">{shown}</div>'


@dataclass(frozen=True)
class Point:
    """A model in a scatter chart."""

    name: str
    x: float
    y: float
    colour: int


@dataclass
class Scatter:
    """Models by two numbers."""

    id: str
    title: str
    x_title: str
    y_title: str
    points: list[Point]
    shown_x: Callable[[float | None], str] = short
    shown_y: Callable[[float | None], str] = number

    def render(self) -> str:
        """As HTML; "" for fewer than two models."""
        points = [p for p in self.points if math.isfinite(p.x) and math.isfinite(p.y)]
        if len(points) < 2:
            return ""
        x_values, y_values = np.array([p.x for p in points]), np.array([p.y for p in points])
        spread = x_values.min() > 0 and x_values.max() / x_values.min() > 4
        x = value_axis(x_values, log=bool(spread), room=0.1)
        y = value_axis(y_values, log=None, room=0.1)
        x_ticks, y_ticks = x.ticks(5), y.ticks(5)
        px, py = x.place(x_values), SIZE - y.place(y_values)
        grid = "".join(f"M0 {_c(SIZE - p)}H{SIZE}" for p in y.place(y_ticks))
        dots = "".join(
            f'<path class="dots large {style_of(p.colour)}" d="M{_c(a)} {_c(b)}h0"/>'
            for p, a, b in zip(points, px, py, strict=True)
        )
        names = "".join(
            f'<span class="name{" before" if a > 0.6 * SIZE else ""}" '
            f'style="left:{_c(100 * a / SIZE)}%;top:{_c(100 * b / SIZE)}%">{escape(p.name)}</span>'
            for p, a, b in zip(points, px, py, strict=True)
            if len(points) <= 12
        )
        values = "; ".join(f"{p.name}: {self.shown_x(p.x)}, {self.shown_y(p.y)}" for p in points)
        facts = {
            "x": [x.low, x.high, x.log],
            "y": [y.low, y.high, y.log],
            "title": self.x_title,
            "points": [
                {"name": p.name, "style": style_of(p.colour), "x": _value(p.x), "y": _value(p.y)} for p in points
            ],
        }
        return (
            f'<figure class="chart" id="{self.id}" aria-labelledby="{self.id}-title">'
            f'<figcaption><h3 id="{self.id}-title">{escape(self.title)}</h3></figcaption>'
            f'<p class="unit"><span>{escape(self.y_title)}{", log scale" if y.log else ""}</span></p>'
            f'<div class="frame">{_axis_labels("y", SIZE - y.place(y_ticks), tick_labels(y_ticks))}'
            f'<div class="plot" tabindex="0" role="img" aria-label="{escape(f"{self.title}. {values}")}">'
            f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" aria-hidden="true">'
            f'<path class="grid" d="{grid}"/>{dots}</svg>{names}</div>'
            f"{_axis_labels('x', x.place(x_ticks), tick_labels(x_ticks))}</div>"
            f'<p class="x-title">{escape(self.x_title)}{", log scale" if x.log else ""}</p>'
            f'<script type="application/json">{script_json(facts)}</script></figure>'
        )
