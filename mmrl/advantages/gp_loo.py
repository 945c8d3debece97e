"""Reward less what a Gaussian process predicts for it from all other samples of the step.

    A_i = (K^-1 (r - m))_i / (K^-1)_ii,     K = c0 11' + c1 [same group] + s2 I

c0: how far prompts are off from m together, c1: how far they differ, s2: how far the samples of a
prompt do, all as variances.  The prediction for sample i does not read it, so the gradient is
unbiased for any such numbers.  Limits: RLOO (c1 -> inf, c0 = 0), the mean of all others (c0 -> inf,
c1 = 0), no baseline (both 0).  A group of equal rewards is judged by the other groups.

Our generalisation of RLOO, after Bayesian quadrature (Ghavamzadeh et al., JMLR 17(66), 2016; also
arXiv:2604.27563), whose Fisher kernel is nothing but Monte Carlo when estimated from the samples
themselves.  Where we measured it, it helped groups of 2 to 4 only.  ``fit`` estimates the numbers
from earlier steps: analysis of variance, averaged with decay 0.9.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from mmrl.advantages._groups import GroupStatistics, advantages_with_metrics, group_statistics
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Ghavamzadeh et al. 2016, arXiv:2604.27563"
EVIDENCE = "reconstructed"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 1
LEARNS_FROM_EQUAL_REWARDS = True
DECAY, LEAST_VARIANCE = 0.9, 1e-6


class Config(StrictModel):
    """Prior variances, in squared units of reward."""

    common: float = Field(
        default=1.0, ge=0, description="c0: of what all prompts share, around the mean."
    )
    between: float = Field(default=0.05, ge=0, description="c1: between prompts.")
    within: float = Field(default=0.15, gt=0, description="s2: of the samples of a prompt.")
    mean: float = Field(default=0.0, description="m: reward that is expected before any is seen.")
    fit: bool = Field(
        default=False,
        description="Take between and within from earlier steps, where there are any.",
    )


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the next ``state``.

    ``state``: with ``fit`` ``between`` and ``within``, else as it was.  Metrics: those of
    ``group``; ``gp_loo/between`` and ``gp_loo/within``, the variances that were used.
    """
    groups = group_statistics(scores)
    known = {**config.model_dump(), **(state if config.fit else {})}
    between, within = float(known["between"]), float(known["within"])
    residual = torch.where(scores.valid, scores.combined - config.mean, 0.0)
    weights, diagonal = solved(residual, groups, config.common, between, within)
    values = torch.where(scores.valid, weights / diagonal, 0.0)
    result = advantages_with_metrics(values, scores, groups)
    own = {"gp_loo/between": between, "gp_loo/within": within}
    state = followed(groups, state) if config.fit else state
    return replace(result, metrics={**result.metrics, **own}), state


def solved(
    residual: Tensor, groups: GroupStatistics, common: float, between: float, within: float
) -> tuple[Tensor, Tensor]:
    """[N] K^-1 residual, and the diagonal of K^-1, of the valid samples, in linear time.

    ``residual`` [N] float64, 0 at invalid samples, which are no part of K; what is given there is
    of no use.
    """
    # Woodbury's identity twice: K is diagonal but for one vector of ones a group, and one of all.
    size = 1 / (within + groups.count * between)
    total = torch.zeros_like(size).index_add(0, groups.member, residual)
    overlap = common / (1 + common * (groups.count * size).sum())
    shared = overlap * size * (size * total).sum()
    weights = (residual - (between * size * total)[groups.member]) / within
    diagonal = (1 - between * size) / within - overlap * size.square()
    return weights - shared[groups.member], diagonal[groups.member]


def followed(groups: GroupStatistics, state: dict[str, Any]) -> dict[str, Any]:
    """The state after these rewards; it stays where they do not tell variances apart."""
    used = groups.count > 0
    count, mean, number = groups.count[used], groups.mean[used], int(used.sum())
    spare = float(count.sum()) - number
    if number < 2 or spare < 1:
        return state
    within = max(float(groups.squares.sum()) / spare, LEAST_VARIANCE)
    grand = (count * mean).sum() / count.sum()
    around = float((count * (mean - grand).square()).sum()) / (number - 1)
    size = float(count.sum() - count.square().sum() / count.sum()) / (number - 1)
    found = {"between": max((around - within) / size, 0.0), "within": within}
    return {n: DECAY * float(state.get(n, v)) + (1 - DECAY) * v for n, v in found.items()}
