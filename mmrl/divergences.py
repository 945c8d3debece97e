"""Estimators of the Kullback-Leibler divergence between two policies.

All estimate KL(p || q) per decision from samples of p: the first argument is the log-probability
under the policy that drew the sample.  With log_ratio = log p - log q:

    k1 = log_ratio                          unbiased, may be negative
    k2 = log_ratio^2 / 2                    biased, never negative
    k3 = exp(-log_ratio) - 1 + log_ratio    unbiased, never negative

Source: J. Schulman, "Approximating KL divergence", 2020.  Used as a penalty on p, the expected
gradient of k1 is zero and that of k2 is the gradient of the divergence.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mmrl.errors import UserError, require
from mmrl.schema import StrictModel
from mmrl.types import PolicyTerms, UpdateBatch

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +-20 nats before ``exp``, so that no ratio overflows float32.

The gradient is zero beyond.  A fixed convention and no option: verl has the same bound, others have
none, and healthy ratios are so far inside that no result depends on it.
"""


def k1(logp: Tensor, logp_other: Tensor) -> Tensor:
    """``logp - logp_other``, any common shape, nats."""
    return logp - logp_other


def k2(logp: Tensor, logp_other: Tensor) -> Tensor:
    """``(logp - logp_other)^2 / 2``, any common shape, nats^2."""
    return 0.5 * (logp - logp_other).square()


def k3(logp: Tensor, logp_other: Tensor) -> Tensor:
    """``exp(-x) - 1 + x`` with ``x = logp - logp_other`` clamped to ``LOG_RATIO_LIMIT``; nats."""
    log_ratio = clamp_log_ratio(logp - logp_other)
    return torch.expm1(-log_ratio) + log_ratio


Estimator = Literal["k1", "k2", "k3"]
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """``log_ratio`` within +-``LOG_RATIO_LIMIT``: the form in which it may be exponentiated."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def gaussian_kl(mean_gap_sq: Tensor, std: Tensor) -> Tensor:
    """Closed-form KL of two Gaussians with one covariance ``std^2 I``: ``gap / (2 std^2)``.

    ``mean_gap_sq`` is the squared difference of the means, averaged over dimensions for a
    divergence per dimension; ``std`` broadcasts against it and must be positive (``ValueError``).
    """
    require(bool((std > 0).all()), "gaussian_kl: std must be positive")
    return mean_gap_sq / (2.0 * std.square())


# --- from the policy that sampled ---------------------------------------------------------------


def logp_before(terms: PolicyTerms, batch: UpdateBatch) -> Tensor:
    """[B, K] log-probabilities of the sampling policy: the present ones when strictly on-policy."""
    return (terms.logp if batch.logp_old is None else batch.logp_old).detach()


def raw_log_ratio(terms: PolicyTerms, batch: UpdateBatch) -> Tensor:
    """logp - logp_old [B, K], not clamped; 0 at masked decisions, 0 everywhere on-policy."""
    gap = terms.logp - logp_before(terms, batch)
    return torch.where(batch.mask, gap, torch.zeros_like(gap))


# --- of denoising transitions N(mu, S^2 I) ------------------------------------------------------

SPREAD = {"true": "step_std", "drop_dt": "diffusion"}
"""The term of ``PolicyTerms`` whose square divides a squared gap of means, by denominator."""


class TransitionConfig(StrictModel):
    """Options of whatever divides a squared gap of transition means.

    Released systems differ by the factor -dt between S^2 and g^2, and so do the weights published
    for them: 0.004 of Flow-GRPO's paper belongs to ``true``, 0.04 of its later configurations to
    ``drop_dt``.
    """

    denominator: Literal["true", "drop_dt"] = Field(
        default="true",
        description="true: 2 S^2, the divergence of the two steps. drop_dt: 2 g^2, which is the "
        "same times -dt.",
    )

    @field_validator("denominator", mode="before")
    @classmethod
    def _written_without_quotes(cls, value: Any) -> Any:
        # YAML reads the bare word as a truth value; nothing else can be meant here.
        return "true" if value is True else value


def active_spread(spread: Tensor, mask: Tensor, what: str) -> Tensor:
    """``spread`` [B, K] where ``mask`` is true and 1 elsewhere, without gradient.

    Raises:
        UserError: not positive at a decision that exists, as at an ODE step; ``what`` says in the
            message which quantity of which part that is.
    """
    active = torch.where(mask, spread.detach(), 1.0)
    if not bool((active > 0).all()):
        raise UserError(
            f"{what} must be positive at every trained step, got {float(active.min()):g}; a step "
            "of an ODE has no transition density: use a kernel that adds noise"
        )
    return active
