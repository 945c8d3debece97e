"""Do the boxes in the answer lie on the right ones? Intersection over union.

Range: [0, 1], higher is better: IoU summed over pairs of an answered and a right box, largest
first, each used once, over the larger number of boxes.  A box is a JSON list of four numbers,
whatever list or object it stands in.  NaN where the column of the prompt is missing or holds no
box; an answer without a box scores 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rewards._answers import AnswerConfig, scores

PAPER = ""

Box = tuple[float, float, float, float]

_NUMBER = r"\s*-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?\s*"
_BOX = re.compile(rf"\[({_NUMBER}(?:,{_NUMBER}){{3}})\]")


class Config(AnswerConfig):
    """Which numbers a box consists of."""

    form: Literal["xyxy", "xywh"] = Field(
        default="xyxy",
        description="xyxy: left, top, right, bottom; xywh: left, top, width, height",
    )


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in [0, 1] or NaN.

    Raises ``TypeError`` when called with anything but texts.
    """

    def score(answer: str, target: Any) -> float:
        right = boxes(target if isinstance(target, str) else json.dumps(target), config.form)
        return matched(boxes(answer, config.form), right) if right else math.nan

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        return scores(config, outputs, columns, score)

    return reward


def boxes(text: str, form: str) -> list[Box]:
    """Every list of four numbers in ``text`` as corners, in its order."""
    found = []
    for match in _BOX.finditer(text):
        x, y, right, bottom = (float(number) for number in match[1].split(","))
        if form == "xywh":
            right, bottom = x + right, y + bottom
        found.append((x, y, right, bottom))
    return found


def matched(answered: Sequence[Box], right: Sequence[Box]) -> float:
    """Sum of IoU over pairs, largest first, each box used once, over max(boxes of both)."""
    pairs = [(iou(a, b), i, j) for i, a in enumerate(answered) for j, b in enumerate(right)]
    total, used, taken = 0.0, set(), set()
    for value, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if i not in used and j not in taken:
            total += value
            used.add(i)
            taken.add(j)
    return total / max(len(answered), len(right))


def iou(a: Box, b: Box) -> float:
    """Area of both over that of either; 0 for a box without an area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    proper = all(box[2] > box[0] and box[3] > box[1] for box in (a, b))
    if not proper or width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    both = width * height
    either = sum(areas) - both
    value = both / either if either > 0 else 0.0
    return value if math.isfinite(value) else 0.0
