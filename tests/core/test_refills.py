"""Dynamic sampling: which groups are trained, how they are numbered, and whose they are."""

from __future__ import annotations

import math

import pytest
import torch

from mmrl.rollouts import Batch, is_varied, make_requests, trainable_groups
from mmrl.types import Prompt, RolloutGroup
from rewards.combine import GroupScores

PROMPTS = [Prompt(id=f"p{i}", text=f"prompt {i}") for i in range(9)]
REQUESTS = make_requests(PROMPTS, 2, 0, 0)
FLAT, VARIED = (1.0, 1.0), (0.0, 1.0)


def scored(index, rewards):
    values = torch.tensor(rewards, dtype=torch.float64)
    return GroupScores(
        index=index,
        by_name={},
        combined=values.nan_to_num(),
        valid=values.isfinite(),
        failures={},
        num_asked={},
        num_failed={},
        seconds=0.0,
    )


def batch(first, rewards, rank=0, world=1):
    """Groups ``first`` and on with these rewards, as a process would hold them."""
    groups = [
        RolloutGroup(
            request=REQUESTS[first + place],
            outputs=["", ""],
            payload=first + place,
            mask=torch.ones(2, 1).bool(),
        )
        for place in range(rank, len(rewards), world)
    ]
    return Batch(groups=groups, scores=[scored(first + i, r) for i, r in enumerate(rewards)])


@pytest.mark.parametrize(
    ("rewards", "varied"),
    [
        (VARIED, True),
        (FLAT, False),
        ((0.5, math.nan), False),
        ((0.5, 0.5, math.nan), False),
        ((0.5, math.nan, 0.6), True),
        ((math.nan, math.nan), False),
    ],
)
def test_what_teaches(rewards, varied):
    assert is_varied(scored(0, rewards)) == varied


def test_without_refills_all_groups_are_trained():
    found = trainable_groups([batch(0, [FLAT, VARIED, FLAT])], 1, drop=False)
    assert [scores.index for scores in found.scores] == [0, 1, 2]
    assert found.owners == [0, 0, 0]
    assert [group.payload for group in found.groups] == [0, 1, 2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_kept_groups_are_numbered_anew_and_stay_where_they_are(world):
    rewards = [FLAT, VARIED, VARIED], [VARIED, FLAT]
    seen = []
    for rank in range(world):
        batches = [batch(0, rewards[0], rank, world), batch(3, rewards[1], rank, world)]
        found = trainable_groups(batches, world, drop=True)
        assert [scores.index for scores in found.scores] == [0, 1, 2]
        assert found.owners == [1 % world, 2 % world, 0]
        assert len(found.everything) == 5
        mine = [g for g in found.groups if found.owners[g.request.index] == rank]
        seen += [(g.request.index, g.payload) for g in mine]
        assert found.groups, "a process without any still takes part"
    assert sorted(seen) == [(0, 1), (1, 2), (2, 3)]


def test_where_nothing_teaches_the_first_batch_is_kept():
    found = trainable_groups([batch(0, [FLAT, FLAT]), batch(2, [FLAT, FLAT])], 1, drop=True)
    assert [group.payload for group in found.groups] == [0, 1]
    assert len(found.everything) == 4
