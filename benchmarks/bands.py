"""Scores against the time of training, over several seeds: their mean and a band around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from benchmarks.runs import Axis, Point, score_at

GRID_POINTS = 200


def band(
    paths: Sequence[Sequence[Point]], name: str, along: Axis = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of several runs at common times: seconds or tokens [T] and scores [runs, T].

    As far as the shortest run goes, on straight lines between evaluations.
    """
    end = min(getattr(points[-1], along) for points in paths)
    times = np.linspace(0.0, end, GRID_POINTS)
    return times, np.array([[score_at(points, name, t, along) for t in times] for points in paths])


def draw(
    axes: Axes,
    paths: Sequence[Sequence[Point]],
    name: str,
    colour: str,
    label: str,
    along: Axis = "cpu",
) -> None:
    """A line for the mean over runs, and a band from the lowest to the highest."""
    times, scores = band(paths, name, along)
    axes.plot(times, scores.mean(axis=0), color=colour, label=label)
    low, high = scores.min(axis=0), scores.max(axis=0)
    axes.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
