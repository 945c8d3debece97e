"""No advantage at all: zeros, for objectives that learn from something else than rewards.

Every sample is kept, scored or not: in distillation rewards are there to be watched, and one that
failed is no reason to leave a sample out.
"""

from __future__ import annotations

from typing import Any

import torch

from mmrl.advantages._groups import group_statistics, spread_metrics
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = ""
MIN_GROUP_SIZE = 1
TAKES_DEMONSTRATIONS = True


class Config(StrictModel):
    """Nothing to configure."""


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Zeros for all samples, invalid ones included, and the unchanged ``state``.

    Metrics: those of ``spread_metrics``.
    """
    del config
    everything = torch.ones_like(scores.valid)
    metrics = spread_metrics(group_statistics(scores))
    zeros = torch.zeros_like(scores.combined)
    return Advantages(values=zeros, keep=everything, metrics=metrics), state
