"""Charts: every value is where its scale says, what is missing is told, and no text escapes its place."""

import re
import xml.etree.ElementTree as ET

import pytest

from luthier.report.charts import Frame, Interval, Point, Scale, bars, heat, intervals, lines, scatter

EVIL = '<script>alert("x")</script> & "quotes"'


def svgs(html):
    return [ET.fromstring(part) for part in re.findall(r"<svg.*?</svg>", html, re.S)]


@pytest.mark.parametrize("chart", [
    scatter("t", [Point(1, 2, EVIL, 0, (0.5, 1.5), (1, 3)), Point(2, None, "gone"), Point(float("nan"), 1)], "x", "y", ("a", "b"), diagonal=True, named=True),
    lines("t", {EVIL: [(0, 1.0), (1, 10.0), (2, None)], "b": [(0, 3.0)]}, "x", "y", log=True, marks=[(1, EVIL)], area=True),
    intervals("t", [Interval(EVIL, 0.5, 0.1, 0.9, (0.2, 0.7)), Interval("gone", None)], "x"),
    heat("t", ["0", EVIL], ["a", "b"], [[1.0, None], [0.0, 2.0]], "u"),
    bars("t", [(EVIL, -1.0), ("gone", None)], "x"),
    scatter("t", [], "x", "y"), lines("t", {}, "x", "y"), intervals("t", [], "x"), heat("t", [], [], [], "u"), bars("t", [], "x"),
])  # fmt: skip
def test_a_chart_is_well_formed_and_escapes_what_it_is_given(chart):
    assert svgs(chart), "at least one drawing"
    assert "<script" not in chart and "nan" not in re.sub(r"<[a-z]+ class=\"n[^>]*>", "", chart).replace("-", "").split("</svg>")[0].lower()
    for svg in svgs(chart):
        assert "aria-label" in svg.attrib or svg.attrib.get("aria-hidden") == "true"


def test_values_lie_where_the_scale_says():
    frame = Frame(Scale(0.0, 10.0), Scale(1.0, 100.0, log=True), "x", "y")
    left, bottom = frame.at(0.0, 1.0)
    right, top = frame.at(10.0, 100.0)
    assert frame.at(5.0, 10.0) == pytest.approx(((left + right) / 2, (top + bottom) / 2)), "half way, in logarithms on the upright axis"
    assert right > left and top < bottom


@pytest.mark.parametrize("low, high, log", [(0, 1, False), (-3, 7.5, False), (1e-5, 2e-5, False), (0.3, 4000, True), (2, 3, True), (1e6, 5e6, False)])
def test_ticks_are_few_round_and_inside(low, high, log):
    ticks = Scale(low, high, log).ticks()
    assert 1 <= len(ticks) <= 9 and all(low - 1e-9 <= t <= high * (1 + 1e-9) for t in ticks)
    assert all(len(f"{t:.6g}".strip("-0.").replace(".", "").rstrip("0").split("e")[0]) <= 3 for t in ticks), ticks


def test_what_is_missing_is_counted_and_never_drawn_as_zero():
    chart = scatter("t", [Point(1, 2), Point(None, 1), Point(1, float("inf"))], "x", "y")
    assert chart.count("<circle") == 1 and "2 values were not measured" in chart
    forest = intervals("t", [Interval("a", None), Interval("b", 1.0)], "x")
    assert "not measured" in forest and "1 value was not measured" in forest
    grid = heat("t", ["0"], ["a", "b"], [[None, 0.0]], "u")
    assert grid.count("url(#none)") == 1 and grid.count('class="cell"') == 1, "a true zero is a cell"


def test_equal_values_still_make_a_scale():
    assert Scale.of([3.0, 3.0]).low < 3.0 < Scale.of([3.0, 3.0]).high
    assert Scale.of([0.0]).high > 0 and Scale.of([]).high > Scale.of([]).low


def test_numbers_at_ticks_are_short_and_without_exponents_where_people_write_none():
    from luthier.report.charts import _tick

    assert [_tick(v) for v in (0, 1400, -99_000, 999.6, 0.534, 2e5, 1e-5)] == ["0", "1,400", "-99,000", "1,000", "0.534", "2e5", "1e-5"]
