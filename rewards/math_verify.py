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
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import IO, Any

from pydantic import Field
from torch import Tensor

from mmrl.resolve import optional
from rewards._answers import AnswerConfig, scores, target_text

PAPER = ""

RUNNER = Path(__file__).with_name("_math_runner.py")

START_SECONDS = 60.0
"""For loading the package."""

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
    judge = Judge()

    def score(answer: str, target: Any) -> float:
        question = {
            "right": as_latex(target_text(target)),
            "found": answer if config.where == "text" else as_latex(answer),
            "digits": config.digits,
            "limit_s": config.limit_s,
        }
        return judge.ask(question, config.limit_s)

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        return scores(config, outputs, columns, score)

    return reward


def as_latex(text: str) -> str:
    """``text`` in one line between dollar signs, unless it says where its mathematics is."""
    return text if any(mark in text for mark in _DELIMITERS) else f"${' '.join(text.split())}$"


class Judge:
    """The process that compares; started by the first question, ended with this object."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._answers: SimpleQueue[str] = SimpleQueue()
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], Any] = lambda: None

    def ask(self, question: dict[str, Any], limit_s: float) -> float:
        """1 or 0; 0 as well if there is no answer in time; NaN if the target cannot be parsed.

        ``RuntimeError`` if the process does not start.
        """
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                answer = self._answers.get(timeout=limit_s)
            except (Empty, OSError):
                answer = ""
            if not answer:
                self._stop()
        return math.nan if answer == "null" else float(answer or 0)

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(RUNNER)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answers = SimpleQueue()
        assert process.stdout is not None
        Thread(target=_listen, args=(process.stdout, self._answers), daemon=True).start()
        self._process, self._end = process, weakref.finalize(self, _ended, process)
        try:
            started = self._answers.get(timeout=START_SECONDS) == "ready"
        except Empty:
            started = False
        if not started:
            self._stop()
            raise RuntimeError(f"{' '.join(command)} does not start")
        return process

    def _stop(self) -> None:
        self._process = None
        self._end()


def _listen(stream: IO[str], answers: SimpleQueue[str]) -> None:
    """Lines into the queue, an empty one at their end."""
    with stream:
        for line in stream:
            answers.put(line.strip())
    answers.put("")


def _ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        try:
            process.stdin.close()
        except OSError:  # a question that it never read
            pass
