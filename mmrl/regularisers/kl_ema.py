"""Divergence of the policy from its own running average (the EMA adapter).

Mean squared velocity gap, plain or ELBO-weighted (Xue et al. 2025, arXiv:2509.25050; in the
released code, with weight 1).  It limits how far a policy moves within a few updates, while
``kl_reference`` limits how far it moves altogether.
"""

from __future__ import annotations

import torch
from pydantic import Field

from mmrl.reduction import tallies
from mmrl.regularisers._velocity import VelocityEstimator, velocity_needs, velocity_penalty
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Xue et al. 2025, arXiv:2509.25050"
EVIDENCE = "code"
TAKES_STALE = True
GAP = "velocity_gap_ema"


class Config(StrictModel):
    """Weight and estimator."""

    coef: float = Field(
        default=1.0, ge=0, description="Weight of the penalty; 0 computes nothing at all."
    )
    estimator: VelocityEstimator = Field(
        default="velocity",
        description="velocity: mean squared velocity gap. velocity_elbo: the same divided by "
        "2 s^2, s = 0.7 sqrt(sigma / (1 - sigma)).",
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute; none when ``coef`` is 0."""
    return velocity_needs(GAP, config.estimator) if config.coef > 0 else frozenset()


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Penalty [B, K], not multiplied by ``coef``; metric ``kl_ema``.

    With ``coef`` 0 it is zero and logs nothing, whatever terms are there.
    """
    if config.coef == 0:
        return LossTerms(loss=torch.zeros_like(terms.logp))
    penalty = velocity_penalty(terms, batch.mask, GAP, config.estimator)
    metrics = tallies({"kl_ema": penalty}, batch.mask, batch.weights)
    return LossTerms(loss=penalty, metrics=metrics)
