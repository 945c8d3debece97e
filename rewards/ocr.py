"""Does the image show the text it should? Read by rapidocr, scored by edit distance.

Range: [0, 1], higher is better.  The target is the column ``text`` where there is one, else what
stands in the first pair of double quotes of the prompt; NaN where there is neither.  Case and white
space do not count.  rapidocr's models come with its package, nothing is downloaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from mmrl.schema import StrictModel
from rewards._reader import shared_reader

PAPER = "Liu et al. 2025, arXiv:2505.05470"

_QUOTED = re.compile(r'"([^"]*)"')


class Config(StrictModel):
    """How images are read and scored."""

    mode: Literal["soft", "exact"] = Field(
        default="soft",
        description="soft: 1 if the target occurs in the text read, else 1 - edit distance over "
        "the target's length, at least 0; exact: 1 if the whole text read is the target, else 0",
    )
    detect: bool = Field(
        default=False,
        description="find text regions first (150-500 ms an image); false takes the image as one "
        "line of text (about 4 ms)",
    )
    num_threads: int = Field(
        default=1,
        ge=1,
        description="threads within an operator; more than the machine has means all of them",
    )


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, images, text=None, **columns) -> [N]`` float32 in [0, 1], NaN without a target.

    Raises ``TypeError`` when called with anything but PIL images.
    """
    score = {"soft": soft_score, "exact": exact_score}[config.mode]

    def reward(
        prompts: Sequence[str],
        outputs: Sequence[Any],
        text: Sequence[Any] | None = None,
        **columns: Any,
    ) -> Tensor:
        targets = [
            target_of(prompt, column)
            for prompt, column in zip(prompts, text or [None] * len(prompts), strict=True)
        ]
        found = shared_reader(config.detect, config.num_threads).read(outputs)
        pairs = zip(targets, map(normalised, found), strict=True)
        return torch.tensor([score(t, read) if t else math.nan for t, read in pairs])

    return reward


def target_of(prompt: str, column: Any = None) -> str:
    """The normalised text that should be shown, "" if the sample asks for none."""
    if column is not None:
        return normalised(str(column))
    match = _QUOTED.search(prompt)
    return normalised(match[1]) if match else ""


def normalised(text: str) -> str:
    """Lower case, without white space."""
    return "".join(text.split()).lower()


def soft_score(target: str, read: str) -> float:
    """1 if ``target`` occurs in ``read``, else 1 - min(Levenshtein, n) / n with n = len(target)."""
    if target in read:
        return 1.0
    return 1.0 - min(Levenshtein.distance(target, read), len(target)) / len(target)


def exact_score(target: str, read: str) -> float:
    """1 if ``read`` is ``target`` and nothing else, else 0."""
    return float(read == target)
