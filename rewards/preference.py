"""How much nearer the image is to a good description than to its opposite, by a CLIP model.

Range: [0, 1], higher is better: sigmoid(s (cos(image, positive) - cos(image, negative))), where s
is the model's learned logit scale, which is the probability of the first in a softmax over the two
texts.  The prompt of the image is not read.  With the default model, made by
``assets/build_preference.py``, the score of a 32x64 render estimates the preference stated there:
high contrast, centred, on a clean background.  As a learned judge of small capacity it can be
over-optimised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rewards._clip import Clip, ClipConfig, batches, loader

PAPER = "Wang et al. 2022, arXiv:2207.12396"


class Config(ClipConfig):
    """Which CLIP model, and the two texts it weighs against each other."""

    model_name: str = Field(
        default="assets/tiny-preference",
        min_length=1,
        description="a folder with open_clip_config.json and weights (plain or as local-dir:PATH), "
        "an open_clip model name, or hf-hub:OWNER/NAME",
    )
    positive: str = Field(
        default="a clean, centred, high-contrast picture",
        min_length=1,
        description="what a good image is like",
    )
    negative: str = Field(
        default="a cluttered, off-centre, low-contrast picture",
        min_length=1,
        description="what a bad image is like",
    )


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, images, **columns) -> [N]`` float32.

    The model is loaded at the first call that brings images.  ``UserError`` here if a path does not
    exist, there if open_clip does not know the model or cannot read its files.
    """
    load = loader(config)

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        if not outputs:
            return torch.zeros(0)
        clip = load()
        axis = preference_axis(clip, config.positive, config.negative)
        parts = [clip.embed_images(part) @ axis for part in batches(outputs, config.batch_size)]
        return torch.sigmoid(torch.cat(parts))

    return reward


def preference_axis(clip: Clip, positive: str, negative: str) -> Tensor:
    """[D] float32: its product with an image's unit vector is the difference of the two logits."""
    good, bad = clip.embed_texts([positive, negative])
    return clip.logit_scale * (good - bad)
