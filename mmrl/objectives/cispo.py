"""Policy gradient weighted by a clipped importance ratio that has no gradient of its own.

    loss = -A sg[clamp(r, low, high)] logp,   r = exp(logp - logp_old),   sg: no gradient

CISPO (MiniMax-M1, arXiv:2506.13585).  Where PPO's clip silences a decision, here it only
bounds its weight, so each decision keeps a gradient.  The paper leaves the lower side open.
Released systems write a bound either as the ratio itself or as its distance from 1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from mmrl.objectives._ratio import approx_kl, log_ratio
from mmrl.reduction import tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "MiniMax 2025, arXiv:2506.13585"
EVIDENCE = "code"
TAKES_STALE = True


class Config(StrictModel):
    """Bounds of the ratio, and how they are written."""

    bounds: Literal["around_one", "absolute"] = Field(
        default="around_one",
        description="around_one: the ratio is clipped to 1 - low and 1 + high. absolute: to low "
        "and high.",
    )
    low: float | None = Field(
        default=None, ge=0, description="Lower bound, at most 1 if absolute; null: none."
    )
    high: float = Field(default=0.28, ge=0, description="Upper bound, at least 1 if absolute.")

    @field_validator("low", "high")
    @classmethod
    def _around_the_ratio_one(cls, value: float | None, info: ValidationInfo) -> float | None:
        # A distance taken for a ratio, such as 0.28, would shrink the weight of every decision.
        if value is None or info.data.get("bounds") != "absolute":
            return value
        if (value > 1) if info.field_name == "low" else (value < 1):
            raise ValueError("should not cut off the ratio 1; absolute bounds lie around it")
        return value


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Weighted policy-gradient loss [B, K].

    Metrics: ``ratio/mean``; ``clip_ratio/low`` and ``clip_ratio/high``, the shares of ratios below
    and above the bounds whatever the advantage, and ``clip_ratio/region``, their sum;
    ``approx_kl``, k3 of KL(old || new) in nats per decision.
    """
    ratio = log_ratio(terms, batch, "decision").exp().detach()
    low, high = bounds(config)
    logp = where_active(terms.logp, batch.mask)
    value = -batch.advantages[:, None].to(logp.dtype) * ratio.clamp(low, high) * logp
    metrics: dict[str, Tensor] = {
        "ratio/mean": ratio,
        "clip_ratio/low": ratio < low,
        "clip_ratio/high": ratio > high,
        "clip_ratio/region": (ratio < low) | (ratio > high),
        "approx_kl": approx_kl(terms, batch),
    }
    return LossTerms(loss=value, metrics=tallies(metrics, batch.mask, batch.weights))


def bounds(config: Config) -> tuple[float, float]:
    """Smallest and largest ratio; a ratio is positive, so 0 is no lower bound."""
    if config.bounds == "absolute":
        return config.low or 0.0, config.high
    return (0.0 if config.low is None else 1.0 - config.low), 1.0 + config.high
