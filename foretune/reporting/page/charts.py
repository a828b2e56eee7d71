"""Charts as inline SVG: a line over steps, a training over time, intervals on one axis. Drawn by us, no script.

points ──thinned──▶ buckets (mean, lowest, highest) ──scale──▶ SVG text: axes, line, marks, tooltips (<title>)

Colours and fonts are classes that the page's stylesheet sets, so that a chart suits a light and a dark page. A number
that is none (NaN) is a gap in the line and a mark at the top: it is neither hidden nor drawn where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TypeVar

from markupsafe import Markup

from foretune.reporting.units import duration_text, printable

T = TypeVar("T")
Point = tuple[float, float]
ToText = Callable[[float], str]

#: A line has at most so many points; more are drawn as the means of neighbours, with what they span as an area.
MOST_POINTS = 240
#: Places of a chart that say their numbers when they are pointed at.
_MOST_TOOLTIPS = 60
_MOST_MARKS = 60
#: Values that span more than this are drawn on a logarithmic scale.
_LOGARITHMIC = 50.0

WIDTH, HEIGHT = 440, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 22, 42


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points as one."""

    first: float
    last: float
    mean: float
    low: float
    high: float

    @property
    def middle(self) -> float:
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class Mark:
    """Something that happened at `x`."""

    x: float
    text: str


@dataclass(frozen=True)
class Marks:
    """What is marked on the time line: faults by a dashed line and a cross, checkpoints by triangles on the axis."""

    faults: Sequence[Mark] = ()
    saves: Sequence[Mark] = ()


