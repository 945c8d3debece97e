"""A weighted lower part of the scores of bundles of questions, in place of the mean reward.

    paper:  A(S) = -omega (q_lo - S)^+ - (q_hi - S)^+
    code:   A(S) = (omega CVaR_alpha + RVaR_alpha:beta) / (omega + 1) at S, over std(bundle)

RiskPO (arXiv:2510.00911): MVaR = (1 + omega) int_{0..q_lo} S dF + int_{q_lo..q_hi} S dF of the
score S of a paper, one rollout of each of K questions (``_bundles``).  q are the alpha- and
beta-quantiles of S over the run, followed by

    q <- q + quantile_rate (level - mean 1{S < q}),      from those of the first step,

kept between the scores ever seen.  A step is judged by the q before it, so that they do not depend
on what they judge.  In the released trainer the followed q seem never to reach the estimator, which
then takes those of each bundle: ``quantiles: bundle``.  There the deviation of a bundle has an eps
and may be 0; here a bundle without spread gets 0.  Both forms ran with a clipped loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from mmrl.advantages._bundles import Credit, credited, papers
from mmrl.advantages._groups import advantages_with_metrics, group_statistics, rows_of_groups
from mmrl.advantages._mixed_var import FORMS, Form, Quantiles, first_state, followed, judging
from mmrl.advantages._risk import LevelsConfig
from mmrl.errors import UserError
from mmrl.typed import floats
from mmrl.types import Advantages, Scores

PAPER = "Ren et al. 2025, arXiv:2510.00911"
EVIDENCE = "code"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 2
LEARNS_FROM_EQUAL_REWARDS = True


class Config(LevelsConfig):
    """Bundles, and what becomes of the advantage of a paper."""

    bundle_size: int = Field(default=5, ge=1, description="Questions of a bundle (published: 5).")
    form: Form = Field(default="code", description="As released, or as printed in the paper.")
    natural_baseline: bool = Field(
        default=True,
        description="Of form code. true: none is above 0. false: none above q_lo is below 0.",
    )
    quantiles: Quantiles = Field(
        default="run",
        description="Followed over the run, of the bundle alone, or the mean of both.",
    )
    quantile_rate: float = Field(
        default=0.1, ge=0, description="Step of the followed quantiles, in units of score."
    )
    credit: Credit = Field(
        default="uniform",
        description="Of a rollout. uniform: that of its paper. std: over the question's deviation. "
        "score: a half where it earned something, else 1.5. sum_mean: a share by centred reward.",
    )


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the next ``state``.

    0 for samples in no paper.  ``state``: ``quantiles`` [lower, upper] and ``range`` [least,
    greatest] score of the run.  Metrics: those of ``group``; ``riskpo/low`` and ``riskpo/high``,
    the quantiles that judged; ``riskpo/papers``.
    """
    groups, found = group_statistics(scores), papers(rows_of_groups(scores), config.bundle_size)
    rewards = scores.combined[found.member]
    if not len(rewards):
        return advantages_with_metrics(torch.zeros_like(scores.combined), scores, groups), state
    marks = rewards.sum(1)
    state = state or first_state(marks, config.levels)
    judges = judging(marks, found.bundle, config.levels, config.quantiles, state)
    values = FORMS[config.form](marks, found.bundle, judges, config, config.natural_baseline)
    spread = groups.deviation(1)[groups.member]
    of_question = (groups.centred[found.member], spread[found.member])
    credit = credited(values, rewards, *of_question, config.credit)
    result = advantages_with_metrics(found.spread(credit, len(scores.combined)), scores, groups)
    own = {"riskpo/papers": float(len(marks))}
    own |= zip(("riskpo/low", "riskpo/high"), floats(judges.mean(0)), strict=True)
    state = followed(marks, config.levels, config.quantile_rate, state)
    return replace(result, metrics={**result.metrics, **own}), state


def refuse(config: Config, num_groups: int, group_size: int) -> None:
    """``UserError`` for prompts that are left over when bundles are made."""
    del group_size
    if num_groups % config.bundle_size:
        raise UserError(
            f"advantage.bundle_size: {config.bundle_size} does not divide the {num_groups} prompts "
            "of a step (training.prompts_per_step); some would never be trained on"
        )
