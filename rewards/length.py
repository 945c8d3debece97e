"""Is the text as long as it should be? A trapezoid over its words, characters or tokens.

Range: [0, 1], higher is better: 0 up to a and from d on, 1 from b to c, and straight lines between.
It applies to every prompt; tasks with lengths of their own have a reward each, with ``tasks`` and
another ``label``.
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
from rewards._signatures import sampled_tokens

PAPER = "OpenVLThinkerV2 2026, arXiv:2604.08539"


class Config(StrictModel):
    """Which lengths are wanted; the paper does not publish its own."""

    a: float = Field(default=0, description="0 up to this length; -1: texts may be empty")
    b: float = Field(default=50, description="1 from this length on")
    c: float = Field(default=300, description="1 up to this length")
    d: float = Field(default=600, description="0 from this length on")
    unit: Literal["words", "characters", "tokens"] = Field(
        default="words",
        description="what is counted; words are parted by white space, tokens as they were "
        "sampled, the end included",
    )
    inside: str | None = Field(
        default=None,
        pattern=TAG,
        description="count only what is in the last pair of this tag (0 without one); null: all",
    )

    @property
    def counts_tokens(self) -> bool:
        """Whether only samples that are made of tokens have such a length."""
        return self.unit == "tokens"

    @model_validator(mode="after")
    def _in_order(self) -> Config:
        if not self.a < self.b <= self.c < self.d:
            raise UserError(
                f"a, b, c, d = {self.a:g}, {self.b:g}, {self.c:g}, {self.d:g} are not in order; "
                "allowed: a < b <= c < d"
            )
        if self.inside is not None and self.counts_tokens:
            raise UserError(
                f"inside: {self.inside!r} with unit 'tokens', which are counted over the whole "
                "completion; allowed: null, or unit 'words' or 'characters'"
            )
        return self


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in [0, 1].

    Raises ``TypeError`` when called with anything but texts, and for tokens without the rollout
    that knows them.
    """

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        texts = [text_of(output) for output in outputs]
        if not config.counts_tokens:
            return torch.tensor([score(text, config) for text in texts])
        lengths = sampled_tokens(texts, columns).tolist()
        return torch.tensor([trapezoid(length, config) for length in lengths])

    reward.reads_group = config.counts_tokens  # type: ignore[attr-defined]
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
