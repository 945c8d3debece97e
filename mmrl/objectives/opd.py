"""On-policy distillation: each step of the student is drawn to that of a teacher.

    loss = mean (mu - mu_teacher)^2 / (2 S^2)        a step that adds noise: KL(student || teacher)
    loss = mean (mu - mu_teacher)^2 / 2              a step of the ODE, S = 0: its limit, times S^2

DiffusionOPD (Li et al. 2026, arXiv:2605.15055, eq. 11 and 12).  Both means are taken at states the
student visited.  In closed form nothing is estimated from the noise that was drawn, so neither
advantages nor ratios appear; rewards serve to watch only (advantage ``none``).  In velocities the
ODE form is dt^2 / 2 times the gap, so late steps weigh the most.
"""

from __future__ import annotations

import torch

from mmrl.divergences import SPREAD, TransitionConfig, gaussian_kl
from mmrl.reduction import tallies, where_active
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Li et al. 2026, arXiv:2605.15055"
EVIDENCE = "paper"


class Config(TransitionConfig):
    """What divides the gap at steps that add noise."""


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    return frozenset({"mean_gap_teacher", SPREAD[config.denominator]})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Divergence from the teacher [B, K], in nats per dimension at steps that add noise.

    Metrics: ``opd/divergence``, the mean of it, and ``opd/mean_gap``, that of the undivided gap.

    Raises:
        ValueError: a spread that is negative or NaN.
    """
    gap = where_active(terms.need("mean_gap_teacher"), batch.mask)
    spread = terms.need(SPREAD[config.denominator]).detach()
    noisy = batch.mask & (spread != 0)
    divergence = gaussian_kl(gap, torch.where(noisy, spread, 1.0))
    metrics = {"opd/divergence": divergence, "opd/mean_gap": gap}
    return LossTerms(loss=divergence, metrics=tallies(metrics, batch.mask, batch.weights))
