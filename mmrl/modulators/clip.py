"""Clamps advantages to a bound, optionally rescaled.

    A' = clamp(A, -bound, bound) [/ bound] * output_max

AWM as released: bound 5, normalised, output_max 1.  Flow-GRPO: bound 5, not normalised.
Flow-Factory's AWM: bound 1, not normalised.
"""

from __future__ import annotations

from pydantic import Field

from mmrl.modulators._metrics import share
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Xue et al. 2025, arXiv:2509.25050"
EVIDENCE = "code"


class Config(StrictModel):
    """Bound and scale."""

    bound: float = Field(default=5.0, gt=0, description="Largest advantage that is not clipped.")
    normalize: bool = Field(
        default=True, description="Divide by bound after clipping, so that results are within 1."
    )
    output_max: float = Field(default=1.0, gt=0, description="Factor applied last.")


def modulate(advantages: Advantages, scores: Scores, config: Config) -> Advantages:
    """Clipped advantages; metric ``advantage/clip_ratio``, the share of kept samples clipped."""
    del scores
    scale = config.output_max / (config.bound if config.normalize else 1.0)
    clipped = (advantages.values.abs() > config.bound) & advantages.keep
    return Advantages(
        values=advantages.values.clamp(-config.bound, config.bound) * scale,
        keep=advantages.keep,
        metrics={**advantages.metrics, "advantage/clip_ratio": share(clipped, advantages.keep)},
    )
