"""Runs rewards beside the rollout and adds them up.

Each reward has a queue and a thread of its own, so rewards run in parallel with each other and with
the caller.  What cannot be scored is marked, never counted as 0: a sample is valid when every
reward with a non-zero weight that applies to its prompt is finite for it.  A reward does not apply
to prompts of other tasks than its own, nor where it gives NaN for all samples without having
failed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Event, Thread
from types import ModuleType
from typing import Any

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor

from mmrl.errors import UserError, require
from mmrl.resolve import resolve
from mmrl.schema import StrictModel, nearest, validate
from mmrl.types import Prompt, RolloutGroup
from rewards._python_runner import Recorder
from rewards._signatures import GROUP, METRICS
from rewards._values import BadReturnError, PartlyFailed, as_values

LOG = logging.getLogger(__name__)

Reward = Callable[..., Any]


# --- what the YAML says -------------------------------------------------------------------------


class RewardSpec(StrictModel):
    """One entry of the list of rewards; ``config`` holds the keys that are the reward's own."""

    name: str = Field(
        min_length=1, description="a shipped reward, or the dotted path of a callable"
    )
    label: str = Field(min_length=1, description="key in the logs, unique; the name by default")
    weight: float = Field(default=1.0, description="factor in the sum; 0: logged only")
    tasks: list[str] | None = Field(
        default=None,
        min_length=1,
        description="prompts it judges, by their column `task`; null: those of every task",
    )
    timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="seconds one call (one group; the first may load a model) may take",
    )
    config: SerializeAsAny[StrictModel] = Field(description="settings of the reward itself")

    def build(self) -> Reward:
        """The reward as a callable; ``UserError`` if its settings name something missing."""
        return _module(self.name).build(self.config)

    def judges(self, prompt: Prompt) -> bool:
        """Whether the prompt belongs to one of ``tasks``."""
        return self.tasks is None or prompt.task in self.tasks

    def dump(self) -> dict[str, Any]:
        """A plain dict from which ``parse_specs`` makes this spec again."""
        common = self.model_dump(exclude={"config"})
        own = self.config.model_dump(exclude={"function"} if "." in self.name else None)
        return {**common, **own}


GRACE_SECONDS = 2.0
"""What calls under way get when a scorer is closed."""

TIMED_OUT = "timed out after"
"""How the failure message of a call that hung begins."""

COMMON_KEYS = tuple(key for key in RewardSpec.model_fields if key != "config")


def parse_specs(entries: Sequence[Mapping[str, Any]]) -> list[RewardSpec]:
    """Specs from the YAML list; ``UserError`` names the entry, the key and what is allowed."""
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise UserError(f"rewards: a list of mappings is needed, not {entries!r}")
    specs = [_parse_spec(entry, f"rewards[{i}]") for i, entry in enumerate(entries)]
    labels = [spec.label for spec in specs]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise UserError(
                f"rewards[{i}].label: {label!r} is taken by rewards[{labels.index(label)}]; "
                "give one of them another label"
            )
    return specs


def _parse_spec(entry: Mapping[str, Any], where: str) -> RewardSpec:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: a mapping with the key 'name' is needed, not {entry!r}")
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}.name: the name of a reward is needed, not {name!r}")
    try:
        config_type = _module(name).Config
    except UserError as error:
        raise UserError(f"{where}.name: {error}") from error
    implied = {"function": name} if "." in name else {}
    own_keys = [key for key in config_type.model_fields if key not in implied]
    allowed = [*COMMON_KEYS, *own_keys]
    for key in entry:
        if key not in allowed:
            raise UserError(f"{where}.{key}: unknown key; {nearest(str(key), allowed)}")
    own = {key: entry[key] for key in own_keys if key in entry}
    common = {key: entry[key] for key in COMMON_KEYS if key in entry}
    config = validate(config_type, implied | own, where)
    return validate(RewardSpec, {"label": name, **common, "config": config}, where)


def _module(name: str) -> ModuleType:
    return resolve("rewards", "python" if "." in name else name)


