"""Negative JPEG size of an image over 500 kB: favours smooth, simple images.

Range: below 0, higher is better; -kB / 500 with the kB of a quality-95 JPEG.  It needs no model,
which makes it the reward for smoke tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl.schema import StrictModel
from rewards._jpeg import size_kb

PAPER = "Black et al. 2023, arXiv:2305.13301"

# Brings the reward of a 512-pixel photograph near -0.2, the scale published settings assume.
KB_PER_UNIT = 500.0


class Config(StrictModel):
    """No settings."""


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, images, **columns) -> [N]`` float32, each -kB / 500."""

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        return torch.tensor([-size_kb(image) / KB_PER_UNIT for image in outputs])

    return reward
