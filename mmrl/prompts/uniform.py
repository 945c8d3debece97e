"""Every prompt about equally often: seeded shuffles of the whole set, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from mmrl.schema import StrictModel
from mmrl.types import Prompt

PAPER = ""


class Config(StrictModel):
    """The uniform sampler has no options."""


def take(
    prompts: Sequence[Prompt], count: int, step: int, seed: int, config: Config, state: dict
) -> tuple[list[Prompt], dict]:
    """``count`` distinct prompts for ``step`` and the next state.

    The position in the stream of shuffles follows from the step alone, so a resumed run continues
    where it stopped.  A remainder too small for a step is left to the next shuffle.
    """
    assert count <= len(prompts), "preflight refuses steps larger than the prompt set"
    epoch, position = divmod(step, len(prompts) // count)
    order = permutation(len(prompts), seed, epoch)
    return [prompts[i] for i in order[position * count : (position + 1) * count]], state


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> list[int]:
    """The shuffle of ``range(size)`` that belongs to a seed and an epoch; not to be changed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()
