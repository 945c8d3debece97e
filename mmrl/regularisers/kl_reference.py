"""Divergence of the policy from the frozen reference model.

Either the closed form of flow matching (Xue et al. 2025, arXiv:2509.25050: mean squared velocity
gap, plain or ELBO-weighted) or an estimate from log-probabilities (k1, k2, k3 of KL(policy ||
reference); GRPO, arXiv:2402.03300, eq. 4, uses k3).

An estimate holds for samples of the present policy.  With ``ratio_weighted`` it is multiplied by
the importance ratio, exp(logp - logp_old), whose gradient counts as well: samples of an older
policy then estimate the divergence without bias, and the gradient of k1 and k3 is that of the
divergence, which without the ratio it is not (DeepSeek-V3.2, arXiv:2512.02556, section 3.1).
"""

from __future__ import annotations

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from mmrl import divergences
from mmrl.reduction import tallies, where_active
from mmrl.regularisers._velocity import VelocityEstimator, velocity_needs, velocity_penalty
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Xue et al. 2025, arXiv:2509.25050"
EVIDENCE = "code"
TAKES_STALE = True
GAP = "velocity_gap_reference"


class Config(StrictModel):
    """Weight and estimator."""

    coef: float = Field(
        default=1e-3, ge=0, description="Weight of the penalty; 0 computes nothing at all."
    )
    estimator: VelocityEstimator | divergences.Estimator = Field(
        default="velocity",
        description="velocity: mean squared velocity gap. velocity_elbo: the same divided by "
        "2 s^2, s = 0.7 sqrt(sigma / (1 - sigma)). k1, k2, k3: from log-probabilities.",
    )
    ratio_weighted: bool = Field(
        default=False,
        description="Multiply the estimate by the importance ratio; for k1, k2 and k3 only.",
    )

    @field_validator("ratio_weighted")
    @classmethod
    def _only_of_log_probabilities(cls, value: bool, info: ValidationInfo) -> bool:
        estimator = info.data.get("estimator")
        if value and estimator not in divergences.ESTIMATORS:
            raise ValueError(f"belongs to the estimators k1, k2 and k3, not to {estimator}")
        return value


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute; none when ``coef`` is 0."""
    if config.coef == 0:
        return frozenset()
    if config.estimator == "velocity" or config.estimator == "velocity_elbo":
        return velocity_needs(GAP, config.estimator)
    return frozenset({"logp", "logp_ref"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Penalty [B, K], not multiplied by ``coef``; metric ``kl_reference``.

    An estimate from log-probabilities is also logged as ``kl``, TRL's key, in nats per decision.
    With ``coef`` 0 it is zero and logs nothing, whatever terms are there.
    """
    if config.coef == 0:
        return LossTerms(loss=torch.zeros_like(terms.logp))
    penalty = _penalty(terms, batch, config)
    metrics = tallies({"kl_reference": penalty}, batch.mask, batch.weights)
    if config.estimator in divergences.ESTIMATORS:
        metrics["kl"] = metrics["kl_reference"]
    return LossTerms(loss=penalty, metrics=metrics)


def _penalty(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> Tensor:
    mask = batch.mask
    if config.estimator == "velocity" or config.estimator == "velocity_elbo":
        return velocity_penalty(terms, mask, GAP, config.estimator)
    logp_ref = where_active(terms.need("logp_ref").detach(), mask)
    estimate = divergences.ESTIMATORS[config.estimator](where_active(terms.logp, mask), logp_ref)
    if not config.ratio_weighted:
        return estimate
    # Strictly on-policy the ratio is 1, and still has a gradient.
    log_ratio = divergences.raw_log_ratio(terms, batch)
    return divergences.clamp_log_ratio(log_ratio).exp() * estimate
