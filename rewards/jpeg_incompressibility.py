"""JPEG size of an image in kB: favours detailed, noisy images.

Range: above 0, higher is better; the kB of a quality-95 JPEG, unscaled.  Note that the published
scale is 500 times that of ``jpeg_compressibility``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl.schema import StrictModel
from rewards._jpeg import size_kb

PAPER = "Black et al. 2023, arXiv:2305.13301"


class Config(StrictModel):
    """No settings."""


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, images, **columns) -> [N]`` float32, each in kB."""

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        return torch.tensor([size_kb(image) for image in outputs])

    return reward
