"""Is the answer the right one: the same text, number or letter of an option?

Range: {0, 1}, higher is better.  Compared with a column of the prompt; NaN where that is missing
or, for numbers and options, holds none.  A completion without an answer scores 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rewards._answers import (
    AnswerConfig,
    choice,
    extract,
    number,
    scores,
    target_text,
    text_of,
)

PAPER = ""


class Config(AnswerConfig):
    """How answers are compared."""

    mode: Literal["exact", "numeric", "choice"] = Field(
        default="exact",
        description="exact: the same text but for white space; numeric: the same number, whatever "
        "its form; choice: the same letter (a whole number in the column counts from A = 0)",
    )
    ignore_case: bool = Field(default=True, description="exact: A and a are the same")
    tolerance: float = Field(
        default=1e-6, ge=0, description="numeric: allowed difference over max(1, |target|)"
    )

    def canonical(self, output: Any) -> str | None:
        """The answer in one spelling; of an option its letter."""
        if self.mode != "choice":
            return super().canonical(output)
        found = extract(text_of(output), self.where, self.tag)
        return None if found is None else choice(found)


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in {0, 1} or NaN.

    Raises ``TypeError`` when called with anything but texts.
    """

    def score(answer: str, target: Any) -> float:
        if config.mode == "numeric":
            return same_number(answer, target, config.tolerance)
        if config.mode == "choice":
            return same_choice(answer, target)
        return same_text(answer, target, config.ignore_case)

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        return scores(config, outputs, columns, score)

    return reward


def same_text(answer: str, target: Any, ignore_case: bool) -> float:
    """1 if both are the same words."""
    pair = [" ".join(text.split()) for text in (answer, target_text(target))]
    return float(len({text.casefold() if ignore_case else text for text in pair}) == 1)


def same_number(answer: str, target: Any, tolerance: float) -> float:
    """1 if |answer - target| <= tolerance * max(1, |target|); NaN if the target is no number."""
    wanted, got = number(target_text(target)), number(answer)
    if wanted is None:
        return math.nan
    return float(got is not None and abs(got - wanted) <= tolerance * max(1.0, abs(wanted)))


def same_choice(answer: str, target: Any) -> float:
    """1 if both name the same option; NaN if the target names none."""
    counted = isinstance(target, int) and not isinstance(target, bool) and 0 <= target < 26
    wanted = chr(ord("A") + target) if counted else choice(target_text(target))
    return math.nan if wanted is None else float(choice(answer) == wanted)
