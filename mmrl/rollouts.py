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
from mmrl.types import Outcome, Prompt, RolloutGroup, RolloutRequest, Scores
from rewards.combine import GroupScores, RewardSpec, Scorer


def make_requests(
    prompts: Sequence[Prompt], group_size: int, seed: int, stream: int
) -> list[RolloutRequest]:
    """One request for each prompt, numbered in order; samples of a repeated one count on."""
    before: Counter[str] = Counter()
    requests = []
    for index, prompt in enumerate(prompts):
        requests.append(
            RolloutRequest(
                prompt=prompt,
                group_size=group_size,
                seed=seed,
                stream=stream,
                index=index,
                first_sample=before[prompt.id] * group_size,
            )
        )
        before[prompt.id] += 1
    return requests


def roll_out(
    backend: Backend,
    accelerator: Accelerator,
    scorer: Scorer,
    requests: Sequence[RolloutRequest],
    means: Means,
) -> list[RolloutGroup]:
    """This process's share of the groups; rewards start as soon as a group is ready."""
    shares = deal(len(requests), accelerator.process_index, accelerator.num_processes)
    groups = []
    with backend.behaviour():
        rolled = backend.rollout([requests[s.index] for s in shares])
        for share, group in zip(shares, rolled, strict=True):
            groups.append(group)
            if not share.padding:
                means.add(group.metrics)
                scorer.submit(group)
    return groups


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
    number; absent where it was asked about none.
    """
    values = {"reward": _mean(scores.combined[scores.valid])}
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
    values["invalid_samples"] = float((~scores.valid).sum())
    values["num_samples"] = float(len(scores.combined))
    return values


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


# What a prompt sampler learns


def due_refresh(sampler: Part, step: int) -> int:
    """Samples of every prompt that the sampler wants scored before ``step``; mostly 0."""
    ask = getattr(sampler.module, "refresh_samples", None)
    return ask(step, sampler.config) if ask else 0


def learn(
    sampler: Part,
    state: dict[str, Any],
    accelerator: Accelerator,
    groups: Sequence[RolloutGroup],
    collected: Sequence[GroupScores],
    requests: Sequence[RolloutRequest],
) -> dict[str, Any]:
    """The sampler's state after these groups, the same on every process.

    ``groups`` are those of this process, ``collected`` and ``requests`` all of them.
    """
    if not hasattr(sampler.module, "learn"):
        return state
    mine: list[tuple[int, float]] = []
    error: Exception | None = None
    try:
        mine = [(g.request.index, sampler.module.measure(g, sampler.config)) for g in groups]
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
    return sampler.module.learn(outcomes, sampler.config, state)


def sampler_metrics(sampler: Part, state: dict[str, Any]) -> dict[str, float]:
    """What a sampler logs of its state."""
    found = getattr(sampler.module, "metrics", None)
    return found(state) if found else {}


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
