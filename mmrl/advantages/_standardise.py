"""Values less their mean, over their deviation, under weights that are 0 where nothing counts."""

from __future__ import annotations

import torch
from torch import Tensor

DECISION_EPS = 1e-8
"""Inside the root, as in GDPO's release over tokens."""


def over_samples(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[N] (v - mean) / (std + eps), with the divisor of the variance sum of ``weight`` [N] - 1."""
    centred, total = _centred(values, weight)
    variance = (weight * centred.square()).sum() / (total - 1).clamp(min=1)
    divisor = variance.sqrt() + eps
    return torch.where((weight > 0) & (divisor > 0), centred / divisor, 0.0)


def over_decisions(values: Tensor, weight: Tensor) -> Tensor:
    """[N] (v - mean) / sqrt(var + 1e-8), with ``weight`` [N] the decisions of each sample."""
    centred, total = _centred(values, weight)
    variance = (weight * centred.square()).sum() / total.clamp(min=1)
    return torch.where(weight > 0, centred / (variance + DECISION_EPS).sqrt(), 0.0)


def _centred(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N] values less their mean, exactly 0 where all that count are equal; sum of weights."""
    used, total = values[weight > 0], weight.sum()
    if not len(used) or bool(used.min() == used.max()):
        return torch.zeros_like(values), total
    return values - (weight * values).sum() / total, total
