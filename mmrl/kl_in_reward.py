"""Divergence from the frozen reference model, taken off the reward.

    R = r - coef sum_k KL_k,        KL_k: an estimate of KL(policy || reference) at decision k

Ziegler et al. 2019, arXiv:1909.08593, eq. 2, with k1 = logp - logp_ref; so also RLOO (Ahmadian et
al. 2024, arXiv:2402.14740).  Advantages are made of R.  The estimate is a number without gradient,
yet with k1 the policy gradient of its expectation is that of the divergence; a penalty of k1 in the
loss has none on average (see ``divergences``).

The policy is the one that sampled, so each step asks it and the reference once more about all
samples.  Logged rewards, ``training.refills`` and prompt samplers go by r.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from mmrl.divergences import ESTIMATORS, Estimator
from mmrl.reduction import where_active
from mmrl.schema import StrictModel
from mmrl.types import PolicyTerms, Scores

NEEDS = frozenset({"logp", "logp_ref"})


class KlInReward(StrictModel):
    """Weight and estimator."""

    coef: float = Field(
        default=0.05, gt=0, description="Reward that a nat of divergence costs (TRL's RLOO: 0.05)."
    )
    estimator: Estimator = Field(
        default="k1",
        description="k1: log-ratio. k2: half its square. k3: exp(-k1) - 1 + k1; see divergences.",
    )


def divergence(terms: PolicyTerms, drawn: Tensor, config: KlInReward) -> Tensor:
    """[B, K] float64 estimates on the CPU, 0 where no decision was ``drawn`` [B, K]."""
    logp, logp_ref = (
        where_active(value.detach().cpu().double(), drawn)
        for value in (terms.logp, terms.need("logp_ref"))
    )
    return ESTIMATORS[config.estimator](logp, logp_ref)


def penalised(scores: Scores, kl: Tensor, config: KlInReward) -> Scores:
    """``scores`` whose valid samples have ``coef * kl`` [N] less; raw rewards stay."""
    combined = torch.where(scores.valid, scores.combined - config.coef * kl, scores.combined)
    return replace(scores, combined=combined)
