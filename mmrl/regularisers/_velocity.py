"""Penalties on the gap between two velocity fields of a flow-matching model.

Both fields are evaluated at the same noised latent.  Their mean squared gap is taken as it is
(``velocity``) or divided by 2 s^2 (``velocity_elbo``), like the closed-form KL of two Gaussians
whose standard deviation s is the diffusion coefficient of Flow-GRPO's sampler at noise level 0.7.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmrl.divergences import gaussian_kl
from mmrl.reduction import where_active
from mmrl.types import PolicyTerms

VelocityEstimator = Literal["velocity", "velocity_elbo"]
NOISE_LEVEL = 0.7
"""Noise level of the stochastic sampler whose variance weights ``velocity_elbo``."""
MAX_SIGMA = 0.99
"""Upper clamp of sigma in the denominator 1 - sigma, which vanishes at pure noise."""


def velocity_needs(gap: str, estimator: VelocityEstimator) -> frozenset[str]:
    """Terms needed for the named gap."""
    return frozenset({gap, "sigma"} if estimator == "velocity_elbo" else {gap})


def velocity_penalty(
    terms: PolicyTerms, mask: Tensor, gap: str, estimator: VelocityEstimator
) -> Tensor:
    """[B, K] penalty, 0 at masked decisions.

    ``velocity``: the gap itself.  ``velocity_elbo``: gap / (2 s^2) with
    s = 0.7 sqrt(sigma / (1 - min(sigma, 0.99))) (AWM, arXiv:2509.25050; released code).

    Raises:
        ValueError: ``velocity_elbo`` at a decision with sigma 0, where the weight is infinite.
    """
    penalty = where_active(terms.need(gap), mask)
    if estimator == "velocity":
        return penalty
    return gaussian_kl(penalty, torch.where(mask, elbo_std(terms.need("sigma")), 1.0))


def elbo_std(sigma: Tensor) -> Tensor:
    """s = 0.7 sqrt(sigma / (1 - min(sigma, 0.99))), any shape."""
    return NOISE_LEVEL * (sigma / (1.0 - sigma.clamp(0.0, MAX_SIGMA))).sqrt()
