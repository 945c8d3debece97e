"""A penalty whose weight is not only its ``coef``."""

from __future__ import annotations

from dataclasses import replace

from mmrl.types import LossTerms


def multiplied(found: LossTerms, multiplier: float, name: str) -> LossTerms:
    """``found`` times ``multiplier``, logged under ``name``; unchanged where it logs nothing."""
    counts = [value[1] for value in found.metrics.values() if isinstance(value, tuple)]
    if not counts:
        return found
    metrics = {**found.metrics, name: (multiplier * counts[0], counts[0])}
    return replace(found, loss=multiplier * found.loss, metrics=metrics)
