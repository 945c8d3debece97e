"""Numbers that the samples of a group share; groups may differ in size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrl.reduction import differentiated
from mmrl.types import Survey


def by_group(
    values: Tensor, group: Tensor, among: Tensor, function: Callable[[Tensor], Tensor]
) -> Tensor:
    """[N] float64: ``function`` of the values [n] of each group, 0 where ``among`` [N] is false.

    It answers with [n] numbers, or with one for all.
    """
    found = torch.zeros_like(values)
    for identity in group[among].unique():
        rows = among & (group == identity)
        found[rows] = function(values[rows])
    return found


def group_losses(
    survey: Survey, log_ratio: Tensor, function: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """A loss of each group, and the slopes that give each sample its part in the gradient.

    ``function`` maps log-ratios [n] and their rows [W] bool to a scalar.  The first result [W] is
    that scalar at every sample of the group, the second [W] n times its derivative in
    ``log_ratio`` [W], so that a mean over samples is the mean over groups of one size.
    """
    values, slopes = torch.zeros_like(log_ratio), torch.zeros_like(log_ratio)
    for identity in survey.group.unique():
        rows = survey.group == identity
        value, slope = differentiated(lambda x, rows=rows: function(x, rows), log_ratio[rows])
        values[rows], slopes[rows] = value, slope * rows.sum()
    return values, slopes
