"""Reward functions written for other systems, called as those systems call them.

Each adapter is called as every reward is and returns a list as long as the function's own answer,
NaN for what it left unscored.  Coroutine functions are awaited in an event loop of the call.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmrl.types import Moment, RolloutGroup
from rewards._answers import is_missing
from rewards._python_runner import Recorder, ignore
from rewards._values import PartlyFailed

Function = Callable[..., Any]
Samples = Sequence[Any]

GROUP = "_group"
"""Keyword under which a reward with the attribute ``reads_group`` gets its ``RolloutGroup``."""

METRICS = "_metrics"
"""Keyword under which a reward with the attribute ``logs`` gets a ``Recorder`` for its metrics."""

_LATE = object()


def sampled_tokens(texts: Sequence[str], columns: Mapping[str, Any]) -> Tensor:
    """Of each text, [N] int64: its tokens as they were sampled, the end included.

    ``columns``: the keywords of a reward with ``reads_group``.  ``TypeError`` without the rollout.
    """
    group: RolloutGroup | None = columns.get(GROUP)
    if texts and group is None:
        raise TypeError("this reward counts tokens, which only the rollout knows")
    return torch.zeros(0, dtype=torch.int64) if group is None else group.drawn.sum(1)


def awaited(value: Any) -> Any:
    """``value``, or what comes of it if it is to be awaited."""

    async def wait(coming: Awaitable[Any]) -> Any:
        return await coming

    return asyncio.run(wait(value)) if inspect.isawaitable(value) else value


def accepted(function: Function, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords that the function takes; all if it hides its signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return dict(offered)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(offered)
    named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {name: value for name, value in offered.items() if name in named}


def trl(function: Function, kwargs: Mapping[str, Any]) -> Function:
    """``f(prompts=, completions=, completion_ids=, **columns) -> list of float or None``.

    Where the prompt is a list of messages, so are ``prompts`` and ``completions``.
    ``completion_ids``: a list of token ids for each, its end included, ``None`` where samples have
    no tokens.  ``trainer_state`` has ``global_step``, the steps that are done, and ``max_steps``;
    it is ``None`` outside of a run.  What goes to ``log_metric`` is logged as
    ``rewards/<label>/<name>`` of a training step, the mean over its calls; what goes to
    ``log_extra`` is dropped.
    """

    def reward(prompts: Samples, outputs: Samples, **columns: Any) -> Any:
        group: RolloutGroup | None = columns.pop(GROUP, None)
        messages = () if group is None else group.request.prompt.messages
        asked: Samples = [list(messages)] * len(outputs) if messages else prompts
        said = [[{"role": "assistant", "content": o}] for o in outputs] if messages else outputs
        hooks = {
            "trainer_state": None if group is None else _trainer_state(group.request.moment),
            "log_extra": ignore,
            "log_metric": columns.pop(METRICS, None) or Recorder(),
        }
        own = {
            "prompts": list(asked),
            "completions": list(said),
            "completion_ids": _completion_ids(group),
        }
        offered = {**columns, **hooks, **own, **kwargs}
        values = awaited(function(**accepted(function, offered)))
        return [_number(v, "") for v in values] if isinstance(values, list | tuple) else values

    reward.logs = True  # type: ignore[attr-defined]
    return _reading_groups(reward)


def verl(function: Function, kwargs: Mapping[str, Any], target: str, limit_s: float | None):
    """``compute_score(data_source, solution_str, ground_truth, extra_info) -> float or dict``.

    NaN without calling it where the sample has no ground truth.
    """

    def reward(prompts: Samples, outputs: Samples, **columns: Any) -> Any:
        truths = ground_truths(columns, target, len(outputs))

        def score(i: int) -> Any:
            offered = {
                "data_source": columns.get("data_source", [""] * len(outputs))[i],
                "solution_str": outputs[i],
                "ground_truth": truths[i],
                "extra_info": columns.get("extra_info", [{}] * len(outputs))[i],
            }
            return function(**accepted(function, {**offered, **kwargs}))

        return of_each(score, truths, limit_s, "score", is_async(function))

    return reward


def easyr1(function: Function, kwargs: Mapping[str, Any], target: str, limit_s: float | None):
    """``f({response, response_length, ground_truth}) -> dict with overall``, for each sample.

    NaN without calling it where the sample has no ground truth.
    """

    def reward(prompts: Samples, outputs: Samples, **columns: Any) -> Any:
        inputs = _easyr1_inputs(outputs, target, columns)
        truths = [sample["ground_truth"] for sample in inputs]

        def score(i: int) -> Any:
            return function(inputs[i], **kwargs)

        return of_each(score, truths, limit_s, "overall", is_async(function))

    return _reading_groups(reward)


def easyr1_batch(function: Function, kwargs: Mapping[str, Any], target: str) -> Function:
    """The same with lists of such dicts, for all samples that have a ground truth at once."""

    def reward(prompts: Samples, outputs: Samples, **columns: Any) -> Any:
        inputs = _easyr1_inputs(outputs, target, columns)
        known = [i for i, sample in enumerate(inputs) if not is_missing(sample["ground_truth"])]
        returned = awaited(function([inputs[i] for i in known], **kwargs)) if known else []
        if not isinstance(returned, list | tuple):
            return returned  # which the caller refuses
        values = [_number(value, "overall") for value in returned]
        if len(values) != len(known):
            return values  # which the caller refuses, naming both lengths
        found = dict(zip(known, values, strict=True))
        return [found.get(i, math.nan) for i in range(len(inputs))]

    return _reading_groups(reward)


def ground_truths(columns: Mapping[str, Samples], target: str, size: int) -> Samples:
    """The column ``target``, else what verl's column ``reward_model`` says."""
    if target in columns:
        return columns[target]
    models = columns.get("reward_model", [None] * size)
    return [m.get("ground_truth") if isinstance(m, Mapping) else None for m in models]


