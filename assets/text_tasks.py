"""Items for the tiny language model: arithmetic, order, and two tasks of reasoning-gym.

An item is a question with a short trace of reasoning and its answer.  ``slip`` makes one step of
the trace wrong and follows it to its wrong answer, as a careless writer would.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ARITHMETIC = ("add", "subtract", "multiply")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question, the written way to its answer, and the answer.

    `steps`: pieces of the trace.  `columns`: what else the question's verifier reads.
    """

    task: str
    prompt: str
    steps: tuple[str, ...]
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def completion(self) -> str:
        """The demonstration."""
        return f"<think>{' '.join(self.steps)}</think><answer>{self.answer}</answer>"

    @property
    def key(self) -> str:
        """What makes the question another one."""
        return self.prompt

    def right(self, answer: str | None) -> bool:
        """Whether the answer holds."""
        return answer == self.answer

    @property
    def row(self) -> dict[str, Any]:
        """A line of a prompt file."""
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "task": self.task,
            **self.columns,
        }


def slipped(digit: int, rng: random.Random) -> int:
    """Another digit, most often a neighbour."""
    off = rng.choice((-1, 1, 1, 2))
    return (digit + off) % 10


# Arithmetic, digit by digit from the right


def add(rng: random.Random, slip: bool = False) -> Item:
    """Two numbers of two or three digits."""
    a, b = _number(rng), _number(rng)
    width = max(len(str(a)), len(str(b)))
    wrong = rng.randrange(width) if slip else -1
    steps, digits, carry = [], [], 0
    for i in range(width):
        x, y = _digit(a, i), _digit(b, i)
        total = x + y + carry
        if i == wrong:
            total = total - total % 10 + slipped(total % 10, rng)
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        digits.append(total % 10)
        carry = total // 10
    answer = _join([*digits, carry])
    return Item(task="add", prompt=f"{a} + {b} = ?", steps=tuple(steps), answer=answer)


def subtract(rng: random.Random, slip: bool = False) -> Item:
    """A number of up to three digits from one that is not smaller."""
    b, a = sorted((_number(rng), _number(rng)))
    width = len(str(a))
    wrong = rng.randrange(width) if slip else -1
    steps, digits, borrow = [], [], 0
    for i in range(width):
        x, y = _digit(a, i), _digit(b, i)
        lent = x - y - borrow < 0
        left = x + 10 * lent - y - borrow
        if i == wrong:
            left = slipped(left, rng)
        steps.append(f"{x + 10 * lent}-{y}{'-1' if borrow else ''}={left}")
        digits.append(left)
        borrow = int(lent)
    return Item(task="subtract", prompt=f"{a} - {b} = ?", steps=tuple(steps), answer=_join(digits))


def multiply(rng: random.Random, slip: bool = False) -> Item:
    """A number of two or three digits, times one digit."""
    a, b = _number(rng), rng.randint(2, 9)
    width = len(str(a))
    wrong = rng.randrange(width) if slip else -1
    steps, digits, carry = [], [], 0
    for i in range(width):
        x = _digit(a, i)
        total = x * b + carry
        if i == wrong:
            total = total - total % 10 + slipped(total % 10, rng)
        steps.append(f"{x}*{b}{f'+{carry}' if carry else ''}={total}")
        digits.append(total % 10)
        carry = total // 10
    return Item(
        task="multiply",
        prompt=f"{a} * {b} = ?",
        steps=tuple(steps),
        answer=_join([*digits, carry]),
    )


def _number(rng: random.Random) -> int:
    return rng.randint(10, 99) if rng.random() < 0.4 else rng.randint(100, 999)


def _digit(number: int, place: int) -> int:
    return number // 10**place % 10


def _join(digits: list[int]) -> str:
    """Digits from the right as a number; the last may have two figures."""
    return str(int("".join(str(digit) for digit in reversed(digits))))


# Order


def sort(rng: random.Random, slip: bool = False) -> Item:
    """Three to five different numbers of one or two digits."""
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    ordered = sorted(numbers)
    if slip:
        i = rng.randrange(len(ordered) - 1)
        ordered[i], ordered[i + 1] = ordered[i + 1], ordered[i]
    return Item(
        task="sort",
        prompt=f"Sort {' '.join(map(str, numbers))}",
        steps=("<".join(map(str, ordered)),),
        answer=" ".join(map(str, ordered)),
    )


