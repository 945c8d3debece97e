"""Scores of groups become those of a step."""

from __future__ import annotations

import torch

from mmrl.rollouts import assemble
from rewards.combine import GroupScores


def scored(index: int, rewards: list[float], task: str) -> GroupScores:
    combined = torch.tensor(rewards, dtype=torch.float64)
    return GroupScores(
        index=index,
        by_name={"f": combined},
        combined=combined,
        valid=torch.ones(len(rewards), dtype=torch.bool),
        failures={},
        num_asked={"f": len(rewards)},
        num_failed={"f": 0},
        seconds=0.0,
        task=task,
    )


def test_every_sample_has_its_group_and_its_task():
    scores = assemble([scored(0, [1.0, 2.0], "ocr"), scored(1, [3.0, 4.0, 5.0], "")])
    assert scores.combined.tolist() == scores.by_name["f"].tolist() == [1, 2, 3, 4, 5]
    assert scores.group.tolist() == [0, 0, 1, 1, 1]
    assert list(scores.task) == ["ocr", "ocr", "", "", ""]
