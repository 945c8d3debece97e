"""Maps advantages to probabilities of being a good sample, as the objective ``nft`` reads them.

    r = clamp(shape(clamp(A, -bound, bound)) / bound / 2 + 1/2, 0, 1)

DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117); the shapes are those of its released code.
Place it last: to any other modulator 0 means "no signal", here it means "bad", and 1/2 is neutral.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.modulators._metrics import share
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Zheng et al. 2025, arXiv:2509.16117"
EVIDENCE = "code"
MAKES_PROBABILITIES = True

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda a: a,
    "positive_only": lambda a: a.clamp(min=0),
    "negative_only": lambda a: a.clamp(max=0),
    "one_only": lambda a: (a > 0).to(a),
    "binary": torch.sign,
}
"""What becomes of clipped advantages, by mode."""


class Config(StrictModel):
    """Bound and shape."""

    bound: float = Field(
        default=5.0, gt=0, description="Advantage at and beyond which r is 1, or 0 if negative."
    )
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = Field(
        default="all",
        description="all: keep advantages. positive_only: max(A, 0). negative_only: min(A, 0). "
        "one_only: 1 where A > 0, else 0. binary: the sign of A. The last two are divided by "
        "bound like the others, so they reach 1/2 +- 1/(2 bound) only.",
    )


def modulate(advantages: Advantages, scores: Scores, config: Config) -> Advantages:
    """Probabilities r in [0, 1] of kept samples, 0 of the others.

    Metrics: ``advantage/clip_ratio``, the share of kept samples clipped; ``optimality/mean``, the
    mean of r over kept samples.
    """
    del scores
    values, keep = advantages.values, advantages.keep
    shaped = SHAPES[config.mode](values.clamp(-config.bound, config.bound))
    optimality = (shaped / config.bound / 2 + 0.5).clamp(0, 1)
    kept = optimality[keep]
    metrics = {
        "advantage/clip_ratio": share((values.abs() > config.bound) & keep, keep),
        "optimality/mean": float(kept.sum()) / max(len(kept), 1),
    }
    return Advantages(
        values=torch.where(keep, optimality, 0.0),
        keep=keep,
        metrics={**advantages.metrics, **metrics},
    )
