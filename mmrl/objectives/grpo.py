"""Clipped policy gradient with an importance ratio for each decision or each sample.

    loss = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)),   r = exp(logp - logp_old)

PPO's surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7) with the group-relative advantages
of GRPO, the separate bounds of DAPO (arXiv:2503.14476) and, with ``importance: sample``,
the sequence ratio of GSPO (arXiv:2507.18071).  With a flow-matching likelihood it is AWM
(arXiv:2509.25050).
"""

from __future__ import annotations

from pydantic import Field

from mmrl.objectives._ratio import (
    Importance,
    approx_kl,
    clipped_surrogate,
    log_ratio,
    ratio_metrics,
)
from mmrl.reduction import tallies
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Shao et al. 2024, arXiv:2402.03300"


class Config(StrictModel):
    """Clip range and level of the ratio."""

    clip_low: float = Field(
        default=0.2, ge=0, description="The ratio is clipped below at 1 - clip_low; 1 disables it."
    )
    clip_high: float = Field(
        default=0.2, ge=0, description="The ratio is clipped above at 1 + clip_high."
    )
    importance: Importance = Field(
        default="decision",
        description="decision: a ratio for each decision. sample: one ratio for each sample, "
        "exp of the mean log-ratio over its decisions.",
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Clipped surrogate, [B, K] for ``importance: decision`` and [B, 1] for ``sample``.

    Metrics: ``ratio/mean``; ``clip_ratio/low`` and ``clip_ratio/high``, the shares of ratios whose
    clip is active given the sign of the advantage, and ``clip_ratio/region``, their sum;
    ``approx_kl``, k3 of KL(old || new) in nats per decision.
    """
    ratio = log_ratio(terms, batch, config.importance).exp()
    advantages = batch.advantages[:, None].to(ratio.dtype)
    surrogate = clipped_surrogate(ratio, advantages, config.clip_low, config.clip_high)
    metrics = ratio_metrics(ratio, advantages, config.clip_low, config.clip_high)
    metrics["approx_kl"] = approx_kl(terms, batch)
    return LossTerms(loss=surrogate, metrics=tallies(metrics, batch.mask, batch.weights))
