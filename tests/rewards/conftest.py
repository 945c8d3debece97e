"""Shared makings of the reward tests."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from mmrl.types import Prompt, RolloutGroup, RolloutRequest


@pytest.fixture
def sign():
    """``sign(text, size=(64, 32))``: an RGB image that shows the text."""

    def make(text, size=(64, 32)):
        image = Image.new("RGB", size, (250, 242, 215))
        font = ImageFont.load_default(size[1] * 0.7)
        draw = ImageDraw.Draw(image)
        draw.text((size[0] / 2, size[1] / 2), text, fill=(20, 20, 160), font=font, anchor="mm")
        return image

    return make


@pytest.fixture
def group():
    """``group(outputs, index=0, text="p", **columns)``: a rolled-out group."""

    def make(outputs, index=0, text="p", **columns):
        prompt = Prompt(id=text, text=text, columns=columns)
        size = len(outputs)
        request = RolloutRequest(prompt=prompt, group_size=size, seed=0, stream=0, index=index)
        mask = torch.ones(size, 1, dtype=torch.bool)
        return RolloutGroup(request=request, outputs=outputs, payload=None, mask=mask)

    return make
