"""Is the answer mathematically the right one, in whatever form? Judged by math-verify.

Range: {0, 1}, higher is better.  1/2, 0.5 and \\frac{1}{2} are the same; with where: text,
math-verify finds the answer itself.  Compared with a column of the prompt; NaN where that is
missing or cannot be parsed.  Needs ``pip install 'mmrl[math]'``.

math-verify limits its time with signals, which only a main thread has, and rewards run in others; a
power tower in a completion is enough to keep it busy for ever.  So it works in a process of its own
that is ended and started again where an answer takes longer than ``limit_s``, which scores 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from mmrl.resolve import optional
from rewards._answers import AnswerConfig, scores, target_text
from rewards._child import Child, EndedError, LateError, Pool

PAPER = ""

RUNNER = Path(__file__).with_name("_math_runner.py")

_DELIMITERS = ("$", "\\boxed", "\\(", "\\[")


class Config(AnswerConfig):
    """How expressions are compared."""

    digits: int = Field(default=6, ge=0, description="decimals to which numbers must agree")
    limit_s: float = Field(default=5.0, gt=0, description="seconds for one answer, then it is 0")


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in {0, 1} or NaN.

    ``UserError`` without math-verify.  Raises ``TypeError`` when called with anything but texts.
    """
    optional("math_verify", "mmrl[math]", "reward 'math_verify'")
    judge = Pool(_start, 1)

    def score(answer: str, target: Any) -> float:
        question = {
            "right": as_latex(target_text(target)),
            "found": answer if config.where == "text" else as_latex(answer),
            "digits": config.digits,
            "limit_s": config.limit_s,
        }
        return verdict(judge, question)

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        return scores(config, outputs, columns, score)

    return reward


def as_latex(text: str) -> str:
    """``text`` in one line between dollar signs, unless it says where its mathematics is."""
    return text if any(mark in text for mark in _DELIMITERS) else f"${' '.join(text.split())}$"


def verdict(judge: Pool, question: dict[str, Any]) -> float:
    """1 or 0; 0 as well if there is no answer in time; NaN if the target cannot be parsed.

    ``RuntimeError`` if the process does not start.
    """
    try:
        answer = judge.ask(f"{json.dumps(question)}\n".encode(), question["limit_s"])
    except (LateError, EndedError):
        return 0.0
    return math.nan if answer == "null" else float(answer)


def _start() -> Child:
    child = Child([str(RUNNER)])
    child.await_ready()
    return child
