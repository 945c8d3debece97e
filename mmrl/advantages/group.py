"""Reward minus the mean of its group, over a standard deviation.

    A_i = (r_i - mean(group of i)) / (s + eps)

with s the deviation of the group (Shao et al. 2024, arXiv:2402.03300, section 4.1.2), that of all
rewards of the step (Flow-GRPO and AWM as released), or no division (Dr. GRPO, arXiv:2503.20783).
Released systems differ in divisor and guard: Flow-GRPO has ``ddof: 0, eps: 1e-4``, Flow-Factory
``ddof: 0, eps: 1e-6, eps_mode: floor``, TRL and verl-omni ``ddof: 1, eps: 1e-4``, verl ``ddof: 1,
eps: 1e-6``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.advantages._groups import (
    GroupStatistics,
    advantages_with_metrics,
    global_deviation,
    group_statistics,
)
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Shao et al. 2024, arXiv:2402.03300"
EVIDENCE = "code"
MIN_GROUP_SIZE = 2


class Config(StrictModel):
    """Which deviation divides, and how it is guarded against zero."""

    deviation: Literal["group", "global", "none"] = Field(
        default="global",
        description="group: deviation of the group. global: deviation of all rewards of the step. "
        "none: no division, ddof and eps are unused.",
    )
    ddof: Literal[0, 1] = Field(
        default=0, description="0: population deviation (divisor n). 1: sample deviation (n - 1)."
    )
    eps: float = Field(default=1e-4, ge=0, description="Guard, in units of the reward.")
    eps_mode: Literal["add", "floor"] = Field(
        default="add",
        description="add: divide by deviation + eps. floor: divide by max(deviation, eps).",
    )


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``.

    Exactly 0 in a group whose valid rewards are all equal (one valid sample included) and at
    invalid samples, which alone lose ``keep``: other losses still see the rest.
    """
    groups = group_statistics(scores)
    return advantages_with_metrics(normalized(scores, groups, config), scores, groups), state


def normalized(scores: Scores, groups: GroupStatistics, config: Config) -> Tensor:
    """[N] float64 centred rewards over the configured deviation; 0 in flat groups."""
    divisor = _divisor(scores, groups, config)
    # The divisor is 0 only where eps is 0 and squares underflow: as good as equal rewards.
    return torch.where(divisor > 0, groups.centred / divisor, 0.0)


def _divisor(scores: Scores, groups: GroupStatistics, config: Config) -> Tensor:
    """[N] positive divisor of each sample."""
    if config.deviation == "none":
        return torch.ones_like(scores.combined)
    if config.deviation == "group":
        deviation = groups.deviation(config.ddof)[groups.member]
    else:
        deviation = global_deviation(scores, config.ddof).expand_as(scores.combined)
    return deviation + config.eps if config.eps_mode == "add" else deviation.clamp(min=config.eps)
