"""Training without advantages."""

from __future__ import annotations

import torch

from mmrl.advantages import none
from mmrl.types import Scores


def test_samples_without_any_reward_are_kept():
    nothing = torch.zeros(3, dtype=torch.bool)
    scores = Scores(combined=torch.zeros(3).double(), group=torch.arange(3), valid=nothing)
    result, _ = none.estimate(scores, none.Config(), {})
    assert result.keep.all()
    assert not result.values.any()


def test_single_samples_are_enough():
    assert none.MIN_GROUP_SIZE == 1


def test_rewards_are_watched_all_the_same():
    scores = Scores(
        combined=torch.tensor([1.0, 3.0, 2.0, 2.0]).double(),
        group=torch.tensor([0, 0, 1, 1]),
        valid=torch.ones(4, dtype=torch.bool),
    )
    result, _ = none.estimate(scores, none.Config(), {})
    assert result.metrics == {"reward_std": 0.5, "frac_reward_zero_std": 0.5}
