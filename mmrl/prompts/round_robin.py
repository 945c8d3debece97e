"""Tasks take turns, prompt by prompt; within a task, seeded shuffles one after another.

The i-th prompt of a run belongs to task i mod M, tasks in the order of their names (DiffusionOPD,
Li et al. 2026, arXiv:2605.15055).  The count is part of the state, so a resumed run goes on with
the task whose turn it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from mmrl.errors import UserError
from mmrl.prompts.uniform import permutation
from mmrl.schema import StrictModel, nearest
from mmrl.types import Prompt

PAPER = "Li et al. 2026, arXiv:2605.15055"
EVIDENCE = "paper"


class Config(StrictModel):
    """Where the task of a prompt is written."""

    column: str = Field(
        default="task", min_length=1, description="Column of the prompts file with the task's name."
    )


def take(
    prompts: Sequence[Prompt],
    count: int,
    step: int,
    seed: int,
    config: Config,
    state: dict[str, Any],
) -> tuple[list[Prompt], dict[str, Any]]:
    """``count`` distinct prompts whose tasks take turns, and the next state.

    ``state``: ``slot``, the number of prompts taken so far, and ``cursors``, for each task the
    shuffle it is in and its position there.  A remainder of a shuffle too small for a step is left
    to the next one, so no prompt comes twice within a step.

    Raises:
        UserError: a prompt without a task, or a task with fewer prompts than a step takes of it.
    """
    del step
    tasks = _by_task(prompts, config.column)
    _refuse_small_tasks(tasks, count)
    slot, cursors = state.get("slot", 0), dict(state.get("cursors", {}))
    names = sorted(tasks)
    turns = [names[(slot + i) % len(names)] for i in range(count)]
    drawn = {}
    for name in sorted(set(turns)):
        epoch, position = cursors.get(name, (0, 0))
        chosen, cursors[name] = _draw(tasks[name], turns.count(name), seed, epoch, position)
        drawn[name] = iter(chosen)
    return [next(drawn[name]) for name in turns], {"slot": slot + count, "cursors": cursors}


def _draw(
    prompts: Sequence[Prompt], count: int, seed: int, epoch: int, position: int
) -> tuple[list[Prompt], list[int]]:
    """The next ``count`` prompts of one task and its cursor behind them."""
    if position + count > len(prompts):
        epoch, position = epoch + 1, 0
    order = permutation(len(prompts), seed, epoch)[position : position + count]
    return [prompts[i] for i in order], [epoch, position + count]


def _by_task(prompts: Sequence[Prompt], column: str) -> dict[str, list[Prompt]]:
    tasks: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        tasks.setdefault(_task(prompt, column), []).append(prompt)
    return tasks


def _task(prompt: Prompt, column: str) -> str:
    if column not in prompt.columns:
        raise UserError(
            f"prompts.sampler.column: prompt {prompt.text!r:.60} has no column {column!r}; "
            f"{nearest(column, sorted(prompt.columns))}"
        )
    task = prompt.columns[column]
    if not isinstance(task, str) or not task:
        raise UserError(
            f"prompts.sampler.column: prompt {prompt.text!r:.60} needs the name of a task under "
            f"{column!r}, got {task!r}"
        )
    return task


def _refuse_small_tasks(tasks: dict[str, list[Prompt]], count: int) -> None:
    # Rounded up: where turns do not divide evenly, each task gets the longer share in some step.
    most = -(-count // len(tasks))
    for name, prompts in tasks.items():
        if len(prompts) < most:
            raise UserError(
                f"training.prompts_per_step: {count} takes up to {most} prompts of task {name!r} "
                f"in a step, which has {len(prompts)}; allowed: {len(prompts) * len(tasks)} or less"
            )
