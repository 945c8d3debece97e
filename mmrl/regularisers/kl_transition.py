"""Divergence of the denoising steps of the policy from those of the frozen reference model.

    loss = mean (mu - mu_reference)^2 / (2 S^2)

The closed-form KL of two Gaussian steps with one covariance (Flow-GRPO, Liu et al. 2025,
arXiv:2505.05470), per latent dimension.
"""

from __future__ import annotations

import torch
from pydantic import Field

from mmrl.divergences import SPREAD, TransitionConfig, active_spread, gaussian_kl
from mmrl.reduction import tallies, where_active
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Liu et al. 2025, arXiv:2505.05470"
EVIDENCE = "code"
TAKES_STALE = True
GAP = "mean_gap_reference"


class Config(TransitionConfig):
    """Weight, and what divides the gap: published weights belong to one of the two."""

    coef: float = Field(
        default=4e-3,
        ge=0,
        description="Weight of the penalty; 0 computes nothing at all. Flow-GRPO: 4e-3 (1e-3 for "
        "PickScore) with `true`, 4e-2 (1e-2) with `drop_dt`.",
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute; none when ``coef`` is 0."""
    return frozenset({GAP, SPREAD[config.denominator]} if config.coef > 0 else ())


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Penalty [B, K], not multiplied by ``coef``; metric ``kl_transition``.

    With ``coef`` 0 it is zero and logs nothing, whatever terms are there.

    Raises:
        UserError: a trained step without noise, where the divergence is infinite.
    """
    if config.coef == 0:
        return LossTerms(loss=torch.zeros_like(terms.logp))
    name = SPREAD[config.denominator]
    spread = active_spread(terms.need(name), batch.mask, f"regulariser kl_transition: {name}")
    penalty = gaussian_kl(where_active(terms.need(GAP), batch.mask), spread)
    metrics = tallies({"kl_transition": penalty}, batch.mask, batch.weights)
    return LossTerms(loss=penalty, metrics=metrics)
