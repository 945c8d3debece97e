"""Scores against the time of training, over several seeds: their mean and a band around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from benchmarks.runs import Point, score_at

GRID_POINTS = 200


def band(paths: Sequence[Sequence[Point]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores of several runs at common times: CPU-seconds [T] and scores [runs, T].

    As far as the shortest run goes, on straight lines between evaluations.
    """
    end = min(points[-1].cpu for points in paths)
    times = np.linspace(0.0, end, GRID_POINTS)
    return times, np.array([[score_at(points, name, t) for t in times] for points in paths])


def draw(axes: Axes, paths: Sequence[Sequence[Point]], name: str, colour: str, label: str) -> None:
    """A line for the mean over runs, and a band from the lowest to the highest."""
    times, scores = band(paths, name)
    axes.plot(times, scores.mean(axis=0), color=colour, label=label)
    low, high = scores.min(axis=0), scores.max(axis=0)
    axes.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
