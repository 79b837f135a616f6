"""Figures: what is drawn is where its value is, and says so in words and in its table."""

import itertools
import re
from xml.etree import ElementTree

import pytest

from codiemb.figures.axes import Axis, axis, label, ticks
from codiemb.figures.bins import band, stretches
from codiemb.figures.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, bars, histogram, line_chart, line_plot
from codiemb.figures.picture import picture
from codiemb.figures.scatter import Point, scatter
from codiemb.figures.strips import level, shares, whisker


def tree_of(markup):
    return ElementTree.fromstring(markup)


def scale_of(tree, anchor):
    """A function from places back to values, from the two outer ticks of an axis: what a reader does with a ruler."""
    at = "x" if anchor == "middle" else "y"
    shift = 0 if at == "x" else 4  # a number stands 4 below the middle of its line
    found = [
        (float(text.get(at)) - shift, float(text.text.replace("−", "-").replace("k", "e3").replace("M", "e6")))
        for text in tree.iter("text")
        if text.get("text-anchor") == anchor and text.get("class") is None
    ]
    (a, low), (b, high) = found[0], found[-1]
    assert a != b
    return lambda place: low + (high - low) * (place - a) / (b - a)


def places(polyline):
    return [tuple(map(float, point.split(","))) for point in polyline.get("points").split()]


def test_the_points_of_a_line_stand_at_their_values():
    points = [(1, 2.5), (4, -1.0), (10, 7.25), (11, 0.0)]
    tree = tree_of(line_chart("loss", [Line("a", points)], "step", "loss"))
    x, y = scale_of(tree, "middle"), scale_of(tree, "end")
    drawn = [(x(a), y(b)) for a, b in places(next(tree.iter("polyline")))]
    for (a, b), (c, d) in zip(drawn, points, strict=True):
        assert (a, b) == (pytest.approx(c, abs=0.03), pytest.approx(d, abs=0.03))


def test_the_table_of_a_line_holds_its_values():
    lines = [Line("one", [(1, 0.5), (2, 0.25)]), Line("two", [(2, 3.0)], 1, [(2, 1.0, 4.0)])]
    tree = tree_of(line_chart("t", lines, "step", "loss"))
    rows = [[cell.text for cell in row] for row in tree.iter("tr")]
    assert rows == [
        ["step", "one", "two", "two, 10 %", "90 %"],
        ["1", "0.5", "–", "–", "–"],
        ["2", "0.25", "3", "1", "4"],
    ]
    hover = [title.text for title in tree.iter("title")]
    assert hover == ["1\none 0.5", "2\none 0.25\ntwo 3"]


def test_bands_of_many_lines_are_left_to_the_table():
    """Three bands over each other are a grey cloud, and one of them would set the axis for all."""
    lines = [Line(str(n), [(0, 1.0), (1, 2.0)], n, [(0, 0.5, 9.0), (1, 1.0, 9.5)]) for n in range(3)]
    few, many = (tree_of(line_chart("t", shown, "step", "loss")) for shown in (lines[:2], lines))
    bands = [[path for path in tree.iter("path") if path.get("class").startswith("band")] for tree in (few, many)]
    assert [len(found) for found in bands] == [2, 0]
    tops = [tree.find(".//svg[@class='plot']").findall("text[@text-anchor='end']")[-2].text for tree in (few, many)]
    assert tops == ["10", "2"]
    assert "9.5" in [cell.text for cell in many.iter("td")]


def test_a_line_of_orders_of_magnitude():
    """By orders, 100 stands in the middle of 1 and 10,000."""
    tree = tree_of(line_chart("t", [Line("a", [(0, 1.0), (1, 100.0), (2, 10_000.0)])], "layer", "number", log=True))
    y = [place for _, place in places(next(tree.iter("polyline")))]
    assert y == [BOTTOM, pytest.approx((BOTTOM + TOP) / 2, abs=0.1), TOP]


@pytest.mark.parametrize(
    "values", [[0.0], [5.0], [-3.0, -3.0], [1e-12, 2e-12], [1e12, 3e12], [0.0, 1e-300], [1e9, 1e9 + 1e-3]]
)
@pytest.mark.parametrize("zero", [False, True])
def test_strange_values_have_an_axis(values, zero):
    """One value, tiny ones, huge ones: they are inside, and there are ticks but no forest of them."""
    found = axis(values, 0, 100, zero=zero)
    assert all(-1e-6 <= found.at(value) <= 100 + 1e-6 for value in values)
    assert 1 <= len(found.ticks()) <= 12


