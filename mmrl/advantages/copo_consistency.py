"""Advantage in the group where its answers differ, between prompts where they agree.

    A_i = w A_local + (1 - w) A_global,      w = sigmoid(sharpness (H - threshold))
    A_local = (r_i - mean) / (std + eps) in the group;   A_global: the same of the groups' means
    H = -sum_a p_a log p_a,   p_a: share of the samples of the group whose answer is a

COPO (Han et al. 2025, arXiv:2508.04138): groups whose samples all earned the same still teach, up
where they are right and down where they are wrong, which lowers every sampled token of a prompt
that always fails; watch the entropy.  Published with sharpness 20, threshold 1.5 and groups of 6.

Known from two reports, which do not settle the outcome of a prompt; here it is the mean reward.
The paper blends two clipped losses; blending the advantages is the same as long as nothing is
clipped.  In its own ablation the global part alone did better than the blend.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from mmrl.advantages import group
from mmrl.advantages._answers import Unparsed, answer_entropy, even_entropy
from mmrl.advantages._groups import advantages_with_metrics, group_statistics
from mmrl.errors import UserError
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Han et al. 2025, arXiv:2508.04138"
EVIDENCE = "paper"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 2
LEARNS_FROM_EQUAL_REWARDS = True


class Config(StrictModel):
    """When answers count as differing."""

    sharpness: float = Field(default=20.0, ge=0, description="gamma, per nat (published: 20).")
    threshold: float | None = Field(
        default=None,
        description="Entropy of answers at which both parts weigh the same, in nats, below log(G) "
        "(published: 1.5 for G = 6); null: 1.5 log(G) / log(6).",
    )
    unparsed: Unparsed = Field(
        default="one",
        description="Samples without an answer count as one answer, or each as its own.",
    )
    eps: float = Field(default=1e-6, ge=0, description="Guard of both deviations.")


def reads(config: Config) -> frozenset[str]:
    """Facts about samples that are needed."""
    del config
    return frozenset({"answer"})


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``.

    Metrics: those of ``group``; ``copo/entropy`` and ``copo/local``, means of H and w over groups
    with a valid sample.
    """
    groups = group_statistics(scores)
    used = groups.count > 0
    one = torch.zeros_like(used, dtype=torch.int64)
    means = Scores(combined=groups.mean, group=one, valid=used)
    options = group.Config(deviation="group", ddof=1, eps=config.eps)
    local = group.normalized(scores, groups, options)
    between = group.normalized(means, group_statistics(means), options)[groups.member]
    entropy = answer_entropy(scores, config.unparsed)
    even = even_entropy(groups.count, config.threshold)
    share = torch.sigmoid(config.sharpness * (entropy - even))
    blend = share[groups.member]
    values = torch.where(scores.valid, blend * local + (1 - blend) * between, 0.0)
    result = advantages_with_metrics(values, scores, groups)
    divisor = max(int(used.sum()), 1)
    own = {"copo/entropy": entropy[used], "copo/local": share[used]}
    means_of = {name: float(value.sum()) / divisor for name, value in own.items()}
    return replace(result, metrics={**result.metrics, **means_of}), state


def refuse(config: Config, num_groups: int, group_size: int) -> None:
    """``UserError`` for a threshold that the entropy of no group can reach."""
    del num_groups
    if config.threshold is not None and config.threshold >= math.log(group_size):
        raise UserError(
            f"advantage.threshold: {config.threshold:g} is not below log({group_size}) = "
            f"{math.log(group_size):.3g}, the entropy of a group without two equal answers, so "
            "that its own advantages would count for nothing; null rescales the published 1.5"
        )
