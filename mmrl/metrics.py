"""Metrics of a run: one JSON object a line, flushed at once, cut back to the step of a resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from mmrl.types import Greatest, Least, Metric, Total


class Means:
    """Accumulates metrics by name; ``result`` divides (sum, count) pairs once."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Add what a micro-batch or a group reports."""
        for name, new in metrics.items():
            old = self._metrics.get(name)
            self._metrics[name] = new if old is None else _together(old, new)

    @property
    def metrics(self) -> dict[str, Metric]:
        """What has been added so far, by name."""
        return dict(self._metrics)

    def result(self) -> dict[str, float]:
        """Means of what was counted at least once, totals and extremes."""
        return {
            name: value[0] / value[1] if isinstance(value, tuple) else float(value)
            for name, value in self._metrics.items()
            if not isinstance(value, tuple) or value[1]
        }


def _together(old: Metric, new: Metric) -> Metric:
    """``ValueError`` for metrics of two kinds under one name."""
    if isinstance(old, tuple) and isinstance(new, tuple):
        return (old[0] + float(new[0]), old[1] + float(new[1]))
    for kind, join in ((Least, min), (Greatest, max), (Total, lambda a, b: a + b)):
        if isinstance(old, kind) and isinstance(new, kind):
            return kind(join(old, new))
    raise ValueError(f"one metric is {old!r} and {new!r}")


class MetricsFile:
    """``metrics.jsonl``: append-only within a run; ``step`` is the number of finished steps."""

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        """Open for appending, keeping only lines with ``step <= keep_until`` of an earlier run."""
        lines = kept_lines(path, keep_until) if keep_until is not None else []
        # Renamed into place: a kill at this moment must not lose the lines of the earlier run.
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line. A value that is not finite becomes null: JSON has no NaN."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def kept_lines(path: Path, until: int) -> list[str]:
    """Complete lines of the file up to and including a step."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # A killed run may leave half a line; it belongs to a step that is done again.
        if line.endswith("\n") and _step_of(line) <= until:
            kept.append(line)
    return kept


def _step_of(line: str) -> float:
    """The step of a line; infinite for a damaged one, which is then not kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