def test_nothing_to_draw_is_no_figure():
    assert line_chart("t", [Line("a", [])], "x", "y") is None


def test_ticks_are_round():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(-0.13, 0.21) == [-0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2] or ticks(-0.13, 0.21) == [-0.1, 0, 0.1, 0.2]
    assert [label(value) for value in (0, 0.25, -3, 20_000, 2_500_000, 1e-5)] == [
        "0",
        "0.25",
        "−3",
        "20k",
        "2.5M",
        "1e−5",
    ]


def test_bars_are_as_high_as_their_counts():
    tree = tree_of(histogram("t", [0, 10, 20, 30], [4, 0, 8], "tokens", "texts", mark=(15, "cut"), open_end=True))
    y = scale_of(tree, "end")
    bars = [bar for bar in tree.iter("rect")]
    assert [y(float(bar.get("y"))) for bar in bars] == pytest.approx([4, 0, 8], abs=0.03)
    assert all(float(bar.get("y")) + float(bar.get("height")) == pytest.approx(BOTTOM, abs=0.1) for bar in bars)
    assert [bar[0].text for bar in bars] == ["0 to 10: 4", "10 to 20: 0", "20 and more: 8"]
    (mark,) = (line for line in tree.iter("line") if line.get("class") == "mark")
    assert float(mark.get("x1")) == pytest.approx((LEFT + RIGHT) / 2, abs=0.1)


def test_points_stand_at_their_values():
    dots = [Point("a", 50.0, 60.0, "base"), Point("b", 54.0, 58.0, "knee", True)]
    tree = tree_of(scatter("t", dots, "retrieval", "similarity", front=[0, 1]))
    x, y = scale_of(tree, "middle"), scale_of(tree, "end")
    drawn = [(x(float(dot.get("cx"))), y(float(dot.get("cy")))) for dot in tree.iter("circle")]
    assert drawn == [pytest.approx((50, 60), abs=0.02), pytest.approx((54, 58), abs=0.02)]
    assert places(next(tree.iter("polyline")))[1] == (
        float(tree.findall(".//circle")[1].get("cx")),
        float(tree.findall(".//circle")[1].get("cy")),
    )


def test_a_whisker_spans_its_interval():
    """On an axis from -0.1 to 0.1 over 10 to 110, a difference of 0.05 from 0.02 to 0.08 stands at 85, 70 to 100."""
    tree = tree_of(whisker(0.05, (0.02, 0.08), Axis(-0.1, 0.1, 10, 110), "better"))
    (line,) = (found for found in tree.iter("line") if found.get("class") == "whisker")
    assert (line.get("x1"), line.get("x2"), next(tree.iter("circle")).get("cx")) == ("70.0", "100.0", "85.0")
    assert tree[0].text == "+5.00 points, interval [+2.00, +8.00]"
    alone = tree_of(whisker(0.05, None, Axis(-0.1, 0.1, 10, 110), "untested"))
    assert not [found for found in alone.iter("line") if found.get("class") == "whisker"]


def test_shares_fill_the_bar():
    tree = tree_of(f"<div>{shares([('forward', 0.25), ('backward', 0.75)], 'time')}</div>")
    assert [(bar.get("x"), bar.get("width")) for bar in next(tree.iter("svg"))] == [
        ("0.00", "25.00"),
        ("25.00", "75.00"),
    ]


def test_a_small_share_is_still_seen():
    assert [level(share) for share in (0.001, 0.2, 0.5, 1.0)] == [1, 1, 2, 5]


@pytest.mark.parametrize(
    ("steps", "most"),
    [(range(1, 51), 80), (range(1, 50_001), 80), (range(7, 1007), 240), ([3], 80), (range(10, 3000, 10), 120)],
)
def test_every_step_is_in_the_stretch_that_names_it(steps, most):
    cut = stretches(steps, most)
    assert cut.count == min(most, len(steps))
    for step in steps:
        low, high = cut.bounds(cut.of(step))
        assert low <= step <= high
    bounds = [cut.bounds(place) for place in range(cut.count)]
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(bounds))
    assert (bounds[0][0], bounds[-1][1]) == (steps[0], steps[-1])


