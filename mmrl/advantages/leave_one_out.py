"""Reward minus the mean reward of the other samples of its group.

    A_i = r_i - mean(r_j, j != i) = n / (n - 1) * (r_i - mean(r))

RLOO (Ahmadian et al. 2024, arXiv:2402.14740): the baseline does not depend on the
sample, so the policy gradient stays unbiased.
"""

from __future__ import annotations

from typing import Any

from mmrl.advantages._groups import advantages_with_metrics, group_statistics
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Ahmadian et al. 2024, arXiv:2402.14740"
EVIDENCE = "paper"
MIN_GROUP_SIZE = 2


class Config(StrictModel):
    """Nothing to configure."""


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``.

    n counts valid samples; a group with one of them, or with equal rewards, gets exactly 0.
    """
    del config
    groups = group_statistics(scores)
    scale = groups.count / (groups.count - 1).clamp(min=1)
    values = groups.centred * scale[groups.member]
    return advantages_with_metrics(values, scores, groups), state
