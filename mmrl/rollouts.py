"""Groups and their scores: asked for, collected from all processes, summed up, learned from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from mmrl import facts
from mmrl.backend import Backend
from mmrl.config import Part
from mmrl.distributed import agree_or_raise, deal, gather_items, owner
from mmrl.errors import UserError
from mmrl.metrics import Means
from mmrl.sharding import is_split
from mmrl.types import Moment, Outcome, Prompt, RolloutGroup, RolloutRequest, Scores
from rewards.combine import TIMED_OUT, GroupScores, RewardSpec, Scorer

STATISTICS = ("mean", "std", "scored", "failed")
"""What ``summary`` says of every reward."""


def make_requests(
    prompts: Sequence[Prompt],
    sizes: int | Sequence[int],
    seed: int,
    stream: int,
    moment: Moment | None = None,
) -> list[RolloutRequest]:
    """One request for each prompt, numbered in order; samples of a repeated one count on.

    ``sizes``: samples of every group, or of each.  ``moment``: where in a run they are asked for.
    """
    before: Counter[str] = Counter()
    requests = []
    each = [sizes] * len(prompts) if isinstance(sizes, int) else sizes
    for index, (prompt, size) in enumerate(zip(prompts, each, strict=True)):
        requests.append(
            RolloutRequest(
                prompt=prompt,
                group_size=size,
                seed=seed,
                stream=stream,
                index=index,
                first_sample=before[prompt.id],
                moment=moment,
            )
        )
        before[prompt.id] += size
    return requests


def allocate(
    budget: Part | None, prompts: Sequence[Prompt], mean_size: int, state: dict[str, Any]
) -> tuple[list[Prompt], list[int]]:
    """The prompts of a step and how many samples each gets, ``mean_size`` of each without a budget.

    With one the largest groups come first: dealt in turn, processes then have about equal work.
    """
    if budget is None:
        return list(prompts), [mean_size] * len(prompts)
    sizes = budget.module.allocate(prompts, mean_size, budget.config, state)
    assert sum(sizes) == mean_size * len(prompts), "a budget is spent, no more and no less"
    assert min(sizes) > 0, "every prompt has a group"
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return [prompts[i] for i in order], [sizes[i] for i in order]


def roll_out(
    backend: Backend,
    accelerator: Accelerator,
    scorer: Scorer,
    requests: Sequence[RolloutRequest],
    means: Means,
) -> list[RolloutGroup]:
    """This process's share of the groups; rewards start as soon as a group is ready."""
    rank, world = accelerator.process_index, accelerator.num_processes
    shares = deal(len(requests), rank, world)
    idle = idle_work(requests, rank, world) if is_split(backend.model) else []
    groups = []
    with backend.behaviour():
        rolled = backend.rollout([*(requests[s.index] for s in shares), *idle])
        for share, group in zip([*shares, *[None] * len(idle)], rolled, strict=True):
            if share is None:
                continue
            groups.append(group)
            if not share.padding:
                means.add(group.metrics)
                scorer.submit(group)
    return groups


def idle_work(requests: Sequence[RolloutRequest], rank: int, world: int) -> list[RolloutRequest]:
    """A request that gives a process as many samples as the busiest one has, if it has fewer.

    Where weights are split, all processes must make the same forwards.
    """
    held = [[requests[s.index] for s in deal(len(requests), r, world)] for r in range(world)]
    totals = [sum(request.group_size for request in each) for each in held]
    short = max(totals) - totals[rank]
    return [replace(held[rank][0], group_size=short)] if short else []


def collect_scores(accelerator: Accelerator, scorer: Scorer) -> list[GroupScores]:
    """Scores of all groups over all processes, in the order of their index."""
    local: list[GroupScores] = []
    error: Exception | None = None
    try:
        local = scorer.collect()
    except UserError as refusal:
        error = refusal
    agree_or_raise(accelerator, error)
    return sorted(gather_items(accelerator, local), key=lambda scores: scores.index)


