"""Leaves samples whose advantage is exactly zero out of the update.

They carry no policy gradient, so their forward pass is saved (Flow-GRPO as released).  Penalties
then do not see them either: keep them where a divergence should act on every sample, as in AWM.
"""

from __future__ import annotations

from mmrl.modulators._metrics import share
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Liu et al. 2025, arXiv:2505.05470"
EVIDENCE = "code"


class Config(StrictModel):
    """Nothing to configure."""


def modulate(advantages: Advantages, scores: Scores, config: Config) -> Advantages:
    """Unchanged values, fewer kept; metric ``advantage/dropped``, the share of kept ones lost."""
    del scores, config
    zero = advantages.keep & (advantages.values == 0)
    return Advantages(
        values=advantages.values,
        keep=advantages.keep & ~zero,
        metrics={**advantages.metrics, "advantage/dropped": share(zero, advantages.keep)},
    )
