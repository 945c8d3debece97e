"""A user's function in processes of its own: samples side by side, each in a call of its own."""

from __future__ import annotations

import json
import math
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from threading import Thread
from typing import Any

from mmrl.types import RolloutGroup
from rewards._child import Child, LateError, Pool
from rewards._python_runner import recorders
from rewards._signatures import GROUP, METRICS, Function
from rewards._values import BadReturnError, PartlyFailed, as_values

RUNNER = Path(__file__).with_name("_python_runner.py")


class CallError(Exception):
    """What the function raised in its process."""


def in_processes(function: Function, path: str, count: int, limit_s: float) -> Function:
    """``function``, found at the dotted ``path``, called in one of ``count`` processes.

    Raises ``LateError`` after ``limit_s``, ``EndedError`` if the process ends, ``CallError`` for
    what the function raises, and ``RuntimeError`` if no process starts.
    """

    def start() -> Child:
        child = Child([str(RUNNER)], quiet=False)
        child.say(pickle.dumps((sys.path, path)))
        child.await_ready()
        return child

    pool = Pool(start, count)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        answer = json.loads(pool.ask(pickle.dumps((args, kwargs)), limit_s))
        if "error" in answer:
            raise CallError(answer["error"])
        for recorder in recorders(kwargs):
            for name, value in answer["logged"]:
                recorder(name, value)
        return answer["value"]

    return call


def one_by_one(reward: Function) -> Function:
    """``reward`` of each sample by itself, all at the same time.

    A sample whose call raises is not scored.  ``BadReturnError`` for what is not one number.
    """

    def separately(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> PartlyFailed:
        group: RolloutGroup | None = columns.pop(GROUP, None)
        log = {METRICS: columns.pop(METRICS)} if METRICS in columns else {}

        def score(i: int) -> float:
            own: dict[str, Any] = {name: [values[i]] for name, values in columns.items()} | log
            if group is not None:
                own[GROUP] = _alone(group, i)
            return float(as_values(reward([prompts[i]], [outputs[i]], **own), 1)[0])

        return _collected(side_by_side(score, len(outputs)))

    separately.reads_group = getattr(reward, "reads_group", False)  # type: ignore[attr-defined]
    separately.logs = getattr(reward, "logs", False)  # type: ignore[attr-defined]
    return separately


def side_by_side(work: Callable[[int], float], count: int) -> list[float | BaseException]:
    """``work(i)`` for each i, or what it raised, in threads that keep no interpreter alive."""
    found: list[float | BaseException] = [math.nan] * count

    def run(i: int) -> None:
        try:
            found[i] = work(i)
        except BaseException as error:
            found[i] = error

    threads = [Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _collected(found: Sequence[float | BaseException]) -> PartlyFailed:
    errors = [result for result in found if isinstance(result, BaseException)]
    for error in errors:
        if isinstance(error, BadReturnError):
            raise error
    return PartlyFailed(
        values=[math.nan if isinstance(result, BaseException) else result for result in found],
        num_failed=len(errors),
        message=_said(errors[0]) if errors else "",
    )


def _said(error: BaseException) -> str:
    own = isinstance(error, LateError | CallError)
    return str(error) if own else f"{type(error).__name__}: {error}"


def _alone(group: RolloutGroup, index: int) -> RolloutGroup:
    """The group of one of its samples."""
    own = slice(index, index + 1)
    return replace(
        group,
        request=replace(group.request, group_size=1),
        outputs=group.outputs[own],
        payload=None,
        mask=group.mask[own],
        logp_old=None,
        everything=None if group.everything is None else group.everything[own],
        truncated=None if group.truncated is None else group.truncated[own],
        tokens=None if group.tokens is None else group.tokens[own],
    )
