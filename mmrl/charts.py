"""Line charts as inline SVG that follow the colours of the page, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

SERIES_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#eab308")
# Colours that no drawing uses, replaced by variables of the page's style sheet after drawing.
_THEMED = {"#010203": "var(--ink)", "#010204": "var(--muted)", "#010205": "var(--line)"}
_INK, _MUTED, _LINE = _THEMED
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
}
WIDTH, HEIGHT = 4.8, 2.7
"""Of a chart, in inches."""
SMOOTH_FROM = 30
"""Curves with at least this many points also show a running mean."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A labelled curve; NaN values leave a gap.  ``band``: half the height of a shaded band."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    band: Sequence[float] = ()


def line_chart(
    series: Sequence[Series], title: str, *, markers: bool = False, log_scale: bool = False
) -> str:
    """An ``<svg>`` element; ``title`` is what a screen reader says.

    ``markers`` shows each point, for sparse series such as evaluations, and never smooths.
    """
    # The salt keeps identifiers of one page apart and the file reproducible.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_subplot()
        axes.grid(axis="y")
        if log_scale:
            _logarithmic(axes)
        for i, item in enumerate(series):
            _draw(axes, item, SERIES_COLOURS[i % len(SERIES_COLOURS)], markers)
        axes.set_xlabel("step")
        _widen_if_flat(axes, series)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if len(series) > 1:
            # Above the plot, so that it never covers a curve.
            columns = min(3, len(series))
            figure.legend(loc="upper left", ncols=columns, labelcolor=_INK)
        _leave_margins(figure, axes, math.ceil(len(series) / 3) if len(series) > 1 else 0)
        return _inline(figure, title)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite values within ``window`` points around each; NaN where there is none."""
    half = window // 2
    finite = [math.isfinite(x) for x in values]
    # Sums of prefixes, so that long runs do not cost a window for each point.
    sums = [0.0, *accumulate(x if ok else 0.0 for x, ok in zip(values, finite, strict=True))]
    counts = [0, *accumulate(finite)]
    means = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        count = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / count if count else math.nan)
    return means


def _draw(axes: Axes, item: Series, colour: str, markers: bool) -> None:
    smooth = not markers and len(item.values) >= SMOOTH_FROM
    shown = running_mean(item.values, max(3, len(item.values) // 12)) if smooth else item.values
    if smooth:
        axes.plot(item.steps, item.values, color=colour, alpha=0.3, linewidth=1)
    lonely = markers or len(item.values) == 1
    marker = {"marker": "o", "markersize": 4} if lonely else {}
    axes.plot(item.steps, shown, color=colour, linewidth=1.8, label=item.label, **marker)
    if item.band:
        low = [m - s for m, s in zip(shown, item.band, strict=True)]
        high = [m + s for m, s in zip(shown, item.band, strict=True)]
        axes.fill_between(item.steps, low, high, color=colour, alpha=0.12, linewidth=0)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    # Plain numbers: the default labels are mathematics, which SVG text does not set.
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _widen_if_flat(axes: Axes, series: Sequence[Series]) -> None:
    """Room around a constant, whose axis would otherwise show rounding errors."""
    values = [x for item in series if not item.band for x in item.values if math.isfinite(x)]
    if values and max(values) - min(values) <= 1e-9 * max(map(abs, values)):
        room = 0.1 * abs(values[0]) or 0.1
        axes.set_ylim(values[0] - room, values[0] + room)


def _leave_margins(figure: Figure, axes: Axes, legend_lines: int) -> None:
    """Room for what stands beside the plot.  A layout engine would draw everything once more."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.yaxis.get_majorticklocs() if low <= tick <= high]
    labels = axes.yaxis.get_major_formatter()
    longest = max(map(len, labels.format_ticks(ticks)), default=0)
    lines = legend_lines + bool(labels.get_offset())
    figure.subplots_adjust(
        left=(0.2 + 0.08 * longest) / WIDTH,
        right=1 - 0.15 / WIDTH,
        bottom=0.5 / HEIGHT,
        top=1 - (0.1 + 0.2 * lines) / HEIGHT,
    )


def _inline(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A style element inside a drawing would apply to the whole page.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    # The page decides the width; identifiers of groups would repeat from chart to chart.
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    for colour, variable in _THEMED.items():
        text = text.replace(colour, variable)
    label = escape(title, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
