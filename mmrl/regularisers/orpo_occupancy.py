"""Chi^2 divergence of what the policy visits from what the frozen reference visits.

    l = log-ratio of a sample, new to reference;   x = (exp(l) - 1) + (exp(-l) - 1) >= 0
    sqrt_chi2:  loss = sqrt(max(mean x, 1e-4))         over all samples of the optimizer step
    chi2:       loss = mean x
    kl:         loss = mean (l + exp(-l) - 1)
    step_chi2:  loss = exp(gap / S^2) - 1,   gap = mean (mu - mu_reference)^2, per denoising step

ORPO, occupancy-regularised (Laidlaw et al. 2024, arXiv:2403.03185): where a proxy reward correlates
with the true one under the reference, a bound on chi^2 of the occupancy bounds what reward hacking
costs; the weight should be s sqrt(1 - rho^2), s the deviation of the proxy and rho the correlation.
A completion is one action, so its occupancy is its probability.  exp(-l) - 1 has mean zero under
the policy.  Beyond |l| = 10 exp goes on as a straight line.  The gradient is that of x through l
alone, which is that of the divergence to first order.

c depends on the length of samples, as l is a sum; released: 8e-4 for a language model, times the
deviation of the proxy.  The first three forms take one more forward for each optimizer step of
several micro-batches.  ``step_chi2`` is ours; there ``gap`` is a mean over latent dimensions, not
their sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.divergences import LOG_RATIO_LIMIT, active_spread
from mmrl.reduction import coupled_loss, differentiated, tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, Survey, UpdateBatch

PAPER = "Laidlaw et al. 2024, arXiv:2403.03185"
EVIDENCE: str = "code"
STRAIGHT = 10.0
"""Log-ratio beyond which exp goes on as a straight line."""
FLOOR = 1e-4
"""Least mean of x under the square root, which has no gradient below it."""
GAP = "mean_gap_reference"


class Config(StrictModel):
    """Weight and form."""

    coef: float = Field(
        default=8e-4, ge=0, description="Weight, in units of the reward; 0 computes nothing."
    )
    form: Literal["sqrt_chi2", "chi2", "kl", "step_chi2"] = Field(
        default="sqrt_chi2",
        description="Of all samples of the optimizer step: sqrt_chi2 (published), chi2, kl. Of "
        "each denoising step: step_chi2.",
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute; none when ``coef`` is 0."""
    if config.coef == 0:
        return frozenset()
    return frozenset({GAP, "step_std"} if config.form == "step_chi2" else {"logp", "logp_ref"})


def survey(config: Config) -> frozenset[str]:
    """Whose log-ratios ``couple`` reads."""
    return frozenset({"reference"} if config.form != "step_chi2" else ())


def couple(survey: Survey, config: Config) -> Mapping[str, Tensor]:
    """``value`` [W], the penalty of the step, and ``slope`` [W], each sample's part in it."""

    def penalty(total: Tensor) -> Tensor:
        if config.form == "kl":
            return (total + _exp(-total) - 1.0).mean()
        chi2 = (_exp(total) + _exp(-total) - 2.0).mean()
        return chi2.clamp(min=FLOOR).sqrt() if config.form == "sqrt_chi2" else chi2

    total = survey.log_ratio["reference"]
    value, slope = differentiated(penalty, total)
    return {"value": value.expand_as(total).clone(), "slope": slope * len(total) * survey.length}


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Penalty [B, K], not multiplied by ``coef``; metric ``orpo_occupancy``.

    With ``coef`` 0 it is zero and logs nothing, whatever terms are there.

    Raises:
        UserError: ``step_chi2`` at a step without noise.
    """
    if config.coef == 0:
        return LossTerms(loss=torch.zeros_like(terms.logp))
    if config.form == "step_chi2":
        spread = active_spread(
            terms.need("step_std"), batch.mask, "regulariser orpo_occupancy: step_std"
        )
        gap = where_active(terms.need(GAP), batch.mask)
        penalty = torch.expm1((gap / spread.square()).clamp(max=LOG_RATIO_LIMIT))
    else:
        penalty = coupled_loss(batch, where_active(terms.logp, batch.mask))
    metrics = tallies({"orpo_occupancy": penalty}, batch.mask, batch.weights)
    return LossTerms(loss=penalty, metrics=metrics)


def _exp(x: Tensor) -> Tensor:
    """exp, continued by its tangent above ``STRAIGHT``."""
    straight = math.exp(STRAIGHT) * (1.0 + x - STRAIGHT)
    return torch.where(x > STRAIGHT, straight, x.clamp(max=STRAIGHT).exp())