def assemble(collected: Sequence[GroupScores]) -> Scores:
    """Concatenate the scores of groups into flat arrays, in group order."""
    sizes = torch.tensor([len(scores.combined) for scores in collected])
    names = collected[0].by_name
    return Scores(
        combined=torch.cat([scores.combined for scores in collected]),
        valid=torch.cat([scores.valid for scores in collected]),
        group=torch.repeat_interleave(torch.arange(len(collected)), sizes),
        by_name={name: torch.cat([scores.by_name[name] for scores in collected]) for name in names},
        task=[scores.task for scores in collected for _ in range(len(scores.combined))],
    )


def with_facts(
    scores: Scores,
    accelerator: Accelerator,
    rolled: Trainable,
    names: frozenset[str],
    specs: Sequence[RewardSpec],
) -> Scores:
    """``scores`` of all processes with the facts in ``names``, each found where its group is.

    Raises:
        UserError: the samples have no such fact.
    """
    if not names:
        return scores
    rank = accelerator.process_index
    mine: list[tuple[int, dict[str, Any]]] = []
    error: Exception | None = None
    try:
        for group in rolled.groups:
            index = group.request.index
            if rolled.owners[index] == rank:
                mine.append((index, facts.of_group(group, names, specs)))
    except UserError as refusal:
        error = refusal
    agree_or_raise(accelerator, error)
    found = sorted(gather_items(accelerator, mine), key=lambda pair: pair[0])
    return replace(scores, **facts.joined([part for _, part in found]))


def summary(scores: Scores, collected: Sequence[GroupScores]) -> dict[str, float]:
    """Reward statistics of a step under TRL's keys; failures are counted, never hidden.

    ``rewards/NAME/scored``: of the samples that the reward was asked about, the share it gave a
    number; absent where it was asked about none.  Metrics of a reward's own: ``logged_by_rewards``.
    """
    values = {"reward": _mean(scores.combined[scores.valid])} if scores.by_name else {}
    values |= logged_by_rewards(collected)
    for name, raw in scores.by_name.items():
        finite = raw[torch.isfinite(raw)]
        values[f"rewards/{name}/mean"] = _mean(finite)
        values[f"rewards/{name}/std"] = float(finite.std(unbiased=False)) if len(finite) else 0.0
        asked = sum(group.num_asked[name] for group in collected)
        if asked:
            values[f"rewards/{name}/scored"] = len(finite) / asked
        failed = sum(group.num_failed.get(name, 0) for group in collected)
        if failed:
            values[f"rewards/{name}/failed"] = float(failed)
    values["time/reward_calls"] = sum(group.seconds for group in collected)
    if scores.by_name:
        values["invalid_samples"] = float((~scores.valid).sum())
    values["num_samples"] = float(len(scores.combined))
    return values


def logged_by_rewards(collected: Sequence[GroupScores]) -> dict[str, float]:
    """``rewards/NAME/METRIC``: means over the calls in which a reward logged a metric of its own.

    One that is called like a statistic of ``summary`` is ``rewards/NAME/own_METRIC``.
    """
    means = Means()
    for group in collected:
        for label, entries in group.logged.items():
            for name, value in entries:
                own = f"own_{name}" if name in STATISTICS else name
                means.add({f"rewards/{label}/{own}": (value, 1.0)})
    return means.result()


def has_hung(collected: Sequence[GroupScores]) -> bool:
    """Whether a reward took longer than it may."""
    return any(text.startswith(TIMED_OUT) for g in collected for text in g.failures.values())


def why_unscored(scores: Scores, collected: Sequence[GroupScores]) -> str:
    """A message about a step in which no sample has a usable reward."""
    failures = {name: text for group in collected for name, text in group.failures.items()}
    reasons = [f"{name!r} failed on all of them: {text}" for name, text in failures.items()]
    reasons += [
        f"no value (NaN) from {name!r}; does the prompts file have the columns it reads?"
        for name, raw in scores.by_name.items()
        if name not in failures and bool(torch.isnan(raw).all())
    ]
    count = len(scores.valid)
    return f"rewards: none of the {count} samples of a step got a reward: " + "; ".join(reasons)


