"""Importance ratios shared by the objectives."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mmrl.divergences import clamp_log_ratio
from mmrl.reduction import masked_mean, where_active
from mmrl.types import PolicyTerms, UpdateBatch

Importance = Literal["decision", "sample"]


def logp_before(terms: PolicyTerms, batch: UpdateBatch) -> Tensor:
    """[B, K] log-probabilities of the sampling policy: the present ones when strictly on-policy."""
    return (terms.logp if batch.logp_old is None else batch.logp_old).detach()


def log_ratio(terms: PolicyTerms, batch: UpdateBatch, importance: Importance) -> Tensor:
    """Clamped log importance ratio: [B, K] for ``decision``, [B, 1] for ``sample``.

    ``sample`` is the mean of the log-ratios over the decisions of the sample (the sequence ratio
    of GSPO, arXiv:2507.18071).  0 at masked decisions, exactly 0 everywhere on-policy.
    """
    per_decision = where_active(terms.logp - logp_before(terms, batch), batch.mask)
    if importance == "sample":
        return clamp_log_ratio(masked_mean(per_decision, batch.mask))
    return clamp_log_ratio(per_decision)
