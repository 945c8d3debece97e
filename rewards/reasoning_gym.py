"""Does the answer solve the puzzle? Judged by the verifier of its task in reasoning-gym.

Range: [0, 1], higher is better; what lies between is the task's own.  It reads the columns
``answer``, ``metadata`` and ``source_dataset`` that prompts of a source ``reasoning_gym:<task>``
have; NaN where one is missing.  Needs ``pip install 'mmrl[gym]'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.resolve import optional
from mmrl.schema import StrictModel, nearest
from rewards._answers import TAG, column, extract, text_of

PAPER = "Stojanovski et al. 2025, arXiv:2505.24760"

COLUMNS = ("answer", "metadata", "source_dataset")


class Config(StrictModel):
    """Where the completion says its answer."""

    where: Literal["text", "tag", "boxed", "number"] = Field(
        default="text",
        description="all of it, its last pair of tags, its last \\boxed{...}, or its last number; "
        "without one it scores what the task gives for no answer",
    )
    tag: str = Field(
        default="answer", pattern=TAG, description="with where: tag, the name of the tag"
    )

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns without which nothing is scored."""
        return COLUMNS


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in [0, 1] or NaN.

    ``UserError`` without reasoning-gym.  Raises ``TypeError`` when called with anything but texts.
    """
    package = optional("reasoning_gym", "mmrl[gym]", "reward 'reasoning_gym'")

    @cache
    def verifier(task: str) -> Callable[..., float]:
        known = sorted(package.factory.DATASETS)
        if task not in known:
            raise UserError(f"source_dataset: unknown task {task!r}; {nearest(task, known)}")
        return package.get_score_answer_fn(task)

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        texts = [extract(text_of(output), config.where, config.tag) for output in outputs]
        rows = zip(*(column(columns, name, len(outputs)) for name in COLUMNS), strict=True)
        found = []
        for prompt, text, (answer, metadata, task) in zip(prompts, texts, rows, strict=True):
            entry = {"question": prompt, "answer": answer, "metadata": metadata}
            missing = None in (answer, metadata, task)
            found.append(math.nan if missing else float(verifier(task)(text, entry)))
        return torch.tensor(found, dtype=torch.float32)

    return reward