def test_a_stretch_is_its_median_and_its_quantiles():
    """Of 0 to 10: the median is 5, the tenth and ninetieth percentile are 1 and 9. NaN and None do not count."""
    cut = stretches(range(1, 23), 2)
    found = band([*range(1, 12), 2, 3, 15], [*map(float, range(11)), float("nan"), None, 7.0], cut)
    assert (found.median, found.low, found.high) == ({0: 5, 1: 7}, {0: 1, 1: 7}, {0: 9, 1: 7})


def test_names_are_not_only_told_by_colour():
    """Two lines differ in their dashes too."""
    tree = tree_of(line_chart("t", [Line("a", [(0, 1), (1, 2)], 0), Line("b", [(0, 2), (1, 1)], 1)], "x", "y"))
    styles = [line.get("class") for line in tree.iter("polyline")]
    assert styles == ["line c0 d0", "line c1 d1"]
    assert re.findall("<bdi>(.)</bdi>", ElementTree.tostring(tree, encoding="unicode")) == ["a", "b"]


def test_names_of_points_do_not_cover_each_other():
    """Models of one run score alike, so their points stand close together."""
    dots = [
        Point("base", 50, 60, "base", True),
        *(Point(f"fused {n}", 54 + n / 5, 62, "fused", True) for n in range(3)),
    ]
    tree = tree_of(scatter("t", dots, "retrieval", "similarity"))
    boxes = []
    for text in (text for text in tree.iter("text") if text.get("class") == "named"):
        x, y, width = float(text.get("x")), float(text.get("y")), 6 * len(text.text)
        left = {"start": x, "middle": x - width / 2, "end": x - width}[text.get("text-anchor")]
        boxes.append((left, y - 9, left + width, y))
    assert len(boxes) == 4
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def test_bars_reach_their_values():
    """Of -0.5, 0.25 and 1: on one scale, from the same 0, to the left of it what is below."""
    tree = tree_of(bars([("a", -0.5), ("b", 0.25), ("c", 1.0)], "cosine"))
    zero = float(next(line for line in tree.iter("line") if line.get("class") == "zero").get("x1"))
    drawn = [(float(bar.get("x")), float(bar.get("width")), bar.get("class")) for bar in tree.iter("rect")]
    unit = drawn[2][1]
    assert drawn[0] == (pytest.approx(zero - unit / 2, abs=0.2), pytest.approx(unit / 2, abs=0.1), "fill against")
    assert drawn[1] == (pytest.approx(zero, abs=0.1), pytest.approx(unit / 4, abs=0.1), "fill with")
    assert [text.text for text in tree.iter("text")] == ["a", "−0.5", "b", "0.25", "c", "1", "cosine"]


def test_the_end_of_a_line_is_a_ring_at_its_value():
    tree = tree_of(line_plot("t", [Line("a", [(0, 1.0), (1, 2.0)], 2, end=3.0)], "layer", "value"))
    (ring,) = (circle for circle in tree.iter("circle") if circle.get("class") == "line c2")
    assert scale_of(tree, "end")(float(ring.get("cy"))) == pytest.approx(3, abs=0.03)


def test_a_picture_stands_alone():
    """A viewer that knows no CSS names shows it too, nothing is asked for, and a hostile name is text."""
    plots = [(f"plot {n}", line_plot("t", [Line("a", [(0, 1.0), (1, 2.0)])], "x", "y")) for n in range(5)]
    drawn = picture(plots, ["<script>alert(1)</script>"], columns=2)
    tree = ElementTree.fromstring(drawn)
    assert (tree.tag, "var(" in drawn, "<script" in drawn) == ("{http://www.w3.org/2000/svg}svg", False, False)
    style = tree.find("{*}style").text
    assert ".c0 { color: #0072b2; }" in style
    assert "url(" not in style
    inner = [tuple(map(float, re.findall(r"[\d.]+", g.get("transform")))) for g in tree if g.tag.endswith("}g")][1:]
    assert len({x for x, _ in inner}) == 2
    assert len({y for _, y in inner}) == 3
    wide, high = float(tree.get("width")), float(tree.get("height"))
    assert all(x + WIDTH <= wide and y + HEIGHT <= high for x, y in inner)
