"""Rewards of each group moved onto the quantiles of a standard normal, by rank alone.

    A_i = q_(rank of r_i),   q_k = Phi^-1((k - 1/2) / n),   equal rewards share the mean of theirs

The map of one-dimensional optimal transport to N(0, 1) (G2RPO, OpenVLThinkerV2, arXiv:2604.08539):
each group has the same spread, and no outlier exceeds q_n.  The released code then does the same
with the results of each task (``second_stage``), after which a group no longer sums to 0, and may
take each reward alone and add up the results (``per_reward``).  There the second stage gives even
a group of equal rewards an advantage; here such a group stays out of it and gets exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from mmrl.advantages import per_reward
from mmrl.advantages._groups import advantages_with_metrics, group_statistics, task_numbers
from mmrl.advantages._transport import transport
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Hu et al. 2026, arXiv:2604.08539"
EVIDENCE = "code"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 2
DECIMALS = 6
"""To these decimals results of the first stage are equal; the last bits of a sum are chance."""


class Config(StrictModel):
    """What is ranked, and which differences count."""

    second_stage: bool = Field(
        default=False, description="Transport the results of each task once more, all together."
    )
    per_reward: bool = Field(
        default=False, description="Transport each reward by itself and add up the results."
    )
    weights: dict[str, float] | None = Field(
        default=None,
        description="With per_reward: weight of each result by the label of its reward, all of "
        "them; 0: logged only. null: 1 each.",
    )
    round_to: float = Field(
        default=1e-6, ge=0, description="Rewards are rounded to multiples of it first; 0: not."
    )
    min_spread: float = Field(
        default=0.0, ge=0, description="A group whose rewards are within this range gets 0."
    )

    @field_validator("weights")
    @classmethod
    def _only_per_reward(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and not info.data.get("per_reward"):
            raise ValueError("belongs to per_reward: true; else the list of rewards has weights")
        return value


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``.

    Exactly 0 in a group without two different results, and at invalid samples, which alone lose
    ``keep``.  Metrics are those of ``group``.

    Raises:
        UserError: ``weights`` and the rewards of the run differ in names.
    """
    first = _first_stage(scores, config)
    after = replace(scores, combined=first.round(decimals=DECIMALS), by_name={})
    groups = group_statistics(after)
    active = scores.valid & ~groups.flat[groups.member]
    if config.second_stage:
        first = transport(after.combined, task_numbers(scores), active)
    values = torch.where(active, first, 0.0)
    return advantages_with_metrics(values, scores, group_statistics(scores)), state


def reward_weights(config: Config, labels: Iterable[str]) -> dict[str, float]:
    """Weight of each of ``labels`` with ``per_reward``, else none; errors as in ``per_reward``."""
    if not config.per_reward:
        return {}
    return per_reward.reward_weights(per_reward.Config(weights=config.weights), labels)


def _first_stage(scores: Scores, config: Config) -> Tensor:
    """[N] results of each group; 0 at invalid samples and in flat groups."""
    guards = {"round_to": config.round_to, "min_spread": config.min_spread}
    if not config.per_reward:
        return transport(scores.combined, scores.group, scores.valid, **guards)
    total = torch.zeros_like(scores.combined)
    for label, weight in reward_weights(config, scores.by_name).items():
        reward = scores.by_name[label]
        applies = scores.valid & torch.isfinite(reward)
        total += weight * transport(reward, scores.group, applies, **guards)
    return total
