"""Importance ratios and their clipping, shared by the objectives."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmrl.divergences import clamp_log_ratio, k3, logp_before, raw_log_ratio
from mmrl.reduction import masked_mean, where_active
from mmrl.types import PolicyTerms, UpdateBatch

Importance = Literal["decision", "sample"]


def log_ratio(terms: PolicyTerms, batch: UpdateBatch, importance: Importance) -> Tensor:
    """Clamped log importance ratio: [B, K] for ``decision``, [B, 1] for ``sample``.

    ``sample`` is the mean of the log-ratios over the decisions of the sample (the sequence ratio
    of GSPO, arXiv:2507.18071).  0 at masked decisions, exactly 0 everywhere on-policy.
    """
    per_decision = raw_log_ratio(terms, batch)
    if importance == "sample":
        return clamp_log_ratio(masked_mean(per_decision, batch.mask))
    return clamp_log_ratio(per_decision)


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    *,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """max(-A r, -A clamp(r, 1 - low, 1 + high)), PPO's loss (arXiv:1707.06347, eq. 7).

    ``dual_clip`` bounds it by -A dual_clip where A < 0 (arXiv:1912.09729); ``delta`` bounds
    the r outside the clamp (arXiv:2505.07291).  ``ratio`` is [B, K] or [B, 1], ``advantages``
    [B, 1], as are ``low`` and ``high`` where samples have their own; the result has the shape of
    ``ratio``.
    """
    clipped = ratio.clamp(*_bounds(low, high, ratio))
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    surrogate = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is None:
        return surrogate
    bounded = torch.minimum(surrogate, -advantages * dual_clip)
    return torch.where(advantages < 0, bounded, surrogate)


def ratio_metrics(
    ratio: Tensor, advantages: Tensor, low: float | Tensor, high: float | Tensor
) -> dict[str, Tensor]:
    """What every clipped objective logs about ``ratio``, in the shape of ``ratio``.

    ``ratio/mean``; ``clip_ratio/low`` and ``clip_ratio/high``, the shares of ratios whose clip is
    active given the sign of the advantage, and ``clip_ratio/region``, their sum.
    """
    ratio = ratio.detach()
    bottom, top = _bounds(low, high, ratio)
    below, above = (ratio < bottom) & (advantages < 0), (ratio > top) & (advantages > 0)
    return {
        "ratio/mean": ratio,
        "clip_ratio/low": below,
        "clip_ratio/high": above,
        "clip_ratio/region": below | above,
    }


def _bounds(low: float | Tensor, high: float | Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest ratio, rounded once to its dtype."""
    bottom, top = (torch.as_tensor(x, dtype=torch.float64) for x in (low, high))
    return (1.0 - bottom).to(ratio), (1.0 + top).to(ratio)


def approx_kl(terms: PolicyTerms, batch: UpdateBatch) -> Tensor:
    """k3 of KL(old || new) [B, K] in nats per decision, without gradient; 0 where masked."""
    # Masked log-probabilities may be anything; -inf - (-inf) must not reach the sums.
    old, new = (
        where_active(logp.detach(), batch.mask) for logp in (logp_before(terms, batch), terms.logp)
    )
    return k3(old, new)
