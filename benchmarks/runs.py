"""Training commands of a benchmark: started, continued, stopped at a budget, and read back.

Training costs what its steps cost: ``time/cpu`` (CPU-seconds of the process, all threads) and
``step_time`` (wall seconds) of ``metrics.jsonl``, added up.  Start-up, evaluations and checkpoints
are no part of them; what a whole command costs is kept apart, in ``pieces.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from benchmarks import tables
from mmrl.config import RunConfig, load, parse, read_yaml
from mmrl.errors import UserError
from mmrl.run_folder import (
    CONFIG,
    ENVIRONMENT,
    EVAL,
    METRICS,
    Row,
    flatten,
    is_finite,
    read_metrics,
)

POLL_SECONDS = 0.5
INTERRUPTED = 130
ENDLESS = 1_000_000
PIECES = "pieces.json"
NUM_STEPS = "training.num_steps"
Axis = Literal["cpu", "wall", "tokens"]
"""What the course of a run is measured in."""
START_TOLERANCE = 0.02
"""Of a score before training: another batch size may round a few pictures over an edge."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluation: after ``step`` steps, which cost ``cpu`` and ``wall`` seconds; its scores.

    ``tokens``: generated until then by a language model, see ``generated_tokens``.
    """

    step: int
    cpu: float
    wall: float
    scores: Mapping[str, float]
    tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Seconds of training, and generated tokens, until a score was reached."""

    cpu: float
    wall: float
    tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One command of a run that took several: what it cost in all, and its exit status."""

    wall: float
    cpu: float
    status: int


@dataclass(kw_only=True)
class Cost:
    """Seconds that ``metered`` fills in."""

    wall: float = 0.0
    cpu: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that a benchmark wants.

    ``overrides``: of the recipe ``config``, as on the command line.  ``budget``: CPU-seconds of
    training after which the run ends, at its next evaluation; without one it ends after the number
    of steps of the recipe.
    """

    config: Path
    folder: Path
    seed: int
    overrides: tuple[str, ...] = ()
    budget: float | None = None

    @property
    def changes(self) -> list[str]:
        """All overrides, those that follow from the job included."""
        endless = [] if self.budget is None else [override(NUM_STEPS, ENDLESS)]
        return [*self.overrides, *endless, override("seed", self.seed)]

    @property
    def command(self) -> list[str]:
        """``mmrl train``; continues what the folder holds."""
        started = (self.folder / CONFIG).is_file()
        return train_command(self.config, self.folder, self.changes, resume=started)

    @cached_property
    def settings(self) -> RunConfig:
        """The validated configuration; ``UserError`` for a budget with a planned end."""
        settings = load(tables.ROOT / self.config, self.changes)
        schedule = settings.optimizer.schedule
        if self.budget is not None and schedule != "constant":
            raise UserError(
                f"{self.config}: optimizer.schedule = {schedule!r} needs to know the last step, "
                "which a budget leaves open; allowed: 'constant'"
            )
        return settings

    def wanted(self, points: Sequence[Point]) -> tuple[Sequence[Point], bool]:
        """The points up to the end of the job, and whether the end is among them."""
        for count, point in enumerate(points, 1):
            if self._is_end(point):
                return points[:count], True
        return points, False

    def _is_end(self, point: Point) -> bool:
        if self.budget is not None:
            return point.cpu >= self.budget
        return point.step >= self.settings.training.num_steps


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a job left: its evaluations, all its metrics, and what its commands cost.

    ``failed``: training ended by itself before its time, for example because it diverged.
    """

    job: Job
    points: Sequence[Point]
    rows: Sequence[Row]
    pieces: Sequence[Piece]
    failed: bool

    def record(self) -> dict[str, Any]:
        """Raw numbers for the results file, whose paths are relative to the working folder."""
        here = f"{Path.cwd()}{os.sep}"
        return {
            "seed": self.job.seed,
            "overrides": [each.replace(here, "") for each in self.job.overrides],
            "budget": self.job.budget,
            "failed": self.failed,
            "commit": _commit(self.job.folder),
            "points": [asdict(point) for point in self.points],
            "pieces": [asdict(piece) for piece in self.pieces],
        }


# Running


def train_command(
    config: Path, folder: Path, changes: Sequence[str], *, resume: bool = False
) -> list[str]:
    """``mmrl train`` into ``folder``, which also names the run."""
    command = [sys.executable, "-m", "mmrl", "train", str(config), *changes]
    command += [f"name={folder.name}", f"output_dir={folder.resolve()}"]
    return [*command, "--resume"] if resume else command


@contextmanager
def metered() -> Iterator[Cost]:
    """What the commands that end inside cost; known once the block is left."""
    cost, used, started = Cost(), _children_cpu(), time.perf_counter()
    try:
        yield cost
    finally:
        cost.wall, cost.cpu = time.perf_counter() - started, _children_cpu() - used


def ensure(job: Job, *, fresh: bool = False) -> Run:
    """The run of a job: kept if it is finished, continued if it was interrupted, else trained.

    ``fresh`` removes it first.  A run that fails after its first step is a result too, and kept;
    one that fails before is a mistake.

    Raises:
        UserError: the folder holds a run with other settings.
        SystemExit: the command was interrupted or killed, or failed before its first step.
    """
    if fresh and (job.folder / CONFIG).is_file():
        shutil.rmtree(job.folder)
    refuse_other_settings(job)
    if not is_finished(job):
        _train(job, is_finished)
    return read(job)


def ensure_exported(job: Job) -> Run:
    """As ``ensure``, for a job with a budget whose adapter is wanted, in ``final/``.

    The run ends as near to the budget as whole steps allow, not at an evaluation.  Its last step is
    evaluated, so the last point tells what the adapter does and what it cost.
    """
    refuse_other_settings(job)
    if not (is_exported(job) or _failed(job.folder)):
        if not _is_spent(job):
            _train(job, _is_spent)
        if not _failed(job.folder):
            _train(_last_step(job), is_exported)
    rows = read_metrics(job.folder / METRICS)
    return Run(
        job=job,
        points=curve(rows),
        rows=rows,
        pieces=_pieces(job.folder),
        failed=not is_exported(job),
    )


def is_exported(job: Job) -> bool:
    """Whether the last command came to the end of its run, where it exports."""
    pieces = _pieces(job.folder)
    return bool(pieces) and pieces[-1].status == 0


def is_finished(job: Job) -> bool:
    """Whether nothing is left to train: the end was evaluated, or training failed."""
    return job.wanted(_points(job))[1] or _failed(job.folder)


def read(job: Job) -> Run:
    """What lies in the folder of a job."""
    rows = read_metrics(job.folder / METRICS)
    points, ended = job.wanted(curve(rows))
    return Run(
        job=job,
        points=points,
        rows=rows,
        pieces=_pieces(job.folder),
        failed=not ended and _failed(job.folder),
    )


def refuse_other_settings(job: Job) -> None:
    """``UserError`` if the folder holds a run that another configuration made.

    The number of steps may differ unless the learning rate depends on it: a longer run begins like
    a shorter one.
    """
    path = job.folder / CONFIG
    if not path.is_file():
        return
    before, now = (flatten(c.dump()) for c in (parse(read_yaml(path)), job.settings))
    free = {"name", "output_dir"}
    if job.settings.optimizer.schedule == "constant":
        free |= {NUM_STEPS}
    keys = sorted((before.keys() | now.keys()) - free)
    changed = [
        f"  {key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    if changed:
        lines = "\n".join(changed)
        raise UserError(f"{job.folder} was made with other settings; --fresh redoes it\n{lines}")


def stop_when_terminated() -> None:
    """End orderly on SIGTERM too, so that training saves itself and its cost is noted."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _train(job: Job, ended: Callable[[Job], bool]) -> None:
    """Run the command of a job until its end, or until it failed."""
    with _command(job) as process:
        _wait(process, job, ended)
    if not (ended(job) or _failed(job.folder)):
        status = process.returncode
        raise SystemExit(f"{job.folder.name}: training ended with {status} before its end")


