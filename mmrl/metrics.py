"""Metrics of a run: one JSON object a line, flushed at once, cut back to the step of a resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

Pair = tuple[float, float]
EXTREMES = {"/min": min, "/max": max}
"""What becomes of pairs of a name with such an ending, instead of adding them up."""


class Means:
    """Accumulates (sum, count) pairs by name; ``result`` divides them once.

    Of a name that ends in ``/min`` or ``/max`` the pair is (value, 1), and the extreme one stays.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, Pair] = {}

    def add(self, pairs: Mapping[str, Pair]) -> None:
        """Add pairs of a micro-batch."""
        for name, (total, count) in pairs.items():
            pair, old = (float(total), float(count)), self._pairs.get(name, (0.0, 0.0))
            extreme = next((f for end, f in EXTREMES.items() if name.endswith(end)), None)
            if extreme is None:
                self._pairs[name] = (old[0] + pair[0], old[1] + pair[1])
            else:
                self._pairs[name] = extreme((p for p in (old, pair) if p[1]), default=pair)

    @property
    def pairs(self) -> dict[str, Pair]:
        """What has been added so far, by name."""
        return dict(self._pairs)

    def result(self) -> dict[str, float]:
        """The means of everything that was counted at least once."""
        return {name: total / count for name, (total, count) in self._pairs.items() if count}


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
