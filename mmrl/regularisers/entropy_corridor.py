"""Keeps the entropy of each sample between two bounds, which may differ by task.

    loss = max(H - high, 0) + max(low - H, 0),    H: mean entropy of the sample's decisions

Entropy shaping of G2RPO (arXiv:2604.08539, OpenVLThinkerV2).  There H is the mean of -logp of the
sampled tokens over a micro-batch: on-policy the expected gradient of that is zero, and the result
depends on the split.  Here H is the entropy over all tokens, of each sample by itself.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmrl.errors import UserError
from mmrl.reduction import masked_mean, tallies
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Hu et al. 2026, arXiv:2604.08539"
EVIDENCE = "code"


class Bounds(StrictModel):
    """A corridor, in nats per decision."""

    low: float = Field(default=0.2, ge=0, description="Below it entropy is raised.")
    high: float = Field(default=0.6, ge=0, description="Above it entropy is lowered.")

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        if self.low > self.high:
            raise UserError(f"low = {self.low:g} is above high = {self.high:g}")
        return self


class Config(Bounds):
    """Weight and corridors."""

    coef: float = Field(
        default=0.02, ge=0, description="Weight of the penalty; 0 computes nothing at all."
    )
    tasks: dict[str, Bounds] = Field(
        default_factory=dict, description="Corridors of tasks that have their own."
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute; none when ``coef`` is 0."""
    return frozenset({"entropy"}) if config.coef > 0 else frozenset()


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Penalty [B, 1], not multiplied by ``coef``.

    Metrics: ``entropy/mean``, and ``entropy/outside``, the share of samples that are penalised.
    With ``coef`` 0 the loss is zero and nothing is logged, whatever terms are there.
    """
    if config.coef == 0:
        return LossTerms(loss=torch.zeros_like(terms.logp))
    entropy = masked_mean(terms.need("entropy"), batch.mask)
    low, high = corridors(batch, config, entropy)
    penalty = (entropy - high).clamp(min=0) + (low - entropy).clamp(min=0)
    metrics = {"entropy/mean": entropy, "entropy/outside": penalty > 0}
    return LossTerms(loss=penalty, metrics=tallies(metrics, batch.mask, batch.weights))


def corridors(batch: UpdateBatch, config: Config, like: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of each sample, [B, 1]."""
    tasks = batch.tasks or [""] * len(like)
    bounds: list[Bounds] = [config.tasks.get(task, config) for task in tasks]
    low = like.new_tensor([bound.low for bound in bounds])
    high = like.new_tensor([bound.high for bound in bounds])
    return low[:, None], high[:, None]
