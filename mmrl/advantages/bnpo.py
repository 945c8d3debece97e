"""Centred rewards over a Beta density of the success rate, fitted anew in each step.

    A_i = (r_i - p) / f(p; alpha, beta),    alpha = max(1, 1 + a / 3),    beta = max(1, 1 + b / 3)

with p the mean reward of the group and Beta(a, b) the moment fit of p over the groups of the step;
among Beta densities f this one makes the variance of A least (BNPO, arXiv:2506.02864).  alpha =
beta = 1 is REINFORCE less the mean of the group, alpha = beta = 3/2 is pi/8 of GRPO's advantage.

Rewards lie between 0 and 1.  p counts the sample itself, a bias as in GRPO.  A group with one valid
sample, of which the released code takes p to be 0, gets 0 here, as do groups of equal rewards.  The
reported gains over other normalisations are small.  Token means that some trainers call "bnpo" are
something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from mmrl.advantages import per_reward
from mmrl.advantages._beta import density, fitted
from mmrl.advantages._groups import advantages_with_metrics, group_statistics, one_reward
from mmrl.errors import UserError
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Xiao et al. 2025, arXiv:2506.02864"
EVIDENCE = "code"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 2
REWARDS = "unit"


class Config(StrictModel):
    """How far a weight may rise, and whether rewards are taken one by one."""

    max_weight: float = Field(
        default=1e6, gt=0, description="Largest 1 / f (released: 1e6; 10 tames rare successes)."
    )
    weights: dict[str, float] | None = Field(
        default=None,
        description="Treat each reward by itself and add up the results with these weights by "
        "label, all of them (released: 1/n each); 0: logged only. null: the sum of rewards.",
    )


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``; they sum to 0 in a group.

    Metrics: those of ``group``; ``bnpo/alpha`` and ``bnpo/beta``, of each reward ``.../label``.

    Raises:
        UserError: a valid reward is outside [0, 1], or ``weights`` and the rewards of the run
            differ in names.
    """
    weights = reward_weights(config, scores.by_name)
    parts = {f"/{n}": (w, one_reward(scores, n)) for n, w in weights.items() if w} or {
        "": (1.0, scores)
    }
    values, keep = torch.zeros_like(scores.combined), torch.zeros_like(scores.valid)
    metrics: dict[str, float] = {}
    for name, (weight, part) in parts.items():
        found, alpha, beta = _normalized(part, config.max_weight)
        values, keep = values + weight * found, keep | part.valid
        metrics |= {f"bnpo/alpha{name}": alpha, f"bnpo/beta{name}": beta}
    pooled = replace(scores, valid=keep)
    result = advantages_with_metrics(values, pooled, group_statistics(pooled))
    return replace(result, metrics={**result.metrics, **metrics}), state


def reward_weights(config: Config, labels: Iterable[str]) -> dict[str, float]:
    """Weight of each of ``labels``, none where their sum counts; errors as in ``per_reward``."""
    if config.weights is None:
        return {}
    return per_reward.reward_weights(per_reward.Config(weights=config.weights), labels)


def _normalized(scores: Scores, most: float) -> tuple[Tensor, float, float]:
    """[N] advantages by one reward, and alpha and beta."""
    valid = scores.combined[scores.valid]
    if bool(((valid < 0) | (valid > 1)).any()):
        wrong = valid[(valid < 0) | (valid > 1)][0]
        raise UserError(
            f"advantage 'bnpo' reads rewards as successes, and one is {float(wrong):g}; allowed: "
            "0 to 1 (of the weighted sum, or with advantage.weights of each reward)"
        )
    groups = group_statistics(scores)
    alpha, beta = fitted(groups.mean[groups.count > 0])
    # In a flat group the density may be 0, and nothing is left to weigh.
    inside = torch.where(groups.flat, 0.5, groups.mean)
    weight = (1 / density(inside, alpha, beta)).clamp(max=most)
    return groups.centred * weight[groups.member], alpha, beta
