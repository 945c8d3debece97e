"""Is the whole text a chain of tagged parts, such as <think>...</think><answer>...</answer>?

Range: {0, 1}, higher is better.  Each tag opens and closes once, in order; between the parts and
around them there may be white space only.  It applies to every prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mmrl.schema import StrictModel
from rewards._answers import TAG, text_of

PAPER = "DeepSeek-AI 2025, arXiv:2501.12948"


class Config(StrictModel):
    """The parts that are wanted."""

    tags: list[Annotated[str, Field(pattern=TAG)]] = Field(
        default=["think", "answer"], min_length=1, description="names of the tags, in their order"
    )
    opened: bool = Field(
        default=False,
        description="the prompt's template already wrote the first opening tag",
    )


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in {0, 1}.

    Raises ``TypeError`` when called with anything but texts.
    """
    pattern = pattern_of(config.tags, config.opened)

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        return torch.tensor([float(bool(pattern.fullmatch(text_of(text)))) for text in outputs])

    return reward


def pattern_of(tags: Sequence[str], opened: bool) -> re.Pattern[str]:
    """What the whole text must match."""
    # No part may hold a tag, so a text has one reading only, found in time linear in its length.
    inside = rf"(?:(?!</?(?:{'|'.join(tags)})>).)*"
    parts = [rf"<{tag}>{inside}</{tag}>" for tag in tags]
    if opened:
        parts[0] = parts[0].removeprefix(f"<{tags[0]}>")
    return re.compile(r"\s*" + r"\s*".join(parts) + r"\s*", re.DOTALL)
