"""How well rewards predict true scores on selected samples, by which PF-PPO compares filters."""

from __future__ import annotations

import torch
from torch import Tensor


def reliability(rewards: Tensor, truths: Tensor, bins: int = 10) -> float:
    """R^2 in [0, 1] of the line from ``rewards`` [M] to ``truths`` [M] with the least squares.

    Samples are averaged first, in ``bins`` of equal size in the order of reward.  NaN where either
    does not differ.  Of some strategies, the one whose samples give the largest is to be preferred.
    """
    order = rewards.argsort(stable=True)
    parts = [part for part in order.tensor_split(bins) if len(part)]
    x, y = (torch.stack([v[part].double().mean() for part in parts]) for v in (rewards, truths))
    x, y = x - x.mean(), y - y.mean()
    rest = y - (x * y).sum() / x.square().sum() * x
    return 1.0 - float(rest.square().sum() / y.square().sum())
