"""Plots as small inline SVG: real text, colours from the page's style, tooltips, a legend below that wraps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsebert._html import Html, tag

__all__ = ["Level", "Line", "Plot", "Point", "Upright", "ticks"]

WIDTH, HEIGHT = 360, 270
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 22, 36

COLOURS = 8
"""Colours of the style sheet, from `s0`; markers and dashes go round in other numbers, so that few lines look alike."""
_DASHES = (None, "6 3", "2 2", "8 3 2 3", "4 1 1 1")


@dataclass(frozen=True)
class Point:
    """A point of a line, with what its tooltip says."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    title: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """Points joined in the order given. `style` picks colour, marker and dashes."""

    name: str
    points: Sequence[Point]
    style: int
    marked: bool = True
    """With markers and whiskers; else a plain curve with a band from `low` to `high`."""


@dataclass(frozen=True)
class Level:
    """A horizontal line across the plot, with a band where there is a spread."""

    name: str
    y: float
    low: float | None
    high: float | None
    style: int


@dataclass(frozen=True)
class Upright:
    """A vertical line with a word at its top, with a band where there is a spread."""

    name: str
    x: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Plot:
    """A figure: an SVG that is as wide as its box, and a legend below."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    uprights: Sequence[Upright] = ()
    note: str = ""
    percent: bool = False
    """Whether x is a share, shown in percent."""
    shares: bool = False
    """Whether y is a share, shown in percent."""
    x_from: float | None = None
    """Where x begins at the latest."""
    log_x: bool = False
    """Whether x, above 0, is shown by its logarithm."""

    def html(self) -> Html:
        """The figure as HTML."""
        points = [point for line in self.lines for point in line.points]
        stands = [value for item in self.uprights for value in (item.x, item.low, item.high)]
        spread = [value for point in points for value in (point.y, point.low, point.high)]
        spread += [value for level in self.levels for value in (level.y, level.low, level.high)]
        xs = [point.x for point in points] + [value for value in stands if value is not None]
        ys = [value for value in spread if value is not None]
        if self.x_from is not None:
            xs.append(self.x_from)
        across = (_LogScale if self.log_x else _Scale)(xs, LEFT, WIDTH - RIGHT)
        up = _Scale(ys, HEIGHT - BOTTOM, TOP)
        marks = [
            *self._grid(across, up),
            *(_upright(item, across) for item in self.uprights),
            *(_level(item, up) for item in self.levels),
            *(_line(item, across, up) for item in self.lines),
        ]
        label = f"{self.title}: {self.y_label} by {self.x_label}"
        svg = tag("svg", *marks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
        caption = tag("figcaption", tag("strong", self.title), f" {self.note}" if self.note else None)
        return tag("figure", caption, svg, self._legend())

    def _grid(self, across: _Scale, up: _Scale) -> list[Html]:
        parts = []
        for value, word in ticks(up.low, up.high, 7, self.shares):
            y = up(value)
            parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
            parts.append(tag("text", word, x=LEFT - 5, y=round(y + 4, 1), text_anchor="end"))
        for value, word in across.ticks(6, self.percent):
            x = across(value)
            parts.append(tag("line", class_="axis", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4))
            parts.append(tag("text", word, x=x, y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
        bottom = HEIGHT - BOTTOM
        parts.append(tag("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
        parts.append(tag("text", self.x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, text_anchor="middle"))
        parts.append(tag("text", self.y_label, x=2, y=11))
        return parts

    def _legend(self) -> Html | None:
        items: list[tuple[str, int, bool | None]] = [(line.name, line.style, line.marked) for line in self.lines]
        items += [(level.name, level.style, None) for level in self.levels]
        if not items:
            return None
        return tag("ul", *(tag("li", _swatch(style, marked), name) for name, style, marked in items), class_="legend")


class _Scale:
    """From numbers to places on the page, with a little room at both ends."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
        self.low, self.high = low - room, high + room
        self._first, self._last = first, last

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self._first + share * (self._last - self._first), 1)

    def ticks(self, about: int, percent: bool) -> list[tuple[float, str]]:
        """Round numbers in its range, with their words."""
        return ticks(self.low, self.high, about, percent)


class _LogScale(_Scale):
    """The same by the logarithm of numbers above 0."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        super().__init__([math.log10(value) for value in values], first, last)

    def __call__(self, value: float) -> float:
        return super().__call__(math.log10(value))

    def ticks(self, about: int, percent: bool) -> list[tuple[float, str]]:
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for nice in ((1, 2, 5), (1, 3), (1,)):
            values = [step * 10.0**power for power in powers for step in nice]
            values = [value for value in values if self.low <= math.log10(value) <= self.high]
            if len(values) <= about:
                break
        if len(values) < 2:
            return ticks(10**self.low, 10**self.high, about, percent)
        return [(value, f"{100 * value:g} %" if percent else f"{value:,.12g}") for value in values]


def ticks(low: float, high: float, about: int, percent: bool = False) -> list[tuple[float, str]]:
    """Round numbers in `[low, high]`, some `about` of them, with their words."""
    raw = (high - low) / max(about, 1)
    if not (raw > 0 and math.isfinite(raw)):
        return []
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 5, 10) if power * nice >= raw * 0.999)
    digits = max(0, -math.floor(math.log10(step * (100 if percent else 1)) + 1e-9))
    found = []
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        value = index * step
        found.append((value, f"{100 * value:.{digits}f} %" if percent else f"{value + 0.0:.{digits}f}"))
    return found


def _class(style: int) -> str:
    return f"s{style % COLOURS}"


def _line(line: Line, across: _Scale, up: _Scale) -> Html:
    places = [(across(point.x), up(point.y)) for point in line.points]
    path = tag("polyline", points=" ".join(f"{x},{y}" for x, y in places), stroke_dasharray=_DASHES[line.style % 5])
    if not line.marked:
        title = tag("title", line.name)
        return tag("g", title, _band(line, across, up), path, class_=f"line {_class(line.style)}")
    marks = []
    for point, (x, y) in zip(line.points, places, strict=True):
        if point.low is not None and point.high is not None:
            low, high = up(point.low), up(point.high)
            marks.append(tag("path", d=f"M{x} {low}V{high}M{x - 4} {low}h8M{x - 4} {high}h8"))
        shape = _marker(line.style, x, y)
        marks.append(tag("path", tag("title", point.title), d=shape, class_="hollow" if point.hollow else "full"))
    return tag("g", path, *marks, class_=f"line {_class(line.style)}")


def _band(line: Line, across: _Scale, up: _Scale) -> Html | None:
    spread = [(across(p.x), up(p.low), up(p.high)) for p in line.points if p.low is not None and p.high is not None]
    if len(spread) < 2:
        return None
    edge = [f"{x},{high}" for x, _, high in spread] + [f"{x},{low}" for x, low, _ in reversed(spread)]
    return tag("polygon", points=" ".join(edge))


def _level(level: Level, up: _Scale) -> Html:
    y, right = up(level.y), WIDTH - RIGHT
    parts = [tag("title", level.name)]
    if level.low is not None and level.high is not None:
        top = up(level.high)
        parts.append(tag("rect", x=LEFT, y=top, width=right - LEFT, height=round(up(level.low) - top, 1)))
    dashes = _DASHES[level.style % 5] or "1 0"
    parts.append(tag("line", x1=LEFT, x2=right, y1=y, y2=y, stroke_dasharray=dashes))
    return tag("g", *parts, class_=f"line {_class(level.style)}")


def _upright(upright: Upright, across: _Scale) -> Html:
    x, parts = across(upright.x), []
    if upright.low is not None and upright.high is not None:
        first = across(upright.low)
        width = round(across(upright.high) - first, 1)
        parts.append(tag("rect", x=first, y=TOP, width=width, height=HEIGHT - BOTTOM - TOP))
    parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM))
    late = x > (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        tag("text", upright.name, x=x - 4 if late else x + 4, y=TOP + 9, text_anchor="end" if late else "start")
    )
    return tag("g", *parts, class_="upright")


def _circle(x: float, y: float) -> str:
    return f"M{x - 3.5:.1f} {y}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z"


def _square(x: float, y: float) -> str:
    return f"M{x - 3.2:.1f} {y - 3.2:.1f}h6.4v6.4h-6.4z"


def _triangle(x: float, y: float) -> str:
    return f"M{x} {y - 4.5:.1f}l4.2 7.4h-8.4z"


def _diamond(x: float, y: float) -> str:
    return f"M{x} {y - 4.6:.1f}l4.6 4.6l-4.6 4.6l-4.6 -4.6z"


def _wedge(x: float, y: float) -> str:
    return f"M{x} {y + 4.5:.1f}l4.2 -7.4h-8.4z"


def _bar(x: float, y: float) -> str:
    return f"M{x - 4.5:.1f} {y - 2:.1f}h9v4h-9z"


_MARKERS: tuple[Callable[[float, float], str], ...] = (_circle, _square, _triangle, _diamond, _wedge, _bar)


def _marker(style: int, x: float, y: float) -> str:
    return _MARKERS[style % len(_MARKERS)](x, y)


def _swatch(style: int, marked: bool | None) -> Html:
    """What a line looks like, for the legend; its name stands beside it. `marked` None: a level."""
    stroke = tag("line", x1=0, x2=26, y1=6, y2=6, stroke_dasharray=_DASHES[style % 5])
    shape = tag("path", d=_marker(style, 13, 6), class_="full") if marked else None
    group = tag("g", stroke, shape, class_=f"line {_class(style)}")
    return tag("svg", group, viewBox="0 0 26 12", aria_hidden="true", class_="swatch")
