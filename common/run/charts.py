"""Curves for report.html: thinned so that no spike is lost, smoothed, with ticks and readings."""

import bisect
import functools
import itertools
import math
import statistics
from dataclasses import dataclass

WIDTH, HEIGHT = 1000, 400  # units of a drawing, which the browser stretches to its column
POINTS = 500  # of a curve, at most
COLUMNS = 60  # of a chart, each with its readings as a tooltip
NOISY_FROM = 20  # points, from which on a noisy curve is dots and their moving median


@dataclass
class Curve:
    """Points (x, y), ascending in x. style: line; dots: a line with a dot at each point; noisy: dots and their
    median; smooth: that median alone."""

    label: str
    points: list[tuple[float, float]]
    style: str = "line"
    colour: str = "c0"

    @functools.cached_property
    def kept(self) -> list:
        return thin(self.points)

    @functools.cached_property
    def line(self) -> list:
        return moving_median(self.points) if self.is_smooth else self.kept

    @property
    def is_smooth(self) -> bool:
        return self.style in ("noisy", "smooth") and len(self.points) >= NOISY_FROM

    @property
    def dots(self) -> list:
        shows = self.style == "dots" or self.style == "noisy" and self.is_smooth or len(self.points) == 1
        return self.kept if shows else []


@dataclass
class Frame:
    """Where points lie in a drawing."""

    start: float
    end: float
    low: float
    high: float

    def across(self, x: float) -> int:
        return round((x - self.start) / (self.end - self.start or 1) * WIDTH)

    def down(self, y: float) -> int:
        return round((self.high - y) / (self.high - self.low) * HEIGHT)

    def path(self, points: list, form: str) -> str:
        return "".join(form.format(self.across(x), self.down(y)) for x, y in points)


def chart(title: str, unit: str, curves: list[Curve], span: tuple, axis: str, marks=(), reach=(), limit=None):
    """What the template draws of some curves, as a dict; None where there is no point.

    span: of x. axis: its name. marks: (x, kind, text) of events. reach: what the y axis reaches in any case.
    limit: (y, label) of a horizontal line.
    """
    if not (curves := [curve for curve in curves if curve.points]):
        return None
    values = [y for curve in curves for _, y in curve.line + curve.dots] + ([limit[0]] if limit else [])
    low, high = min([*values, *reach]), max([*values, *reach])
    margin = (high - low or abs(high) or 1) * 0.06
    frame = Frame(*span, low if low in reach else low - margin, high + margin)
    return dict(
        title=title,
        unit=unit,
        axis=axis,
        curves=[draw(curve, frame) for curve in curves],
        columns=columns(curves, marks, axis, frame),
        marks=sorted({(frame.across(x), kind) for x, kind, _ in marks}),
        x_ticks=[(frame.across(x), number(x)) for x in ticks(*span) if axis != "step" or x % 1 == 0],
        y_ticks=[(frame.down(y), number(y)) for y in ticks(frame.low, frame.high)],
        limit=limit and (frame.down(limit[0]), limit[1]),
    )


def draw(curve: Curve, frame: Frame) -> dict:
    """A curve as SVG paths, with its last, least and greatest value."""
    values = [y for _, y in curve.points]
    return dict(
        label=curve.label,
        colour=curve.colour,
        line="M" + frame.path(curve.line, "{} {} ").rstrip(),
        dots=frame.path(curve.dots, "M{} {}h0"),
        faint=curve.is_smooth,  # the dots
        last=number(curve.line[-1][1]),
        low=number(min(values)),
        high=number(max(values)),
    )


def thin(points: list) -> list:
    """At most POINTS of them: of each stretch the lowest and the highest."""
    if len(points) <= POINTS:
        return points
    size, kept = math.ceil(len(points) / (POINTS // 2)), []
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        kept += sorted({pick(stretch, key=lambda point: point[1]) for pick in (min, max)})
    return kept


def moving_median(points: list) -> list:
    """The medians of stretches of a twentieth of the curve, a hundred of them; a spike hardly bends them."""
    half, gap = max(2, len(points) // 40), max(1, len(points) // 100)
    middles = sorted({*range(0, len(points), gap), *range(len(points))[-1:]})
    around = [points[max(0, middle - half) : middle + half + 1] for middle in middles]
    return [(points[at][0], statistics.median(y for _, y in near)) for at, near in zip(middles, around, strict=True)]


def columns(curves: list[Curve], marks, axis: str, frame: Frame) -> list[tuple[int, int, str]]:
    """(left, width, readings) of the columns of a chart."""
    xs = sorted({x for curve in curves for x, _ in curve.kept} | {x for x, *_ in marks})
    size, found = math.ceil(len(xs) / COLUMNS), []
    parts = [xs[first : first + size] for first in range(0, len(xs), size)]
    borders = [0, *(frame.across((a[-1] + b[0]) / 2) for a, b in itertools.pairwise(parts)), WIDTH]
    for part, (left, right) in zip(parts, itertools.pairwise(borders), strict=True):
        first, last = part[0], part[-1]
        lines = [f"{axis} {number(first)}" + f" to {number(last)}" * (last > first)]
        for curve in curves:
            start, end = bisect.bisect_left(curve.kept, (first,)), bisect.bisect_right(curve.kept, (last, math.inf))
            if ys := [y for _, y in curve.kept[start:end]]:
                between = f"{number(min(ys))} to {number(max(ys))}" if min(ys) < max(ys) else number(ys[0])
                lines.append(f"{curve.label}: {between}")
        lines += [text for x, _, text in marks if first <= x <= last][:3]
        found.append((left, right - left, "\n".join(lines)))
    return found


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two bounds, about four."""
    rough = (high - low or 1) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number(value: float) -> str:
    """Four significant digits, or from 100 on those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