def of_each(
    score: Callable[[int], Any], truths: Samples, limit_s: float | None, key: str, is_async: bool
) -> list[float] | PartlyFailed:
    """``score(i)`` of every sample with a ground truth; NaN for the others and what is late.

    Coroutines run side by side, others one after another; one that is late is left to itself and
    has failed.  ``TimeoutError`` if all are late.
    """
    known = [i for i, truth in enumerate(truths) if not is_missing(truth)]
    if is_async:
        results = asyncio.run(_side_by_side(score, known, limit_s))
    else:
        results = [_in_time(lambda i=i: awaited(score(i)), limit_s) for i in known]
    num_late = sum(result is _LATE for result in results)
    if known and num_late == len(known):
        raise TimeoutError(f"all {len(known)} samples took longer than {limit_s:g} s")
    values = (math.nan if r is _LATE else _number(r, key) for r in results)
    found = dict(zip(known, values, strict=True))
    scores = [found.get(i, math.nan) for i in range(len(truths))]
    if not num_late:
        return scores
    message = f"timed out after {limit_s:g} s"
    return PartlyFailed(values=scores, num_failed=num_late, message=message)


async def _side_by_side(
    score: Callable[[int], Awaitable[Any]], known: Sequence[int], limit_s: float | None
) -> list[Any]:
    async def one(i: int) -> Any:
        try:
            return await asyncio.wait_for(score(i), limit_s)
        except asyncio.TimeoutError:  # Python 3.10 has two
            return _LATE

    return await asyncio.gather(*(one(i) for i in known))


def _in_time(call: Callable[[], Any], limit_s: float | None) -> Any:
    """What ``call`` returns or raises, ``_LATE`` after ``limit_s``."""
    if limit_s is None:
        return call()
    returned: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def work() -> None:
        try:
            returned.put((call(), None))
        except BaseException as error:
            returned.put((None, error))

    Thread(target=work, daemon=True).start()
    try:
        value, error = returned.get(timeout=limit_s)
    except Empty:
        return _LATE
    if error is not None:
        raise error
    return value


def _number(value: Any, key: str) -> Any:
    """``None`` is NaN; a mapping has its number under ``key``, else ``TypeError``."""
    if isinstance(value, Mapping) and key:
        if key not in value:
            raise TypeError(f"the function returned a dict without {key!r}: {sorted(value)}")
        value = value[key]
    return math.nan if value is None else value


def _easyr1_inputs(
    outputs: Samples, target: str, columns: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Lengths are in tokens where the rollout is known, else in words."""
    group: RolloutGroup | None = columns.get(GROUP)
    lengths = [len(o.split()) for o in outputs] if group is None else group.drawn.sum(1).tolist()
    truths = ground_truths(columns, target, len(outputs))
    return [
        {"response": output, "response_length": length, "ground_truth": truth}
        for output, length, truth in zip(outputs, lengths, truths, strict=True)
    ]


def _completion_ids(group: RolloutGroup | None) -> list[list[int]] | None:
    """Copies: a function may change them."""
    if group is None or group.tokens is None:
        return None
    return [list(ids) for ids in group.tokens]


def _trainer_state(moment: Moment | None) -> SimpleNamespace | None:
    """What rewards read of transformers' ``TrainerState``."""
    if moment is None:
        return None
    return SimpleNamespace(global_step=moment.step, max_steps=moment.num_steps)


def is_async(function: Function) -> bool:
    """Whether calling it gives a coroutine."""
    called = getattr(function, "__call__", None)  # noqa: B004 - of an object, not whether it has one
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def _reading_groups(reward: Function) -> Function:
    reward.reads_group = True  # type: ignore[attr-defined]
    return reward