@dataclass(frozen=True)
class _Axis:
    """Values → pixels, and where its ticks are."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    ticks: list[float] = field(default_factory=list)

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Bucket | None]:
    """The points in at most `most` buckets of equally many; None where a bucket holds no finite number."""
    count = min(most, len(points))
    buckets: list[Bucket | None] = []
    for index in range(count):
        part = points[len(points) * index // count : len(points) * (index + 1) // count]
        values = [y for _, y in part if math.isfinite(y)]
        buckets.append(
            Bucket(part[0][0], part[-1][0], sum(values) / len(values), min(values), max(values)) if values else None
        )
    return buckets


def step_chart(
    name: str,
    points: Sequence[Point],
    *,
    to_text: ToText,
    marks: Marks = Marks(),
    extra: Sequence[tuple[float, float, str]] = (),
    linear: bool = False,
) -> Markup:
    """A quantity over the steps of a training.

    Args:
        points: (step, value); a value may be NaN or infinite.
        to_text: a value as people read it.
        extra: (step, value, what it is): drawn as diamonds.
        linear: never on a logarithmic scale.
    """
    finite = [y for _, y in points if math.isfinite(y)] + [y for _, y, _ in extra if math.isfinite(y)]
    if not finite:
        said = "there is no step yet" if not points else f"none of {len(points)} values is a number"
        return Markup('<p class="empty">{}: {}</p>').format(name, said)
    x = _x_axis(points[0][0] if points else extra[0][0], points[-1][0] if points else extra[-1][0])
    y = _y_axis(min(finite), max(finite), linear=linear)
    pieces = [*_grid(x, y, x_text=lambda value: f"{value:,.0f}", x_name="step"), *_marks(x, marks)]
    pieces += _line(points, x, y)
    for step, value, what in extra:
        if math.isfinite(value):
            across, down = x.at(step), y.at(value)
            said = f"step {step:,.0f}: {what} {to_text(value)}"
            pieces.append(f'<path class="diamond" d="M{across:.1f} {down - 5:.1f}l5 5-5 5-5-5z">{_title(said)}</path>')
    pieces += _tooltips(points, x, to_text)
    title = name + (", logarithmic scale" if y.logarithmic else "")
    return _svg(title, _summary(name, points, to_text), pieces)


def time_chart(
    launches: Sequence[Sequence[Point]],
    *,
    faults: Sequence[tuple[float, float, str]] = (),
    saves: Sequence[tuple[float, float, str]] = (),
) -> Markup:
    """How a training came forward: steps done over seconds, a line for each launch. What failures cost is to be seen.

    Args:
        launches: of each, (seconds, steps done).
        faults: (seconds, steps done, what happened).
        saves: as `faults`, of checkpoints.
    """
    points = [point for launch in launches for point in launch]
    if not points:
        return Markup('<p class="empty">{}</p>').format("Steps over time: there is no step yet")
    seconds = max([x for x, _ in points] + [x for x, _, _ in faults])
    x = _x_axis(0.0, seconds or 1.0, whole=False)
    y = _y_axis(0.0, max([y for _, y in points] + [1.0]), linear=True)
    pieces = _grid(x, y, x_text=_axis_seconds, x_name="time of training")
    for launch in launches:
        shown = [(bucket.middle, bucket.high) for bucket in thinned(launch, MOST_POINTS) if bucket is not None]
        line = " ".join(f"{x.at(when):.1f},{y.at(step):.1f}" for when, step in shown)
        pieces.append(f'<polyline class="line" points="{line}"/>')
        if launch:
            (when, step), began = launch[-1], launch[0][1]
            said = f"steps {began:,.0f} to {step:,.0f}, until {duration_text(when)}"
            pieces.append(
                f'<circle class="dot" cx="{x.at(when):.1f}" cy="{y.at(step):.1f}" r="3">{_title(said)}</circle>'
            )
    for when, step, what in _spread(saves):
        pieces.append(_triangle(x.at(when), y.at(step) + 9, what))
    for when, step, what in _spread(faults):
        pieces.append(_cross(x.at(when), y.at(step), what))
    return _svg(
        "Steps done over time",
        f"{max(y for _, y in points):,.0f} steps in {duration_text(seconds)}, in {len(launches)} launches",
        pieces,
    )


def interval_chart(rows: Sequence[tuple[str, float, tuple[float, float]]], *, name: str, to_text: ToText) -> Markup:
    """Values with their intervals, below each other on one axis. A row is (name, value, interval)."""
    bounds = [bound for _, value, interval in rows for bound in (value, *interval) if math.isfinite(bound)]
    if not bounds:
        return Markup("")
    height = 30 * len(rows) + 44
    low, high = min(bounds), max(bounds)
    room = (high - low or abs(high) or 1.0) * 0.06
    low = low - room if low - room > 0 or low <= 0 else 0.0
    ticks = [tick for tick in _ticks(low, high + room, 4) if low <= tick <= high + room]
    x = _Axis(low, high + room, _LEFT, WIDTH - _RIGHT - 30, ticks=ticks)
    pieces = []
    for tick in x.ticks:
        pieces.append(f'<line class="grid" x1="{x.at(tick):.1f}" x2="{x.at(tick):.1f}" y1="8" y2="{height - 34}"/>')
        pieces.append(_text(x.at(tick), height - 20, f"{tick:.4g}", "middle"))
    for number, (row, value, interval) in enumerate(rows):
        down = 24 + 30 * number
        said = f"{row}: {to_text(value)}, 95 % interval {to_text(interval[0])} to {to_text(interval[1])}"
        ends = [x.at(bound) for bound in interval]
        pieces.append(_text(_LEFT - 8, down + 4, row, "end"))
        pieces.append(
            f'<g>{_title(said)}<line class="whisker" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{down}" y2="{down}"/>'
            + "".join(
                f'<line class="whisker" x1="{e:.1f}" x2="{e:.1f}" y1="{down - 6}" y2="{down + 6}"/>' for e in ends
            )
            + f'<circle class="dot" cx="{x.at(value):.1f}" cy="{down}" r="5"/></g>'
        )
    pieces.append(_text((_LEFT + WIDTH) / 2, height - 4, name, "middle", "axis-name"))
    summary = "; ".join(f"{row} {to_text(value)}" for row, value, _ in rows)
    return _svg(name, summary, pieces, height=height, headed=False)


def _svg(title: str, summary: str, pieces: Iterable[str], *, height: int = HEIGHT, headed: bool = True) -> Markup:
    head = f'<text class="chart-name" x="2" y="13">{_safe(title)}</text>' if headed else ""
    label = _safe(f"{title}: {summary}")
    body = "".join(pieces)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{head}{body}</svg>'
    )


def _summary(name: str, points: Sequence[Point], to_text: ToText) -> str:
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return name
    (first, began), (last, ended) = finite[0], finite[-1]
    odd = len(points) - len(finite)
    return (
        f"{to_text(began)} at step {first:,.0f}, {to_text(ended)} at step {last:,.0f}"
        f", lowest {to_text(min(y for _, y in finite))}, highest {to_text(max(y for _, y in finite))}"
        + (f", {odd} values that are no number" if odd else "")
    )


def _grid(x: _Axis, y: _Axis, *, x_text: ToText, x_name: str) -> list[str]:
    """Axes, their lines and their numbers."""
    bottom = HEIGHT - _BOTTOM
    pieces = []
    for tick in y.ticks:
        down = y.at(tick)
        pieces.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        pieces.append(_text(_LEFT - 7, down + 4, axis_text(tick), "end"))
    for tick in x.ticks:
        across = x.at(tick)
        pieces.append(f'<line class="axis" x1="{across:.1f}" x2="{across:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        pieces.append(_text(across, bottom + 18, x_text(tick), "middle"))
    pieces.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    pieces.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_name, "middle", "axis-name"))
    return pieces


def _line(points: Sequence[Point], x: _Axis, y: _Axis) -> list[str]:
    """The means as a line that is broken where there is no number, over the area that they are means of."""
    pieces: list[str] = []
    run: list[Bucket] = []
    for bucket in [*thinned(points), None]:
        if bucket is not None:
            run.append(bucket)
            continue
        if len(run) == 1:
            pieces.append(f'<circle class="dot" cx="{x.at(run[0].middle):.1f}" cy="{y.at(run[0].mean):.1f}" r="3"/>')
        elif run:
            if any(item.high > item.low for item in run):
                edge = [(item.middle, item.high) for item in run] + [(item.middle, item.low) for item in reversed(run)]
                area = " ".join(f"{x.at(across):.1f},{y.at(value):.1f}" for across, value in edge)
                pieces.append(f'<polygon class="area" points="{area}"/>')
            line = " ".join(f"{x.at(item.middle):.1f},{y.at(item.mean):.1f}" for item in run)
            pieces.append(f'<polyline class="line" points="{line}"/>')
        run = []
    odd = [Mark(step, f"step {step:,.0f}: {value}, no number") for step, value in points if not math.isfinite(value)]
    for mark in _spread(odd):
        across = x.at(mark.x)
        pieces.append(
            f'<text class="odd" x="{across:.1f}" y="{_TOP + 6}" text-anchor="middle">?{_title(mark.text)}</text>'
        )
    return pieces


def _tooltips(points: Sequence[Point], x: _Axis, to_text: ToText) -> list[str]:
    """Columns that can't be seen and say the numbers at that place."""
    pieces = []
    buckets = thinned(points, _MOST_TOOLTIPS)
    width = (x.end - x.start) / max(1, len(buckets))
    for bucket in buckets:
        if bucket is None:
            continue
        if bucket.first == bucket.last:
            said = f"step {bucket.first:,.0f}: {to_text(bucket.mean)}"
        else:
            span = f"{to_text(bucket.low)} to {to_text(bucket.high)}"
            said = f"steps {bucket.first:,.0f} to {bucket.last:,.0f}: {to_text(bucket.mean)} ({span})"
        left = x.at(bucket.middle) - width / 2
        pieces.append(
            f'<rect class="hover" x="{left:.1f}" y="{_TOP}" width="{width:.1f}" height="{HEIGHT - _TOP - _BOTTOM}">'
            f"{_title(said)}</rect>"
        )
    return pieces


