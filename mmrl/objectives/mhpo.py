"""Policy gradient with a smoothly bounded log-ratio, damped more the further it has moved.

    loss  = -A exp(psi - sg[zeta]),   psi = c tanh(x / c),   x = logp - logp_old
    zeta  = (softplus(psi) / onset_up)^shape_up + (softplus(-psi) / onset_down)^shape_down

MHPO (arXiv:2603.16929), without clip.  The gradient is that of -A M logp with the weight
M = exp(psi - zeta) sech^2(x / c), which is positive and at most e^c, whatever the sign of A.
zeta, two Weibull cumulative hazards, has no gradient.  softplus(0) is ln 2, so it does not vanish
on-policy: with the defaults M is 0.2651 at ratio 1, and the whole gradient is that much smaller
than GRPO's.  M is largest, 0.396, near a ratio of 1.78: of small moves only those downwards are
damped.

Formula and defaults are known from notes that quote the paper; no code of its authors was found.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from mmrl.objectives._ratio import approx_kl, log_ratio
from mmrl.reduction import tallies
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "MHPO 2026, arXiv:2603.16929"
EVIDENCE: str = "paper"
TAKES_STALE = True


class Config(StrictModel):
    """Bound of the log-ratio, and the hazards on either side."""

    bound: float | None = Field(
        default=1.5,
        gt=0,
        description="Largest log-ratio c, in nats; null: none. Published: 1.5.",
    )
    hazard: bool = Field(
        default=True,
        description="Damp by zeta. Without it and with bound null: the unclipped ratio.",
    )
    shape_up: float = Field(
        default=1.5, gt=0, description="Exponent k of the hazard of a ratio above 1."
    )
    onset_up: float = Field(
        default=1.0, gt=0, description="Scale lambda of that hazard, in nats; smaller: earlier."
    )
    shape_down: float = Field(
        default=2.0, gt=0, description="Exponent k of the hazard of a ratio below 1."
    )
    onset_down: float = Field(
        default=0.8, gt=0, description="Scale lambda of that hazard, in nats; smaller: earlier."
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Modulated policy-gradient loss [B, K].

    Metrics: ``ratio/mean``, of the plain ratio; ``mhpo/weight``, the mean of M; ``approx_kl``, k3
    of KL(old || new) in nats per decision.
    """
    plain = log_ratio(terms, batch, "decision")
    bounded, slope = plain, torch.ones_like(plain)
    if config.bound is not None:
        tanh = torch.tanh(plain / config.bound)
        bounded, slope = config.bound * tanh, 1.0 - tanh.square()
    ratio = (bounded - zeta(bounded.detach(), config)).exp() if config.hazard else bounded.exp()
    metrics = {
        "ratio/mean": plain.exp(),
        "mhpo/weight": ratio * slope,
        "approx_kl": approx_kl(terms, batch),
    }
    value = -batch.advantages[:, None].to(ratio.dtype) * ratio
    return LossTerms(loss=value, metrics=tallies(metrics, batch.mask, batch.weights))


def zeta(psi: Tensor, config: Config) -> Tensor:
    """Sum of both cumulative hazards, in nats, in the shape of ``psi``."""
    up = (softplus(psi) / config.onset_up).pow(config.shape_up)
    return up + (softplus(-psi) / config.onset_down).pow(config.shape_down)
