"""Plots: round ticks, everything inside the picture, and which points are on the front."""

from __future__ import annotations

import re

from hypothesis import assume, given
from hypothesis import strategies as st
from reports.pages import Page

from sparsebert._html import Html, tag
from sparsebert.reports.html.curves import best_of
from sparsebert.reports.html.plots import HEIGHT, WIDTH, Level, Line, Plot, Point, Upright, ticks

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, st.floats(1e-6, 1e6), st.integers(3, 8), st.booleans())
def test_ticks_are_round_and_within(low: float, span: float, about: int, percent: bool) -> None:
    high = low + span
    assume(high - low > 1e-6 * max(abs(low), abs(high)))
    found = ticks(low, high, about, percent)
    values = [value for value, _ in found]
    slack = 1e-6 * span + 1e-9 * max(abs(low), abs(high))
    assert values == sorted(set(values)) and all(low - slack <= value <= high + slack for value in values)
    assert 0 < len(found) <= about + 1
    assert len({word for _, word in found}) == len(found), "two ticks with one word"


def test_ticks_as_people_write_them() -> None:
    assert [word for _, word in ticks(0.48, 0.93, 5, True)] == ["50 %", "60 %", "70 %", "80 %", "90 %"]
    assert [word for _, word in ticks(-0.5, 1.0, 3)] == ["-0.5", "0.0", "0.5", "1.0"]
    assert ticks(1.0, 1.0, 5) == [] and ticks(0.0, float("inf"), 5) == []


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12))
def test_every_mark_lies_inside_the_picture(places: list[tuple[float, float]]) -> None:
    points = [Point(x, y, y - 1, y + 1, f"{x}") for x, y in places]
    plot = Plot("t", "x", "y", [Line("l", points, 3)], [Level("d", 5.0, 4.0, 6.0, 1)], [Upright("u", 1.0, 0.0, 2.0)])
    text = plot.html()
    Page(f"<html>{text}</html>")
    for name, most in (("x", WIDTH), ("x1", WIDTH), ("x2", WIDTH), ("y", HEIGHT), ("y1", HEIGHT), ("y2", HEIGHT)):
        for value in re.findall(rf' {name}="([^"]+)"', text):
            assert 0 <= float(value) <= most
    for pair in re.findall(r'points="([^"]+)"', text)[0].split():
        x, y = map(float, pair.split(","))
        assert 0 <= x <= WIDTH and 0 <= y <= HEIGHT


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=10))
def test_the_front(points: list[tuple[int, int]]) -> None:
    found = best_of(points)
    assert any(found)
    for point, best in zip(points, found, strict=True):
        beaten = any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
        assert best != beaten


def test_a_picture_without_points_is_still_a_picture() -> None:
    Page(f"<html>{Plot('t', 'x', 'y', []).html()}</html>")


@given(st.text(), st.text())
def test_whatever_is_put_in_comes_out_as_text(inner: str, value: str) -> None:
    page = tag("p", inner, tag("b", "kept"), None, title=value, hidden=False)
    assert isinstance(page, Html) and page.count("<") == 4 and page.endswith("<b>kept</b></p>")
