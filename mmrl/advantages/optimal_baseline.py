"""Rewards less the baseline under which the policy gradient varies least.

    A_i = r_i - sum_j W_j r_j / sum_j W_j,      W_j ~ |d log pi(y_j) / d theta|^2

minimises E[(r - b)^2 W] (OBLR-PO, arXiv:2511.23310, known here from its abstract and standard
theory); the sums are over the group, or with ``leave_one_out`` over its other samples, which keeps
the gradient unbiased.  W is estimated:

    length: the number of decisions (the baseline of OPO)
    logits: sum_t (1 - 2 pi(y_t) + sum_v pi_t(v)^2), the squared norm of the gradient to the logits

W follows from the policy that sampled.  Equal W give RLOO, or the mean of the group.  The paper's
learning rate by the signal-to-noise ratio of the gradient is no part of this.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.advantages._groups import advantages_with_metrics, group_statistics
from mmrl.schema import StrictModel
from mmrl.types import Advantages, Scores

PAPER = "Huang et al. 2025, arXiv:2511.23310"
EVIDENCE = "reconstructed"
OWN_ADVANTAGE = True
MIN_GROUP_SIZE = 2
FACT = {"length": "length", "logits": "score_norm"}


class Config(StrictModel):
    """What stands for the norm of the score, and over which samples the baseline is taken."""

    weight: Literal["length", "logits"] = Field(
        default="length",
        description="length: decisions of the sample. logits: squared norm of the gradient to the "
        "logits (text, vlm; one more forward).",
    )
    leave_one_out: bool = Field(
        default=True, description="Baseline of the other samples of the group; false: of all."
    )


def reads(config: Config) -> frozenset[str]:
    """Facts about samples that are needed."""
    return frozenset({FACT[config.weight]})


def estimate(
    scores: Scores, config: Config, state: dict[str, Any]
) -> tuple[Advantages, dict[str, Any]]:
    """Advantages of all samples of a step and the unchanged ``state``.

    A group with one valid sample, or with equal rewards, gets exactly 0; where no sample to weigh
    has a weight, all of them count the same.  Metrics are those of ``group``.
    """
    groups = group_statistics(scores)
    weight = torch.where(scores.valid, scores.need(FACT[config.weight]).double(), 0.0)

    def among(values: Tensor) -> Tensor:
        """[N] sum over the samples that make the baseline of each one."""
        total = torch.zeros_like(groups.count).index_add(0, groups.member, values)[groups.member]
        return total - values if config.leave_one_out else total

    weighed, count = among(weight), among(scores.valid.double())
    optimal = among(weight * groups.centred) / torch.where(weighed > 0, weighed, 1.0)
    mean = among(groups.centred) / count.clamp(min=1)
    baseline = torch.where(weighed > 0, optimal, mean)
    values = torch.where(scores.valid, groups.centred - baseline, 0.0)
    return advantages_with_metrics(values, scores, groups), state
