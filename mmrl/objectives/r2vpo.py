"""Policy gradient under a bound on the variance of the ratio, held by a dual variable.

    loss = -A r + multiplier (r - 1)^2,   r = exp(logp - logp_old)
    multiplier <- max(0, multiplier + rate (V - target)),   V: mean of (r - 1)^2

R2VPO (arXiv:2601.03320, arXiv:2605.26784): the constraint E[(r - 1)^2] <= target takes the place of
the clip, and is that of chi^2(new || old), about twice the KL divergence of a small step.  The
multiplier is updated once for each optimizer step, from the mean over its decisions on all
processes.  A decision is drawn to the ratio 1 + A / (2 multiplier).

``logp_old`` is of the policy that drew the sample, however old: with ``training.stale`` groups of
earlier steps are trained beside the fresh ones, their ratios are further from 1, and the square
damps them.  V is then the mean over both.  That old rollouts may be reused is published; which
ones, and how many, is ours (``mmrl.stale``).

Only abstracts and a re-implementation with a fixed multiplier of 0.04 were reachable: the dual
update is the textbook one, and target, rate and bounds are ours.  A third-party benchmark of the
fixed form found low errors, but also low final entropies: log the entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from mmrl.objectives._ratio import approx_kl, log_ratio
from mmrl.reduction import tallies
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "R2VPO 2026, arXiv:2601.03320"
EVIDENCE: str = "reconstructed"
TAKES_STALE = True
VARIANCE = "ratio/variance"


class Config(StrictModel):
    """The bound, and how its multiplier follows it; all ours."""

    ASCENDING = (("multiplier_min", "multiplier_max"),)

    target: float = Field(
        default=0.04 / 3,
        gt=0,
        description="Largest mean of (r - 1)^2; default: of a ratio spread evenly over 1 -+ 0.2.",
    )
    multiplier: float = Field(
        default=1.0,
        ge=0,
        description="At the start. A re-implementation keeps it at 0.04 (rate 0).",
    )
    rate: float = Field(
        default=3.75,
        ge=0,
        description="Of the dual ascent; 0: none. Default: adds 1 in 20 steps of V = 2 target.",
    )
    multiplier_min: float = Field(
        default=0.01, ge=0, description="Floor of its updates: strictly on-policy V is 0."
    )
    multiplier_max: float = Field(default=100.0, gt=0, description="Ceiling of its updates.")


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def initial_state(config: Config) -> dict[str, Any]:
    """``multiplier`` at the start."""
    return {"multiplier": config.multiplier}


def update_state(
    state: Mapping[str, Any], metrics: Mapping[str, float], config: Config
) -> dict[str, Any]:
    """The state after an optimizer step with these means; unchanged where none was logged."""
    if not config.rate or VARIANCE not in metrics:
        return dict(state)
    found = state["multiplier"] + config.rate * (metrics[VARIANCE] - config.target)
    return {"multiplier": min(max(found, config.multiplier_min), config.multiplier_max)}


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Policy-gradient loss with its penalty [B, K].

    Metrics: ``ratio/mean``; ``ratio/variance``, the mean of (r - 1)^2; ``r2vpo/multiplier``;
    ``approx_kl``, k3 of KL(old || new) in nats per decision.
    """
    multiplier = (batch.state or initial_state(config))["multiplier"]
    ratio = log_ratio(terms, batch, "decision").exp()
    square = (ratio - 1.0).square()
    metrics = {
        "ratio/mean": ratio,
        VARIANCE: square,
        "r2vpo/multiplier": torch.full_like(ratio, multiplier),
        "approx_kl": approx_kl(terms, batch),
    }
    value = -batch.advantages[:, None].to(ratio.dtype) * ratio
    if multiplier:
        value = value + multiplier * square
    return LossTerms(loss=value, metrics=tallies(metrics, batch.mask, batch.weights))
