"""Charts: what is drawn, in numbers rather than pictures."""

from __future__ import annotations

import math
import random
import re
from xml.etree import ElementTree

import pytest

from mmrl.charts import SMOOTH_FROM, Series, line_chart, running_mean


def paths(svg: str, colour: str = "#3b82f6") -> list[str]:
    """Outlines of curves stroked in a colour."""
    lines = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg)
    return [d for d, style in lines if "fill: none" in style and f"stroke: {colour}" in style]


def ordinates(path: str) -> list[float]:
    return [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", path)]


def test_the_curve_rises_with_its_values():
    (path,) = paths(line_chart([Series(label="a", steps=[0, 1, 2], values=[1, 2, 4])], "t"))
    top = ordinates(path)
    # The vertical axis of SVG points down.
    assert top[0] > top[1] > top[2]
    assert (top[0] - top[1]) / (top[1] - top[2]) == pytest.approx(0.5, abs=1e-3)


def test_logarithmic_scale_and_plain_labels():
    series = Series(label="a", steps=[0, 1, 2], values=[0.01, 0.1, 1.0])
    svg = line_chart([series], "t", log_scale=True)
    top = ordinates(paths(svg)[0])
    assert top[0] - top[1] == pytest.approx(top[1] - top[2], abs=1e-3)
    assert "mathdefault" not in svg


def test_long_curves_are_smoothed_and_short_ones_are_not():
    def drawn(count: int, **options: bool) -> int:
        values = [i % 2 for i in range(count)]
        series = Series(label="a", steps=list(range(count)), values=values)
        return len(paths(line_chart([series], "t", **options)))

    assert drawn(SMOOTH_FROM - 1) == 1
    assert drawn(SMOOTH_FROM) == 2
    assert drawn(SMOOTH_FROM, markers=True) == 1


def test_gaps_and_empty_series():
    series = Series(label="a", steps=[0, 1, 2, 3, 4], values=[1, 2, math.nan, 2, 1])
    assert paths(line_chart([series], "t"))[0].count("M") == 2
    assert "<svg" in line_chart([Series(label="a", steps=[], values=[])], "t")


def test_band_and_legend():
    plain = Series(label="alone", steps=[0, 1], values=[1, 2])
    band = Series(label="alone", steps=[0, 1], values=[1, 2], band=[0.5, 0.5])
    assert "opacity: 0.12" not in line_chart([plain], "t")
    assert "opacity: 0.12" in line_chart([band], "t")
    assert "alone" not in line_chart([plain], "t")
    other = Series(label="<other> $x$", steps=[0, 1], values=[2, 1])
    assert "&lt;other&gt; $x$" in line_chart([plain, other], "t")


def test_a_constant_has_a_readable_axis():
    svg = line_chart([Series(label="a", steps=[0, 1], values=[3e-4, 3e-4 + 1e-19])], "t")
    assert ">0.00030<" in svg
    assert "1e" not in "".join(re.findall(r">([^<]*)</text>", svg))


def test_well_formed_named_and_reproducible():
    series = [Series(label="a", steps=[0, 1], values=[1, 2])]
    svg = line_chart(series, 'a "title" & more')
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == 'a "title" & more'
    assert root.get("width") is None
    assert svg == line_chart(series, 'a "title" & more')


def test_running_mean_against_a_plain_loop():
    rng = random.Random(0)
    values = [math.nan if rng.random() < 0.2 else rng.gauss(0, 1) for _ in range(50)]
    for window in (1, 4, 9):
        half = window // 2
        for i, mean in enumerate(running_mean(values, window)):
            near = [x for x in values[max(0, i - half) : i + half + 1] if not math.isnan(x)]
            expected = math.fsum(near) / len(near) if near else math.nan
            assert mean == pytest.approx(expected, abs=1e-12, nan_ok=True)
