"""Charts: their points, what they leave out, and what they say to a screen reader."""

import math
import re

from ubgen.report.charts import bars, lines


def test_each_point_shows_its_value() -> None:
    svg = str(lines("Loss", {"loss": [(1, 5.0), (2, math.nan), (3, 2.5)]}, "update"))
    assert re.findall(r"<title>(.*?)</title>", svg) == ["update 1, loss: 5", "update 3, loss: 2.5"]
    assert 'aria-label="Loss. loss: first 5, last 2.5, lowest 2.5, highest 5"' in svg
    ys = [float(y) for y in re.findall(r'cy="([\d.]+)" r="2.2"', svg)]
    assert ys[0] < ys[1]  # downwards


def test_many_points_are_averaged_not_dropped() -> None:
    svg = str(lines("Loss", {"loss": [(i, i % 2) for i in range(600)]}, "update"))
    titles = re.findall(r"loss: ([\d.]+)</title>", svg)
    assert titles == ["0.5"] * 60


def test_a_band_lies_around_its_curve() -> None:
    svg = str(lines("Accuracy", {"a": [(1, 5), (2, 6)]}, "share", bands={"a": [(1, 4, 6), (2, 0, 10)]}))
    around = re.search(r'<polygon class="c0" points="([^"]*)"', svg)
    assert around
    ys = [float(point.split(",")[1]) for point in around[1].split()]
    dots = [float(y) for y in re.findall(r'cy="([\d.]+)" r="2.2"', svg)]
    assert ys[0] > dots[0] > ys[3]  # downwards
    assert ys[1] > dots[1] > ys[2]


def test_nothing_to_draw_is_no_chart() -> None:
    assert lines("Loss", {"loss": [], "other": [(1, math.inf)]}, "update") is None
    assert bars("Scores", [], [], "score") is None
    assert bars("Scores", [0, 1, 2], [0, 0], "score") is None


def test_a_constant_has_a_scale() -> None:
    svg = str(lines("Learning rate", {"lr": [(5, 0.0001), (6, 0.0001)]}, "update"))
    heights = {float(y) for y in re.findall(r'cy="([\d.]+)" r="2.2"', svg)}
    assert len(heights) == 1
    assert ">0.00012<" in svg  # ticks near the value, by which it can be read


def test_names_are_escaped() -> None:
    svg = str(lines("<b>", {"<script>": [(1, 1)], "b": [(1, 2)]}, "<i>"))
    assert not re.search(r"<(b|i|script)>", svg)


def test_bars_show_their_range_and_count() -> None:
    svg = str(bars("Scores", [0, 0.5, 1], [3, 9], "score"))
    assert re.findall(r"<title>(.*?)</title>", svg) == ["0 to 0.5: 3", "0.5 to 1: 9"]
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"><title>', svg)]
    assert abs(heights[1] - 3 * heights[0]) < 0.2  # rounded to 0.1
