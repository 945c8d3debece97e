"""Advantages that differ between the decisions of a sample.

    A_k = A + scale min(w_k, cap),   w_k = exp(logp_tempered_k - logp_old_k)

An objective gives every decision the advantage of its sample.  Where decisions have their own, it
is asked about each as if it were a whole sample, which is the same to an objective that treats
decisions apart; one that takes a sample together is refused at start-up.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmrl.divergences import clamp_log_ratio, logp_before
from mmrl.reduction import where_active
from mmrl.types import OPTIONAL_TERMS, LossTerms, PolicyTerms, Tempering, UpdateBatch

TERM = "logp_tempered"


def loss(module: ModuleType, terms: PolicyTerms, batch: UpdateBatch, config: Any) -> LossTerms:
    """That of an objective; [B, K] where ``batch`` has a ``tempering``."""
    if batch.tempering is None:
        return module.loss(terms, batch, config)
    values = advantages(terms, batch, batch.tempering)
    found = module.loss(*apart(terms, batch, values), config)
    return replace(found, loss=found.loss.reshape(batch.mask.shape))


def advantages(terms: PolicyTerms, batch: UpdateBatch, tempering: Tempering) -> Tensor:
    """[B, K] float64, without gradient; that of the sample at masked decisions."""
    log_weight = where_active(terms.need(TERM) - logp_before(terms, batch), batch.mask)
    weight = clamp_log_ratio(log_weight.detach().double()).exp()
    if tempering.cap is not None:
        weight = weight.clamp(max=tempering.cap)
    return batch.advantages[:, None] + tempering.scale[:, None] * where_active(weight, batch.mask)


def apart(
    terms: PolicyTerms, batch: UpdateBatch, values: Tensor
) -> tuple[PolicyTerms, UpdateBatch]:
    """The same decisions as B K samples of one each, with advantages ``values`` [B, K]."""
    size = batch.mask.shape[1]

    def alone(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.reshape(-1, 1)

    optional = {name: alone(getattr(terms, name)) for name in OPTIONAL_TERMS}
    return replace(terms, logp=terms.logp.reshape(-1, 1), **optional), replace(
        batch,
        payload=None,
        mask=batch.mask.reshape(-1, 1),
        advantages=values.reshape(-1),
        weights=batch.weights.repeat_interleave(size),
        logp_old=alone(batch.logp_old),
        memory=None,
        tasks=[task for task in batch.tasks for _ in range(size)],
        signals={name: x.repeat_interleave(size) for name, x in batch.signals.items()},
        tempering=None,
    )


def of_samples(
    tempering: Tempering | None, places: list[int], device: torch.device
) -> Tempering | None:
    """That of the samples at ``places`` of a step."""
    if tempering is None:
        return None
    return replace(tempering, scale=tempering.scale[places].to(device))
