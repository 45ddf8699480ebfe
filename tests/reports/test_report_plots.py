"""Plots: round ticks, everything inside the picture, and which points are on the front."""

from __future__ import annotations

import re

from hypothesis import assume, given
from hypothesis import strategies as st
from reports.pages import Page

from sparsebert._html import Html, join, tag
from sparsebert.reports.html.analyses import analysis_parts
from sparsebert.reports.html.analysis_plots import analysis_plots
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


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=6))
def test_numbers_by_their_logarithm(counts: list[int]) -> None:
    text = Plot("t", "rows", "y", [Line("l", [Point(count, 1.0) for count in counts], 0)], log_x=True).html()
    places = [float(pair.split(",")[0]) for pair in re.findall(r'points="([^"]+)"', text)[0].split()]
    for one, two in zip(counts, places, strict=True):
        for other, there in zip(counts, places, strict=True):
            assert (one < other) <= (two <= there)
        assert 0 <= two <= WIDTH
    words = re.findall(r'text-anchor="middle">([^<]+)<', text)
    assert 1 <= len(words) <= 10


def test_ticks_of_a_logarithm() -> None:
    text = Plot(
        "t", "rows", "y", [Line("l", [Point(count, 1.0) for count in (100, 1000, 67000)], 0)], log_x=True
    ).html()
    words = re.findall(r'text-anchor="middle">([^<]+)<', text)
    assert words == ["100", "300", "1,000", "3,000", "10,000", "30,000", "rows"]


SCARCITY = {
    "curves": [
        {
            "task": "sst2",
            "method": "tamt",
            "metric": "accuracy",
            "sparsity": sparsity,
            "points": [
                {"rows": 100, "mean": 0.6, "std": 0.02, "scores": [0.58, 0.62]},
                {"rows": 67349, "mean": 0.9, "std": None, "scores": [0.9]},
            ],
        }
        for sparsity in (0.7, None)
    ]
}
FLATNESS = {"runs": {"a<b": {"loss": 0.5, "points": [{"radius": 0.1, "mean": 0.6, "std": 0.1, "losses": [0.5, 0.7]}]}}}


def test_scarcity_and_flatness_as_plots() -> None:
    report = {"analyses": {"scarcity": {"data": SCARCITY}, "flatness": {"data": FLATNESS}}}
    shown = Page(f"<html>{join(analysis_parts(report))}</html>")
    assert shown.pictures == [
        "sst2: scarcity of data: accuracy, points by training rows",
        "flatness of the minimum: loss on train by distance from the weights",
    ]
    for words in ("tamt, 70 %", "tamt, dense", "tamt, 70 %: 100 rows, 60 ± 2", "a<b: 0.5000 as it is"):
        assert words in shown.words
    assert "a<b: at 0.1, 0.6 ± 0.1" in shown.words


@given(st.recursive(st.none() | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)))
def test_numbers_of_another_shape_give_no_plot(odd: object) -> None:
    for name, good in (("scarcity", SCARCITY), ("flatness", FLATNESS)):
        assert analysis_plots(name, odd) == [] and analysis_plots("other", good) == []
    curve = SCARCITY["curves"][0]
    for point in ({"rows": 0, "mean": 1.0}, {"rows": 5, "mean": float("nan")}, {"rows": 5, "mean": True}, [odd]):
        assert analysis_plots("scarcity", {"curves": [{**curve, "points": [point]}]}) == []
