"""Numbers that the samples of a group share; groups may differ in size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

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
    for rows in _members(group):
        rows = rows & among
        if not bool(rows.any()):
            continue
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
    for rows in _members(survey.group):
        value, slope = differentiated(partial(_swapped, function, rows), log_ratio[rows])
        values[rows], slopes[rows] = value, slope * len(slope)
    return values, slopes


def coupled_by_group(
    survey: Survey, scale: Tensor, function: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Signals ``value`` and ``slope`` [W] of a loss of each group in its log-ratios over ``scale``.

    ``scale`` [W]: what a sample's sum of log-ratios is divided by before ``function`` sees it, as
    in ``group_losses``; its length for the mean.  The slope is in that mean.
    """
    value, slope = group_losses(survey, survey.log_ratio["old"] / scale, function)
    return {"value": value, "slope": slope * (survey.length / scale)}


def _swapped(
    function: Callable[[Tensor, Tensor], Tensor], rows: Tensor, log_ratio: Tensor
) -> Tensor:
    return function(log_ratio, rows)


def pair_excess(values: Tensor, group: Tensor, among: Tensor) -> Tensor:
    """[N]: mean over the other samples of the group of max(value - theirs, 0); 0 alone in it."""

    def excess(x: Tensor) -> Tensor:
        return (x[:, None] - x[None]).clamp(min=0).sum(dim=1) / max(len(x) - 1, 1)

    return by_group(values, group, among, excess)


def _members(group: Tensor) -> Iterator[Tensor]:
    """[N] bool of each group."""
    return (group == identity for identity in sorted({int(each) for each in group.cpu()}))
