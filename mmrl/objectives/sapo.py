"""Policy gradient through a soft gate in place of the clip.

    loss = -A (4 / tau) sigmoid(tau (r - 1)),   r = exp(logp - logp_old)
    tau  = temperature_positive where A > 0, else temperature_negative

SAPO (Gao et al. 2025, arXiv:2511.20347).  The slope of the gate in r is 4 p (1 - p) with
p = sigmoid(tau (r - 1)): it is 1 at r = 1, so on-policy the gradient is the policy gradient, and
fades on both sides, the faster the larger tau.
"""

from __future__ import annotations

import torch
from pydantic import Field

from mmrl.objectives._ratio import approx_kl, log_ratio
from mmrl.reduction import tallies
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Gao et al. 2025, arXiv:2511.20347"
EVIDENCE = "code"
TAKES_STALE = True


class Config(StrictModel):
    """How fast the gate closes."""

    temperature_positive: float = Field(
        default=1.0, gt=0, description="tau of samples with a positive advantage."
    )
    temperature_negative: float = Field(
        default=1.05,
        gt=0,
        description="tau of the others; larger than that of the positive, as their gradient raises "
        "many decisions that were not sampled.",
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Gated policy-gradient loss [B, K].

    Metrics: ``ratio/mean``; ``gate/mean``, the slope of the gate, 1 where nothing is held back;
    ``approx_kl``, k3 of KL(old || new) in nats per decision.
    """
    ratio = log_ratio(terms, batch, "decision").exp()
    advantages = batch.advantages[:, None].to(ratio.dtype)
    tau = torch.full_like(advantages, config.temperature_negative)
    tau = tau.masked_fill(advantages > 0, config.temperature_positive)
    gate = torch.sigmoid(tau * (ratio - 1.0))
    metrics = {
        "ratio/mean": ratio,
        "gate/mean": 4.0 * gate * (1.0 - gate),
        "approx_kl": approx_kl(terms, batch),
    }
    value = -advantages * (4.0 / tau) * gate
    return LossTerms(loss=value, metrics=tallies(metrics, batch.mask, batch.weights))
