"""Is the text as long as it should be? A trapezoid over its words or characters.

Range: [0, 1], higher is better: 0 up to a and from d on, 1 from b to c, and straight lines between.
It applies to every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmrl.errors import UserError
from mmrl.schema import StrictModel
from rewards._answers import TAG, in_tag, text_of

PAPER = "OpenVLThinkerV2 2026, arXiv:2604.08539"


class Config(StrictModel):
    """Which lengths are wanted; the paper does not publish its own."""

    a: float = Field(default=0, description="0 up to this length; -1: texts may be empty")
    b: float = Field(default=50, description="1 from this length on")
    c: float = Field(default=300, description="1 up to this length")
    d: float = Field(default=600, description="0 from this length on")
    unit: Literal["words", "characters"] = Field(
        default="words", description="what is counted; words are parted by white space"
    )
    inside: str | None = Field(
        default=None,
        pattern=TAG,
        description="count only what is in the last pair of this tag (0 without one); null: all",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Config:
        if not self.a < self.b <= self.c < self.d:
            raise UserError(
                f"a, b, c, d = {self.a:g}, {self.b:g}, {self.c:g}, {self.d:g} are not in order; "
                "allowed: a < b <= c < d"
            )
        return self


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in [0, 1].

    Raises ``TypeError`` when called with anything but texts.
    """

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        return torch.tensor([score(text_of(output), config) for output in outputs])

    return reward


def score(text: str, config: Config) -> float:
    """The trapezoid at the length of ``text``."""
    counted = text if config.inside is None else in_tag(text, config.inside)
    if counted is None:
        return 0.0
    return trapezoid(len(counted.split() if config.unit == "words" else counted), config)


def trapezoid(length: float, config: Config) -> float:
    """min((length - a) / (b - a), (d - length) / (d - c)), held in [0, 1]."""
    rise = (length - config.a) / (config.b - config.a)
    fall = (config.d - length) / (config.d - config.c)
    return max(0.0, min(1.0, rise, fall))