# Groups without a signal, and others in their place


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Groups that were rolled out together: those of this process, and the scores of all."""

    groups: list[RolloutGroup]
    scores: list[GroupScores]


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """What a step trains on, numbered from 0: ``groups`` of this process, ``scores`` of all, and
    the process that owns each.  ``everything``: scores of the groups left out as well.
    """

    groups: list[RolloutGroup]
    scores: list[GroupScores]
    owners: list[int]
    everything: list[GroupScores]


def is_varied(scores: GroupScores) -> bool:
    """Whether the usable rewards of a group differ, without which it teaches nothing."""
    usable = scores.combined[scores.valid]
    return len(usable) > 1 and bool(usable.min() < usable.max())


def trainable_groups(batches: Sequence[Batch], world: int, *, drop: bool) -> Trainable:
    """All groups of some batches, or with ``drop`` only those with a signal.

    Where none has one, all of the first batch.
    """
    everything = [scores for batch in batches for scores in batch.scores]
    if drop and not any(map(is_varied, everything)):
        batches, drop = batches[:1], False
    kept: list[tuple[Batch, int]] = []
    for batch in batches:
        places = range(len(batch.scores))
        kept += [(batch, i) for i in places if not drop or is_varied(batch.scores[i])]
    groups = []
    for number, (batch, place) in enumerate(kept):
        wanted = batch.scores[place].index
        found = [group for group in batch.groups if group.request.index == wanted]
        groups += [_renumbered(group, number) for group in found[:1]]
    return Trainable(
        # A process without any still takes part, with weight 0.
        groups=groups or [_renumbered(batches[0].groups[0], 0)],
        scores=[replace(batch.scores[i], index=n) for n, (batch, i) in enumerate(kept)],
        owners=[owner(place, world) for _, place in kept],
        everything=everything,
    )


def _renumbered(group: RolloutGroup, index: int) -> RolloutGroup:
    return replace(group, request=replace(group.request, index=index))


# What prompt samplers and budgets learn


def due_refresh(sampler: Part, step: int) -> int:
    """Samples of every prompt that the sampler wants scored before ``step``; mostly 0."""
    ask = getattr(sampler.module, "refresh_samples", None)
    return ask(step, sampler.config) if ask else 0


def learn(
    part: Part,
    state: dict[str, Any],
    accelerator: Accelerator,
    groups: Sequence[RolloutGroup],
    collected: Sequence[GroupScores],
    requests: Sequence[RolloutRequest],
) -> dict[str, Any]:
    """The state of a sampler or a budget after these groups, the same on every process.

    ``groups`` are those of this process, ``collected`` and ``requests`` all of them.
    """
    if not hasattr(part.module, "learn"):
        return state
    mine: list[tuple[int, float]] = []
    error: Exception | None = None
    measure = getattr(part.module, "measure", lambda group, config: 0.0)
    try:
        mine = [(group.request.index, measure(group, part.config)) for group in groups]
    except UserError as refusal:
        error = refusal
    agree_or_raise(accelerator, error)
    measures = dict(gather_items(accelerator, mine))
    prompts = {request.index: request.prompt for request in requests}
    outcomes = [
        Outcome(
            prompt_id=prompts[scores.index].id,
            combined=scores.combined,
            valid=scores.valid,
            by_name=scores.by_name,
            measure=measures[scores.index],
        )
        for scores in collected
    ]
    return part.module.learn(outcomes, part.config, state)


def state_metrics(part: Part | None, state: dict[str, Any]) -> dict[str, float]:
    """What a sampler or a budget logs of its state."""
    found = getattr(part.module, "metrics", None) if part is not None else None
    return found(state) if found else {}


def size_metrics(requests: Sequence[RolloutRequest]) -> dict[str, float]:
    """The least and the most samples of a group, where a budget makes them differ."""
    sizes = [request.group_size for request in requests]
    return {"budget/min_group_size": float(min(sizes)), "budget/max_group_size": float(max(sizes))}


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
