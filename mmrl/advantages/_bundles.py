"""Papers: one rollout of each question of a bundle, marked together (RiskPO, arXiv:2510.00911).

    S_p = sum of the rewards of the rollouts in paper p

Rewards of 0 and 1 become a score of many values.  A bundle is ``size`` successive groups that have
valid samples; its j-th paper takes the j-th valid sample of each, which for samples of one policy
is as good as a random permutation (and what the released code does).  Where groups differ in size
there are as many papers as the largest has samples, and a smaller one lends its own again in turn.
Groups that fill no bundle are in no paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Credit = Literal["uniform", "std", "score", "sum_mean"]
"""How the advantage of a paper is handed to its rollouts, see ``credited``."""

SMALL_DEVIATION = 1e-3
"""Up to it the rewards of a question count as equal (as released)."""
SMALL_SUM = 1e-6


@dataclass(frozen=True)
class Papers:
    """P papers of K rollouts: ``member`` [P, K] int64, their positions; ``bundle`` [P] int64."""

    member: Tensor
    bundle: Tensor

    def spread(self, credit: Tensor, size: int) -> Tensor:
        """[size] of each sample the mean of ``credit`` [P, K] over its papers; 0 without any."""
        total = torch.zeros(size, dtype=credit.dtype).index_add(
            0, self.member.flatten(), credit.flatten()
        )
        count = torch.bincount(self.member.flatten(), minlength=size)
        return total / count.clamp(min=1)


def papers(rows: Sequence[Tensor], size: int) -> Papers:
    """Papers of the groups whose valid samples are at ``rows``."""
    rows = [each for each in rows if len(each)]
    member, bundle = [torch.zeros(0, size, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for number in range(len(rows) // size):
        chosen = rows[number * size : (number + 1) * size]
        count = max(len(each) for each in chosen)
        turns = torch.arange(count)
        member.append(torch.stack([each[turns % len(each)] for each in chosen], dim=1))
        bundle.append(torch.full((count,), number))
    return Papers(torch.cat(member), torch.cat(bundle))


def credited(
    values: Tensor, rewards: Tensor, centred: Tensor, deviation: Tensor, how: Credit
) -> Tensor:
    """[P, K] what each rollout gets of the advantage of its paper.

    uniform: all of it.  std: over the deviation of its question, if that is above
    ``SMALL_DEVIATION``.  score: half of it if it earned something, else one and a half.  sum_mean:
    a share by how far it is above the mean of its question, within +-K; 1/K where these shares
    have no sum.

    Args:
        values: [P] advantage of each paper.
        rewards: [P, K] reward of each rollout.
        centred: [P, K] less the mean of its question.
        deviation: [P, K] sample deviation of its question.
        how: as above.
    """
    whole, count = values[:, None].expand_as(rewards), rewards.shape[1]
    if how == "std":
        return whole / torch.where(deviation > SMALL_DEVIATION, deviation, 1.0)
    if how == "score":
        return whole * torch.where(rewards > 0, 0.5, 1.5)
    if how == "sum_mean":
        total = centred.sum(1, keepdim=True)
        none = total.abs() <= SMALL_SUM
        share = (centred / torch.where(none, 1.0, total)).clamp(-count, count)
        return whole * torch.where(none, 1 / count, share)
    return whole