def _is_spent(job: Job) -> bool:
    """Whether two more steps use up the budget: the one under way, and the last one."""
    steps = [row["time/cpu"] for row in _steps(job)]
    return bool(steps) and sum(steps) + 2 * steps[-1] >= (job.budget or 0.0)


def _last_step(job: Job) -> Job:
    """The same run, which now ends by itself after one step more."""
    done = _steps(job)[-1]["step"]
    overrides = (*job.overrides, override(NUM_STEPS, done + 1))
    return replace(job, budget=None, overrides=overrides)


def _steps(job: Job) -> list[Row]:
    """Metrics of the training steps of a job."""
    return [row for row in read_metrics(job.folder / METRICS) if "time/cpu" in row]


@contextmanager
def _command(job: Job) -> Iterator[subprocess.Popen[bytes]]:
    """The training command, ended and its cost noted when the block is left."""
    process = None
    try:
        with metered() as cost:
            process = subprocess.Popen(job.command, cwd=tables.ROOT)
            try:
                yield process
            finally:
                process.terminate()  # training saves itself when it is asked to stop
                process.wait()
    finally:
        if process is not None and (job.folder / CONFIG).is_file():
            piece = Piece(wall=cost.wall, cpu=cost.cpu, status=process.returncode)
            pieces = [asdict(each) for each in (*_pieces(job.folder), piece)]
            (job.folder / PIECES).write_text(json.dumps(pieces, indent=1), encoding="utf-8")


def _wait(process: subprocess.Popen[bytes], job: Job, ended: Callable[[Job], bool]) -> None:
    """Until the command ends, or what its budget is for is done."""
    while process.poll() is None:
        if job.budget is not None and ended(job):
            return
        time.sleep(POLL_SECONDS)


def _failed(folder: Path) -> bool:
    """Whether the last command failed after a first step; a signal (below 0) is no failure."""
    pieces = _pieces(folder)
    trained = any("step_time" in row for row in read_metrics(folder / METRICS))
    status = pieces[-1].status if pieces else 0
    return trained and status > 0 and status != INTERRUPTED


