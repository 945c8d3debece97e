"""Statistics of rewards within the groups of a step; invalid samples count nowhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmrl.typed import numbered, pieces
from mmrl.types import Advantages, Scores


@dataclass(frozen=True, kw_only=True)
class GroupStatistics:
    """Statistics over the valid samples of M groups.

    ``member`` [N] int64: position of the group of each sample.  ``count`` [M] float64: number of
    valid samples.  ``mean`` [M] float64: of their rewards, 0 where there are none.  ``centred`` [N]
    float64: reward minus the mean of its group; exactly 0 in a ``flat`` group and at invalid
    samples.  ``squares`` [M] float64: sum of squares of ``centred``.  ``flat`` [M] bool: groups
    without two different valid rewards.
    """

    member: Tensor
    count: Tensor
    mean: Tensor
    centred: Tensor
    squares: Tensor
    flat: Tensor

    def deviation(self, ddof: int) -> Tensor:
        """[M] float64 standard deviation of each group with divisor ``count - ddof``."""
        return (self.squares / (self.count - ddof).clamp(min=1)).sqrt()


def group_statistics(scores: Scores) -> GroupStatistics:
    """Statistics of ``scores.combined`` by ``scores.group``; groups may differ in size."""
    identities, member = numbered(scores.group)
    valid = scores.valid

    def per_group(values: Tensor, reduce: str, start: float) -> Tensor:
        initial = values.new_full((len(identities),), start)
        return initial.scatter_reduce(0, member[valid], values[valid], reduce)

    count = per_group(torch.ones_like(scores.combined), "sum", 0.0)
    mean = per_group(scores.combined, "sum", 0.0) / count.clamp(min=1)
    highest = per_group(scores.combined, "amax", -math.inf)
    flat = highest <= per_group(scores.combined, "amin", math.inf)
    centred = torch.where(valid & ~flat[member], scores.combined - mean[member], 0.0)
    squares = per_group(centred.square(), "sum", 0.0)
    return GroupStatistics(
        member=member, count=count, mean=mean, centred=centred, squares=squares, flat=flat
    )


def rows_of_groups(scores: Scores) -> list[Tensor]:
    """Positions of the valid samples of each group, groups in ascending order of their numbers."""
    identities, member = numbered(scores.group)
    rows = scores.valid.nonzero()[:, 0]
    order = rows[member[rows].argsort(stable=True)]
    sizes = torch.bincount(member[rows], minlength=len(identities))
    return pieces(order, sizes)


def others(values: Tensor) -> Tensor:
    """[n, n - 1]: for each of n values all the others, in order."""
    size = len(values)
    return values.expand(size, size)[~torch.eye(size, dtype=torch.bool)].view(size, size - 1)


def one_reward(scores: Scores, label: str) -> Scores:
    """The same samples scored by one reward, valid where it is a number."""
    reward = scores.by_name[label]
    applies = torch.isfinite(reward)
    combined = torch.where(applies, reward, 0.0)
    return replace(scores, combined=combined, valid=applies, by_name={})


def global_deviation(scores: Scores, ddof: int) -> Tensor:
    """Scalar float64 standard deviation of all valid rewards with divisor ``count - ddof``."""
    rewards = scores.combined[scores.valid]
    mean = rewards.sum() / max(len(rewards), 1)
    return ((rewards - mean).square().sum() / max(len(rewards) - ddof, 1)).sqrt()


def task_numbers(scores: Scores) -> Tensor:
    """[N] int64: which task each sample is of; all the same where ``scores`` names none."""
    if not scores.task:
        return torch.zeros_like(scores.group)
    names = sorted(set(scores.task))
    return torch.tensor([names.index(task) for task in scores.task], device=scores.group.device)


def advantages_with_metrics(values: Tensor, scores: Scores, groups: GroupStatistics) -> Advantages:
    """Advantages that keep every valid sample, with the metrics common to group estimators.

    Those of ``spread_metrics``, and of ``size_metrics`` over valid samples.
    """
    metrics = {**spread_metrics(groups), **size_metrics(values[scores.valid])}
    return Advantages(values=values, keep=scores.valid, metrics=metrics)


def size_metrics(kept: Tensor) -> dict[str, float]:
    """``advantage/abs_mean`` and ``advantage/max`` of the absolute values that are kept."""
    size = kept.abs()
    largest = float(size.max()) if len(size) else 0.0
    return {"advantage/abs_mean": _mean(size), "advantage/max": largest}


def spread_metrics(groups: GroupStatistics) -> dict[str, float]:
    """``reward_std``: mean population deviation within a group.  ``frac_reward_zero_std``: share of
    groups whose valid rewards are all equal.  Both are over groups with a valid sample.
    """
    used = groups.count > 0
    return {
        "reward_std": _mean(groups.deviation(0)[used]),
        "frac_reward_zero_std": _mean(groups.flat[used].double()),
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
