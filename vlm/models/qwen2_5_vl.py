"""Qwen2.5-VL: positions in time, height and width; images in windows."""

from __future__ import annotations

from vlm.models.base import Family

PAPER = "Bai et al. 2025, arXiv:2502.13923"


class Qwen25VL(Family):
    """See ``Family``."""


load = Qwen25VL