def _marks(x: _Axis, marks: Marks) -> list[str]:
    bottom = HEIGHT - _BOTTOM
    pieces = []
    for save in _spread([mark for mark in marks.saves if x.low <= mark.x <= x.high]):
        pieces.append(_triangle(x.at(save.x), bottom, save.text))
    for fault in _spread(marks.faults):
        across = x.at(min(max(fault.x, x.low), x.high))
        pieces.append(f'<line class="fault" x1="{across:.1f}" x2="{across:.1f}" y1="{_TOP + 12}" y2="{bottom}"/>')
        pieces.append(_cross(across, _TOP + 6, fault.text))
    return pieces


def _cross(x: float, y: float, said: str) -> str:
    return f'<path class="cross" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0-10l-10 10">{_title(said)}</path>'


def _triangle(x: float, y: float, said: str) -> str:
    return f'<path class="save" d="M{x:.1f} {y - 7:.1f}l4.5 7h-9z">{_title(said)}</path>'


def _spread(items: Sequence[T]) -> list[T]:
    """At most `_MOST_MARKS` of them, evenly, the last always among them."""
    if len(items) <= _MOST_MARKS:
        return list(items)
    return [items[(number + 1) * len(items) // _MOST_MARKS - 1] for number in range(_MOST_MARKS)]


def _x_axis(low: float, high: float, *, whole: bool = True) -> _Axis:
    if high <= low:
        low, high = low - 1, high + 1
    ticks = _ticks(low, high, 5) if whole else _second_ticks(high)
    ticks = [tick for tick in ticks if low <= tick <= high and (not whole or tick == round(tick))]
    return _Axis(low, high, _LEFT + 6, WIDTH - _RIGHT - 6, ticks=ticks)


def _y_axis(low: float, high: float, *, linear: bool) -> _Axis:
    if not linear and low > 0 and high / low > _LOGARITHMIC:
        ends = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        decades = round(math.log10(ends[1] / ends[0]))
        ticks = [ends[0] * 10**power for power in range(0, decades + 1, max(1, decades // 4))]
        return _Axis(*ends, HEIGHT - _BOTTOM - 4, _TOP + 14, logarithmic=True, ticks=ticks)
    if high == low:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    ticks = _ticks(low, high, 4)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    start = math.floor(low / step) * step
    stop = math.ceil(high / step) * step
    ticks = [tick for tick in _ticks(start, stop, 4) if start <= tick <= stop]
    return _Axis(start, stop, HEIGHT - _BOTTOM - 4, _TOP + 14, ticks=ticks)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, about so many, from the one at or below `low` to the one at or above `high`."""
    rough = (high - low) / about
    size = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next((size * factor for factor in (1, 2, 5) if size * factor >= rough), size * 10)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _second_ticks(high: float) -> list[float]:
    """Ticks where people cut time."""
    sizes = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800]
    step = next((size for size in sizes if size >= high / 6), None)
    if step is None or high < 3:
        return _ticks(0, high, 4)
    return [float(number * step) for number in range(int(high // step) + 1)]


def _axis_seconds(seconds: float) -> str:
    """``90`` seconds as ``1m30s``; whole units have no others behind them."""
    text = duration_text(seconds) if seconds else "0"
    for full in ("m00s", "h00m", "d00h"):
        text = text.replace(full, full[0]) if text.endswith(full) else text
    return text


def axis_text(value: float) -> str:
    """A round number, short: ``0``, ``0.02``, ``2.5``, ``300``, ``20k``, ``1e-05``."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-3:
        return f"{value:.0e}"
    for unit, unit_size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= 10 * unit_size or (size >= unit_size and unit != "k"):
            return f"{value / unit_size:g}{unit}"
    return f"{value:g}"


def _text(x: float, y: float, said: str, anchor: str, css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(said)}</text>'


def _title(said: str) -> str:
    return f"<title>{_safe(said)}</title>"


def _safe(said: str) -> str:
    return escape(printable(said))