def _pieces(folder: Path) -> list[Piece]:
    path = folder / PIECES
    return [Piece(**item) for item in json.loads(path.read_text())] if path.is_file() else []


def _points(job: Job) -> list[Point]:
    return curve(read_metrics(job.folder / METRICS))


def _commit(folder: Path) -> str | None:
    path = folder / ENVIRONMENT
    return json.loads(path.read_text()).get("commit") if path.is_file() else None


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# Reading


def curve(rows: Sequence[Row]) -> list[Point]:
    """The evaluations of a run, with the cost of the training steps before each."""
    cpu = wall = tokens = 0.0
    points = []
    for row in rows:
        cpu, wall = cpu + row.get("time/cpu", 0.0), wall + row.get("step_time", 0.0)
        tokens += generated_tokens(row)
        scores = {
            key.removeprefix(EVAL): float(value)
            for key, value in row.items()
            if key.startswith(EVAL) and is_finite(value)
        }
        if scores:
            point = Point(step=row["step"], cpu=cpu, wall=wall, tokens=tokens, scores=scores)
            points.append(point)
    return points


def generated_tokens(row: Row) -> float:
    """Tokens that a training step generated, dropped groups and refresh passes included."""
    samples = row.get("num_samples", 0.0) + row.get("sampler/refresh_samples", 0.0)
    return samples * row.get("completions/mean_length", 0.0)


def crossing(points: Sequence[Point], name: str, target: float) -> Reached | None:
    """When a score first came up to ``target``, on straight lines between the evaluations.

    No time if it was there before training; ``None`` if it never was.
    """
    at = first_crossing([point.scores[name] for point in points], target)
    if at is None:
        return None
    return Reached(
        cpu=between([point.cpu for point in points], at),
        wall=between([point.wall for point in points], at),
        tokens=between([point.tokens for point in points], at),
    )


def first_crossing(values: Sequence[float], target: float) -> float | None:
    """Where a polygon first reaches ``target``: 1.5 is half way from item 1 to item 2."""
    for i, value in enumerate(values):
        if value >= target:
            before = values[i - 1] if i else value
            return i - 1 + (target - before) / (value - before) if i else 0.0
    return None


def between(values: Sequence[float], at: float) -> float:
    """The value of a polygon at a place as ``first_crossing`` gives it."""
    return float(np.interp(at, np.arange(len(values)), values))


def score_at(points: Sequence[Point], name: str, at: float, along: Axis = "cpu") -> float:
    """A score after so many seconds or tokens, on straight lines; the last one of a shorter run."""
    costs = [getattr(point, along) for point in points]
    return float(np.interp(at, costs, [point.scores[name] for point in points]))


# Small things that the experiments share


def experiment_parser(
    name: str, *, seeds: Sequence[int] = (0, 1, 2, 3, 4), every: int | None = None
) -> argparse.ArgumentParser:
    """What every experiment is asked: seeds, folders, overrides; ``every`` if it evaluates."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=list(seeds))
    if every is not None:
        add("--every", type=int, default=every, help="steps between evaluations")
    folder = Path("runs") / name.replace("_", "-")
    add("--runs", type=Path, default=folder, help="where the run folders go")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    add("--fresh", action="store_true", help="train again what is finished")
    add("overrides", nargs="*", help="a.b=value, for every run")
    return parser


def costs(run: Run) -> dict[str, Any]:
    """Steps and seconds of training, and CPU-seconds of everything else."""
    trained = sum(row.get("time/cpu", 0.0) for row in run.rows)
    last = run.points[-1]
    return {
        "failed": run.failed,
        "steps": last.step,
        "train_cpu": last.cpu,
        "train_wall": last.wall,
        "cpu_per_step": last.cpu / last.step if last.step else None,
        "other_cpu": sum(piece.cpu for piece in run.pieces) - trained,
    }


def starts_apart(runs: Mapping[str, Run], tolerances: Mapping[str, float]) -> list[str]:
    """Runs, by title, whose scores before training are not those of the first run.

    ``tolerances``: by score, how far apart is still the same.  The network, the prompts and the
    noise of that evaluation are the same for all, so a difference means that a recipe changes how
    pictures are evaluated, and that its scores compare to nothing.
    """
    scores = {title: run.points[0].scores for title, run in runs.items()}
    first = next(iter(scores.values()))
    return [
        title
        for title, found in scores.items()
        if any(abs(found[name] - first[name]) > least for name, least in tolerances.items())
    ]


def override(key: str, value: Any) -> str:
    """``key=value`` as the command line takes it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def mean_and_std(values: Sequence[float | None], form: str) -> str:
    """``mean ± std`` of the numbers among ``values``: the mean of one, a dash for none."""
    found = tables.spread(values)
    if found is None:
        return tables.ABSENT
    mean, std = tables.cell(found.mean, form), tables.cell(found.std, form.removeprefix("+"))
    return mean if std == tables.ABSENT else f"{mean} ± {std}"
