"""Held-out prompts with fixed noise: the same samples are asked for at each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from mmrl.backend import Backend
from mmrl.config import RunConfig
from mmrl.distributed import deal, gather_items
from mmrl.rollouts import assemble, collect_scores, make_requests
from mmrl.types import Moment, Prompt, RolloutGroup
from rewards.combine import GroupScores, Scorer

# No training step has this number, so evaluation noise never coincides with training noise.
EVALUATION_STREAM = -1


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """``metrics``: `eval/<label>` means.  ``shown``: the groups of the sample grid, on all ranks,
    and their ``scores``.
    """

    metrics: dict[str, float]
    shown: list[RolloutGroup]
    scores: list[GroupScores]


def evaluate_held_out(
    config: RunConfig,
    accelerator: Accelerator,
    backend: Backend,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    moment: Moment | None = None,
) -> Evaluation:
    """Draw ``samples_per_prompt`` samples of each prompt with averaged weights and judge them.

    ``moment``: where in a run that is.
    """
    section = config.evaluation
    requests = make_requests(
        prompts, section.samples_per_prompt, section.seed, EVALUATION_STREAM, moment
    )
    shares = deal(len(requests), accelerator.process_index, accelerator.num_processes)
    shown, wanted = [], spread(len(requests), section.grid_prompts)
    with backend.averaged():
        rolled = backend.rollout([requests[s.index] for s in shares], evaluation=True)
        for share, group in zip(shares, rolled, strict=True):
            if share.padding:
                continue
            scorer.submit(group)
            if share.index in wanted:
                shown.append(replace(group, payload=None))
    collected = collect_scores(accelerator, scorer)
    everything = gather_items(accelerator, shown)
    return Evaluation(
        metrics=_means(collected),
        shown=sorted(everything, key=lambda group: group.request.index),
        scores=[scores for scores in collected if scores.index in wanted],
    )


def spread(count: int, wanted: int) -> frozenset[int]:
    """Up to ``wanted`` indices below ``count``, evenly spread: files often sort by kind."""
    wanted = min(count, wanted)
    return frozenset(i * count // wanted for i in range(wanted))


def _means(collected: Sequence[GroupScores]) -> dict[str, float]:
    """Mean of each judge over the samples it could judge, and how many it could not, if any.

    Only prompts of a judge's own tasks count; without one it has neither.
    """
    found = {}
    for name, raw in assemble(collected).by_name.items():
        asked = sum(group.num_asked[name] for group in collected)
        judged = raw[torch.isfinite(raw)]
        if asked:
            found[f"eval/{name}"] = float(judged.mean())
        if len(judged) < asked:
            found[f"eval/{name}_unjudged"] = float(asked - len(judged))
    return found
