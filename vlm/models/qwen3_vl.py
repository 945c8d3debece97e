"""Qwen3-VL: positions interleaved; the tower's features of several depths join the first layers."""

from __future__ import annotations

from vlm.models.base import Family

PAPER = "Bai et al. 2025, arXiv:2511.21631"


class Qwen3VL(Family):
    """See ``Family``."""


load = Qwen3VL
