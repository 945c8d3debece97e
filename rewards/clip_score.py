"""Agreement of image and prompt: cosine of their CLIP embeddings (open_clip).

Range: ``cosine`` in [-1, 1], in practice 0.2 to 0.35; higher is better.  Published systems scale
the logit s cos instead, where s is the model's learned logit scale (100 for OpenAI's weights), and
their numbers do not compare: ``per30`` is s cos / 30 (Flow-GRPO), ``per100`` s cos / 100
(DiffusionNFT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rewards._clip import ClipConfig, batches, loader

PAPER = "Hessel et al. 2021, arXiv:2104.08718"

Scale = Literal["cosine", "per30", "per100"]


class Config(ClipConfig):
    """Which CLIP model, and in which convention its score is reported."""

    scale: Scale = Field(
        default="cosine",
        description="cosine; per30: logit scale times cosine over 30; per100: the same over 100",
    )


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, images, **columns) -> [N]`` float32.

    The model is loaded at the first call.  ``UserError`` here if a path does not exist, there if
    open_clip does not know the model or its weights.
    """
    load = loader(config)

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        clip = load()
        images = [clip.embed_images(part) for part in batches(outputs, config.batch_size)]
        texts = [clip.embed_texts(part) for part in batches(prompts, config.batch_size)]
        cosines = (torch.cat(images) * torch.cat(texts)).sum(-1)
        return cosines * scale_factor(config.scale, clip.logit_scale)

    return reward


def scale_factor(scale: Scale, logit_scale: float) -> float:
    """What the cosine is multiplied by."""
    return {"cosine": 1.0, "per30": logit_scale / 30, "per100": logit_scale / 100}[scale]
