"""DAPO's penalty along the last tokens of a completion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmrl.errors import UserError
from mmrl.schema import validate
from rewards import soft_overlong
from rewards.combine import scored


def rewards(group, lengths, mask=None, **options):
    """Of a group whose samples have so many tokens."""
    everything = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = everything if mask is None else mask
    rolled = replace(group(["a b"] * len(lengths)), mask=mask, everything=everything)
    reward = soft_overlong.build(soft_overlong.Config(**options))
    return scored(reward, rolled, "soft_overlong")


def test_it_is_equation_13(group):
    """Worked by hand: L_max = 10, L_cache = 4."""
    found = rewards(group, [1, 5, 6, 7, 8, 9, 10, 11, 50], max_tokens=10, buffer=4)
    assert found.values.tolist() == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]


def test_the_values_of_the_paper_are_the_defaults():
    config = soft_overlong.Config()
    assert config.free_tokens == 16384
    lengths = torch.tensor([16384, 18432, 20480])
    assert soft_overlong.penalty(lengths, config).tolist() == [0, -0.5, -1]


def test_the_whole_length_can_be_the_buffer(group):
    assert rewards(group, [1, 4], max_tokens=4, buffer=4).values.tolist() == [-0.25, -1]


def test_completions_that_are_not_trained_have_their_length(group):
    """As with drop_overlong, which takes them out of the mask."""
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    found = rewards(group, [2, 4], mask, max_tokens=4, buffer=2)
    assert found.values.tolist() == [0, -1]


def test_it_needs_texts_and_their_tokens(group):
    reward = soft_overlong.build(soft_overlong.Config())
    with pytest.raises(TypeError, match="which only the rollout knows"):
        reward(["p"], ["a"])
    with pytest.raises(TypeError, match="reads text, not bytes"):
        reward(["p"], [b"image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 8, "buffer": 9}, "buffer: 9 is more than max_tokens = 8; allowed: 1 to 8"),
        ({"buffer": 0}, r"buffer: .*greater than or equal to 1"),
        ({"max_token": 8}, "did you mean 'max_tokens'"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        validate(soft_overlong.Config, options, "rewards[0]")
