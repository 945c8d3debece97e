"""How close is the answer to the right text, by edit distance?

Range: [0, 1], higher is better: 1 - Levenshtein distance / length of the longer of both.  Compared
with a column of the prompt; NaN where that is missing.  A completion without an answer scores 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from rewards._answers import AnswerConfig, scores, target_text

PAPER = ""


class Config(AnswerConfig):
    """How texts are compared."""

    ignore_case: bool = Field(default=False, description="A and a are the same")


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in [0, 1] or NaN.

    Raises ``TypeError`` when called with anything but texts.
    """
    same = str.casefold if config.ignore_case else None

    def score(answer: str, target: Any) -> float:
        return Levenshtein.normalized_similarity(answer, target_text(target), processor=same)

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        return scores(config, outputs, columns, score)

    return reward
