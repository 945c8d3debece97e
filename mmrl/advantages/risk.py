"""Credit of each reward for a risk functional of their law, in place of their mean.

    A_i = A(r_i),      A: influence function of rho at the law of the rewards

``_risk`` has the functionals.  rho is meant for each prompt (``scope: group``), of whose rewards a
group shows G, so that with a level below 1/G the worst of them counts alone; or for all prompts
together, on rewards less the mean of their group (``scope: batch``).

Where A is made of the samples that it credits its thresholds depend on them, a bias of order 1/G;
``baseline: leave_one_out`` takes the law of the others, less the mean of A over them.  For the mean
that is RLOO; with rewards of 0 and 1 a success earns k (share of failures)^(k - 1) for pass@k, less
that mean.  It takes quadratic time, so ``batch`` is for steps of some thousand samples.

The weights are RiskPO's (arXiv:2510.00911) and the rest is standard theory of influence functions;
no published run has this form, so what it gains is not established.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from mmrl.advantages._groups import advantages_with_metrics, group_statistics, rows_of_groups
from mmrl.advantages._risk import Baseline, RiskConfig, credit
from mmrl.errors import UserError
from mmrl.types import Advantages, Scores

PAPER = "Ren et al. 2025, arXiv:2510.00911"
EVIDENCE = "reconstructed"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 2


class Config(RiskConfig):
    """Which functional, of which law, against which baseline."""

    scope: Literal["group", "batch"] = Field(
        default="group",
        description="Law of the rewards of a group, or of all rewards of a step less the means of "
        "their groups.",
    )
    baseline: Baseline = Field(
        default="leave_one_out",
        description="none: A as it is. mean: less its mean over the law. leave_one_out: law and "
        "mean of the others.",
    )


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``.

    Exactly 0 where all rewards of a law are equal, but for ``baseline: none``.  Metrics: those of
    ``group``; ``risk/value``: rho, mean over the laws that have a sample.
    """
    groups, law, risk = group_statistics(scores), scores, config.functional()
    if config.scope == "batch":
        law = replace(scores, combined=groups.centred, group=torch.zeros_like(scores.group))
    values = torch.zeros_like(scores.combined)
    found: list[float] = []
    for rows in filter(len, rows_of_groups(law)):
        rewards = law.combined[rows]
        values[rows] = credit(risk, rewards, config.baseline)
        found.append(float(risk.value(rewards)))
    if config.baseline == "mean":
        values = group_statistics(replace(law, combined=values)).centred
    result = advantages_with_metrics(values, scores, groups)
    own = {"risk/value": sum(found) / max(len(found), 1)}
    return replace(result, metrics={**result.metrics, **own}), state


def refuse(config: Config, num_groups: int, group_size: int) -> None:
    """``UserError`` for a best of k among fewer than k samples."""
    del num_groups
    if config.measure == "pass_at_k" and config.scope == "group" and config.k > group_size:
        raise UserError(
            f"advantage.k: {config.k} draws are more than the {group_size} samples of the smallest "
            f"group (training.group_size, prompts.budget); allowed: 1 to {group_size}"
        )
