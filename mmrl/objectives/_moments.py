"""Moments of log-ratios as metrics, over all denoising steps and of each step apart."""

from __future__ import annotations

from torch import Tensor

from mmrl.reduction import tallies
from mmrl.types import Metric, UpdateBatch


def moments(raw: Tensor, corrected: Tensor) -> dict[str, Tensor]:
    """[B, K] whose means are the first two moments of both log-ratios, without gradient."""
    raw, corrected = raw.detach(), corrected.detach()
    return {
        "log_ratio/mean_raw": raw,
        "log_ratio/sq_raw": raw.double().square(),
        "log_ratio/mean": corrected,
        "log_ratio/sq": corrected.double().square(),
    }


def by_sigma(values: dict[str, Tensor], sigma: Tensor, batch: UpdateBatch) -> dict[str, Metric]:
    """``tallies`` of the steps from each ``sigma`` [B, K] apart, under ``NAME/SIGMA``."""
    # A step is known by its sigma: a batch may hold any of them, in any columns.
    level = sigma.double().round(decimals=3)
    pairs: dict[str, Metric] = {}
    for value in sorted({float(each) for each in level[batch.mask].cpu()}):
        named = {f"{name}/{value:.3f}": each for name, each in values.items()}
        pairs |= tallies(named, batch.mask & (level == value), batch.weights)
    return pairs
