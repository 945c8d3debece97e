"""What each sample adds to the worth of its group, a set function with diminishing returns.

    A_i = F(S) - F(S without i) + reward_weight (r_i - mean of the others),      S: the group

SubPO (Prajapat et al. 2023, arXiv:2307.13372) credits an action with marginal gains of a submodular
F of what a trajectory visited.  Its form across a group is ours: F(S without i) does not depend on
sample i, so that sum_i A_i grad log pi(y_i) is an unbiased gradient of E[F(S)] for any F of
``_sets`` but ``facility_location``, whose places to be served are the samples themselves.  A sample
like another one earns nothing; with ``max`` and rewards of 0 and 1 only the single success of a
group does, which is pass@G.  Random-order (Shapley) gains would sum to F(S), their gradient biased.

With ``normalise`` they are normalised in the group, and no longer unbiased.  Features are of form,
not of meaning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from mmrl.advantages import _sets, group, leave_one_out
from mmrl.advantages._groups import advantages_with_metrics, group_statistics, rows_of_groups
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Prajapat et al. 2023, arXiv:2307.13372"
EVIDENCE = "reconstructed"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 2
NORMAL = group.Config(deviation="group", ddof=1, eps=1e-6)


class Config(StrictModel):
    """What a group is worth, and how much the rewards of its samples count beside it."""

    function: _sets.Name = Field(
        default="max",
        description="max: best reward (pass@G). distinct: number of different right answers. "
        "facility_location: how well the samples stand for all, by features. log_det: volume that "
        "they span, by features; the last two weigh samples by reward, which must be 0 or more.",
    )
    success: float = Field(
        default=0.5, description="Of distinct: an answer is right above this reward."
    )
    reward_weight: float = Field(
        default=0.0, ge=0, description="Weight of the sample's own reward, less that of the others."
    )
    normalise: bool = Field(
        default=False, description="Less the mean of the group, over its deviation, as in GRPO."
    )


def reads(config: Config) -> frozenset[str]:
    """Facts about samples that are needed."""
    return _sets.READS[config.function]


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``.

    Only valid samples are in a group.  Metrics: those of ``group``; ``subpo/value``, mean of F over
    groups with a valid sample.

    Raises:
        UserError: a reward below 0, where rewards weigh features.
    """
    values = torch.zeros_like(scores.combined)
    found: list[float] = []
    function = _sets.FUNCTIONS[config.function]
    for rows in filter(len, rows_of_groups(scores)):
        pool = _sets.pool(scores, rows, config.function, config.success)
        values[rows] = _sets.leave_one_out(function, pool)
        found.append(function(pool, range(len(rows))))
    if config.reward_weight:
        own, _ = leave_one_out.estimate(scores, leave_one_out.Config(), {})
        values = values + config.reward_weight * own.values
    if config.normalise:
        credit = replace(scores, combined=values)
        values = group.normalized(credit, group_statistics(credit), NORMAL)
    result = advantages_with_metrics(values, scores, group_statistics(scores))
    worth = sum(found) / max(len(found), 1)
    return replace(result, metrics={**result.metrics, "subpo/value": worth}), state
