"""What a person sees while a run goes on: a progress bar with step, reward and time left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mmrl.config import RunConfig


class Display(Protocol):
    """Where a run reports to."""

    def note(self, text: str, *, transient: bool = False) -> None:
        """A line of text; a transient one only beside the bar."""
        ...

    def step(self, done: int, values: Mapping[str, float]) -> None:
        """A finished step."""
        ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished evaluation."""
        ...


class Silent:
    """The display of processes that must not talk."""

    def note(self, text: str, *, transient: bool = False) -> None:
        """Nothing."""

    def step(self, done: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""


class Bar:
    """A rich progress bar; without a terminal, one plain line now and then."""

    def __init__(self, progress: Progress, task: TaskID, total: int) -> None:
        self._progress, self._task = progress, task
        self._plain_every = max(1, total // 20)

    def note(self, text: str, *, transient: bool = False) -> None:
        """A line above the bar, or beside it."""
        if transient:
            self._progress.update(self._task, status=text)
        else:
            self._progress.console.print(text, highlight=False, markup=False)

    def step(self, done: int, values: Mapping[str, float]) -> None:
        """Advance the bar to ``done``."""
        # Without a reward, as on demonstrations, what is minimised says how it goes.
        name = "reward" if "reward" in values else "loss"
        status = f"{name} {values.get(name, math.nan):.3f}"
        if values.get("invalid_samples"):
            status += f"  invalid {values['invalid_samples']:.0f}"
        self._progress.update(self._task, completed=done, status=status)
        if not self._progress.console.is_terminal and done % self._plain_every == 0:
            seconds = values["step_time"]
            self._progress.console.print(f"step {done}  {status}  {seconds:.2f} s", highlight=False)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """A line with every evaluation metric."""
        values = "  ".join(
            f"{name.removeprefix('eval/')} {value:.3f}" for name, value in metrics.items()
        )
        self.note(f"held-out after step {step}: {values}")


@contextmanager
def make_display(config: RunConfig, talks: bool) -> Iterator[Display]:
    """A bar for the process that talks, silence for the others."""
    if not talks:
        yield Silent()
        return
    total = config.training.num_steps
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console()) as progress:
        yield Bar(progress, progress.add_task(config.name, total=total, status=""), total)
