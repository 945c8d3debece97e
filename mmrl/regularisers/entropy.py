"""Bonus for an undecided policy: minus the entropy of its decisions.

    loss = -H          at the decisions that count, 0 elsewhere

Mnih et al. 2016, arXiv:1602.01783, section 4.  With ``top_share`` below 1 only the most uncertain
decisions count, as in the policy gradient of Wang et al. 2025 (arXiv:2506.01939).  There the
quantile is that of a micro-batch; here it is that of each sample, so that no result depends on how
a step is split.  A micro-batch must hold all decisions of its samples for that.  Decisions that do
not count stay in every mean as 0.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from mmrl.reduction import tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Mnih et al. 2016, arXiv:1602.01783"
EVIDENCE = "paper"
TAKES_STALE = True
TAKES_DEMONSTRATIONS = True


class Config(StrictModel):
    """Weight, and how many decisions count."""

    coef: float = Field(
        default=1e-3, ge=0, description="Weight of the bonus; 0 computes nothing at all."
    )
    top_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the decisions of each sample that count, those of the highest "
        "entropy (rounded up); 1: all of them.",
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute; none when ``coef`` is 0."""
    return frozenset({"entropy"}) if config.coef > 0 else frozenset()


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Minus the entropy [B, K], not multiplied by ``coef``.

    Metric ``entropy``, in nats per decision, over all decisions.  With ``coef`` 0 the loss is zero
    and nothing is logged, whatever terms are there.
    """
    if config.coef == 0:
        return LossTerms(loss=torch.zeros_like(terms.logp))
    entropy = where_active(terms.need("entropy"), batch.mask)
    counts = highest(entropy.detach(), batch.mask, config.top_share)
    metrics = tallies({"entropy": entropy}, batch.mask, batch.weights)
    return LossTerms(loss=-where_active(entropy, counts), metrics=metrics)


def highest(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """[B, K] bool: the highest ``values`` of each row, ``share`` of its decisions and their equals.

    A row of n decisions has ceil(share n) of them, and more where others equal the lowest of these.
    """
    # Without the guard 0.07 * 100, which is 7.000000000000001, would be 8 decisions.
    sizes = (share * mask.sum(dim=1, keepdim=True).double() - 1e-9).ceil().long()
    ranked = values.masked_fill(~mask, -math.inf).sort(dim=1, descending=True).values
    return mask & (values >= ranked.gather(1, sizes.clamp(min=1) - 1))
