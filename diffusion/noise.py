"""Gaussian noise of image latents, one stream for each sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrl.noise import NoiseKey


def normal(keys: Sequence[NoiseKey], purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape], float32, on the CPU; row b belongs to ``keys[b]``."""
    return torch.stack([torch.randn(*shape, generator=key.generator(purpose)) for key in keys])
