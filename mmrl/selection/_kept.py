"""What every selection says of the samples it keeps."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mmrl.types import Advantages


def narrowed(advantages: Advantages, keep: Tensor, counts: Tensor | None = None) -> Advantages:
    """``advantages`` of which only ``keep`` [N] bool are trained, as often as ``counts`` says.

    Metric ``selection/samples``: of the samples kept before, the share that still is.
    """
    left = float(keep.sum()) / max(int(advantages.keep.sum()), 1)
    return replace(
        advantages,
        values=advantages.values.where(keep, 0.0),
        keep=keep,
        counts=advantages.counts if counts is None else counts,
        metrics={**advantages.metrics, "selection/samples": left},
    )
