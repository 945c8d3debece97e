"""Weighted sum of the advantages of each reward alone.

    A_i = sum_r weight_r (r_i - mean_r(group of i)) / (s_r + eps)

Rewards of unlike scale then count by their weights, and different combinations of rewards stay
apart that have equal sums (GDPO, Liu et al. 2026, arXiv:2601.05242, without its last step, which
standardises the sum over the batch).  A reward that is NaN for a sample, because it does not apply
or failed, enters neither that sample's sum nor any statistic; the other rewards still count.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field

from mmrl.advantages import group
from mmrl.advantages._groups import advantages_with_metrics, group_statistics, one_reward
from mmrl.errors import UserError
from mmrl.schema import nearest
from mmrl.types import Advantages, Scores

PAPER = "Liu et al. 2026, arXiv:2601.05242"
EVIDENCE = "code"
MIN_GROUP_SIZE = group.MIN_GROUP_SIZE


class Config(group.Config):
    """Weights, and how each reward is normalised (the options of ``group``)."""

    weights: dict[str, float] | None = Field(
        default=None,
        description="Weight of each reward by its label, all of them; 0: logged only. null: 1 "
        "each. Weights in the list of rewards play no part here.",
    )


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``.

    Kept are samples to which a reward of non-zero weight applies, whether or not
    ``scores.combined`` is valid for them.  Metrics are those of ``group`` for the weighted sum of
    the rewards that apply.

    Raises:
        UserError: ``weights`` and the rewards of the run differ in names.
    """
    values, total = torch.zeros_like(scores.combined), torch.zeros_like(scores.combined)
    keep = torch.zeros_like(scores.valid)
    for label, weight in reward_weights(config, scores.by_name).items():
        if weight == 0:
            continue
        alone = one_reward(scores, label)
        values += weight * group.normalized(alone, group_statistics(alone), config)
        total += weight * alone.combined
        keep |= alone.valid
    pooled = Scores(combined=total, group=scores.group, valid=keep)
    return advantages_with_metrics(values, pooled, group_statistics(pooled)), state


def reward_weights(config: Config, labels: Iterable[str]) -> dict[str, float]:
    """Weight of each of ``labels``; ``UserError`` for one without weight or a weight without one.

    It needs no sample, so it can be asked before a run starts.
    """
    labels = list(labels)
    if config.weights is None:
        return dict.fromkeys(labels, 1.0)
    for name in config.weights:
        if name not in labels:
            raise UserError(f"advantage.weights: no reward {name!r}; {nearest(name, labels)}")
    for label in labels:
        if label not in config.weights:
            raise UserError(f"advantage.weights: no weight for reward {label!r}; 0 only logs it")
    return dict(config.weights)
