"""Line charts, histograms and bars as SVG, colored by the style sheet of the page that holds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 44
_TICKS = 6
_BAR, _NAMES, _VALUES = 26, 240, 90
COLORS = 10
"""That the style sheet has."""


class Series(NamedTuple):
    """Named points, joined by a line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    """Draw the points too, with their values as tooltips."""
    dashed: bool = False


class Axis(NamedTuple):
    """The range of an axis, its marked values and its name."""

    name: str
    low: float
    high: float
    ticks: Sequence[float]
    percent: bool = False

    def text(self, value: float) -> str:
        """A value as it is written beside the axis."""
        return f"{100 * value:.4g}%" if self.percent else f"{value:,.4g}"


def axis_over(name: str, values: Sequence[float], *, percent: bool = False, tight: bool = False) -> Axis:
    """An axis that covers the values, with round ticks.

    Args:
        name: Written beside it.
        values: At least one, all finite.
        percent: Whether they are shares, to be written as percentages.
        tight: End at the values rather than at the ticks around them.
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / _TICKS)
    first = math.ceil(low / step) if tight else math.floor(low / step)
    last = math.floor(high / step) if tight else math.ceil(high / step)
    ticks = [number * step for number in range(first, last + 1)]
    return Axis(name, low, high, ticks, percent) if tight else Axis(name, ticks[0], ticks[-1], ticks, percent)


def _round_step(step: float) -> float:
    """The next of 1, 2, 5, 10, … times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def line_chart(title: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis) -> Markup:
    """A chart with a line for each series.

    Args:
        title: For screen readers.
        series: In the order of their colors.
        x_axis: From left to right.
        y_axis: From bottom to top.
    """
    lines = [_line(number, each, x_axis, y_axis) for number, each in enumerate(series, 1)]
    return _chart(title, x_axis, y_axis, lines)


def histogram_chart(
    title: str, edges: Sequence[float], shares: Sequence[tuple[str, Sequence[float]]], x_name: str
) -> Markup:
    """Histograms over one another, each with an area of its own color.

    Args:
        title: For screen readers.
        edges: Ends of the intervals, one more than there are intervals.
        shares: Name and the share of each interval, 0 to 1, per histogram.
        x_name: What is counted.
    """
    x_axis = axis_over(x_name, edges, tight=True)
    y_axis = axis_over("share of the pairs", [0, *(max(values) for _, values in shares)], percent=True)
    areas = []
    for number, (name, values) in enumerate(shares, 1):
        points = [(edges[0], 0.0)]
        for left, right, value in zip(edges, edges[1:], values, strict=False):
            points += [(left, value), (right, value)]
        points.append((edges[-1], 0.0))
        path = " ".join(f"{_x(x, x_axis):.1f},{_y(y, y_axis):.1f}" for x, y in points)
        areas.append(
            Markup('<polygon class="area c{}" points="{}"><title>{}</title></polygon>').format(
                number, path, name
            )
        )
    return _chart(title, x_axis, y_axis, areas)


def _x(value: float, axis: Axis) -> float:
    return _LEFT + (value - axis.low) / (axis.high - axis.low) * (WIDTH - _LEFT - _RIGHT)


def _y(value: float, axis: Axis) -> float:
    return HEIGHT - _BOTTOM - (value - axis.low) / (axis.high - axis.low) * (HEIGHT - _TOP - _BOTTOM)


def _line(number: int, series: Series, x_axis: Axis, y_axis: Axis) -> Markup:
    points = [(_x(x, x_axis), _y(y, y_axis)) for x, y in zip(series.x, series.y, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = " dashed" if series.dashed else ""
    line = Markup('<polyline class="line c{}{}" points="{}"><title>{}</title></polyline>').format(
        number, style, path, series.name
    )
    if not series.marks:
        return line
    marks = [
        Markup(
            '<circle class="mark c{}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}: {} at {} {}</title></circle>'
        ).format(number, x, y, series.name, y_axis.text(value), x_axis.name, x_axis.text(place))
        for (x, y), place, value in zip(points, series.x, series.y, strict=True)
    ]
    return line + Markup("").join(marks)


def _chart(title: str, x_axis: Axis, y_axis: Axis, content: Sequence[Markup]) -> Markup:
    bottom = HEIGHT - _BOTTOM
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)]
    for value in y_axis.ticks:
        y = _y(value, y_axis)
        parts += [
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                _LEFT, WIDTH - _RIGHT, y, y
            ),
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                _LEFT - 8, y + 4, y_axis.text(value)
            ),
        ]
    for value in x_axis.ticks:
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                _x(value, x_axis), bottom + 18, x_axis.text(value)
            )
        )
    parts += [
        Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            _LEFT, WIDTH - _RIGHT, bottom, bottom
        ),
        Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(
            WIDTH - _RIGHT, HEIGHT - 6, x_axis.name
        ),
        *content,
        Markup("</svg>"),
    ]
    return Markup("\n").join(parts)


def scatter_chart(title: str, groups: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> Markup:
    """Points without axes, those of a group in one color, as large as fit into a square.

    Args:
        title: For screen readers.
        groups: Name and points (x, y) of each, in the order of their colors; at least one point in all.
    """
    points = [point for _, own in groups for point in own]
    lows = [min(point[axis] for point in points) for axis in (0, 1)]
    spans = [max(point[axis] for point in points) - lows[axis] for axis in (0, 1)]
    scale = (WIDTH - 2 * _TOP) / (max(spans) or 1)
    margins = [(WIDTH - scale * spans[0]) / 2, _TOP]
    height = round(2 * _TOP + scale * spans[1])
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, title)]
    for number, (name, own) in enumerate(groups, 1):
        places = [[margins[axis] + scale * (point[axis] - lows[axis]) for axis in (0, 1)] for point in own]
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)  # a line of no length is a dot
        parts.append(
            Markup('<path class="dots c{}" d="{}"><title>{}</title></path>').format(number, path, name)
        )
    return Markup("\n").join([*parts, Markup("</svg>")])


def bar_chart(
    title: str, bars: Sequence[tuple[str, float, float | None]], *, percent: bool = False
) -> Markup:
    """A horizontal bar for each value, from zero, with a whisker for its deviation.

    Args:
        title: For screen readers.
        bars: Name, value and deviation, if there is one; from top to bottom.
        percent: Whether values are shares.
    """
    axis = axis_over(
        title, [0.0, *(value + (deviation or 0) for _, value, deviation in bars)], percent=percent
    )
    height = _TOP + _BAR * len(bars)

    def place(value: float) -> float:
        return _NAMES + (value - axis.low) / (axis.high - axis.low) * (WIDTH - _NAMES - _VALUES)

    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, title)]
    name_of = '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
    bar = '<rect class="bar" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}: {}</title></rect>'
    value_of = '<text class="tick" x="{:.1f}" y="{}">{}</text>'
    whisker = '<line class="axis" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>'
    for number, (name, value, deviation) in enumerate(bars):
        y, text = _TOP + _BAR * number, axis.text(value)
        width = max(place(value) - place(0), 0)
        parts += [
            Markup(name_of).format(_NAMES - 8, y + 15, name),
            Markup(bar).format(place(0), y + 3, width, _BAR - 8, name, text),
            Markup(value_of).format(place(value + (deviation or 0)) + 8, y + 15, text),
        ]
        if deviation:
            ends = (place(value - deviation), place(value + deviation))
            parts.append(Markup(whisker).format(*ends, y + 12, y + 12))
    return Markup("\n").join([*parts, Markup("</svg>")])
