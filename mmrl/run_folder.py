"""Reading a run folder: configuration, environment, metrics, sample grids.

Everything that looks back at a run (report, model card, command line) goes through here.  A run
that was stopped early lacks pieces; what is missing reads as empty, never as an error.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mmrl.errors import UserError

LOG = logging.getLogger(__name__)
EVAL = "eval/"
CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"

COMPLETIONS = "completions"

Kind = Literal["step", "eval"]
"""Completions of training prompts in a step, or those of held-out prompts after it."""

Row = Mapping[str, Any]
"""One line of ``metrics.jsonl``: ``step`` and named scalars."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What a run left behind.

    ``config``: the resolved YAML.  ``environment``: versions, commit, command, device.
    ``metrics``: rows in file order.  ``samples``: of each evaluated step, a grid of pictures (PNG)
    or texts (jsonl).  ``trained`` and ``held_out``: completions with their rewards (parquet), by
    step.
    """

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Row]
    samples: Mapping[int, Path]
    trained: Mapping[int, Path]
    held_out: Mapping[int, Path]

    @property
    def name(self) -> str:
        """The configured name, or that of the folder."""
        return str(self.config.get("name") or self.path.resolve().name)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One evaluation metric over a run.

    ``before`` and ``after``: values at the first and the last evaluation; ``after`` is ``None``
    after a single one.  ``best``: the largest value, at ``best_step`` (rewards and diversity are
    better when larger).
    """

    name: str
    before: float
    after: float | None
    best: float
    best_step: int

    @property
    def change(self) -> float | None:
        """``after - before``."""
        return None if self.after is None else self.after - self.before


def read_run(path: Path) -> RunFolder:
    """The run in ``path``; ``UserError`` unless it holds a configuration or metrics."""
    if not path.is_dir():
        raise UserError(f"run folder not found: {path}")
    if not any((path / name).is_file() for name in (CONFIG, METRICS)):
        raise UserError(f"{path} is not a run folder: it has neither {CONFIG} nor {METRICS}")
    return RunFolder(
        path=path,
        config=_read_mapping(path / CONFIG),
        environment=_read_mapping(path / ENVIRONMENT),
        metrics=read_metrics(path / METRICS),
        samples=_samples(path / "samples"),
        trained=completion_files(path / COMPLETIONS, "step"),
        held_out=completion_files(path / COMPLETIONS, "eval"),
    )


def completion_files(folder: Path, kind: Kind) -> dict[int, Path]:
    """Files of completions by their steps, in order."""
    return _by_step(folder, re.compile(rf"{kind}-(\d+)\.parquet"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of completions."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl``; none if there is no file.

    A killed run leaves half a line at the end, which is skipped; a broken line anywhere else is
    skipped with a warning.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    parsed = [_parse_row(line) for line in lines]
    for number, (line, row) in enumerate(zip(lines, parsed, strict=True), 1):
        if row is None and line.strip() and number < len(lines):
            LOG.warning("%s:%d is not a metrics line and is skipped", path, number)
    return [row for row in parsed if row is not None]


def evaluations(metrics: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Finite evaluation values by step; names lose their ``eval/`` prefix."""
    found: dict[int, dict[str, float]] = {}
    for row in metrics:
        values = {
            key.removeprefix(EVAL): float(value)
            for key, value in row.items()
            if key.startswith(EVAL) and is_finite(value)
        }
        if values:
            # A resumed run may evaluate a step again: the later line is the valid one.
            found.setdefault(int(row["step"]), {}).update(values)
    return dict(sorted(found.items()))


def before_after(metrics: Sequence[Row]) -> list[Change]:
    """First, last and best value of every evaluation metric, in order of appearance."""
    by_step = evaluations(metrics)
    names = dict.fromkeys(name for values in by_step.values() for name in values)
    return [_change(name, by_step) for name in names]


def _change(name: str, by_step: Mapping[int, Mapping[str, float]]) -> Change:
    points = [(step, values[name]) for step, values in by_step.items() if name in values]
    best_step, best = max(points, key=lambda point: point[1])
    after = points[-1][1] if len(points) > 1 else None
    return Change(name=name, before=points[0][1], after=after, best=best, best_step=best_step)


def training_curves(metrics: Sequence[Row]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every training metric, sorted by name; not finite reads as NaN."""
    curves: dict[str, dict[int, float]] = {}
    for row in metrics:
        for key, value in row.items():
            # The log writes a value that is not finite as null: a gap in the curve.
            if key != "step" and not key.startswith(EVAL) and (value is None or _is_number(value)):
                curves.setdefault(key, {})[int(row["step"])] = _finite_or_nan(value)
    return {
        key: (sorted(points), [points[step] for step in sorted(points)])
        for key, points in sorted(curves.items())
    }


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a finite number (a boolean is none)."""
    return _is_number(value) and math.isfinite(value)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a nested configuration under dotted names; items of a list go by number."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[str(key)] = value
    return flat


def _finite_or_nan(value: Any) -> float:
    return float(value) if is_finite(value) else math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON mapping; empty if the file is missing or damaged."""
    if not path.is_file():
        return {}
    try:
        # JSON is a subset of YAML, so one reader serves both files.
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        LOG.warning("%s cannot be read and is left out", path)
        return {}
    return data if isinstance(data, dict) else {}


def _samples(folder: Path) -> dict[int, Path]:
    return _by_step(folder, re.compile(r"step-(\d+)\.(png|jsonl)"))


def _by_step(folder: Path, name: re.Pattern[str]) -> dict[int, Path]:
    matches = ((name.fullmatch(path.name), path) for path in folder.glob("*"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))