def compare(rng: random.Random, slip: bool = False) -> Item:
    """The larger of two different numbers of three digits, which often begin alike."""
    a = rng.randint(100, 999)
    b = a
    while b == a:
        alike = rng.randint(0, 2)
        b = int(str(a)[:alike] + "".join(str(rng.randint(0, 9)) for _ in range(3 - alike)))
        b = a if b < 100 else b
    steps = []
    larger = max(a, b)
    for x, y in zip(str(a), str(b), strict=True):
        steps.append(f"{x}{'=' if x == y else '>' if x > y else '<'}{y}")
        if x != y:
            break
    if slip:
        last = steps[-1]
        steps[-1] = last.replace(">", "!").replace("<", ">").replace("!", "<")
        larger = min(a, b)
    return Item(
        task="compare",
        prompt=f"Which is larger: {a} or {b}?",
        steps=tuple(steps),
        answer=str(larger),
    )


# reasoning-gym

CHAIN, LEGS = "chain_sum", "leg_counting"
GYM: dict[str, dict[str, int]] = {
    CHAIN: {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    LEGS: {"min_animals": 1, "max_animals": 2, "max_instances": 5},
}
"""Tasks, and what keeps them small."""


def gym_item(task: str, rng: random.Random, slip: bool = False) -> Item:
    """One entry of a task of `GYM`, with a trace of our own."""
    import reasoning_gym

    seed = rng.randrange(2**31)
    entry = reasoning_gym.create_dataset(task, size=1, seed=seed, **GYM[task])[0]
    steps, answer = _GYM_TRACES[task](entry["metadata"], slip, rng)
    assert slip or answer == entry["answer"], (entry, steps)
    return Item(
        task=task,
        prompt=entry["question"].strip(),
        steps=tuple(steps),
        answer=answer,
        columns={"metadata": entry["metadata"], "source_dataset": task},
    )


def _chain_trace(metadata: Mapping[str, Any], slip: bool, rng: random.Random):
    """Partial sums from the left."""
    words = metadata["expression"].split()
    total, steps = int(words[0]), []
    pairs = list(zip(words[1::2], words[2::2], strict=True))
    wrong = rng.randrange(len(pairs)) if slip else -1
    for i, (sign, term) in enumerate(pairs):
        before = total
        total += int(term) if sign == "+" else -int(term)
        total += rng.choice((-10, -1, 1, 10)) if i == wrong else 0
        steps.append(f"{before}{sign}{term}={total}")
    return steps, str(total)


def _legs_trace(metadata: Mapping[str, Any], slip: bool, rng: random.Random):
    """Legs of each kind of animal, then their sum."""
    legs = _legs_of()
    products = [(count, legs[name]) for name, count in metadata["animals"].items()]
    wrong = rng.randrange(len(products)) if slip else -1
    parts = [
        count * each + (rng.choice((-2, 2)) if i == wrong else 0)
        for i, (count, each) in enumerate(products)
    ]
    steps = [f"{count}*{each}={part}" for (count, each), part in zip(products, parts, strict=True)]
    if len(parts) > 1:
        steps.append(f"{'+'.join(map(str, parts))}={sum(parts)}")
    return steps, str(sum(parts))


def _legs_of() -> Mapping[str, int]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return ANIMALS


_GYM_TRACES: dict[str, Callable[..., tuple[list[str], str]]] = {
    CHAIN: _chain_trace,
    LEGS: _legs_trace,
}


# All of them

SHARES: dict[str, float] = {
    "add": 3,
    "subtract": 3,
    "multiply": 3,
    "sort": 1.5,
    "compare": 1,
    CHAIN: 1.5,
    LEGS: 1,
}
"""How often a task is drawn in the cold start, relatively."""

_MAKERS: dict[str, Callable[..., Item]] = {
    "add": add,
    "subtract": subtract,
    "multiply": multiply,
    "sort": sort,
    "compare": compare,
}


def make(task: str, rng: random.Random, slip: bool = False) -> Item:
    """A random item of a task."""
    return _MAKERS[task](rng, slip) if task in _MAKERS else gym_item(task, rng, slip)
