"""Regression of the ratio onto the exact optimum of a bounded-ratio trust region.

    loss   = |r - target| |A|,   r = exp(logp - logp_old)
    target = 1 - clip_low + (clip_low + clip_high) sigmoid(gap / temperature)
    gap    = (R - median of the group) / (s + eps)            GBPO: s, the deviation of the group
    gap    =  R - median of the group                         in the manner of BPO

BRRL (arXiv:2604.18578): among ratios within 1 -+ clip the expected advantage is largest where each
is at one of the bounds, by the side of the median on which its reward lies.  Unlike PPO's clip,
which is flat beyond the bound, the loss draws a ratio back to it.  BPO has a learned median of the
state's value and an advantage from a critic; here the group's median stands for the first.

Median samples are anchored at 1 (for equal clips): with binary rewards and a correct majority only
the wrong samples move.  Where A = 0 nothing is anchored.  At ratio 1 the gradient is that of
-A logp wherever the target lies on A's side, and the opposite where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.objectives._groups import by_group
from mmrl.objectives._ratio import approx_kl, log_ratio
from mmrl.reduction import tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import Advantages, LossTerms, PolicyTerms, Scores, UpdateBatch

PAPER = "BRRL 2026, arXiv:2604.18578"
EVIDENCE: str = "code"
OWN_ADVANTAGE = True
IGNORES_SIGN = True
TAKES_STALE = True
TOLERANCE = 1e-5
"""A ratio this near its target is at it: at the kink, rounding must not choose the gradient."""


class Config(StrictModel):
    """Bounds of the ratio, and how hard the side of the median decides between them."""

    clip_low: float = Field(
        default=0.2, ge=0, lt=1, description="The least target is 1 - clip_low (0.2, 0.3)."
    )
    clip_high: float = Field(
        default=0.2, ge=0, description="The greatest is 1 + clip_high (the same)."
    )
    temperature: float = Field(
        default=1e-4, gt=0, description="Divisor of the gap; 1e-4 leaves its sign. BPO: 1e-3."
    )
    gap: Literal["normalised", "reward"] = Field(
        default="normalised",
        description="normalised: over the deviation of the group (GBPO). reward: in units of the "
        "reward (BPO).",
    )


def signals(scores: Scores, advantages: Advantages, config: Config) -> Mapping[str, Tensor]:
    """``gap`` [N] of each sample from its group's median; 0 at invalid samples."""
    del advantages

    def gap(rewards: Tensor) -> Tensor:
        if len(rewards) == 1:
            return rewards  # released code: mean 0, deviation 1, median 0
        distance = rewards - rewards.quantile(0.5)
        if config.gap == "reward":
            return distance
        squares = (rewards - rewards.mean()).square().sum()
        return distance / ((squares / (len(rewards) - 1)).sqrt() + 1e-6)

    return {"gap": by_group(scores.combined, scores.group, scores.valid, gap)}


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Weighted distance from the target [B, K].

    Metrics: ``ratio/mean``; ``gbpo/beyond``, the share of ratios that are drawn back to a target
    which they have passed; ``gbpo/opposed``, that of samples whose target lies on the other side of
    1 than A; ``approx_kl``, k3 of KL(old || new) in nats per decision.
    """
    ratio = log_ratio(terms, batch, "decision").exp()
    side = torch.sigmoid(batch.signal("gap") / config.temperature)
    move = ((config.clip_low + config.clip_high) * side - config.clip_low).to(ratio.dtype)
    size = batch.advantages[:, None].to(ratio.dtype)
    distance = ratio - (1.0 + move)
    distance = where_active(distance, distance.abs() > TOLERANCE)
    metrics = {"ratio/mean": ratio, "approx_kl": approx_kl(terms, batch)}
    metrics |= {"gbpo/beyond": distance * move > 0, "gbpo/opposed": size * move < 0}
    pairs = tallies(metrics, batch.mask, batch.weights)
    return LossTerms(loss=distance.abs() * size.abs(), metrics=pairs)
