"""Where in a completion its answer stands, and what stands there: the one home of both.

Everything here takes time linear in the text, whatever a policy writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.schema import StrictModel

TAG = r"^[A-Za-z][A-Za-z0-9_-]*$"
"""What the name of a tag may look like."""

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?(?:/[0-9]+)?"
)
_BESIDE = str.maketrans("", "", "$%,{}\\")
_FRACTION = re.compile(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}")
_BOXED = "\\boxed{"
_GSM8K = "####"
_ONE_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s|$)|$)")
_SAID = re.compile(r"\b(?i:answer|option|choice)\b(?: is)?[\s:*]*\(?([A-Z])\b")
_MARKED = re.compile(r"[({]([A-Z])[)}]|\b([A-Z])[.)]?\s*$")
_FENCE = re.compile(r"^[ \t]*```[^\n]*$", re.MULTILINE)


class AnswerConfig(StrictModel):
    """What is compared with what."""

    target: str = Field(
        default="answer",
        min_length=1,
        description="column with the right answer; what follows its last ####, if it has one",
    )
    where: Literal["text", "tag", "boxed", "number"] = Field(
        default="text",
        description="where the completion says its answer: all of it, its last pair of tags, its "
        "last \\boxed{...}, or its last number; without one it scores 0",
    )
    tag: str = Field(
        default="answer", pattern=TAG, description="with where: tag, the name of the tag"
    )

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns without which nothing is scored."""
        return (self.target,)

    def canonical(self, output: Any) -> str | None:
        """The answer of a completion in one spelling: that of a number, else without case."""
        found = extract(text_of(output), self.where, self.tag)
        value = None if found is None else number(found)
        if found is None or value is None:
            return found and " ".join(found.split()).casefold()
        return f"{value:.12g}"


def scores(
    config: AnswerConfig,
    outputs: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    score: Callable[[str, Any], float],
) -> Tensor:
    """``score(answer, target)`` of each completion [N] float32.

    0 where a completion holds no answer, NaN where the column of targets is missing or empty.
    ``TypeError`` for what is no text.
    """
    found = []
    for output, target in zip(outputs, column(columns, config.target, len(outputs)), strict=True):
        answer = extract(text_of(output), config.where, config.tag)
        known = not is_missing(target)
        found.append(math.nan if not known else 0.0 if answer is None else score(answer, target))
    return torch.tensor(found, dtype=torch.float32)


def column(columns: Mapping[str, Sequence[Any]], name: str, size: int) -> Sequence[Any]:
    """The named column, ``None`` for every sample where there is none."""
    return columns.get(name) or [None] * size


def is_missing(target: Any) -> bool:
    """Whether a sample has no target: ``None``, NaN, an empty list or nothing but white space."""
    if isinstance(target, str):
        return not target.strip()
    if isinstance(target, float):
        return math.isnan(target)
    return target is None or (isinstance(target, list | tuple | dict) and not target)


def text_of(output: Any) -> str:
    """The completion; ``TypeError`` if it is no string."""
    if not isinstance(output, str):
        raise TypeError(f"this reward reads text, not {type(output).__name__}")
    return output


def target_text(target: Any) -> str:
    """The target as text: what follows its last ``####`` (as GSM8K writes it), stripped."""
    return str(target).rpartition(_GSM8K)[2].strip()


def extract(text: str, where: str, tag: str = "answer") -> str | None:
    """What stands at the last such place in ``text``, stripped; ``None`` if there is none."""
    if where == "tag":
        return in_tag(text, tag)
    if where == "boxed":
        return in_box(text)
    return last_number(text) if where == "number" else text.strip()


def in_tag(text: str, tag: str) -> str | None:
    """Inside the last ``<tag>...</tag>`` that is closed."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end].strip()


def in_box(text: str) -> str | None:
    """Inside the last ``\\boxed{...}``, whose braces must match."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, position = 1, start + len(_BOXED)
    for i in range(position, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[position:i].strip()
    return None


def last_number(text: str) -> str | None:
    """The last number as it is written, its sign and a fraction's denominator included."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match[0]
    return found


def number(text: str) -> float | None:
    """The value of a text that is one number and nothing else; ``None`` if it is not, or infinite.

    Signs, separators of thousands, exponents, fractions (also LaTeX's), and $ and % beside it.
    """
    text = _FRACTION.sub(r"\1/\2", text).translate(_BESIDE).strip()
    above, slash, below = text.partition("/")
    try:
        value = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def choice(text: str) -> str | None:
    """The upper-case letter of the option that ``text`` names.

    The text is the letter, alone or before its option (``B``, ``(b)``, ``B. a cat``); else the
    last one said to be the answer, the option or the choice; else the last capital in parentheses
    or at the end.
    """
    if match := _ONE_LETTER.match(text.strip()):
        return match[1].upper()
    for pattern in (_SAID, _MARKED):
        letters = [next(filter(None, match.groups())) for match in pattern.finditer(text)]
        if letters:
            return letters[-1].upper()
    return None


def code_in(text: str) -> str:
    """Inside the last pair of code fences; all of the text where there is none."""
    blocks = list(_blocks(text))
    return blocks[-1] if blocks else text


def _blocks(text: str) -> Iterator[str]:
    fences = list(_FENCE.finditer(text))
    for opening, closing in zip(fences[::2], fences[1::2], strict=False):
        yield text[opening.end() : closing.start()]