# --- what comes out -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GroupScores:
    """Rewards of one group of G samples.

    ``index``: the group's place in its step.  ``by_name``: raw values [G] float64 by label, NaN
    where the reward failed or does not apply.  ``combined`` [G] float64: weighted sum, 0 where
    invalid.  ``valid`` [G] bool: every weighted reward that applies is finite.  ``failures``:
    error message of each reward that failed.  ``num_asked``: samples each reward was asked about,
    0 where the prompt is of another task than its own.  ``num_failed``: those of them it failed on
    (where it does not apply it has not failed).  ``seconds``: time inside reward calls, summed.
    ``task``: that of the prompt.  ``logged``: by label, names and values of the metrics that
    rewards log themselves.
    """

    index: int
    by_name: Mapping[str, Tensor]
    combined: Tensor
    valid: Tensor
    failures: Mapping[str, str]
    num_asked: Mapping[str, int]
    num_failed: Mapping[str, int]
    seconds: float
    task: str = ""
    logged: Mapping[str, Sequence[tuple[str, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.combined.ndim == 1, f"combined has rank {self.combined.ndim}, not 1")
        require(self.combined.dtype == torch.float64, "combined is not float64")
        require(self.valid.dtype == torch.bool, "valid is not bool")
        for name, value in {"valid": self.valid, **self.by_name}.items():
            require(value.shape == self.combined.shape, f"{name} and combined differ in shape")
        require(bool(torch.isfinite(self.combined).all()), "combined is not finite")


@dataclass(frozen=True)
class _Outcome:
    """What became of one call: values [G] float64, and why some are missing."""

    values: Tensor
    num_failed: int = 0
    message: str | None = None
    fatal: UserError | None = None
    seconds: float = 0.0
    logged: Sequence[tuple[str, float]] = ()

    @property
    def applies(self) -> bool:
        """False where the reward knowingly has nothing to say about the prompt."""
        return bool(self.num_failed) or not bool(self.values.isnan().all())


class Scorer:
    """Scores groups in the background; ``collect`` hands the results back in submit order.

    A reward that raises, hangs or returns infinity leaves NaN and a message behind, and training
    goes on.  One that returns the wrong number of values, or no numbers, is a mistake in the code:
    ``collect`` raises ``UserError``.  Each reward is called
    from one thread at a time, unless an earlier call hangs past its timeout: that thread is left to
    itself.  All threads are daemons, so nothing that hangs can keep the interpreter alive.
    """

    def __init__(self, specs: Sequence[RewardSpec]) -> None:
        self._specs = list(specs)
        self._workers = [_Worker(spec, spec.build()) for spec in self._specs]
        self._pending: list[tuple[RolloutGroup, list[_Job]]] = []

    def submit(self, group: RolloutGroup) -> None:
        """Queue ``group`` for every reward and return at once."""
        self._pending.append((group, [worker.submit(group) for worker in self._workers]))

    def collect(self) -> list[GroupScores]:
        """Wait for everything submitted since the last call; ``UserError`` as described above."""
        pending, self._pending = self._pending, []
        results = [(group, [job.wait() for job in jobs]) for group, jobs in pending]
        for outcome in (outcome for _, outcomes in results for outcome in outcomes):
            if outcome.fatal is not None:
                raise outcome.fatal
        return [combined_scores(group, self._specs, outcomes) for group, outcomes in results]

    def close(self) -> None:
        """Drop what is queued and end the threads; a call under way gets a moment to return.

        Native code that still runs when the interpreter ends would abort the process.
        """
        for worker in self._workers:
            worker.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def combined_scores(
    group: RolloutGroup, specs: Sequence[RewardSpec], outcomes: Sequence[_Outcome]
) -> GroupScores:
    """combined = sum_r weight_r reward_r over weighted rewards that apply, 0 where invalid."""
    size = group.request.group_size
    # A reward of weight 0 is only logged: 0 * NaN must not reach the sum.
    counted = [
        spec.weight * outcome.values
        for spec, outcome in zip(specs, outcomes, strict=True)
        if spec.weight and outcome.applies
    ]
    total = torch.stack(counted).sum(0) if counted else torch.full((size,), math.nan).double()
    valid = torch.isfinite(total)
    by_label = {spec.label: outcome for spec, outcome in zip(specs, outcomes, strict=True)}
    return GroupScores(
        index=group.request.index,
        by_name={label: outcome.values for label, outcome in by_label.items()},
        combined=torch.where(valid, total, 0.0),
        valid=valid,
        failures={label: o.message for label, o in by_label.items() if o.message is not None},
        num_asked={spec.label: size * spec.judges(group.request.prompt) for spec in specs},
        num_failed={label: outcome.num_failed for label, outcome in by_label.items()},
        seconds=sum(outcome.seconds for outcome in outcomes),
        task=group.request.prompt.task,
        logged={label: o.logged for label, o in by_label.items() if o.logged},
    )


# --- threads ------------------------------------------------------------------------------------


class _Job:
    """A group in the queue of one reward, and in time what became of it."""

    def __init__(self, group: RolloutGroup) -> None:
        self.group = group
        self._done = Event()
        self._outcome: _Outcome | None = None

    def finish(self, outcome: _Outcome) -> None:
        self._outcome = outcome
        self._done.set()

    def wait(self) -> _Outcome:
        self._done.wait()
        assert self._outcome is not None
        return self._outcome


class _Worker:
    """Calls one reward for one group after the other."""

    def __init__(self, spec: RewardSpec, reward: Reward) -> None:
        self._spec, self._reward = spec, reward
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = self._warned = False
        self._thread = Thread(target=self._serve, name=f"reward-{spec.label}", daemon=True)
        self._thread.start()

    def submit(self, group: RolloutGroup) -> _Job:
        job = _Job(group)
        self._queue.put(job)
        return job

    def close(self) -> None:
        self._closed = True
        self._queue.put(None)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._closed:
                job.finish(_failed(job.group, "the scorer was closed"))
            elif not self._spec.judges(job.group.request.prompt):
                job.finish(_Outcome(_nothing(job.group)))
            else:
                outcome = self._score(job.group)
                self._warn(outcome)
                job.finish(outcome)

    def _warn(self, outcome: _Outcome) -> None:
        """Of the first failure; the log counts them all."""
        if outcome.num_failed and outcome.fatal is None and not self._warned:
            self._warned = True
            LOG.warning(
                "reward %r: %d of %d samples not scored: %s (rewards/.../failed counts them)",
                self._spec.label, outcome.num_failed, len(outcome.values), outcome.message,
            )  # fmt: skip

    def _score(self, group: RolloutGroup) -> _Outcome:
        """One call in a thread of its own (cheap beside a reward), left behind if it hangs."""
        returned: SimpleQueue[_Outcome] = SimpleQueue()
        Thread(
            target=lambda: returned.put(scored(self._reward, group, self._spec.label)),
            name=f"reward-{self._spec.label}-call",
            daemon=True,
        ).start()
        try:
            return returned.get(timeout=self._spec.timeout_s)
        except Empty:
            limit = self._spec.timeout_s
            return _failed(group, f"{TIMED_OUT} {limit:g} s", seconds=limit)


def scored(reward: Reward, group: RolloutGroup, label: str) -> _Outcome:
    """One call of ``reward``; never raises."""
    prompt, size = group.request.prompt, group.request.group_size
    columns: dict[str, Any] = {name: [value] * size for name, value in prompt.columns.items()}
    if getattr(reward, "reads_group", False):
        columns[GROUP] = group
    recorder = Recorder()
    if getattr(reward, "logs", False):
        columns[METRICS] = recorder
    start = time.perf_counter()
    try:
        returned = reward([prompt.text] * size, list(group.outputs), **columns)
        outcome = _outcome(returned, size)
    except BadReturnError as error:
        fatal = UserError(f"reward {label!r} returned {error}")
        return _failed(group, str(fatal), fatal=fatal)
    except BaseException as error:
        # Even sys.exit() in a reward: the group would otherwise wait for its timeout.
        message = f"{type(error).__name__}: {error}"
        return _failed(group, message, seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return replace(outcome, seconds=seconds, logged=tuple(recorder.entries))


def _failed(
    group: RolloutGroup, message: str, *, seconds: float = 0.0, fatal: UserError | None = None
) -> _Outcome:
    size, values = group.request.group_size, _nothing(group)
    return _Outcome(values, num_failed=size, message=message, seconds=seconds, fatal=fatal)


def _nothing(group: RolloutGroup) -> Tensor:
    """[G] float64, all NaN."""
    return torch.full((group.request.group_size,), math.nan, dtype=torch.float64)


def _outcome(returned: Any, size: int) -> _Outcome:
    """What a reward returned; infinities are failures.  ``BadReturnError`` for anything else."""
    if isinstance(returned, PartlyFailed):
        found = _outcome(returned.values, size)
        return replace(
            found,
            num_failed=found.num_failed + returned.num_failed,
            message=returned.message or found.message,
        )
    values = as_values(returned, size)
    infinite = values.isinf()
    num_failed = int(infinite.sum())
    message = f"{num_failed} of {len(values)} values are infinite" if num_failed else None
    return _Outcome(values.masked_fill(infinite, math.nan), num_failed=num_failed, message=message)
